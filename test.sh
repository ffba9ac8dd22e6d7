#!/usr/bin/env bash
# Set up and pass every check: formatting, lints, tests, documentation.
set -euo pipefail
cd "$(dirname "$0")"
. .ci/setup
# The tests on real models; they skip, saying so, when the models cannot be had.
models/fetch.sh || echo "test: the real models are not at hand; their tests will skip" >&2
# The server's test with OpenAI's client, likewise.
if [ -z "${NEPENTHE_TEST_PYTHON:-}" ]; then
    if NEPENTHE_TEST_PYTHON=$(.ci/openai); then
        export NEPENTHE_TEST_PYTHON
    else
        unset NEPENTHE_TEST_PYTHON
        echo "test: OpenAI's client is not at hand; its test will skip" >&2
    fi
fi
cargo fmt --all --check
cargo clippy --release --workspace --all-targets -- -D warnings
# The runtime alone, as a device builds it, and what lies between that and the whole.
minimal="--no-default-features --features minimal"
cargo clippy --release $minimal --all-targets -- -D warnings
cargo test --release $minimal --test gguf --test patches --test runtime
for feature in merge train peft serve; do
    cargo clippy --release --no-default-features --features "$feature" -- -D warnings
done
if command -v cargo-nextest >/dev/null; then
    cargo nextest run --release --workspace
    # nextest leaves the documentation's examples out.
    cargo test --release --workspace --doc
else
    cargo test --release --workspace
fi
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --release
echo "test: all passed"
