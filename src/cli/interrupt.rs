//! Ctrl-C: the first asks a long job to stop where it can go on later, the second ends the process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static STOP: AtomicBool = AtomicBool::new(false);

/// Start listening; `notice` is what the first Ctrl-C prints.
pub(super) fn listen(notice: &'static str) {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let heard = ctrlc::set_handler(move || {
            if STOP.swap(true, Ordering::SeqCst) {
                crate::ggml::exit_at_once(130);
            }
            eprintln!("\n{notice} (once more: at once)");
        });
        // Without a handler the system's own applies: the run ends at once.
        let _ = heard;
    });
}

/// Whether Ctrl-C was pressed.
pub(super) fn asked() -> bool {
    STOP.load(Ordering::SeqCst)
}
