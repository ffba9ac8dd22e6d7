//! Points between two changes of the disk, at which tests kill the process.

/// Which point, counted from 1, does not return.
#[cfg(test)]
pub(crate) const KILL_AT: &str = "NEPENTHE_TEST_KILL_AT";

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point() {}

/// Counts its calls; call number [`KILL_AT`] does not return.
#[cfg(test)]
pub(crate) fn point() {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static AT: OnceLock<Option<u64>> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let at = AT.get_or_init(|| std::env::var(KILL_AT).ok()?.parse().ok());
    if at.is_some_and(|at| COUNT.fetch_add(1, Ordering::Relaxed) + 1 == at) {
        // No destructor, no buffer flushed: SIGKILL, sent by a shell since std cannot.
        let kill = format!("kill -9 {}", std::process::id());
        let _ = std::process::Command::new("sh")
            .args(["-c", &kill])
            .status();
        std::process::abort(); // a machine without sh
    }
}
