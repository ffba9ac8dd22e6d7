"""Golden adapters for src/patch/peft: pip install numpy. The safetensors
format is written here: a length, a JSON header, the data.

Two PEFT adapter directories for a toy llama (n_embd 16, 4 heads, 2 key heads, n_ff 24), and the
updates they make to the GGUF's weights. Those are worked out in f64 and without a reshape: each
row of q and k is carried to where llama.cpp's rope looks for it, one index at a time.
Writes peft.json and peft/ beside this script.
"""
import json
import math
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
N_EMBD, N_HEAD, N_KV, N_FF = 16, 4, 2, 24
HEAD = N_EMBD // N_HEAD
# module: (n_out, n_in, heads to reorder, GGUF name)
MODULES = {
    "self_attn.q_proj": (N_EMBD, N_EMBD, N_HEAD, "attn_q"),
    "self_attn.k_proj": (N_KV * HEAD, N_EMBD, N_KV, "attn_k"),
    "self_attn.v_proj": (N_KV * HEAD, N_EMBD, 0, "attn_v"),
    "self_attn.o_proj": (N_EMBD, N_EMBD, 0, "attn_output"),
    "mlp.gate_proj": (N_FF, N_EMBD, 0, "ffn_gate"),
    "mlp.up_proj": (N_FF, N_EMBD, 0, "ffn_up"),
    "mlp.down_proj": (N_EMBD, N_FF, 0, "ffn_down"),
}


def bf16(x):
    """Truncated to bfloat16: the upper half of an f32."""
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4") & 0xFFFF0000
    return bits.view("<f4"), (bits >> 16).astype("<u2").tobytes()


def encode(x, dtype):
    if dtype == "bfloat16":
        return bf16(x)
    kind = {"float32": "<f4", "float16": "<f2"}[dtype]
    return x.astype(kind).astype("<f4"), x.astype(kind).tobytes()


def serialize(tensors):
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key in sorted(tensors):
        t = tensors[key]
        span = [len(data), len(data) + len(t["data"])]
        header[key] = {"dtype": names[t["dtype"]], "shape": t["shape"], "data_offsets": span}
        data += t["data"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def reordered(delta, heads):
    """Row i of half j of a head becomes its row 2 i + j."""
    if not heads:
        return delta
    out = np.empty_like(delta)
    size = delta.shape[0] // heads
    for head in range(heads):
        for half in range(2):
            for i in range(size // 2):
                out[head * size + 2 * i + half] = delta[head * size + half * (size // 2) + i]
    return out


def adapter(name, dtype, layers, config, rank_of, scale_of, seed):
    rng = np.random.default_rng(seed)
    tensors, deltas = {}, {}
    for layer in layers:
        for module, (n_out, n_in, heads, gguf) in MODULES.items():
            full = f"model.layers.{layer}.{module}"
            rank = rank_of(full)
            a, a_bytes = encode(rng.normal(size=(rank, n_in)), dtype)
            b, b_bytes = encode(rng.normal(size=(n_out, rank)), dtype)
            for part, x, data in [("A", a, a_bytes), ("B", b, b_bytes)]:
                key = f"base_model.model.{full}.lora_{part}.weight"
                tensors[key] = {"dtype": dtype, "shape": list(x.shape), "data": data}
            delta = scale_of(full) * (b.astype(np.float64) @ a.astype(np.float64))
            delta = reordered(delta, heads)
            deltas[f"blk.{layer}.{gguf}.weight"] = [float(f"{x:.7g}") for x in delta.ravel()]
    folder = HERE / "peft" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(serialize(tensors))
    common = {
        "base_model_name_or_path": "toy", "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": True, "lora_dropout": 0.05, "modules_to_save": None,
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "use_dora": False,
        "target_modules": sorted(m.split(".")[1] for m in MODULES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(common | config, indent=2) + "\n")
    return deltas


plain = adapter(
    "plain", "float32", [0],
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 3},
     "alpha_pattern": {"^model.layers.0.mlp.up_proj": 2}},
    lambda m: 2 if m.endswith("down_proj") else 3 if m.endswith("q_proj") else 4,
    lambda m: 8 / 2 if m.endswith("down_proj") else 8 / 3 if m.endswith("q_proj")
    else 2 / 4 if m.endswith("up_proj") else 8 / 4,
    1,
)
rslora = adapter(
    "rslora", "bfloat16", [1], {"r": 3, "lora_alpha": 6, "use_rslora": True},
    lambda m: 3, lambda m: 6 / math.sqrt(3), 2,
)
halves = adapter(
    "halves", "float16", [0], {"r": 1, "lora_alpha": 1}, lambda m: 1, lambda m: 1.0, 3,
)
golden = {"plain": plain, "rslora": rslora, "halves": halves}
rows = [f'"{k}": {{\n' + ",\n".join(f'"{t}": {json.dumps(v)}' for t, v in d.items()) + "\n}" for k, d in golden.items()]
(HERE / "peft.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")
