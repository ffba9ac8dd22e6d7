//! Answer losses of samples that begin alike: what is common is computed once.
//!
//! The samples of a batch form a tree (a trie of token ids): the chat template's opening, then each
//! question, then its answers. Each node is one token of one decode, held by every sequence that
//! passes through it, so attention sees the same tokens as if each sample stood alone.

use super::losses::{LOGIT_BYTES, answer_losses, row_nll};
use crate::data::Sample;
use crate::error::Error;
use crate::ggml::{Batch, Context, Token};
use crate::likelihood::SampleLoss;

/// Bounds of one decode.
#[derive(Debug, Clone, Copy)]
struct Limits {
    tokens: usize,
    rows: usize,
    seqs: usize,
}

struct Node {
    token: Token,
    pos: i32,
    /// The sequences, that is samples, that pass through, ascending.
    seqs: Vec<i32>,
    /// Answer tokens that follow, with their sequence.
    targets: Vec<(i32, Token)>,
    children: Vec<usize>,
}

/// Samples as a tree; parents stand before their children.
#[derive(Default)]
struct Trie {
    nodes: Vec<Node>,
    roots: Vec<usize>,
    n_seq: usize,
    n_rows: usize,
}

impl Trie {
    fn of<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Self {
        let mut trie = Self::default();
        for sample in samples {
            trie.add(sample);
        }
        trie
    }

    fn add(&mut self, sample: &Sample) {
        let seq = self.n_seq as i32;
        self.n_seq += 1;
        let mut parent: Option<usize> = None;
        // The last token is only ever predicted.
        for (pos, pair) in sample.tokens.windows(2).enumerate() {
            let siblings = match parent {
                Some(p) => &self.nodes[p].children,
                None => &self.roots,
            };
            let found = siblings.iter().find(|&&i| self.nodes[i].token == pair[0]);
            let at = found.copied().unwrap_or_else(|| {
                let at = self.nodes.len();
                self.nodes.push(Node {
                    token: pair[0],
                    pos: pos as i32,
                    seqs: Vec::new(),
                    targets: Vec::new(),
                    children: Vec::new(),
                });
                match parent {
                    Some(p) => self.nodes[p].children.push(at),
                    None => self.roots.push(at),
                }
                at
            });
            let node = &mut self.nodes[at];
            node.seqs.push(seq);
            if sample.answers.iter().any(|a| a.contains(&(pos + 1))) {
                self.n_rows += usize::from(node.targets.is_empty());
                node.targets.push((seq, pair[1]));
            }
            parent = Some(at);
        }
    }

    fn fits(&self, limits: Limits) -> bool {
        self.nodes.len() <= limits.tokens && self.n_rows <= limits.rows && self.n_seq <= limits.seqs
    }

    /// Losses of its samples, in their order.
    fn losses(&self, context: &mut Context) -> Result<Vec<SampleLoss>, Error> {
        let mut batch = Batch::default();
        for node in &self.nodes {
            batch.push_shared(node.token, node.pos, &node.seqs, !node.targets.is_empty());
        }
        context.clear();
        context.decode(&mut batch)?;
        let rows: Vec<(usize, Token)> = self
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(at, node)| node.targets.iter().map(move |&(_, token)| (at, token)))
            .collect();
        let seqs = self.nodes.iter().flat_map(|node| &node.targets);
        let mut losses = vec![SampleLoss::default(); self.n_seq];
        for (nll, &(seq, _)) in row_nll(context, &rows).into_iter().zip(seqs) {
            let loss = &mut losses[seq as usize];
            loss.nll += nll;
            loss.loss += nll;
            loss.n_tokens += 1;
        }
        Ok(losses)
    }
}

/// [`answer_losses`] of groups of samples that share a prompt, in the same order. `progress` is
/// told how many groups are done.
///
/// Groups are decoded together as far as a batch has room; a group too large for one batch is
/// split. Results equal [`answer_losses`]' up to the order of floating-point sums.
///
/// # Errors
/// llama.cpp's failures, and whatever `progress` stops with.
pub fn shared_losses(
    context: &mut Context,
    groups: &[Vec<Sample>],
    progress: &mut dyn FnMut(usize) -> Result<(), Error>,
) -> Result<Vec<Vec<SampleLoss>>, Error> {
    if context.model().is_recurrent() {
        // A recurrent state cannot be held by several sequences of one decode.
        return groups
            .iter()
            .enumerate()
            .map(|(i, group)| {
                progress(i)?;
                answer_losses(context, group, &mut |_| {})
            })
            .collect();
    }
    let limits = Limits {
        tokens: context.n_batch(),
        rows: (LOGIT_BYTES / (4 * context.model().n_vocab())).max(1),
        seqs: context.n_seq_max(),
    };
    let mut losses: Vec<Vec<SampleLoss>> = Vec::with_capacity(groups.len());
    while losses.len() < groups.len() {
        progress(losses.len())?;
        let first = losses.len();
        let (n_groups, trie) = fill(&groups[first..], limits);
        if n_groups == 0 {
            losses.push(split_group(context, &groups[first], limits)?);
            continue;
        }
        let mut found = trie.losses(context)?.into_iter();
        for group in &groups[first..first + n_groups] {
            losses.push(found.by_ref().take(group.len()).collect());
        }
    }
    progress(losses.len())?;
    Ok(losses)
}

/// As many of `groups` as one decode holds: 0 when not even the first fits.
fn fill(groups: &[Vec<Sample>], limits: Limits) -> (usize, Trie) {
    let mut best = (0, Trie::default());
    for n in 1..=groups.len() {
        let trie = Trie::of(groups[..n].iter().flatten());
        if !trie.fits(limits) {
            break;
        }
        best = (n, trie);
    }
    best
}

/// A group larger than a decode, as few decodes as its samples' order allows; a single sample that
/// is too large is decoded all the same.
fn split_group(
    context: &mut Context,
    group: &[Sample],
    limits: Limits,
) -> Result<Vec<SampleLoss>, Error> {
    let mut losses = Vec::with_capacity(group.len());
    while losses.len() < group.len() {
        let rest = &group[losses.len()..];
        let n = (2..=rest.len())
            .take_while(|&n| Trie::of(&rest[..n]).fits(limits))
            .last()
            .unwrap_or(1);
        losses.extend(Trie::of(&rest[..n]).losses(context)?);
    }
    Ok(losses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(tokens: &[Token], answer: usize) -> Sample {
        Sample {
            tokens: tokens.to_vec(),
            answers: std::iter::once(answer..tokens.len()).collect(),
            truncated: false,
        }
    }

    #[test]
    fn common_beginnings_are_held_once() {
        let trie = Trie::of(&[
            sample(&[1, 2, 3, 4, 9], 3),
            sample(&[1, 2, 3, 4, 5, 9], 3),
            sample(&[1, 2, 7, 8], 2),
        ]);
        let tokens: Vec<_> = trie.nodes.iter().map(|n| (n.token, n.pos)).collect();
        assert_eq!(tokens, [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (7, 2)]);
        assert_eq!(trie.nodes[1].seqs, [0, 1, 2]);
        assert_eq!(trie.nodes[3].targets, [(0, 9), (1, 5)]);
        // The logits after 2 serve the third sample, those after 3 and 4 two samples.
        assert_eq!((trie.n_rows, trie.n_seq), (5, 3));
    }

    #[test]
    fn batches_are_filled_by_whole_groups() {
        let groups: Vec<_> = (0..5)
            .map(|g| vec![sample(&[1, 10 + g, 2, 3], 2), sample(&[1, 10 + g, 4, 5], 2)])
            .collect();
        let limits = |tokens, rows, seqs| Limits { tokens, rows, seqs };
        // One shared opening, then three tokens and three rows a group.
        let n = |limits| fill(&groups, limits).0;
        assert_eq!(n(limits(1 + 3 * 3, 99, 99)), 3);
        assert_eq!(n(limits(99, 6, 99)), 2);
        assert_eq!(n(limits(99, 99, 9)), 4);
        assert_eq!(n(limits(3, 99, 99)), 0);
    }
}
