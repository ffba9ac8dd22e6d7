//! Which weights get copies beside the mapped file, where there is not memory for all.
//!
//! Every copy is BF16: two bytes a weight. A plain copy of a type that ggml multiplies slowly spares
//! the way forward one slow product a step; a transposed copy spares the way back the decoding of
//! the weight (about 1 ns each on one thread). So the plain ones come first, and among the
//! transposed ones none is worth more for its bytes than another: they are taken as the way back
//! meets them.

use super::GraphError;
use super::rules::carries;
use super::template::{Leaf, Step, Template};
use super::weights::{Weights, is_slow};
use crate::ggml::sys;
use std::collections::HashSet;

/// One copy that would spare time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Tensor.
    pub name: String,
    /// For the way back, instead of the way forward.
    pub transposed: bool,
    /// Its size.
    pub bytes: u64,
}

/// Copies to keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copies {
    transposed: HashSet<String>,
    plain: HashSet<String>,
    /// Their size in all.
    pub bytes: u64,
}

/// The copies that training adapters on `template` can use, most wanted first.
///
/// # Errors
/// A template of another model.
pub fn wanted(template: &Template, weights: &Weights) -> Result<Vec<Wanted>, GraphError> {
    let on_the_way = template.on_the_way(carries);
    let (mut plain, mut transposed) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for e in template.entries[..=template.hidden].iter().rev() {
        let Step::Op { op, src, .. } = &e.step else {
            continue;
        };
        if !matches!(*op, sys::GGML_OP_MUL_MAT | sys::GGML_OP_MUL_MAT_ID) {
            continue;
        }
        let Step::Leaf(Leaf::Weight(name)) = &template.entries[src[0]].step else {
            continue;
        };
        if !seen.insert(name) {
            continue;
        }
        let info = weights.info(name)?;
        let copy = |transposed| Wanted {
            name: name.clone(),
            transposed,
            bytes: 2 * info.n_elements(),
        };
        if is_slow(info.ty) && template.adaptable.iter().any(|t| t.name == *name) {
            plain.push(copy(false));
        }
        // The first layer's input needs no gradient.
        if on_the_way[src[1]] {
            transposed.push(copy(true));
        }
    }
    plain.extend(transposed);
    Ok(plain)
}

impl Copies {
    /// The first of `wanted` that fit into `room` bytes together. None after the first that does
    /// not: with more room there is then never a copy less.
    pub fn within(wanted: &[Wanted], room: u64) -> Self {
        let mut copies = Self::default();
        for w in wanted {
            if copies.bytes + w.bytes > room {
                break;
            }
            copies.bytes += w.bytes;
            let set = match w.transposed {
                true => &mut copies.transposed,
                false => &mut copies.plain,
            };
            set.insert(w.name.clone());
        }
        copies
    }

    /// Whether a copy of `name` is kept.
    pub fn has(&self, name: &str, transposed: bool) -> bool {
        match transposed {
            true => self.transposed.contains(name),
            false => self.plain.contains(name),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.transposed.len() + self.plain.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_room_is_never_fewer_copies() {
        let wanted: Vec<Wanted> = [40, 7, 90, 1, 25]
            .iter()
            .enumerate()
            .map(|(i, &bytes)| Wanted {
                name: i.to_string(),
                transposed: i > 1,
                bytes,
            })
            .collect();
        let mut before = Copies::default();
        for room in 0..200 {
            let copies = Copies::within(&wanted, room);
            assert!(copies.bytes <= room);
            assert!(before.transposed.is_subset(&copies.transposed));
            assert!(before.plain.is_subset(&copies.plain));
            before = copies;
        }
        assert_eq!((before.len(), before.bytes), (5, 163));
        assert!(before.has("0", false) && !before.has("0", true) && before.has("4", true));
    }
}
