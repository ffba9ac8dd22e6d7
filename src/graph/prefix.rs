//! What lies below the lowest adapted layer: the same for a sample in every pass, and therefore
//! computed once.
//!
//! The template is a list in which sources come before readers. Cut before its first adapter, some
//! entries below are still read above: the residual stream, in most models. Where the list is cut is
//! free as long as no adapter is below, and chosen so that as little as possible is read across.

use super::template::{Entry, Step, Template};
use crate::ggml::sys;

/// The lower part of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prefix {
    /// Entries before this one are below.
    pub end: usize,
    /// Those of them, no leaves, that are read above: each f32 `[n, T]`.
    pub crossing: Vec<usize>,
}

impl Prefix {
    /// The lower part of `template`; none if no product with a weight is below the first adapter, or
    /// if something is read across that is not a column for each token.
    pub fn of(template: &Template) -> Option<Self> {
        let entries = &template.entries;
        let first = entries
            .iter()
            .position(|e| matches!(e.step, Step::Adapter { .. }))?;
        let mut last_reader = vec![0; entries.len()];
        for (i, e) in entries.iter().enumerate() {
            e.step.sources().iter().for_each(|&s| last_reader[s] = i);
        }
        let is_product = |e: &Entry| {
            e.step
                .op()
                .is_some_and(|(op, _)| op == sys::GGML_OP_MUL_MAT)
        };
        let product = entries.iter().position(is_product)?;
        let cut = |end: usize| {
            let read =
                |&i: &usize| last_reader[i] >= end && !matches!(entries[i].step, Step::Leaf(_));
            let crossing: Vec<usize> = (0..end).filter(read).collect();
            let columns = crossing.iter().all(|&i| is_columns(&entries[i]));
            columns.then_some(Self { end, crossing })
        };
        let width = |p: &Self| -> i64 { p.crossing.iter().map(|&i| entries[i].ne[0].base).sum() };
        // The last of the narrowest: as much as possible is below.
        (product + 1..=first)
            .rev()
            .filter_map(cut)
            .min_by_key(width)
    }

    /// Rows of each column that is read across, in order.
    pub fn widths(&self, template: &Template) -> Vec<usize> {
        let width = |&i: &usize| template.entries[i].ne[0].base as usize;
        self.crossing.iter().map(width).collect()
    }
}

/// Whether an entry is a column of f32 for each token, made by an op that is no view.
fn is_columns(e: &Entry) -> bool {
    let Some((op, _)) = e.step.op() else {
        return false;
    };
    let view = matches!(
        op,
        sys::GGML_OP_VIEW | sys::GGML_OP_RESHAPE | sys::GGML_OP_PERMUTE | sys::GGML_OP_TRANSPOSE
    );
    let constant = |d: usize, n: i64| e.ne[d].at(0, 0) == n && e.ne[d].at(1, 1) == n;
    let of_tokens = e.ne[1].at(1, 0) == 1 && e.ne[1].at(0, 0) == 0 && e.ne[1].at(0, 1) == 0;
    !view
        && e.ty == sys::GGML_TYPE_F32
        && e.ne[0].at(0, 0) == e.ne[0].at(1, 1)
        && of_tokens
        && constant(2, 1)
        && constant(3, 1)
}
