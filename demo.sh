#!/usr/bin/env bash
# Set up and run the main job on the built-in model: one command, no download of models.
set -euo pipefail
cd "$(dirname "$0")"
. .ci/setup
cargo build --release
exec "${CARGO_TARGET_DIR:-target}/release/nepenthe" demo "$@"
