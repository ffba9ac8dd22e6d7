//! Several sequences packed into one batch of T tokens, kept apart by a block-causal mask.

use crate::ggml::Token;

/// One sequence of a batch: its tokens, and which of them need logits.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Token ids.
    pub tokens: &'a [Token],
    /// Indices into `tokens` whose next-token logits are wanted, ascending.
    pub rows: &'a [usize],
}

/// Sequences side by side, padded to the shape of a graph.
#[derive(Debug, Clone, Default)]
pub struct Packed {
    /// Token ids `[T]`.
    pub tokens: Vec<i32>,
    /// Positions within each sequence `[T]`.
    pub positions: Vec<i32>,
    /// Sequence numbers `[T]`; padding tokens have one of their own.
    pub sequence: Vec<u32>,
    /// Indices of the tokens whose logits are wanted `[R]`; padding repeats token 0.
    pub rows: Vec<i32>,
    /// How many of `rows` are real.
    pub n_rows: usize,
}

/// What an attention mask holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MaskKind {
    /// Tokens further back than this are hidden.
    pub window: Option<usize>,
    /// What is seen has minus its distance, for ALiBi, instead of 0.
    pub distance: bool,
}

/// Token counts are padded to this: attention sums then have llama.cpp's own lengths.
pub const TOKEN_PAD: usize = 32;
/// Row counts are padded to this.
pub const ROW_PAD: usize = 16;

impl Packed {
    /// Pack `sequences` and pad tokens and rows to their multiples.
    pub fn new(sequences: &[Sequence<'_>]) -> Self {
        let mut packed = Self::default();
        for (s, seq) in sequences.iter().enumerate() {
            let first = packed.tokens.len();
            packed.tokens.extend_from_slice(seq.tokens);
            packed.positions.extend(0..seq.tokens.len() as i32);
            packed
                .sequence
                .extend(std::iter::repeat_n(s as u32, seq.tokens.len()));
            packed
                .rows
                .extend(seq.rows.iter().map(|&r| (first + r) as i32));
        }
        packed.n_rows = packed.rows.len();
        let n = packed.tokens.len().max(1).next_multiple_of(TOKEN_PAD);
        let padding = n - packed.tokens.len();
        packed.tokens.resize(n, 0);
        packed.positions.extend(0..padding as i32);
        packed.sequence.resize(n, u32::MAX);
        let r = packed.n_rows.max(1).next_multiple_of(ROW_PAD);
        packed.rows.resize(r, 0);
        packed
    }

    /// T.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// R, padding included.
    pub fn n_padded_rows(&self) -> usize {
        self.rows.len()
    }

    /// The first token that each token sees `[T]`: it sees all from there up to itself.
    pub fn first_seen(&self, window: Option<usize>) -> Vec<f32> {
        let of = |q: usize| {
            let begin = q - self.positions[q] as usize;
            let near = window.map_or(0, |w| (q + 1).saturating_sub(w));
            begin.max(near) as f32
        };
        (0..self.n_tokens()).map(of).collect()
    }

    /// The additive mask `[T, T]`: row q lets token q see its own sequence up to itself.
    pub fn mask(&self, kind: MaskKind) -> Vec<f32> {
        let n = self.n_tokens();
        let mut mask = vec![f32::NEG_INFINITY; n * n];
        for q in 0..n {
            let row = &mut mask[q * n..(q + 1) * n];
            for (k, m) in row.iter_mut().enumerate() {
                let distance = self.positions[q] - self.positions[k];
                let near = kind.window.is_none_or(|w| (distance as usize) < w);
                if self.sequence[k] == self.sequence[q] && distance >= 0 && near {
                    *m = if kind.distance {
                        -(distance as f32)
                    } else {
                        0.0
                    };
                }
            }
        }
        mask
    }
}

/// Distribute sequences over batches of at most `max_tokens` each (first fit, longest
/// first), as indices into `lengths`. A longer sequence gets a batch of its own.
pub fn pack(lengths: &[usize], max_tokens: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lengths[i]), i));
    let mut bins: Vec<(usize, Vec<usize>)> = Vec::new();
    for i in order {
        match bins
            .iter_mut()
            .find(|(used, _)| used + lengths[i] <= max_tokens)
        {
            Some((used, bin)) => {
                *used += lengths[i];
                bin.push(i);
            }
            None => bins.push((lengths[i], vec![i])),
        }
    }
    bins.into_iter()
        .map(|(_, mut bin)| {
            bin.sort_unstable();
            bin
        })
        .collect()
}
