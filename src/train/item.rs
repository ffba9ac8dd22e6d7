//! What a step computes: samples, and what each is trained towards.

use super::answer_loss::AnswerLoss;
use super::loss::RowObjective;
use super::soft::Soft;
use crate::data::Sample;

/// What a sample is trained towards.
#[derive(Debug, Clone, Copy)]
pub enum Aim<'a> {
    /// Each answer row by itself.
    Rows(RowObjective),
    /// Each answer row towards another model's distribution, in order.
    Taught(&'a [Soft]),
    /// The answer as a whole, against another answer to the same question where there is one.
    Answer {
        /// The loss.
        loss: AnswerLoss,
        /// The preferred answer.
        preferred: Option<&'a Sample>,
    },
}

/// A sample to compute, what it is trained towards, and the weight of that.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    /// The sample.
    pub sample: &'a Sample,
    /// Its loss.
    pub aim: Aim<'a>,
    /// Factor of the gradients of each row, or of the answer.
    pub weight: f32,
}

impl<'a> Item<'a> {
    /// Cross-entropy on the answer rows.
    pub fn remembered(sample: &'a Sample, weight: f32) -> Self {
        Self {
            sample,
            aim: Aim::Rows(RowObjective::CrossEntropy),
            weight,
        }
    }

    /// Tokens computed for it.
    pub fn n_tokens(&self) -> usize {
        self.samples().map(|s| s.tokens.len()).sum()
    }

    pub(super) fn preferred(&self) -> Option<&'a Sample> {
        match self.aim {
            Aim::Answer { preferred, .. } => preferred,
            Aim::Rows(_) | Aim::Taught(_) => None,
        }
    }

    /// The sample and what it is compared with.
    pub(super) fn samples(&self) -> impl Iterator<Item = &'a Sample> {
        std::iter::once(self.sample).chain(self.preferred())
    }

    /// Objective and weight of its rows. The factor of a whole answer is known only after all of
    /// them, so they are graded as plain cross-entropy first.
    pub(super) fn row_target(&self) -> (RowObjective, f32) {
        match self.aim {
            Aim::Rows(objective) => (objective, self.weight),
            Aim::Taught(_) => (RowObjective::CrossEntropy, self.weight),
            Aim::Answer { .. } => (RowObjective::CrossEntropy, 1.0),
        }
    }

    /// What answer row `i` is taught.
    pub(super) fn teacher(&self, i: usize) -> Option<&'a Soft> {
        match self.aim {
            Aim::Taught(rows) => rows.get(i),
            Aim::Rows(_) | Aim::Answer { .. } => None,
        }
    }
}

/// Rows whose next token is an answer token.
pub(super) fn rows_of(sample: &Sample) -> Vec<usize> {
    sample
        .answers
        .iter()
        .flat_map(|a| a.clone())
        .filter(|&j| j > 0)
        .map(|j| j - 1)
        .collect()
}
