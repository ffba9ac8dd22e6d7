"""A second opinion on src/score/choice.rs: pip install numpy gguf tokenizers.

usage: choice_model.py SmolLM2-135M-Instruct.Q4_1.gguf [MMLU.csv TOPIC N]. Tokeniser and forward pass
of a Llama model in NumPy on the file's dequantised weights; no llama.cpp in it. Writes the letters'
log-likelihoods for the questions of choice.json to choice_model.json beside this script, or prints
those of the first N questions of a headered MMLU file as JSON Lines.
"""
import csv
import json
import pathlib
import sys

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

reader = GGUFReader(sys.argv[1])


def meta(key):
    return reader.fields[key].contents()


W = {t.name: t for t in reader.tensors}


def weight(name):
    t = W[name]
    return np.asarray(dequantize(t.data, t.tensor_type), dtype=np.float32)


tokens = meta("tokenizer.ggml.tokens")
merges = [tuple(m.split(" ")) for m in meta("tokenizer.ggml.merges")]
tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
# The pre-tokeniser named smollm: digits one by one, then GPT-2's pattern.
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
assert meta("tokenizer.ggml.pre") == "smollm"
BOS = [meta("tokenizer.ggml.bos_token_id")] if "tokenizer.ggml.add_bos_token" in reader.fields and meta("tokenizer.ggml.add_bos_token") else []


def encode(text):
    return BOS + tokenizer.encode(text).ids


N_LAYER, N_HEAD = meta("llama.block_count"), meta("llama.attention.head_count")
N_KV, EPS = meta("llama.attention.head_count_kv"), meta("llama.attention.layer_norm_rms_epsilon")
BASE = meta("llama.rope.freq_base")
EMBED = weight("token_embd.weight")
HEAD = weight("output.weight") if "output.weight" in W else EMBED
LAYERS = [
    {k: weight(f"blk.{i}.{k}.weight") for k in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")}
    for i in range(N_LAYER)
]
OUT_NORM = weight("output_norm.weight")


def norm(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w


def rope(x):
    """Rotate pairs (2i, 2i+1) of x [T, heads, d]: the order of GGUF's llama weights."""
    t, _, d = x.shape
    angle = np.arange(t)[:, None] * BASE ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


def last_log_probs(ids):
    x = EMBED[ids]
    t = len(ids)
    mask = np.triu(np.full((t, t), -np.inf, dtype=np.float32), 1)
    for w in LAYERS:
        h = norm(x, w["attn_norm"])
        q = rope((h @ w["attn_q"].T).reshape(t, N_HEAD, -1))
        k = rope((h @ w["attn_k"].T).reshape(t, N_KV, -1)).repeat(N_HEAD // N_KV, 1)
        v = (h @ w["attn_v"].T).reshape(t, N_KV, -1).repeat(N_HEAD // N_KV, 1)
        s = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]) + mask
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", p, v).reshape(t, -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    logits = (HEAD @ norm(x[-1], OUT_NORM)).astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def letters(prompt):
    context = encode(prompt)
    own = [encode(f"{prompt} {letter}")[len(context):] for letter in "ABCD"]
    assert all(len(o) == 1 for o in own)
    log_probs = last_log_probs(context)
    return [round(float(log_probs[o[0]]), 4) for o in own]


if len(sys.argv) > 2:
    with open(sys.argv[2], newline="") as f:
        rows = list(csv.reader(f))[1 : 1 + int(sys.argv[4])]
    for i, (question, *choices, answer) in enumerate(rows):
        prompt = f"The following are multiple choice questions (with answers) about {sys.argv[3]}.\n\n{question.strip()}"
        prompt += "".join(f"\n{a}. {c}" for a, c in zip("ABCD", choices)) + "\nAnswer:"
        lls = letters(prompt)
        print(json.dumps({"index": i, "answer": "ABCD"[int(answer)], "chosen": "ABCD"[int(np.argmax(lls))], "log_likelihoods": lls}), flush=True)
else:
    here = pathlib.Path(__file__).parent
    prompts = json.loads((here / "choice.json").read_text())["prompts"]
    values = [[letters(p) for p in texts] for name, _, _, texts in prompts if name == "anatomy.csv"]
    (here / "choice_model.json").write_text(json.dumps(values) + "\n")
    print(json.dumps(values, indent=1))
