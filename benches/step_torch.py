"""One ReGLU training step in PyTorch, the reference that benches/step.rs measures beside ours.

Started by the bench, which sends a line per measurement:
    step_torch.py MODEL.gguf JOB.json --style official|tuned --dtype f32|bf16 --threads N
Answers one JSON object a line. Commands on stdin: `forward`, `step`; end of input ends it.

The method is that of arXiv 2604.17396 as its public code runs it: W0 − s·B0·A0 in place of W0,
LoRA on all seven linears of a block, IHL on forget answers, cross-entropy on retain answers,
ROL summed over layers, gradient clipping, AdamW on A and B.
  official  forget and retain batch one after the other, logits of every position, the hinge
            with one-hot masks over the vocabulary
  tuned     one batch, logits of answer positions only, the hinge from gathered logits
Weights are the GGUF's, decoded. Token ids come from the bench, since the usual Python loaders
tokenise Gemma wrongly from a GGUF. B0 and P are random orthonormal: they cost what real ones do,
and step 0 is the original model whatever they are.

Needs torch, transformers, gguf, numpy.
"""

import argparse
import gc
import json
import resource
import sys
import time

import torch
import torch.nn.functional as F
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

RANK, ALPHA, RETAIN_RANK, ROL, GAMMA = 32, 64, 128, 0.5, 1.0

# GGUF name in a block -> name in transformers. Gemma's norms are stored as 1 + weight.
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "gemma3": {
        "attn_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    },
    "llama": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}


def interleaved(w, n_head):
    """llama.cpp turns neighbouring pairs of a head's outputs, transformers its two halves."""
    return w.reshape(n_head, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def load(path, dtype):
    reader = GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    if arch not in NORMS:
        sys.exit(f"step_torch: {path} is of architecture {arch}, this script knows {list(NORMS)}")

    def key(name):
        return reader.get_field(f"{arch}.{name}").contents()

    tensors = {t.name: t for t in reader.tensors}
    heads = {"attn_q": key("attention.head_count"), "attn_k": key("attention.head_count_kv")}
    common = dict(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        use_cache=False,
    )
    if arch == "gemma3":
        config = Gemma3TextConfig(
            head_dim=key("attention.key_length"),
            query_pre_attn_scalar=key("attention.key_length"),
            sliding_window=key("attention.sliding_window"),
            **common,
        )
        model = Gemma3ForCausalLM(config).to(dtype)
    else:
        assert "output.weight" not in tensors, "its head is taken to be its table of embeddings"
        theta = key("rope.freq_base")
        config = LlamaConfig(
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            rope_theta=theta,
            tie_word_embeddings=True,
            **common,
        )
        model = LlamaForCausalLM(config).to(dtype)
    shift = 1.0 if arch == "gemma3" else 0.0
    # .to() also rounded the frequencies of the rotary embedding.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)

    def put(param, name, shift=0.0):
        t = tensors[f"{name}.weight"]
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) - shift
        with torch.no_grad():
            param.copy_(w.reshape(param.shape))

    put(model.model.embed_tokens.weight, "token_embd")
    put(model.model.norm.weight, "output_norm", shift)
    for i, block in enumerate(model.model.layers):
        for ours, theirs in LINEARS.items():
            weight = block.get_submodule(theirs).weight
            put(weight, f"blk.{i}.{ours}")
            if arch == "llama" and ours in heads:
                with torch.no_grad():
                    weight.copy_(interleaved(weight.clone(), heads[ours]))
        for ours, theirs in NORMS[arch].items():
            put(block.get_submodule(theirs).weight, f"blk.{i}.{ours}", shift)
    for p in model.parameters():
        p.requires_grad_(False)
    return model


class Adapted(nn.Module):
    """y = W·x + s·B(A·x), with W = W0 − s·B0·A0."""

    def __init__(self, linear):
        super().__init__()
        w = linear.weight.data.float()
        n_out = w.shape[0]
        self.scale = ALPHA / RANK
        b0 = torch.linalg.qr(torch.randn(n_out, RANK))[0]
        a0 = b0.T @ w
        k = min(RETAIN_RANK, n_out // 2)
        dtype = linear.weight.dtype
        self.weight = nn.Parameter((w - self.scale * b0 @ a0).to(dtype), requires_grad=False)
        self.a = nn.Parameter(a0.to(dtype).contiguous())
        self.b = nn.Parameter(b0.to(dtype).contiguous())
        self.register_buffer("basis", torch.linalg.qr(torch.randn(n_out, k))[0].to(dtype))

    def forward(self, x):
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.a), self.b)

    def rol(self):
        return (self.b.T @ self.basis).float().square().sum()


def adapt(model):
    adapted = []
    for block in model.model.layers:
        for name in LINEARS.values():
            parent, leaf = name.rsplit(".", 1)
            module = Adapted(block.get_submodule(name))
            setattr(block.get_submodule(parent), leaf, module)
            adapted.append(module)
    return adapted


def padded(samples):
    """ids [n, T], attention mask [n, T], labels [n, T] (−100: no loss)."""
    n = max(len(s["tokens"]) for s in samples)
    ids = torch.zeros(len(samples), n, dtype=torch.long)
    mask = torch.zeros(len(samples), n, dtype=torch.long)
    labels = torch.full((len(samples), n), -100)
    for i, s in enumerate(samples):
        tokens = torch.tensor(s["tokens"])
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        for a, b in s["answers"]:
            labels[i, a:b] = tokens[a:b]
    return ids, mask, labels


class Official:
    def __init__(self, model, forget, retain):
        self.model, self.forget, self.retain = model, padded(forget), padded(retain)

    def losses(self):
        return self.hinge(*self.forget), self.cross_entropy(*self.retain)

    def logits(self, ids, mask, labels):
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        labels = labels[:, 1:]
        return logits, labels

    def hinge(self, *batch):
        logits, labels = self.logits(*batch)
        counted = labels != -100
        p = logits.softmax(-1)
        one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]).to(p.dtype)
        p_y = (p * one_hot).sum(-1)
        rival = (p * (1 - one_hot)).max(-1).values
        loss = (1 + p_y - rival).clamp(min=0)
        return (loss * counted).sum() / counted.sum()

    def cross_entropy(self, *batch):
        logits, labels = self.logits(*batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class Tuned:
    def __init__(self, model, forget, retain):
        self.model = model
        self.ids, self.mask, labels = padded(forget + retain)
        labels = labels[:, 1:]
        self.rows = labels != -100
        self.targets = labels[self.rows]
        self.n_forget = int(self.rows[: len(forget)].sum())

    def losses(self):
        hidden = self.model.model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][self.rows])
        n = self.n_forget
        return self.hinge(logits[:n], self.targets[:n]), F.cross_entropy(logits[n:], self.targets[n:])

    @staticmethod
    def hinge(logits, targets):
        top = logits.detach().topk(2, -1).indices
        rival = torch.where(top[:, 0] == targets, top[:, 1], top[:, 0])
        pair = logits.gather(1, torch.stack([targets, rival], 1))
        p = (pair - logits.logsumexp(-1, keepdim=True)).exp()
        return (1 + p[:, 0] - p[:, 1]).clamp(min=0).mean()


def main():
    args = argparse.ArgumentParser()
    args.add_argument("model")
    args.add_argument("job")
    args.add_argument("--style", choices=["official", "tuned"], required=True)
    args.add_argument("--dtype", choices=["f32", "bf16"], required=True)
    args.add_argument("--threads", type=int, required=True)
    args = args.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(42)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    with open(args.job) as f:
        job = json.load(f)
    model = load(args.model, dtype)
    adapted = adapt(model)
    params = [p for m in adapted for p in (m.a, m.b)]
    optimiser = torch.optim.AdamW(params, lr=job["lr"], weight_decay=0.01)
    style = {"official": Official, "tuned": Tuned}[args.style]
    batch = style(model, job["forget"], job["retain"])

    def forward():
        with torch.no_grad():
            return batch.losses()

    def step():
        optimiser.zero_grad(set_to_none=True)
        forget, retain = batch.losses()
        loss = forget + GAMMA * retain + ROL * sum(m.rol() for m in adapted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        return forget, retain

    gc.collect()
    # The peak of loading is not the peak of training.
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    for line in sys.stdin:
        work = {"forward": forward, "step": step}[line.strip()]
        cpu, wall = time.process_time(), time.perf_counter()
        forget, retain = work()
        report = {
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
            "peak": peak_bytes(),
            "forget": forget.item(),
            "retain": retain.item(),
        }
        print(json.dumps(report), flush=True)


def peak_bytes():
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
