//! Two models on the same texts: KL and answer probabilities.
//!
//! Per row, KL(p ‖ q) = Σ p·(log p − log q), in nats. Rows are those whose next token is an
//! answer's (all of running text). Two small models are open together and decoded in step, with
//! one batch's logits of each in memory. Two large ones are opened in turn, each for as many
//! samples as the first one's logits find room for.

use super::gate::GateError;
use crate::adapter::Loaded;
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, Model, Token};
use crate::graph::batch::pack;
use crate::likelihood::nll;
use crate::likelihood::{SampleLoss, mean_prob};
use crate::score::{N_BATCH, small_scoring_context};
use rayon::prelude::*;
use serde::Serialize;

/// Samples decoded side by side.
pub(super) const TOGETHER: usize = 4;

/// Bytes of logits of one decode.
const DECODE_BYTES: usize = 64 << 20;
/// Bytes of the first model's logits that are kept while the second has its turn.
const KEPT_BYTES: usize = 512 << 20;

/// Opens a model with what is applied to it.
pub type Side<'a> = &'a dyn Fn() -> Result<(Model, Loaded), Error>;

/// One set under both models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Samples.
    pub samples: usize,
    /// Rows compared.
    pub tokens: usize,
    /// Mean KL(unmerged ‖ merged) a token, nats.
    pub kl: f64,
    /// Mean answer probability^(1/tokens), model and patch.
    pub prob_unmerged: f64,
    /// The same of the merged file.
    pub prob_merged: f64,
}

/// Two models that are compared set by set.
pub struct Comparison<'a> {
    p: Turn<'a>,
    q: Turn<'a>,
    apart: bool,
}

impl<'a> Comparison<'a> {
    /// Of `p` with `q`; `apart`: one at a time is open.
    pub fn new(p: Side<'a>, q: Side<'a>, apart: bool, n_threads: usize) -> Self {
        Self {
            p: Turn::new(p, n_threads),
            q: Turn::new(q, n_threads),
            apart,
        }
    }

    /// KL and answer probabilities of `samples`; `progress` gets samples that are done.
    ///
    /// # Errors
    /// Models of different vocabularies, no answer tokens, llama.cpp's failures.
    pub fn of(
        &mut self,
        samples: &[Sample],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Compared, Error> {
        let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
        let n_vocab = self.p.model()?.n_vocab();
        let rows_in = |bytes: usize| (bytes / (4 * n_vocab.max(1))).max(1);
        let (decode, kept) = (rows_in(DECODE_BYTES), rows_in(KEPT_BYTES));
        let mut sums = Sums {
            n_vocab,
            kl: 0.0,
            losses: [(); 2].map(|()| vec![SampleLoss::default(); samples.len()]),
        };
        let mut portions: Vec<Portion> = Vec::new();
        for group in groups(samples, kept) {
            let n_rows = rows(samples, &group);
            let pieces = pieces(samples, &group, decode);
            let joins = |p: &Portion| self.apart && p.n_rows + n_rows <= kept;
            match portions.last_mut().filter(|p| joins(p)) {
                Some(portion) => portion.add(pieces, n_rows, group.len()),
                None => {
                    let mut portion = Portion::default();
                    portion.add(pieces, n_rows, group.len());
                    portions.push(portion);
                }
            }
        }
        for portion in &portions {
            if self.apart {
                let mut of_p = Vec::with_capacity(portion.n_rows * n_vocab);
                for piece in &portion.pieces {
                    self.p.decode(piece, longest, n_vocab, &mut of_p)?;
                }
                self.p.close();
                let mut at = 0;
                for piece in &portion.pieces {
                    let mut of_q = Vec::new();
                    self.q.decode(piece, longest, n_vocab, &mut of_q)?;
                    sums.add(piece, &of_p[at..at + of_q.len()], &of_q);
                    at += of_q.len();
                }
                self.q.close();
            } else {
                for piece in &portion.pieces {
                    let (mut of_p, mut of_q) = (Vec::new(), Vec::new());
                    self.p.decode(piece, longest, n_vocab, &mut of_p)?;
                    self.q.decode(piece, longest, n_vocab, &mut of_q)?;
                    sums.add(piece, &of_p, &of_q);
                }
            }
            progress(portion.n_samples);
        }
        // The next set may hold longer samples.
        self.p.context = None;
        self.q.context = None;
        let tokens: usize = sums.losses[0].iter().map(|l| l.n_tokens).sum();
        if tokens == 0 {
            return Err(GateError::NoSamples.into());
        }
        Ok(Compared {
            samples: samples.len(),
            tokens,
            kl: sums.kl / tokens as f64,
            prob_unmerged: mean_prob(&sums.losses[0]),
            prob_merged: mean_prob(&sums.losses[1]),
        })
    }
}

/// Show `seen` the logits `[n_vocab]` of every answer row of `samples`: the sample's number and the
/// row, a sample's rows in order. `progress` gets samples that are done.
///
/// # Errors
/// llama.cpp's failures.
pub fn answer_rows(
    side: Side<'_>,
    samples: &[Sample],
    n_threads: usize,
    seen: &mut dyn FnMut(usize, &[f32]),
    progress: &mut dyn FnMut(usize),
) -> Result<(), Error> {
    let mut turn = Turn::new(side, n_threads);
    let longest = samples.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let n_vocab = turn.model()?.n_vocab();
    let most = (DECODE_BYTES / (4 * n_vocab.max(1))).max(1);
    for group in groups(samples, most) {
        for piece in pieces(samples, &group, most) {
            let mut rows = Vec::new();
            turn.decode(&piece, longest, n_vocab, &mut rows)?;
            let wanted = piece.positions.iter().filter(|p| p.next.is_some());
            for (row, at) in rows.chunks_exact(n_vocab).zip(wanted) {
                seen(at.sample, row);
            }
        }
        progress(group.len());
    }
    Ok(())
}

/// A model that is open while it has its turn.
struct Turn<'a> {
    open: Side<'a>,
    n_threads: usize,
    opened: Option<(Model, Loaded)>,
    context: Option<Context>,
}

impl<'a> Turn<'a> {
    fn new(open: Side<'a>, n_threads: usize) -> Self {
        Self {
            open,
            n_threads,
            opened: None,
            context: None,
        }
    }

    fn model(&mut self) -> Result<&Model, Error> {
        if self.opened.is_none() {
            self.opened = Some((self.open)()?);
        }
        Ok(&self.opened.as_ref().expect("opened above").0)
    }

    fn close(&mut self) {
        self.context = None;
        self.opened = None;
    }

    /// Append the logits `[n_vocab]` of every wanted row of `piece` to `rows`.
    fn decode(
        &mut self,
        piece: &Piece,
        longest: usize,
        n_vocab: usize,
        rows: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let found = self.model()?.n_vocab();
        if found != n_vocab {
            return Err(GateError::Vocabulary {
                wanted: n_vocab,
                found,
            }
            .into());
        }
        let (model, adapters) = self.opened.as_ref().expect("model() opens it");
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(small_scoring_context(
                model,
                adapters,
                longest,
                self.n_threads,
                TOGETHER,
            )?),
        };
        if piece.first {
            context.clear();
        }
        let mut batch = Batch::default();
        for p in &piece.positions {
            batch.push(p.token, p.pos as i32, p.seq as i32, p.next.is_some());
        }
        context.decode(&mut batch)?;
        for at in 0..piece.positions.len() {
            if let Some(row) = context.logits(at) {
                rows.extend_from_slice(row);
            }
        }
        Ok(())
    }
}

/// Decodes between which no model need be closed.
#[derive(Default)]
struct Portion {
    pieces: Vec<Piece>,
    n_rows: usize,
    n_samples: usize,
}

impl Portion {
    fn add(&mut self, pieces: Vec<Piece>, n_rows: usize, n_samples: usize) {
        self.pieces.extend(pieces);
        self.n_rows += n_rows;
        self.n_samples += n_samples;
    }
}

/// One decode; `first`: nothing before it belongs to the same samples.
struct Piece {
    first: bool,
    positions: Vec<Position>,
}

/// A token of a batch; `next`: the answer token that follows, whose row is compared.
#[derive(Clone, Copy)]
struct Position {
    token: Token,
    pos: usize,
    seq: usize,
    sample: usize,
    next: Option<Token>,
}

fn wanted(sample: &Sample, pos: usize) -> bool {
    sample.answers.iter().any(|a| a.contains(&(pos + 1)))
}

fn rows(samples: &[Sample], group: &[usize]) -> usize {
    let of = |s: &Sample| (0..s.tokens.len() - 1).filter(|&p| wanted(s, p)).count();
    group.iter().map(|&i| of(&samples[i])).sum()
}

/// Samples to decode side by side, with at most `max_rows` rows where a sample alone has no more.
fn groups(samples: &[Sample], max_rows: usize) -> Vec<Vec<usize>> {
    let lengths: Vec<usize> = samples.iter().map(|s| s.tokens.len() - 1).collect();
    let longest = lengths.iter().copied().max().unwrap_or(1);
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for bin in pack(&lengths, longest.max(N_BATCH)) {
        let mut group: Vec<usize> = Vec::new();
        for i in bin {
            let full = group.len() == TOGETHER
                || (!group.is_empty() && rows(samples, &group) + rows(samples, &[i]) > max_rows);
            if full {
                groups.push(std::mem::take(&mut group));
            }
            group.push(i);
        }
        groups.push(group);
    }
    groups
}

/// The tokens of a group in pieces with at most `max_rows` rows each. The cache carries a sample
/// over the border, so one long sample needs no more logits than many short ones.
fn pieces(samples: &[Sample], group: &[usize], max_rows: usize) -> Vec<Piece> {
    let mut pieces = vec![Vec::new()];
    let mut rows = 0;
    for (seq, &s) in group.iter().enumerate() {
        let sample = &samples[s];
        for (pos, pair) in sample.tokens.windows(2).enumerate() {
            let wanted = wanted(sample, pos);
            if wanted && rows == max_rows {
                pieces.push(Vec::new());
                rows = 0;
            }
            rows += usize::from(wanted);
            let piece = pieces.last_mut().expect("starts with one");
            piece.push(Position {
                token: pair[0],
                pos,
                seq,
                sample: s,
                next: wanted.then_some(pair[1]),
            });
        }
    }
    pieces.retain(|p: &Vec<Position>| !p.is_empty());
    let piece = |(i, positions)| Piece {
        first: i == 0,
        positions,
    };
    pieces.into_iter().enumerate().map(piece).collect()
}

struct Sums {
    n_vocab: usize,
    kl: f64,
    losses: [Vec<SampleLoss>; 2],
}

impl Sums {
    /// Rows of both models, in the order of the piece's wanted positions.
    fn add(&mut self, piece: &Piece, of_p: &[f32], of_q: &[f32]) {
        let targets: Vec<(Token, usize)> = piece
            .positions
            .iter()
            .filter_map(|p| Some((p.next?, p.sample)))
            .collect();
        let found: Vec<(f64, [f64; 2])> = of_p
            .par_chunks(self.n_vocab)
            .zip(of_q.par_chunks(self.n_vocab))
            .zip(&targets)
            .map(|((p, q), &(token, _))| (kl(p, q), [nll(p, token), nll(q, token)]))
            .collect();
        for (&(_, sample), (kl, nlls)) in targets.iter().zip(found) {
            self.kl += kl;
            for (losses, nll) in self.losses.iter_mut().zip(nlls) {
                losses[sample].nll += nll;
                losses[sample].loss += nll;
                losses[sample].n_tokens += 1;
            }
        }
    }
}

/// KL(softmax p ‖ softmax q) of two rows of logits, in nats; exactly 0 for equal rows.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let top = |row: &[f32]| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (p_top, q_top) = (top(p), top(q));
    let (mut p_sum, mut q_sum, mut mean) = (0f64, 0f64, 0f64);
    for (&p, &q) in p.iter().zip(q) {
        let (p, q) = (f64::from(p - p_top), f64::from(q - q_top));
        let e = p.exp();
        p_sum += e;
        q_sum += q.exp();
        // A token that p rules out adds nothing, whatever q says: not 0·∞.
        if e > 0.0 {
            mean += e * (p - q);
        }
    }
    mean / p_sum - p_sum.ln() + q_sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_is_that_of_the_definition() {
        let softmax = |row: &[f32]| {
            let e: Vec<f64> = row.iter().map(|&v| f64::from(v).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|v| v / sum).collect::<Vec<f64>>()
        };
        let (p, q) = ([0.5f32, -1.0, 3.0, 0.0], [1.5f32, -2.0, 0.25, 7.0]);
        let wanted: f64 = softmax(&p)
            .iter()
            .zip(softmax(&q))
            .map(|(p, q)| p * (p / q).ln())
            .sum();
        assert!((kl(&p, &q) - wanted).abs() < 1e-12);
        assert_eq!(kl(&p, &p), 0.0);
        // A shift of all logits is no difference, a masked token no infinity.
        let shifted = p.map(|v| v + 100.0);
        assert!(kl(&p, &shifted).abs() < 1e-6);
        assert!(kl(&[0.0, f32::NEG_INFINITY], &[0.0, -1.0]).is_finite());
    }

    #[test]
    fn pieces_bound_rows_and_keep_every_token_in_order() {
        let sample = |n: usize, answer: usize| Sample {
            tokens: (0..n as i32).collect(),
            answers: std::iter::once(answer..n).collect(),
            truncated: false,
        };
        let samples = [sample(9, 3), sample(5, 1)];
        let pieces = pieces(&samples, &[0, 1], 4);
        let rows = |p: &Piece| p.positions.iter().filter(|p| p.next.is_some()).count();
        assert_eq!(pieces.iter().map(rows).collect::<Vec<_>>(), [4, 4, 2]);
        let positions = || pieces.iter().flat_map(|p| &p.positions);
        let all: Vec<(usize, Token)> = positions().map(|p| (p.seq, p.token)).collect();
        let wanted = (0..8).map(|t| (0, t)).chain((0..4).map(|t| (1, t)));
        assert_eq!(all, wanted.collect::<Vec<_>>());
        for p in positions() {
            assert!(p.next.is_none_or(|t| t == p.token + 1));
        }
    }
}
