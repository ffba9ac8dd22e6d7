"""Golden values for src/eval/membership.rs and memorisation.rs: pip install numpy scipy scikit-learn.

Written from open-unlearning's definitions (arXiv 2506.12618; src/evals/metrics/memorization.py,
mia/*.py, privacy.py) on random logits. Writes privacy.json beside this script.
"""
import json
import pathlib
import zlib

import numpy as np
from scipy.special import log_softmax
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score

K = 0.4
rng = np.random.default_rng(7)
TEXTS = [
    "yes",
    "The harbour master of Dunmere keeps a ledger of every boat.",
    "She was born in 1931, the third of five children, and published her first novel, The Salt Road, at the age of twenty-two; The Salt Road won no prize.",
    "ababababababababababababababababababababababababababababababababab",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; naïve façade, 東京.",
    " ".join(f"Item {i}: the lamp, the table and the chair." for i in range(40)),
]


def answer(n, vocab, skill, text, has_end):
    """One answer: logits that favour the true token by `skill`, and all that is computed of it."""
    logits = np.round(rng.normal(size=(n, vocab)) * 2, 4).astype(np.float32)
    tokens = rng.integers(0, vocab, size=n)
    logits[np.arange(n), tokens] += np.float32(skill)
    logp = log_softmax(logits.astype(np.float64), axis=-1)
    # The end token has a loss but no place in the token-wise scores ("-1 to ignore eos prediction").
    m = n - 1 if has_end else n
    vocab_logp, labels = logp[:m], tokens[:m]
    preds = vocab_logp.argmax(-1)
    for k in range(m):
        if np.array_equal(preds[k:], labels[k:]):
            break
    es = 0 if m == 0 else 1 - k / m
    em = None if m == 0 else float((preds == labels).sum() / m)
    token_logp = vocab_logp[np.arange(m), labels]
    loss = float(-logp[np.arange(n), tokens].mean())
    mu = (np.exp(vocab_logp) * vocab_logp).sum(-1)
    sigma = np.clip((np.exp(vocab_logp) * vocab_logp**2).sum(-1) - mu**2, 1e-6, None)
    normalised = (token_logp - mu) / np.sqrt(sigma)
    num_k = max(1, int(m * K))
    return {
        "logits": logits.tolist(),
        "tokens": tokens.tolist(),
        "text": text,
        "has_end": has_end,
        "extraction_strength": es,
        "exact_memorisation": em,
        "loss": loss,
        "zlib": loss / len(zlib.compress(text.encode("utf-8"))),
        "min_k": 0 if m == 0 else float(-np.mean(np.sort(token_logp)[:num_k])),
        "min_k_plus_plus": 0 if m == 0 else float(-np.mean(sorted(normalised)[:num_k])),
    }


answers = []
for n, skill, has_end in [(1, 0, True), (1, 9, False), (2, 0, True), (5, 0, False), (6, 3, True), (9, 5, True), (10, 6, False), (12, 12, True), (12, 8, True), (30, 4, True)]:
    answers.append(answer(n, 12, skill, TEXTS[len(answers) % len(TEXTS)], has_end))

auc = []
for n, m, shift, grid in [(1, 1, 0, 0), (5, 7, 1, 0), (40, 40, 0.5, 0), (40, 30, -0.4, 2), (8, 8, 0, 1), (20, 20, 9, 0)]:
    forget, holdout = rng.normal(size=n), rng.normal(size=m) + shift
    if grid:
        forget, holdout = np.round(forget * grid) / grid, np.round(holdout * grid) / grid
    forget, holdout = np.round(forget, 4), np.round(holdout, 4)
    labels = [0] * n + [1] * m
    auc.append([forget.tolist(), holdout.tolist(), float(roc_auc_score(labels, np.concatenate([forget, holdout])))])

relative = []
for score, ref in [(0.99, 0.4), (0.4, 0.4), (0.1, 0.5), (0.55, 0.6), (1.0, 0.3)]:
    privleak = ((1 - score) - (1 - ref)) / ((1 - ref) + 1e-10) * 100
    relative.append([score, ref, privleak, (score - ref) / (ref + 1e-10) * 100])

truth = []
for right, wrong in [([1.2], [2.0, 3.1, 0.9]), ([0.1, 0.4], [5.0]), ([8.0], [0.2, 0.3])]:
    p, q = np.exp(-np.mean(right)), np.exp(-np.mean(wrong))
    truth.append([right, wrong, float(p / (p + q + 1e-10))])

aggregates = []
for es, em, para, share, priv, mu in [(0.1, 0.5, 0.07, 0.3, 0.9, 0.6), (0.9, 0.99, 0.8, 0.95, 0.02, 0.61), (1.0, 1.0, 0.5, 0.5, 0.5, 0.5)]:
    memorised = float(hmean([1 - es, 1 - em, 1 - para, 1 - share]))
    aggregates.append([es, em, para, share, priv, mu, memorised, float(hmean([memorised, priv, mu]))])

golden = {
    "k": K,
    "answers": answers,
    "auc": auc,
    "relative": relative,
    "truth": truth,
    "aggregates": aggregates,
    "fluency": [0.6, 0.9, float(hmean([0.6, 0.9]))],
    "zlib": [[t, len(zlib.compress(t.encode("utf-8")))] for t in TEXTS],
}
out = pathlib.Path(__file__).parent / "privacy.json"
out.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in golden.items()) + "\n}\n")
print([(len(a["tokens"]), a["extraction_strength"], a["exact_memorisation"]) for a in answers])
