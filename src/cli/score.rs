//! `nepenthe score`.

use crate::error::Error;
use crate::eval::tofu::{SplitScores, TofuScores, score, score_present};
use crate::eval::tofu_log::read_summary;
use clap::Args;
use std::path::PathBuf;

/// Score a finished TOFU log: model utility and forget quality
#[derive(Debug, Args)]
pub struct Score {
    /// Log of the model: TOFU's eval_log_aggregated.json or open-unlearning's TOFU_EVAL.json
    #[arg(long, value_name = "LOG")]
    log: PathBuf,
    /// Log of a model that never saw the forget set: forget quality is measured against it
    #[arg(long, value_name = "LOG")]
    retain_log: Option<PathBuf>,
    /// Score what the log holds, even if sets are missing
    #[arg(long)]
    partial: bool,
    /// Report as JSON on stdout
    #[arg(long)]
    json: bool,
}

impl Score {
    pub(super) fn run(&self) -> Result<(), Error> {
        let log = read_summary(&self.log)?;
        let retain_log = self.retain_log.as_deref().map(read_summary).transpose()?;
        let score = if self.partial { score_present } else { score };
        let scores = score(&log, retain_log.as_ref()).map_err(|e| e.of(&self.log))?;
        if self.json {
            super::emit(&scores);
        } else {
            print_scores(&scores);
        }
        Ok(())
    }
}

/// The table; what was not measured is left out.
pub(super) fn print_scores(scores: &TofuScores) {
    println!("              probability  ROUGE-L recall  truth ratio");
    let [rp, rr, rt, ap, ar, at, wp, wr, wt] = scores.nine();
    let forget = scores.forget;
    let rows = [
        ("retain", [rp, rr, rt]),
        ("real authors", [ap, ar, at]),
        ("world facts", [wp, wr, wt]),
        ("forget", of(forget)),
    ];
    for (name, values) in rows {
        if values.iter().all(Option::is_none) {
            continue;
        }
        let [prob, rouge, ratio] =
            values.map(|v| v.map_or_else(|| "-".into(), |v| format!("{v:.4}")));
        println!("{name:<12}  {prob:>11}  {rouge:>14}  {ratio:>11}");
    }
    if let Some(utility) = scores.model_utility {
        println!("model utility   {utility:.4}");
    }
    if let (Some(p), Some(ln_p), Some(d)) = (
        scores.forget_quality,
        scores.forget_quality_ln,
        scores.forget_ks,
    ) {
        let p = match p {
            // Below what f64 holds.
            0.0 => format!("1e{:.0}", ln_p / std::f64::consts::LN_10),
            p if p < 1e-3 => format!("{p:.3e}"),
            p => format!("{p:.4}"),
        };
        println!("forget quality  {p} (Kolmogorov-Smirnov p-value, D = {d:.4})");
    }
}

fn of(scores: Option<SplitScores>) -> [Option<f64>; 3] {
    [
        scores.map(|s| s.prob),
        scores.and_then(|s| s.rouge_l),
        scores.map(|s| s.truth_ratio),
    ]
}
