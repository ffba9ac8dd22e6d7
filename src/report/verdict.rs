//! The verdict: criteria with their thresholds, each with a sentence that says why it is where it
//! is.
//!
//! A criterion is judged by its point estimate; `clear` says whether the whole 95% interval lies on
//! the same side. Nothing that was not measured counts as met.

use super::Thresholds;
use super::evidence::{Evidence, Kind, MergedFile, Variant};
use crate::eval::stats::Interval;
use crate::robustness::Robustness;
use crate::score::SetScores;
use serde::Serialize;

/// What came of a criterion, or of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Met.
    Met,
    /// Missed.
    Missed,
    /// Not measured.
    NotMeasured,
}

/// Which side of the threshold is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// At least.
    AtLeast,
    /// At most.
    AtMost,
}

impl Side {
    fn holds(self, value: f64, threshold: f64) -> bool {
        // Not negated: NaN meets neither.
        match self {
            Self::AtLeast => value >= threshold,
            Self::AtMost => value <= threshold,
        }
    }
}

/// One criterion on one deployed file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Criterion {
    /// What is claimed.
    pub claim: &'static str,
    /// Of which file.
    pub subject: String,
    /// What is compared.
    pub quantity: &'static str,
    /// Which side is good.
    pub side: Side,
    /// The threshold.
    pub threshold: f64,
    /// Why it is there.
    pub why: &'static str,
    /// What was found.
    pub found: Option<f64>,
    /// Its 95% interval, where it has one: sampling of the deployed file's scores alone.
    pub interval: Option<Interval>,
    /// What came of it.
    pub status: Status,
    /// Whether the whole interval is on one side.
    pub clear: bool,
}

/// All criteria.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Missed if one is missed, else not measured if nothing shows that the set is forgotten and
    /// the rest kept.
    pub status: Status,
    /// In one sentence.
    pub summary: String,
    /// One by one.
    pub criteria: Vec<Criterion>,
}

/// A criterion before it is judged.
struct Asked<'a> {
    claim: &'static str,
    subject: &'a str,
    quantity: &'static str,
    why: &'static str,
}

impl Asked<'_> {
    fn judge(
        self,
        side: Side,
        threshold: f64,
        found: Option<f64>,
        interval: Option<Interval>,
    ) -> Criterion {
        let status = match found {
            None => Status::NotMeasured,
            Some(v) if side.holds(v, threshold) => Status::Met,
            Some(_) => Status::Missed,
        };
        let met = status == Status::Met;
        let clear = interval.is_none_or(|i| {
            [i.low, i.high]
                .iter()
                .all(|&v| side.holds(v, threshold) == met)
        });
        Criterion {
            claim: self.claim,
            subject: self.subject.to_owned(),
            quantity: self.quantity,
            side,
            threshold,
            why: self.why,
            found,
            interval,
            status,
            clear,
        }
    }
}

fn over(i: Interval, by: f64) -> Interval {
    Interval {
        low: i.low / by,
        high: i.high / by,
    }
}

fn minus(i: Interval, what: f64) -> Interval {
    Interval {
        low: i.low - what,
        high: i.high - what,
    }
}

/// Judge `e` (whose verdict is not looked at).
pub fn judge(e: &Evidence, t: &Thresholds) -> Verdict {
    let base = e.measured.iter().find(|v| v.kind == Kind::Base);
    let patched = e.measured.iter().find(|v| v.kind == Kind::Patched);
    let mut criteria = Vec::new();
    if let Some(confirmed) = e.asked.confirmed {
        let asked = Asked {
            claim: "The set measured is the set that was asked for.",
            subject: "forget set",
            quantity: "salted hash matches (1: yes)",
            why: "Scores of another set would say nothing about this request.",
        };
        let found = Some(f64::from(u8::from(confirmed)));
        criteria.push(asked.judge(Side::AtLeast, 1.0, found, None));
    }
    for v in e.measured.iter().filter(|v| v.kind != Kind::Base) {
        criteria.extend(forgotten(e, t, base, v));
        criteria.push(kept(t, base, v));
        criteria.extend(other_words(t, v));
        if v.kind == Kind::Merged {
            let both = (forget(base), forget(patched));
            criteria.push(merged(t, &v.name, both, v.set("forget")));
        }
    }
    criteria.extend(off_retain(e, t));
    for r in &e.robustness {
        let others = r.files.iter().filter(|f| {
            let known = |m: &MergedFile| m.file.sha256 == f.file.sha256;
            !e.files.merged.iter().any(known)
        });
        let both = (alone(r), Some(&r.deployed.forget));
        for f in others {
            let now = Some(&f.sets.forget);
            criteria.push(merged(t, &f.file.name, both, now));
        }
        criteria.extend(relearned(t, base, r));
    }
    if let Some(p) = e.tofu.as_ref().and_then(|s| s.forget_quality) {
        let asked = Asked {
            claim: "TOFU's test cannot tell the model from one that never saw the set.",
            subject: "TOFU log",
            quantity: "forget quality, a p-value",
            why: "Below p = 0.05 the distributions of truth ratios differ by more than chance.",
        };
        criteria.push(asked.judge(Side::AtLeast, t.min_forget_quality, Some(p), None));
    }
    sum_up(criteria)
}

fn forgotten(e: &Evidence, t: &Thresholds, base: Option<&Variant>, v: &Variant) -> Vec<Criterion> {
    let forget = v.set("forget");
    let Some(level) = e.training.unseen_nll.filter(|&l| l > 0.0) else {
        let before = base.and_then(|b| b.set("forget")).map(|s| s.prob.mean);
        let both = forget.zip(before);
        let asked = Asked {
            claim: "The set is forgotten.",
            subject: &v.name,
            quantity: "forget answer probability over that before",
            why: "The patch records no unseen level, so all that can be asked is that true \
                  answers are less than half as likely as before.",
        };
        return vec![asked.judge(
            Side::AtMost,
            t.max_forget_share,
            both.map(|(s, before)| s.prob.mean / before),
            both.map(|(s, before)| over(s.prob.interval, before)),
        )];
    };
    let (found, interval) = (
        forget.map(|s| s.nll.mean / level),
        forget.map(|s| over(s.nll.interval, level)),
    );
    let asked = |claim, why| Asked {
        claim,
        subject: &v.name,
        quantity: "forget answer NLL over the unseen level",
        why,
    };
    vec![
        asked(
            "The set is forgotten.",
            "A model that never saw the set finds its answers about this unlikely; training \
             aims for that level and stops within a tenth of it.",
        )
        .judge(Side::AtLeast, t.min_level, found, interval),
        asked(
            "The set is not suppressed beyond that.",
            "Answers far less likely than unseen ones are a trace of their own: they show what \
             was removed.",
        )
        .judge(Side::AtMost, t.max_level, found, interval),
    ]
}

fn kept(t: &Thresholds, base: Option<&Variant>, v: &Variant) -> Criterion {
    let before = base.and_then(|b| b.set("retain")).map(|s| s.prob.mean);
    let both = v.set("retain").zip(before);
    Asked {
        claim: "What was to be kept is kept.",
        subject: &v.name,
        quantity: "retain answer probability over that before",
        why: "Three percent is the loss that this program allows itself everywhere; side effects \
              show in kept answers before a reader notices them.",
    }
    .judge(
        Side::AtLeast,
        t.min_retain,
        both.map(|(s, before)| s.prob.mean / before),
        both.map(|(s, before)| over(s.prob.interval, before)),
    )
}

fn other_words(t: &Thresholds, v: &Variant) -> Option<Criterion> {
    let paraphrased = v.set("paraphrased")?;
    let forget = v.set("forget").map(|s| s.prob.mean);
    let asked = Asked {
        claim: "Other wordings do not bring it back.",
        subject: &v.name,
        quantity: "paraphrased less forget answer probability",
        why: "If rewording a question makes its answer likelier by a tenth, the wording was \
              forgotten and not the fact.",
    };
    Some(asked.judge(
        Side::AtMost,
        t.max_paraphrase_gap,
        forget.map(|f| paraphrased.prob.mean - f),
        forget.map(|f| minus(paraphrased.prob.interval, f)),
    ))
}

/// Share of the fall from `before` to `after` that is gone at `now`; none where there was none.
fn undone(before: f64, after: f64, now: f64) -> Option<f64> {
    (before > after).then(|| (now - after) / (before - after))
}

fn forget(v: Option<&Variant>) -> Option<&SetScores> {
    v?.set("forget")
}

/// How much of the fall from `before` to `after` the file at `now` keeps.
fn merged(
    t: &Thresholds,
    subject: &str,
    (before, after): (Option<&SetScores>, Option<&SetScores>),
    now: Option<&SetScores>,
) -> Criterion {
    let kept = |now: f64| Some(1.0 - undone(before?.prob.mean, after?.prob.mean, now)?);
    let interval = now.and_then(|s| {
        Some(Interval {
            low: kept(s.prob.interval.high)?,
            high: kept(s.prob.interval.low)?,
        })
    });
    Asked {
        claim: "The merged file forgets as the patch does.",
        subject,
        quantity: "share kept of the fall in forget probability",
        why: "Requantisation can round a small update away; nine tenths kept is what merging is \
              for.",
    }
    .judge(
        Side::AtLeast,
        t.min_kept_effect,
        now.and_then(|s| kept(s.prob.mean)),
        interval,
    )
}

fn off_retain(e: &Evidence, t: &Thresholds) -> Option<Criterion> {
    let config = &e.method.as_ref()?.config;
    if config["train"]["constraint"] != "project" {
        return None;
    }
    let worst = e.tensors.iter().map(|t| f64::from(t.retain_fraction));
    let asked = Asked {
        claim: "The update stays off the directions that the retain set uses.",
        subject: "patch",
        quantity: "largest ‖PᵀΔW‖/‖ΔW‖ of a tensor",
        why: "The method promises none at all; a hundredth leaves room for rounding to 16 bits.",
    };
    Some(asked.judge(
        Side::AtMost,
        t.max_retain_fraction,
        worst.reduce(f64::max),
        None,
    ))
}

/// The forget set under the model without patch, where the sweep came by.
fn alone(r: &Robustness) -> Option<&SetScores> {
    let swept = r.scales.iter().find(|p| p.scale == 0.0);
    swept.map(|p| &p.sets.forget)
}

fn relearned(t: &Thresholds, base: Option<&Variant>, r: &Robustness) -> Option<Criterion> {
    let relearn = r.relearn.as_ref()?;
    let (first, last) = (relearn.points.first()?, relearn.points.last()?);
    // The sweep has the same samples as the attack, this report perhaps others.
    let before = alone(r).or_else(|| base?.set("forget"));
    let before = before.map(|s| s.prob.mean);
    let share = |now: f64| undone(before?, first.forget.prob.mean, now);
    let p = last.forget.prob;
    let interval = share(p.interval.low).zip(share(p.interval.high));
    let asked = Asked {
        claim: "Training on other data does not bring it back.",
        subject: &r.model.name,
        quantity: "share of the fall in forget probability undone by relearning",
        why: "A model that gets half of it back from data without it had only hidden it.",
    };
    Some(asked.judge(
        Side::AtMost,
        t.max_relearned,
        share(p.mean),
        interval.map(|(low, high)| Interval { low, high }),
    ))
}

fn sum_up(criteria: Vec<Criterion>) -> Verdict {
    let count = |status| criteria.iter().filter(|c| c.status == status).count();
    let (met, missed) = (count(Status::Met), count(Status::Missed));
    let open = criteria.len() - met - missed;
    let shown = |claim: &str| {
        let mut of = criteria.iter().filter(|c| c.claim == claim).peekable();
        of.peek().is_some() && of.all(|c| c.status == Status::Met)
    };
    let both = shown("The set is forgotten.") && shown("What was to be kept is kept.");
    let status = match (missed, both) {
        (1.., _) => Status::Missed,
        (0, true) => Status::Met,
        (0, false) => Status::NotMeasured,
    };
    let unclear = criteria
        .iter()
        .filter(|c| c.status != Status::NotMeasured && !c.clear)
        .count();
    let mut summary = match status {
        Status::Met => format!("All {met} criteria that were measured are met."),
        Status::Missed => format!("{missed} of {} criteria measured are missed.", met + missed),
        Status::NotMeasured => {
            "Forgetting and keeping were not both measured, so no verdict is given.".to_owned()
        }
    };
    if open > 0 {
        summary += &format!(" {open} could not be measured.");
    }
    if unclear > 0 {
        summary += &format!(" {unclear} are within sampling noise of their threshold.");
    }
    Verdict {
        status,
        summary,
        criteria,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(side: Side, found: Option<f64>, interval: Option<(f64, f64)>) -> Criterion {
        let asked = Asked {
            claim: "c",
            subject: "s",
            quantity: "q",
            why: "w",
        };
        let interval = interval.map(|(low, high)| Interval { low, high });
        asked.judge(side, 0.5, found, interval)
    }

    #[test]
    fn nothing_unmeasured_or_nan_is_met() {
        assert_eq!(one(Side::AtMost, None, None).status, Status::NotMeasured);
        assert_eq!(
            one(Side::AtMost, Some(f64::NAN), None).status,
            Status::Missed
        );
        assert_eq!(
            one(Side::AtLeast, Some(f64::NAN), None).status,
            Status::Missed
        );
        assert_eq!(sum_up(Vec::new()).status, Status::NotMeasured);
    }

    #[test]
    fn an_interval_across_the_threshold_is_not_clear() {
        let near = one(Side::AtLeast, Some(0.6), Some((0.4, 0.8)));
        assert_eq!((near.status, near.clear), (Status::Met, false));
        let far = one(Side::AtLeast, Some(0.6), Some((0.55, 0.8)));
        assert_eq!((far.status, far.clear), (Status::Met, true));
        let missed = one(Side::AtLeast, Some(0.3), Some((0.2, 0.4)));
        assert_eq!((missed.status, missed.clear), (Status::Missed, true));
    }

    #[test]
    fn half_way_back_is_half_undone() {
        let half = undone(0.9, 0.5, 0.7).expect("something was forgotten");
        assert!((half - 0.5).abs() < 1e-12, "{half}");
        assert_eq!(undone(0.5, 0.9, 0.7), None);
    }
}
