//! The log of a training run, as `unlearn --log` writes it.

use super::error::ReportError;
use super::evidence::{StepRow, Training};
use crate::error::Error;
use serde::Deserialize;
use serde_json::Value as Json;
use std::path::Path;

/// Steps and checks of the last run in the log: a log is appended to.
///
/// # Errors
/// [`ReportError::Log`] naming the line.
pub fn read(path: &Path) -> Result<Training, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        doing: "reading",
        source,
    })?;
    let mut training = Training::default();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let bad = |e: serde_json::Error| ReportError::Log {
            path: path.to_owned(),
            line: i + 1,
            problem: e.to_string(),
        };
        let event: Json = serde_json::from_str(line).map_err(bad)?;
        match event["event"].as_str() {
            Some("step") => {
                let step = StepRow::deserialize(&event).map_err(bad)?;
                if training.steps.last().is_some_and(|s| s.step >= step.step) {
                    training = Training::default();
                }
                training.steps.push(step);
            }
            Some("check") => {
                training
                    .checks
                    .push(serde_json::from_value(event).map_err(bad)?);
            }
            // Of `learn`, or of a later version.
            _ => {}
        }
    }
    Ok(training)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Training, Error> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("log");
        std::fs::write(&path, text).expect("room on the disk");
        read(&path)
    }

    #[test]
    fn the_last_run_counts() {
        let step =
            |n| format!("{{\"event\":\"step\",\"step\":{n},\"forget\":1.5,\"retain\":null}}\n");
        let check = "{\"event\":\"check\",\"step\":2,\"nll\":0.5,\"prob\":0.6,\"below\":1.0}\n";
        let text = [step(1), step(2), check.into(), step(1), "\n".into()].concat();
        let t = of(&text).expect("a good log");
        assert_eq!((t.steps.len(), t.checks.len()), (1, 0));
        assert_eq!(t.steps[0].forget, Some(1.5));
        let text = [step(1), step(2), check.into(), step(3)].concat();
        let t = of(&text).expect("a good log");
        assert_eq!((t.steps.len(), t.checks.len()), (3, 1));
    }

    #[test]
    fn a_bad_line_is_named() {
        let e = of("{}\n{\"event\":\"step\",\"step\":\"x\"}\n").expect_err("refused");
        assert!(e.to_string().contains("line 2"), "{e}");
        assert!(of("nonsense").is_err());
    }
}
