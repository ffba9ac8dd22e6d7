//! What is to be forgotten and what is to be kept, read and tokenised.

use crate::data::{
    Record, Sample, Template, build_samples, general_records, overlap, refusals, refused,
    salted_hash, samples,
};
use crate::digest::Digest;
use crate::error::Error;
use crate::merge::moments::Sources;
use crate::model::OpenModel;
use crate::train::config::{Objective, TrainConfig};
use crate::train::fit::FitData;

/// What is to be forgotten and what is to be kept.
#[derive(Debug, Clone)]
pub struct Sets {
    /// Forget records.
    pub forget_records: Vec<Record>,
    /// Retain records.
    pub retain_records: Vec<Record>,
    /// Forget samples.
    pub forget: Vec<Sample>,
    /// Retain samples.
    pub retain: Vec<Sample>,
    /// Samples like the forget set's that the model has never seen, if there are any at hand.
    pub unseen: Vec<Sample>,
    /// A refusal of every forget question, where the objective prefers one.
    pub preferred: Vec<Sample>,
    /// Whether the built-in general text stands in for a retain set.
    pub general: bool,
    /// What the user should know about the data.
    pub notices: Vec<String>,
}

impl Sets {
    /// Names data in a checkpoint; never leaves this machine, so it needs no salt.
    pub(crate) fn digest(&self) -> Digest {
        let forget = salted_hash(&self.forget_records, b"forget");
        let tokens = self.preferred.iter().flat_map(|s| &s.tokens);
        let mut salt = forget.to_vec();
        salt.extend(tokens.flat_map(|t| t.to_le_bytes()));
        Digest(salted_hash(&self.retain_records, &salt))
    }

    /// Token counts of the longest samples, as many as one step computes at a time.
    pub(crate) fn step_lengths(&self, train: &TrainConfig) -> Vec<usize> {
        let longest = |set: &[Sample]| set.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
        let n = |set: &[Sample]| train.step_samples().min(set.len());
        let both = longest(&self.forget) + longest(&self.preferred);
        let mut lengths = vec![both; n(&self.forget)];
        if train.objective.has_retain() {
            lengths.extend(vec![longest(&self.retain); n(&self.retain)]);
        }
        lengths
    }

    /// The sets as second moments are taken of them.
    pub(crate) fn moment_sources<'a>(&'a self, general: &'a [Sample]) -> Sources<'a> {
        Sources {
            forget: &self.forget,
            // The general text would otherwise be counted twice.
            retain: if self.general { &[] } else { &self.retain },
            general,
        }
    }

    /// Tokenise both sets. Without `retain_records` the built-in general text is used.
    ///
    /// # Errors
    /// A retain set that holds forget records, records that cannot be tokenised, empty sets.
    pub fn new(
        open: &OpenModel,
        template: &Template,
        forget_records: Vec<Record>,
        retain_records: Option<Vec<Record>>,
        unseen_records: &[Record],
        max_tokens: usize,
    ) -> Result<Self, Error> {
        let general = retain_records.is_none();
        let retain_records = retain_records.unwrap_or_else(general_records);
        let shared = overlap(&forget_records, &retain_records);
        if shared.n_shared > 0 {
            return Err(Error::Overlap(shared));
        }
        let mut notices = Vec::new();
        if general {
            notices.push(format!(
                "no retain set given: {} built-in records of general text stand in for it",
                retain_records.len()
            ));
        }
        let forget = samples(
            &open.model,
            template,
            &forget_records,
            max_tokens,
            "forget",
            &mut notices,
        )?;
        let retain = samples(
            &open.model,
            template,
            &retain_records,
            max_tokens,
            "retain",
            &mut notices,
        )?;
        let unseen = if unseen_records.is_empty() {
            Vec::new()
        } else {
            let records = unseen_records;
            samples(
                &open.model,
                template,
                records,
                max_tokens,
                "unseen",
                &mut notices,
            )?
        };
        Ok(Self {
            forget_records,
            retain_records,
            forget,
            retain,
            unseen,
            preferred: Vec::new(),
            general,
            notices,
        })
    }

    /// Answer every forget question with one of `refusals` (none: built-in ones) if the objective
    /// is DPO; refuse them if it is not.
    ///
    /// # Errors
    /// Refusals for another objective, forget records without a question.
    pub fn prefer(
        mut self,
        given: Option<&[String]>,
        open: &OpenModel,
        template: &Template,
        config: &TrainConfig,
    ) -> Result<Self, Error> {
        if config.objective != Objective::Dpo {
            return match given {
                None => Ok(self),
                Some(_) => Err(Error::Setting {
                    setting: "idk",
                    wanted: "the objective dpo, which alone prefers refusals".into(),
                    found: format!("{:?}", config.objective).to_lowercase(),
                }),
            };
        }
        let given = given.map_or_else(refusals, <[String]>::to_vec);
        let no_question = |found: String| Error::Setting {
            setting: "objective dpo",
            wanted: "a forget set of questions, so that there is something to refuse".into(),
            found,
        };
        let records = refused(&self.forget_records, &given, config.seed)
            .map_err(|n| no_question(format!("record {n} without one")))?;
        let set = build_samples(&records, &open.model, template, config.max_tokens)?;
        if set.samples.len() != self.forget.len() {
            return Err(no_question("records too short to be trained on".into()));
        }
        self.preferred = set.samples;
        Ok(self)
    }

    /// What training sees of it.
    pub fn fit_data(&self) -> FitData<'_> {
        FitData {
            forget: &self.forget,
            preferred: &self.preferred,
            retain: &self.retain,
        }
    }
}

/// The built-in general text as samples.
///
/// # Errors
/// As [`samples`].
pub(crate) fn general_samples(
    open: &OpenModel,
    template: &Template,
    max_tokens: usize,
) -> Result<Vec<Sample>, Error> {
    let (records, mut notices) = (general_records(), Vec::new());
    Ok(samples(
        &open.model,
        template,
        &records,
        max_tokens,
        "general",
        &mut notices,
    )?)
}
