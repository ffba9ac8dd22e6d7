//! Where the second moments of a merge come from.
//!
//! Best first: texts, run through the model with its patches on; the sketch that a patch's maker
//! left beside it; an importance matrix of llama.cpp's, which knows the diagonal only. Without any
//! of them the built-in general text stands in: what the patch does there is kept, what it does to
//! the forgotten is then a matter of luck.

use super::imatrix::Imatrix;
use super::measure::Moments;
use super::moments::{Captured, Part, Set};
use super::sketch::{self, SketchFile};
use crate::error::Error;

/// Second moments by tensor.
pub enum Calibration {
    /// Inputs captured from texts.
    Texts(Captured),
    /// A sketch of them.
    Sketch(SketchFile),
    /// Their diagonal.
    Imatrix(Imatrix),
}

/// One side's moments, X·Xᵀ/n + diag(rest), as [`Moments::Sum`] takes them: a dense H of a 7B
/// model's ffn_down would be 485 MB.
struct Side {
    /// X [n_in, columns].
    columns: Vec<f32>,
    n: f64,
    /// \[n_in\] or empty.
    rest: Vec<f32>,
}

/// Moments to judge a merge by; at least one side is there.
pub struct Judged {
    forget: Option<Side>,
    kept: Option<Side>,
}

impl Judged {
    /// H_F; H_R where nothing is known of forget inputs.
    pub fn forget(&self) -> Moments<'_> {
        Self::of(&self.forget, &self.kept)
    }

    /// H_R; H_F where nothing is known of others.
    pub fn kept(&self) -> Moments<'_> {
        Self::of(&self.kept, &self.forget)
    }

    fn of<'a>(first: &'a Option<Side>, second: &'a Option<Side>) -> Moments<'a> {
        let side = first.as_ref().or(second.as_ref());
        let side = side.expect("calibration without any tokens is refused when captured");
        Moments::Sum {
            columns: &side.columns,
            n: side.n,
            rest: &side.rest,
        }
    }
}

impl Calibration {
    /// In a few words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Texts(_) => "texts",
            Self::Sketch(_) => "sketch",
            Self::Imatrix(_) => "imatrix",
        }
    }

    /// Whether forget inputs are known apart from others.
    pub fn knows_forget(&self) -> bool {
        match self {
            Self::Texts(c) => c.n_tokens(Set::Forget, Part::Fit) > 0,
            Self::Sketch(_) => true,
            Self::Imatrix(_) => false,
        }
    }

    /// Whether merges are judged on tokens they were not fitted to.
    pub fn holds_out(&self) -> bool {
        match self {
            Self::Texts(c) => part(c, &[Set::Forget]) == Part::HeldOut,
            Self::Sketch(_) | Self::Imatrix(_) => false,
        }
    }

    /// `tensors` in groups that share their moments, in order of first use.
    pub fn groups<'t>(&self, tensors: &[&'t str]) -> Vec<Vec<&'t str>> {
        let known: Vec<Vec<&str>> = match self {
            Self::Texts(c) => named(c.groups()),
            Self::Sketch(s) => named(s.groups()),
            Self::Imatrix(_) => Vec::new(),
        };
        let mut groups: Vec<(Option<usize>, Vec<&'t str>)> = Vec::new();
        for &t in tensors {
            let of = known.iter().position(|names| names.contains(&t));
            match groups.iter_mut().find(|(g, _)| of.is_some() && *g == of) {
                Some((_, members)) => members.push(t),
                None => groups.push((of, vec![t])),
            }
        }
        groups.into_iter().map(|(_, members)| members).collect()
    }

    /// What rounding minimises, `[n_in, n_in]`: H_R/tr(H_R) + λ·H_F/tr(H_F).
    ///
    /// # Errors
    /// A tensor whose inputs are not known, a failing disk.
    pub fn combined(&self, tensor: &str, n_in: usize, lambda: f64) -> Result<Vec<f32>, Error> {
        match self {
            Self::Texts(c) => c.combined(tensor, lambda, Part::Fit),
            Self::Sketch(s) => Ok(s.input(tensor, n_in)?.combined(lambda)),
            Self::Imatrix(i) => Ok(i.dense(tensor, n_in)?),
        }
    }

    /// What a merge of `tensor` is judged by.
    ///
    /// # Errors
    /// As [`combined`](Self::combined).
    pub fn judged(&self, tensor: &str, n_in: usize) -> Result<Judged, Error> {
        let (forget, kept) = match self {
            Self::Texts(c) => {
                let of = |sets: &[Set]| -> Result<Option<Side>, Error> {
                    let sets: Vec<Set> = sets
                        .iter()
                        .copied()
                        .filter(|s| c.n_tokens(*s, Part::Fit) > 0)
                        .collect();
                    if sets.is_empty() {
                        return Ok(None);
                    }
                    let columns = c.rows(tensor, &sets, part(c, &sets))?;
                    Ok(Some(Side {
                        n: (columns.len() / n_in) as f64,
                        columns,
                        rest: Vec::new(),
                    }))
                };
                (of(&[Set::Forget])?, of(&Set::KEPT)?)
            }
            Self::Sketch(s) => {
                let input = s.input(tensor, n_in)?;
                let side = |side| {
                    let (columns, rest) = input.factors(side);
                    Some(Side {
                        columns,
                        n: 1.0,
                        rest,
                    })
                };
                (side(sketch::Side::Forget), side(sketch::Side::Kept))
            }
            Self::Imatrix(i) => {
                let rest = i.normalised(tensor, n_in)?;
                let diagonal = Side {
                    columns: Vec::new(),
                    n: 1.0,
                    rest,
                };
                (None, Some(diagonal))
            }
        };
        Ok(Judged { forget, kept })
    }
}

/// Held-out tokens, unless a set is too small to have any.
fn part(captured: &Captured, sets: &[Set]) -> Part {
    if sets
        .iter()
        .any(|&s| captured.n_tokens(s, Part::HeldOut) > 0)
    {
        Part::HeldOut
    } else {
        Part::Fit
    }
}

fn named<'a>(groups: impl Iterator<Item = &'a [String]>) -> Vec<Vec<&'a str>> {
    groups
        .map(|g| g.iter().map(String::as_str).collect())
        .collect()
}
