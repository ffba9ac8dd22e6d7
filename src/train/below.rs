//! What samples come to below the lowest adapted layer, kept from pass to pass: training changes
//! nothing there.

use crate::ggml::Token;
use crate::graph::batch::Sequence;
use std::collections::HashMap;

/// Bytes that are kept, unless told otherwise.
const ROOM: u64 = 1 << 30;

/// Values by sample: for each tensor that is read across, `[n, tokens]` of the sample.
pub struct Below {
    /// Rows of each of those tensors.
    widths: Vec<usize>,
    known: HashMap<Vec<Token>, Vec<f32>>,
    bytes: u64,
    room: u64,
}

impl Below {
    /// Nothing yet, of columns of these widths.
    pub fn new(widths: Vec<usize>) -> Self {
        Self {
            widths,
            known: HashMap::new(),
            bytes: 0,
            room: ROOM,
        }
    }

    /// Keep no more than `room` bytes from now on.
    pub fn limit(&mut self, room: u64) {
        self.room = room;
    }

    /// Samples and bytes that are kept.
    pub fn held(&self) -> (usize, u64) {
        (self.known.len(), self.bytes)
    }

    /// The values of a batch of `n_tokens`, tensor after tensor, if all its samples are known; those of
    /// padding are 0, as nothing reads them.
    pub fn of(&self, sequences: &[Sequence<'_>], n_tokens: usize) -> Option<Vec<f32>> {
        let known: Vec<&Vec<f32>> = sequences
            .iter()
            .map(|s| self.known.get(s.tokens))
            .collect::<Option<_>>()?;
        let mut values = Vec::with_capacity(self.widths.iter().sum::<usize>() * n_tokens);
        let mut before = 0;
        for width in &self.widths {
            let end = values.len() + width * n_tokens;
            for (s, own) in sequences.iter().zip(&known) {
                let n = s.tokens.len();
                values.extend_from_slice(&own[before * n..(before + width) * n]);
            }
            values.resize(end, 0.0);
            before += width;
        }
        Some(values)
    }

    /// Keep what `values` holds of each sample of the batch, as far as there is room.
    pub fn keep(&mut self, sequences: &[Sequence<'_>], n_tokens: usize, values: &[f32]) {
        let mut first = 0;
        for s in sequences {
            let n = s.tokens.len();
            let size = 4 * (n * self.widths.iter().sum::<usize>() + n) as u64;
            if self.bytes + size <= self.room && !self.known.contains_key(s.tokens) {
                let mut own = Vec::new();
                let mut tensor = 0;
                for width in &self.widths {
                    let at = tensor + width * first;
                    own.extend_from_slice(&values[at..at + width * n]);
                    tensor += width * n_tokens;
                }
                self.known.insert(s.tokens.to_vec(), own);
                self.bytes += size;
            }
            first += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_come_back_in_any_company() {
        let sequence = |tokens: &'static [Token]| Sequence { tokens, rows: &[] };
        let (a, b) = (sequence(&[1, 2, 3]), sequence(&[4, 5]));
        let mut below = Below::new(vec![2, 1]);
        assert!(below.of(&[a], 4).is_none());
        // Columns of a, of b and of padding; then the second tensor's.
        let values = [
            10., 11., 20., 21., 30., 31., 40., 41., 50., 51., 0., 0., 1., 2., 3., 4., 5., 9.,
        ];
        below.keep(&[a, b], 6, &values);
        assert_eq!(below.held(), (2, 4 * (5 * 3 + 5)));
        let swapped = below.of(&[b, a], 5).expect("known");
        let wanted = [
            40., 41., 50., 51., 10., 11., 20., 21., 30., 31., 4., 5., 1., 2., 3.,
        ];
        assert_eq!(swapped, wanted);
        let padded = below.of(&[b], 3).expect("known");
        assert_eq!(padded, [40., 41., 50., 51., 0., 0., 4., 5., 0.]);
        below.limit(0);
        below.keep(&[sequence(&[7])], 1, &[1., 2., 3.]);
        assert!(below.of(&[sequence(&[7])], 1).is_none());
    }
}
