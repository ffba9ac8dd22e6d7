//! Points between two changes of the disk, at which tests kill the process.

#[cfg(not(test))]
#[inline(always)]
pub(super) fn point() {}

/// Counts its calls; call number `NEPENTHE_TEST_KILL_AT` (from 1) does not return.
#[cfg(test)]
pub(super) fn point() {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static KILL_AT: OnceLock<Option<u64>> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let at = KILL_AT.get_or_init(|| std::env::var(super::kill_tests::KILL_AT).ok()?.parse().ok());
    if at.is_some_and(|at| COUNT.fetch_add(1, Ordering::Relaxed) + 1 == at) {
        // No destructor, no buffer flushed: SIGKILL, sent by a shell since std cannot.
        let kill = format!("kill -9 {}", std::process::id());
        let _ = std::process::Command::new("sh")
            .args(["-c", &kill])
            .status();
        std::process::abort(); // a machine without sh
    }
}
