//! A patch put into the quantised weights, tensor by tensor: same types, same sizes, code bits
//! alone changed, unless a tensor's error says otherwise and the policy allows more.
//!
//! Per group of tensors that share an input: second moments ([`Calibration`]), one factor, then
//! for each tensor error-feedback rounding ([`round_rows`]), its error on moments it was not
//! fitted to, and what a larger type or a low-rank residue would do instead. When all are measured
//! [`decide`] chooses. New bytes wait in an unnamed temporary file: one tensor and its moments are
//! in memory at a time.

use super::calibration::{Calibration, Judged};
use super::decide::{
    Action, Candidate, Choice, Decision, Limits, Policy, Reason, decide, promotions,
};
use super::error::RoundError;
use super::factor::Factor;
use super::feedback::{Rounded, Search, round_rows};
use super::grid::{Cells, Grid};
use super::measure::{Measured, Merged, measure};
use super::promote::promote_rows;
use super::rewrite::{Form, empty_files};
use super::scratch::Scratch;
use crate::error::Error;
use crate::gguf::{GgmlType, GgufWriter, TensorInfo};
use crate::graph::weights::Weights;
use crate::patch::delta::{Delta, deltas};
use crate::patch::{Patch, Update};
use crate::project::NetUpdate;
use serde::Serialize;
use std::collections::HashMap;
use std::path::Path;

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    /// Errors of earlier columns are made up for by later ones, as the inputs ask
    Feedback,
    /// Every element to its nearest code
    Nearest,
}

/// Settings of a same-grid merge.
#[derive(Debug, Clone, Serialize)]
pub struct Options {
    /// How codes are chosen.
    pub rounding: Rounding,
    /// Weight of the forget inputs against all others.
    pub lambda: f64,
    /// Share of the mean diagonal of H added to its diagonal.
    pub damping: f64,
    /// Passes of coordinate descent after the rounding.
    pub passes: usize,
    /// How often scales are fitted to the codes; with 0 only code bits change.
    pub refits: usize,
    /// What may be done to tensors that the grid does not serve.
    pub limits: Limits,
    /// Whether tensors whose type has no grid are written in a larger one instead of being left
    /// as they are.
    pub promote: bool,
    /// Ranks of residues to try.
    pub residue_ranks: Vec<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rounding: Rounding::Feedback,
            // Of the drop in forget probability, 82% was kept at 0.5, 89% at 2, 91% at 4, 92% at 8
            // and 30 (Gemma-3-270M Q4_K_M, one patch of 0.8%), with KL on general text .055, .052,
            // .056, .062, .065.
            lambda: 4.0,
            damping: 0.005,
            passes: 20,
            refits: 0,
            limits: Limits {
                policy: Policy::Grid,
                ..Limits::default()
            },
            promote: false,
            residue_ranks: vec![4, 16],
        }
    }
}

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Its name.
    pub tensor: String,
    /// Its type.
    pub from: String,
    /// The type it is written in.
    pub to: String,
    /// What was done; none: the update is not in the file.
    pub action: Option<Action>,
    /// Why.
    pub reason: Reason,
    /// ‖ΔW‖/‖W‖.
    pub relative_norm: f64,
    /// Share of the update's effect on forget inputs that is lost, tr(E·H_F·Eᵀ)/tr(ΔW·H_F·ΔWᵀ).
    pub err_f: f64,
    /// What the merge adds to outputs on kept inputs, tr(E·H_R·Eᵀ)/tr(W·H_R·Wᵀ).
    pub retain_noise: f64,
    /// Codes that changed, where the tensor stays on its grid.
    pub codes_changed: usize,
    /// Codes in all.
    pub codes: usize,
    /// Bytes added to the files.
    pub growth: u64,
}

/// All tensors decided, new bytes at hand.
pub struct Fitted {
    /// In the order of the model.
    pub outcomes: Vec<Outcome>,
    /// Residues to be written beside the file.
    pub residues: Vec<Update>,
    /// New types and where the bytes are.
    pub(super) replaced: HashMap<String, (GgmlType, u64, u64)>,
    pub(super) scratch: Scratch,
}

/// A measured way, with what it takes to carry it out.
struct Way {
    choice: Choice,
    bytes: Option<(GgmlType, u64, u64)>,
    residue: Option<Update>,
    rounded: Rounded,
}

struct Tensor {
    info: TensorInfo,
    measured: Measured,
    grid: Option<Way>,
    others: Vec<Way>,
}

/// Fit `patches`, each at its scale, to the tensors of `model`. New bytes wait in `scratch_dir`.
/// `progress` gets tensors done and all of them.
///
/// # Errors
/// Patches that do not fit, inputs that are not known, a failing disk.
pub fn fit(
    model: &Weights,
    patches: &[(Patch, f32)],
    calibration: &Calibration,
    options: &Options,
    scratch_dir: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Fitted, Error> {
    let deltas = deltas(model, patches)?;
    let order: Vec<&str> = model
        .set()
        .tensors()
        .map(|(_, t)| t.name.as_str())
        .filter(|name| deltas.contains_key(name))
        .collect();
    let mut scratch = Scratch::new(scratch_dir)?;
    let mut tensors: HashMap<&str, Tensor> = HashMap::new();
    for group in calibration.groups(&order) {
        let n_in = model.info(group[0])?.ne[0] as usize;
        let of_group = (calibration, options);
        let moments = GroupMoments::new(of_group, group[0], n_in)?;
        for name in group {
            let fitted = one(model, name, &deltas[name], &moments, options, &mut scratch)?;
            tensors.insert(name, fitted);
            progress(tensors.len(), order.len());
        }
    }
    let mut list: Vec<Tensor> = order
        .iter()
        .map(|name| tensors.remove(name).expect("every tensor is in a group"))
        .collect();
    let decisions = decide(
        &list.iter().map(candidate).collect::<Vec<_>>(),
        &options.limits,
    );
    let mut out = Fitted {
        outcomes: Vec::new(),
        residues: Vec::new(),
        replaced: HashMap::new(),
        scratch,
    };
    for (tensor, decision) in list.iter_mut().zip(decisions) {
        out.take(tensor, &decision);
    }
    Ok(out)
}

/// What a group of tensors shares.
struct GroupMoments {
    n_in: usize,
    factor: Option<Factor>,
    judged: Judged,
}

impl GroupMoments {
    fn new(
        (calibration, options): (&Calibration, &Options),
        tensor: &str,
        n_in: usize,
    ) -> Result<Self, Error> {
        let factor = match options.rounding {
            Rounding::Nearest => None,
            Rounding::Feedback => {
                let h = calibration.combined(tensor, n_in, options.lambda)?;
                Some(Factor::new(h, n_in, options.damping)?)
            }
        };
        Ok(Self {
            n_in,
            factor,
            judged: calibration.judged(tensor, n_in)?,
        })
    }

    fn measure(&self, merged: &Merged<'_>) -> Result<Measured, RoundError> {
        measure(merged, self.judged.forget(), self.judged.kept())
    }
}

/// Every way to treat one tensor, measured.
fn one(
    model: &Weights,
    name: &str,
    delta: &Delta<'_>,
    moments: &GroupMoments,
    options: &Options,
    scratch: &mut Scratch,
) -> Result<Tensor, Error> {
    let info = model.info(name)?.clone();
    let before = model.set().read_tensor(name)?;
    let update = |row: usize, values: &mut [f32]| delta.add_row(row, values);
    let n_in = moments.n_in;
    let search = Search {
        passes: options.passes,
        refits: options.refits,
        ..Search::default()
    };
    let merged = |ty: GgmlType, after: &[u8]| {
        moments.measure(&Merged {
            before: (info.ty, &before),
            after: (ty, after),
            n_in,
            update: &update,
        })
    };
    let grid = match Grid::new(info.ty, n_in) {
        Ok(grid) => {
            let mut after = before.clone();
            let factor = moments.factor.as_ref();
            let rounded = round_rows(&grid, &mut after, &update, factor, search)?;
            let m = merged(info.ty, &after)?;
            let place = scratch.push(&after)?;
            Some((m, way(Action::Grid, 0, &m, Some((info.ty, place)), rounded)))
        }
        Err(RoundError::NoGrid { .. }) => None,
        Err(e) => return Err(e.into()),
    };
    let policy = options.limits.policy;
    let may = |wanted: Policy| policy == wanted || policy == Policy::Auto;
    let mut others = Vec::new();
    let promote = may(Policy::Promote) || (grid.is_none() && options.promote);
    for to in promotions(info.ty, n_in).into_iter().filter(|_| promote) {
        let (after, rounded) = promote_rows(
            (info.ty, &before),
            to,
            n_in,
            &update,
            None,
            moments.factor.as_ref(),
            search,
        )?;
        let m = merged(to, &after)?;
        let growth = (after.len() - before.len()) as u64;
        let place = scratch.push(&after)?;
        let found = way(Action::Promote(to), growth, &m, Some((to, place)), rounded);
        others.push((m, found));
    }
    if may(Policy::Residue) {
        for &rank in &options.residue_ranks {
            others.extend(residue(name, &info, &before, delta, moments, rank)?);
        }
    }
    // What no merge at all would do: the effect that errors are measured against.
    let nothing = match &grid {
        Some((m, _)) => *m,
        None => merged(info.ty, &before)?,
    };
    let mut others: Vec<Way> = others.into_iter().map(|(_, way)| way).collect();
    let grid = match grid {
        Some((_, way)) => Some(way),
        // Asked for, so not a matter of errors and budgets.
        None if options.promote && !others.is_empty() => Some(others.remove(0)),
        None => None,
    };
    Ok(Tensor {
        info,
        measured: nothing,
        grid,
        others,
    })
}

fn way(
    action: Action,
    growth: u64,
    m: &Measured,
    bytes: Option<(GgmlType, (u64, u64))>,
    rounded: Rounded,
) -> Way {
    Way {
        choice: Choice {
            action,
            growth,
            err_f: m.err_f(),
            retain_noise: m.retain_noise(),
        },
        bytes: bytes.map(|(ty, (at, len))| (ty, at, len)),
        residue: None,
        rounded,
    }
}

/// The update's best pair of rank `rank`, in a side adapter; none if the update has no more.
fn residue(
    name: &str,
    info: &TensorInfo,
    before: &[u8],
    delta: &Delta<'_>,
    moments: &GroupMoments,
    rank: usize,
) -> Result<Option<(Measured, Way)>, Error> {
    let (n_in, n_out) = (moments.n_in, delta.n_out());
    let (lora_a, lora_b, full) = delta.factors();
    let net = NetUpdate::new((n_in, n_out, full), 1.0, lora_a, lora_b)?;
    let small = net.refactor(rank.min(full))?.update;
    let (_, _, rank) = small.shape();
    let side = Update {
        tensor: name.to_owned(),
        n_in,
        n_out,
        rank,
        scale: small.scale(),
        lora_a: small.lora_a().to_vec(),
        lora_b: small.lora_b().to_vec(),
    };
    let mut kept = Delta::new(n_in, n_out);
    kept.push_update(&side, -1.0)?;
    let lost = |row: usize, values: &mut [f32]| {
        delta.add_row(row, values);
        kept.add_row(row, values);
    };
    let whole = |row: usize, values: &mut [f32]| delta.add_row(row, values);
    let measured = |update: &(dyn Fn(usize, &mut [f32]) + Sync)| {
        moments.measure(&Merged {
            before: (info.ty, before),
            after: (info.ty, before),
            n_in,
            update,
        })
    };
    let (mut m, all) = (measured(&lost)?, measured(&whole)?);
    (m.update, m.forget_effect) = (all.update, all.forget_effect);
    let growth = 2 * (rank * (n_in + n_out)) as u64;
    let mut found = way(
        Action::Residue { rank },
        growth,
        &m,
        None,
        Rounded::default(),
    );
    found.residue = Some(side);
    Ok(Some((m, found)))
}

fn candidate(t: &Tensor) -> Candidate {
    // Relative to the tensor's own output, so that tensors of different scale compare.
    let effect = t.measured.forget_effect / t.measured.retain_output.max(f64::MIN_POSITIVE);
    Candidate {
        name: t.info.name.clone(),
        relative_norm: t.measured.relative_norm(),
        effect,
        grid: t.grid.as_ref().map(|w| w.choice),
        others: t.others.iter().map(|w| w.choice).collect(),
    }
}

impl Fitted {
    /// The merged model, as deliver takes it: one file for each part, or one in all.
    ///
    /// # Errors
    /// The same patch twice, now or merged before.
    pub fn files<'a>(
        &'a self,
        model: &'a Weights,
        patches: &[(Patch, f32)],
        form: Form,
    ) -> Result<Vec<GgufWriter<'a>>, Error> {
        let mut files = empty_files(model, patches, form)?;
        for (no, part) in model.set().parts().iter().enumerate() {
            let file = &mut files[if form.join { 0 } else { no }];
            for info in part.tensors() {
                let Some(&(ty, at, len)) = self.replaced.get(&info.name) else {
                    file.copy_tensor(part, &info.name)?;
                    continue;
                };
                file.tensor(&info.name, info.dims(), ty, move |out| {
                    Ok(self.scratch.copy((at, len), out)?)
                })?;
            }
        }
        Ok(files)
    }

    /// What `later`, fitted to the file that this makes of `model`, makes of it. Errors stay those of
    /// the first fit: a correction means to leave the update.
    ///
    /// # Errors
    /// A failing disk.
    pub fn then(mut self, mut later: Self, model: &Weights) -> Result<Self, Error> {
        for (name, &(ty, at, len)) in &self.replaced {
            if !later.replaced.contains_key(name) {
                let (at, len) = later.scratch.push(&self.scratch.read((at, len))?)?;
                later.replaced.insert(name.clone(), (ty, at, len));
            }
        }
        self.scratch = later.scratch;
        self.replaced = later.replaced;
        let on_grid = |o: &&mut Outcome| o.action == Some(Action::Grid);
        for outcome in self.outcomes.iter_mut().filter(on_grid) {
            let info = model.info(&outcome.tensor)?;
            let Some(&(_, at, len)) = self.replaced.get(&outcome.tensor) else {
                continue;
            };
            let grid = Grid::new(info.ty, info.ne[0] as usize)?;
            let (mut before, mut after) = (Cells::default(), Cells::default());
            grid.decode(model.bytes(&outcome.tensor)?, &mut before)?;
            grid.decode(&self.scratch.read((at, len))?, &mut after)?;
            let codes = before.code.iter().zip(&after.code);
            outcome.codes_changed = codes.filter(|(b, a)| b != a).count();
        }
        Ok(self)
    }

    fn take(&mut self, t: &mut Tensor, decision: &Decision) {
        let name = &t.info.name;
        let ways = t.grid.iter_mut().chain(&mut t.others);
        let chosen = decision
            .choice
            .and_then(|c| ways.into_iter().find(|w| w.choice == c));
        let from = t.info.ty.name().to_owned();
        let mut outcome = Outcome {
            tensor: name.clone(),
            to: from.clone(),
            from,
            action: None,
            reason: decision.reason,
            relative_norm: t.measured.relative_norm(),
            err_f: 1.0,
            retain_noise: 0.0,
            codes_changed: 0,
            codes: 0,
            growth: 0,
        };
        if let Some(way) = chosen {
            outcome.action = Some(way.choice.action);
            outcome.err_f = way.choice.err_f;
            outcome.retain_noise = way.choice.retain_noise;
            outcome.growth = way.choice.growth;
            if way.choice.action == Action::Grid {
                outcome.codes_changed = way.rounded.n_changed;
                outcome.codes = way.rounded.n_elements;
            }
            if let Some(bytes) = way.bytes {
                outcome.to = bytes.0.name().to_owned();
                self.replaced.insert(name.clone(), bytes);
            }
            self.residues.extend(way.residue.take());
        }
        self.outcomes.push(outcome);
    }
}
