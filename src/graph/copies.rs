//! Which stacks of experts get transposed copies beside the mapped file, where there is not memory
//! for all. Other weights are decoded as they are multiplied.
//!
//! Every copy is BF16: two bytes a weight. It spares the way back the decoding of the weight (about
//! 1 ns each on one thread). None is worth more for its bytes than another: they are taken as the
//! way back meets them.

use super::GraphError;
use super::rules::carries;
use super::template::{Leaf, Step, Template};
use super::weights::Weights;
use crate::ggml::sys;
use crate::gguf::TensorInfo;
use std::collections::HashSet;

/// One copy that would spare time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Tensor.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// Copies to keep.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copies {
    names: HashSet<String>,
    /// Their size in all.
    pub bytes: u64,
}

/// The copies that training adapters on `template` can use, most wanted first.
///
/// # Errors
/// A template of another model.
pub fn wanted(template: &Template, weights: &Weights) -> Result<Vec<Wanted>, GraphError> {
    let on_the_way = template.on_the_way(carries);
    let mut wanted = Vec::new();
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
        // The first layer's input needs no gradient.
        if !is_decoded(info) && on_the_way[src[1]] {
            wanted.push(Wanted {
                name: name.clone(),
                bytes: 2 * info.n_elements(),
            });
        }
    }
    Ok(wanted)
}

/// Whether products decode a weight on the way: [`takes_decoded`](crate::ggml::Ctx::takes_decoded).
fn is_decoded(info: &TensorInfo) -> bool {
    info.ne[2] * info.ne[3] == 1 && info.ne[1].is_multiple_of(2)
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
            copies.names.insert(w.name.clone());
        }
        copies
    }

    /// Whether a copy of `name` is kept.
    pub fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
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
                bytes,
            })
            .collect();
        let mut before = Copies::default();
        for room in 0..200 {
            let copies = Copies::within(&wanted, room);
            assert!(copies.bytes <= room);
            assert!(before.names.is_subset(&copies.names));
            before = copies;
        }
        assert_eq!((before.len(), before.bytes), (5, 163));
        assert!(before.has("0") && before.has("4"));
    }
}
