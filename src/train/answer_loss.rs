//! Losses of whole answers: functions of the answer's log-probability, not of single rows.
//!
//! With S = −log π(y|x), summed over answer tokens, every loss here is (2/β)·softplus(−u) for a
//! u that is linear in S, so its slope in S is −2σ(−u) times a constant: cross-entropy rows,
//! scaled once the forward pass has given S. It falls to zero as the answer is forgotten, where
//! plain ascent goes on for ever.

/// A loss of a whole answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AnswerLoss {
    /// `−(2/β)·log σ(β·(m − m_ref))`, m = S of the forget answer, less S of the preferred answer
    /// where there is one.
    ///
    /// Without a preferred answer this is NPO (Zhang et al., arXiv 2404.05868, eq. 3); with one,
    /// DPO (Rafailov et al., arXiv 2305.18290, eq. 7) in the scaling that makes NPO its special
    /// case. As β → 0 the gradient becomes that of plain ascent on S.
    Preference {
        /// β.
        beta: f64,
        /// m under the untouched model.
        reference: f64,
    },
    /// SimNPO, `−(2/β)·log σ(β·S/n − γ)` for n answer tokens (Fan et al., arXiv 2410.07163,
    /// eq. 4): no reference model.
    Normalised {
        /// β.
        beta: f64,
        /// γ, a margin.
        gamma: f64,
    },
}

impl AnswerLoss {
    /// The loss at margin `m` (nats) of an answer of `n_tokens`, and its slope in m.
    pub fn grade(self, m: f64, n_tokens: usize) -> (f64, f64) {
        let (beta, u, du) = match self {
            Self::Preference { beta, reference } => (beta, beta * (m - reference), beta),
            Self::Normalised { beta, gamma } => {
                let per_token = beta / n_tokens.max(1) as f64;
                (beta, per_token * m - gamma, per_token)
            }
        };
        (
            2.0 / beta * softplus(-u),
            -2.0 / beta * du * (-softplus(u)).exp(),
        )
    }
}

/// `log(1 + eˣ)`, which is also −log σ(−x), without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::loss::{RowObjective, Target, grade};

    const N_VOCAB: usize = 23;
    const FORGET: [i32; 3] = [4, 0, 22];
    const PREFERRED: [i32; 2] = [9, 17];

    fn logits() -> Vec<f32> {
        (0..N_VOCAB * 5)
            .map(|i| ((i * 7919 % 101) as f32 / 17.0).sin() * 3.0)
            .collect()
    }

    /// Loss of the forget rows against the preferred ones, and its gradient in all logits.
    fn whole(loss: AnswerLoss, paired: bool, logits: &mut [f32]) -> f64 {
        let tokens = FORGET.iter().chain(&PREFERRED);
        let nll: Vec<f64> = logits
            .chunks_exact_mut(N_VOCAB)
            .zip(tokens)
            .map(|(row, &token)| {
                let target = Target {
                    token,
                    objective: RowObjective::CrossEntropy,
                    teacher: None,
                    weight: 1.0,
                };
                grade(row, target, true).nll
            })
            .collect();
        let (forget, preferred) = nll.split_at(FORGET.len());
        let preferred = if paired { preferred.iter().sum() } else { 0.0 };
        let m = forget.iter().sum::<f64>() - preferred;
        let (value, slope) = loss.grade(m, FORGET.len());
        let (own, other) = logits.split_at_mut(N_VOCAB * FORGET.len());
        own.iter_mut().for_each(|g| *g *= slope as f32);
        let slope = if paired { -slope } else { 0.0 };
        other.iter_mut().for_each(|g| *g *= slope as f32);
        value
    }

    #[test]
    fn gradients_match_finite_differences() {
        let npo = |reference| AnswerLoss::Preference {
            beta: 0.3,
            reference,
        };
        let simnpo = |gamma| AnswerLoss::Normalised { beta: 2.5, gamma };
        for (loss, paired) in [
            (npo(14.0), false),
            (npo(4.0), false),
            (npo(1.0), true),
            (simnpo(0.0), false),
            (simnpo(8.0), false),
        ] {
            let mut gradient = logits();
            whole(loss, paired, &mut gradient);
            for k in 0..gradient.len() {
                let at = |h: f32| {
                    let mut z = logits();
                    z[k] += h;
                    whole(loss, paired, &mut z)
                };
                let numeric = (at(1e-2) - at(-1e-2)) / 2e-2;
                let got = f64::from(gradient[k]);
                assert!(
                    (numeric - got).abs() < 2e-4,
                    "{loss:?} {k}: {numeric} against {got}"
                );
            }
        }
    }

    #[test]
    fn a_small_beta_is_plain_ascent_and_a_forgotten_answer_pulls_no_more() {
        let npo = |beta| AnswerLoss::Preference {
            beta,
            reference: 3.0,
        };
        for m in [0.5, 3.0, 40.0] {
            let off = |beta| (npo(beta).grade(m, 7).1 + 1.0).abs();
            assert!(off(1e-6) < 1e-4, "{m}");
            assert!(off(1e-3) <= off(1e-1), "{m}");
        }
        assert!(npo(0.5).grade(200.0, 7).1.abs() < 1e-30);
        // On the reference the slope is one exactly, whatever beta.
        assert!((npo(0.1).grade(3.0, 7).1 + 1.0).abs() < 1e-12);
    }

    #[test]
    fn far_margins_stay_finite() {
        for m in [-1e6, 1e6] {
            let (value, slope) = AnswerLoss::Preference {
                beta: 10.0,
                reference: 0.0,
            }
            .grade(m, 1);
            assert!(value.is_finite() && slope.is_finite(), "{m}");
        }
    }
}
