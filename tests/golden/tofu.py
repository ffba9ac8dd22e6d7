"""Golden values for src/eval/tofu.rs: TOFU's official formulas on the shared logs.

usage: tofu.py EVAL_LOGS_DIR; needs numpy and scipy. Written from the paper's and the program's
definitions, not with our code. Writes tofu.json beside this script.
"""
import json
import pathlib
import sys

import numpy as np
from scipy import stats

logs = pathlib.Path(sys.argv[1])
LOGS = {n: json.loads((logs / f"phi_{n}" / "eval_log_aggregated.json").read_text()) for n in ("full", "retain90")}
SPLITS = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}


def column(split, metric):
    return np.array(list(split[metric].values()))


def t_of(split):
    return np.exp(column(split, "average_perturb_loss").mean(-1) - column(split, "avg_paraphrased_loss"))


golden = {}
for name, log in LOGS.items():
    parts = {}
    for split, key in SPLITS.items():
        prob = np.exp(-column(log[key], "avg_gt_loss"))
        if split in ("real_authors", "world_facts"):
            prob = prob / (prob + np.exp(-column(log[key], "average_perturb_loss")).sum(-1))
        t = t_of(log[key])
        ratio = np.minimum(t, 1 / t) if split == "forget" else np.maximum(0, 1 - 1 / t)
        parts[f"{split}_prob"] = float(prob.mean())
        parts[f"{split}_rouge_l"] = float(column(log[key], "rougeL_recall").mean())
        parts[f"{split}_truth_ratio"] = float(ratio.mean())
    parts["model_utility"] = float(stats.hmean([v for k, v in parts.items() if not k.startswith("forget")]))
    golden[name] = parts
for n in (300, 40):
    a, b = (t_of(LOGS[k]["eval_log_forget.json"])[:n] for k in ("full", "retain90"))
    test = stats.ks_2samp(a, b)
    golden[f"full_vs_retain90_first_{n}"] = {"forget_quality": float(test.pvalue), "forget_ks": float(test.statistic)}
(pathlib.Path(__file__).parent / "tofu.json").write_text(json.dumps(golden, indent=1) + "\n")
print(json.dumps(golden, indent=1))
