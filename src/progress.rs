//! One line on stderr that says how far a long job is. Only on a terminal, never on stdout.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Jobs shorter than this show nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// Least time between two drawings.
const INTERVAL: Duration = Duration::from_millis(100);

/// A progress line; cleared when dropped.
pub struct Progress {
    label: String,
    began: Instant,
    drawn: Option<Instant>,
    shown: bool,
}

impl Progress {
    /// A line that starts with `label`; nothing is shown when `quiet` or off a terminal.
    pub fn new(label: &str, quiet: bool) -> Self {
        Self {
            label: label.to_owned(),
            began: Instant::now(),
            drawn: None,
            shown: !quiet && std::io::stderr().is_terminal(),
        }
    }

    /// `done` of `total` are done.
    pub fn set(&mut self, done: usize, total: usize) {
        self.note(done, total, "");
    }

    /// As [`Progress::set`], with a word at the end of the line.
    pub fn note(&mut self, done: usize, total: usize, note: &str) {
        let now = Instant::now();
        let early = now - self.began < PATIENCE || self.drawn.is_some_and(|d| now - d < INTERVAL);
        if !self.shown || (early && done < total) {
            return;
        }
        self.drawn = Some(now);
        let eta = eta(self.began.elapsed(), done, total);
        eprint!("\r\x1b[K{} {done}/{total}{eta}{note}", self.label);
        let _ = std::io::stderr().flush();
    }

    /// Print a line above the progress line.
    pub fn say(&mut self, line: &str) {
        self.clear();
        eprintln!("{line}");
    }

    fn clear(&mut self) {
        if self.drawn.take().is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What a long job tells its user.
pub trait Ui {
    /// A sentence worth reading.
    fn notice(&mut self, text: &str);
    /// A stage and how far it is.
    fn progress(&mut self, stage: &str, done: usize, total: usize);
}

/// Notices and one progress line a stage, on stderr.
pub struct Stages {
    quiet: bool,
    stage: String,
    line: Option<Progress>,
}

impl Stages {
    /// Silent if `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self {
            quiet,
            stage: String::new(),
            line: None,
        }
    }

    /// Whether it is silent.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// The line of `stage`; that of another stage ends.
    pub fn line(&mut self, stage: &str) -> &mut Progress {
        if self.stage != stage {
            self.end();
            self.stage = stage.to_owned();
        }
        let quiet = self.quiet;
        self.line.get_or_insert_with(|| Progress::new(stage, quiet))
    }

    /// End the line there is.
    pub fn end(&mut self) {
        self.line = None;
    }
}

impl Ui for Stages {
    fn notice(&mut self, text: &str) {
        self.end();
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    fn progress(&mut self, stage: &str, done: usize, total: usize) {
        self.line(stage).set(done, total);
    }
}

/// `, 2m05s left`, once there is something to extrapolate from.
fn eta(elapsed: Duration, done: usize, total: usize) -> String {
    if done == 0 || done >= total {
        return String::new();
    }
    let left = elapsed.as_secs_f64() / done as f64 * (total - done) as f64;
    format!(", {} left", short_time(left))
}

/// Seconds for people.
pub fn short_time(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_extrapolated() {
        assert_eq!(eta(Duration::from_secs(10), 1, 4), ", 30s left");
        assert_eq!(eta(Duration::from_secs(10), 0, 4), "");
        assert_eq!(short_time(3725.0), "1h02m");
        assert_eq!(short_time(65.0), "1m05s");
    }
}
