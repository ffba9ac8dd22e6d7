pub(super) const KILL_AT: &str = "NEPENTHE_TEST_KILL_AT";
