//! The part of a template that a graph is built of.

use super::prefix::Prefix;
use super::template::Template;

/// A part of a graph.
#[derive(Debug, Clone, Copy, Default)]
pub enum Part<'a> {
    /// All of it.
    #[default]
    Whole,
    /// What is below the adapters: its output is what is read across, one tensor after another.
    Below(&'a Prefix),
    /// What is above, given what is read across ([`Tape::set_below`](super::tape::Tape::set_below)).
    Above(&'a Prefix),
}

impl Part<'_> {
    /// Which entries of the template it computes or reads, for `last`.
    pub(super) fn needs(self, template: &Template, last: usize) -> Vec<bool> {
        let (roots, given) = match self {
            Self::Whole => (vec![last], &[][..]),
            Self::Below(p) => (p.crossing.clone(), &[][..]),
            Self::Above(p) => (vec![last], p.crossing.as_slice()),
        };
        let mut needed = vec![false; template.entries.len()];
        roots.iter().for_each(|&i| needed[i] = true);
        for i in (0..needed.len()).rev() {
            if needed[i] && !given.contains(&i) {
                let sources = template.entries[i].step.sources();
                sources.iter().for_each(|&s| needed[s] = true);
            }
        }
        needed
    }

    /// Whether entry `i` is computed elsewhere and given.
    pub(super) fn given(self, i: usize) -> bool {
        matches!(self, Self::Above(p) if p.crossing.contains(&i))
    }
}
