//! What a long training run shows, logs and listens to.

use super::interrupt;
use crate::error::Error;
use crate::progress::{Stages, Ui};
use crate::train::fit::{Event, Watch};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Progress line, notices and JSON-lines log.
pub struct TrainUi {
    stages: Stages,
    log: Option<(PathBuf, BufWriter<File>)>,
    failed: Option<std::io::Error>,
}

impl TrainUi {
    /// Start listening for Ctrl-C and open `log`.
    ///
    /// # Errors
    /// A log that cannot be made.
    pub fn new(quiet: bool, log: Option<&Path>) -> Result<Self, Error> {
        interrupt::listen("stopping after this step");
        let log = match log {
            Some(path) => {
                let file = File::options().create(true).append(true).open(path);
                let file = file.map_err(|source| Error::Io {
                    path: path.to_owned(),
                    doing: "opening the log",
                    source,
                })?;
                Some((path.to_owned(), BufWriter::new(file)))
            }
            None => None,
        };
        Ok(Self {
            stages: Stages::new(quiet),
            log,
            failed: None,
        })
    }

    /// Close the log.
    ///
    /// # Errors
    /// The first failure to write it.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.stages.end();
        if let Some((path, mut file)) = self.log.take() {
            let failed = self.failed.take().map_or_else(|| file.flush(), Err);
            failed.map_err(|source| Error::Io {
                path,
                doing: "writing the log",
                source,
            })?;
        }
        Ok(())
    }

    fn write(&mut self, event: &Event<'_>) {
        let Some((_, file)) = &mut self.log else {
            return;
        };
        let written = serde_json::to_string(event)
            .map_err(std::io::Error::other)
            .and_then(|text| writeln!(file, "{text}"))
            .and_then(|()| file.flush());
        if let Err(e) = written {
            self.failed.get_or_insert(e);
        }
    }
}

impl Watch for TrainUi {
    fn seen(&mut self, event: &Event<'_>) {
        self.write(event);
        match event {
            Event::Step {
                step, of, report, ..
            } => {
                let part = |name: &str, v: Option<f64>| {
                    v.map_or(String::new(), |v| format!(" {name} {v:.3}"))
                };
                let note = format!(
                    "  loss:{}{}{}",
                    part("forget", report.forget),
                    part("retain", report.retain),
                    part("ROL", report.rol)
                );
                self.stages
                    .line("training")
                    .note(*step as usize, *of, &note);
            }
            Event::Check(c) if !self.stages.quiet() => {
                let text = format!(
                    "step {:>4}: forget answers NLL {:.2}, probability {:.3}, {:.0}% still known",
                    c.step,
                    c.nll,
                    c.prob,
                    100.0 * c.below
                );
                self.stages.line("training").say(&text);
            }
            Event::Learned { step, prob } if !self.stages.quiet() => {
                let text = format!("step {step:>4}: answer probability {prob:.3}");
                self.stages.line("training").say(&text);
            }
            _ => {}
        }
    }

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}

impl Ui for TrainUi {
    fn notice(&mut self, text: &str) {
        self.stages.notice(text);
    }

    fn progress(&mut self, stage: &str, done: usize, total: usize) {
        self.stages.progress(stage, done, total);
    }
}
