"""Golden values for src/eval/rouge.rs and porter.rs: pip install rouge-score nltk.

usage: rouge.py TOFU_DIR [--all-words FILE]

Pairs are cut, shuffled and mixed from TOFU answers with a fixed seed; words are every nth word of
TOFU plus invented ones with the stemmer's suffixes. Writes rouge.json beside this script.
"""
import json
import pathlib
import random
import re
import sys

from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

here = pathlib.Path(__file__).parent
tofu = pathlib.Path(sys.argv[1])
rng = random.Random(42)
stemmer = PorterStemmer()
scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def rows(name):
    return [json.loads(line) for line in (tofu / name).read_text().splitlines()]


def short(text, n=14):
    words = text.split()
    start = rng.randrange(max(1, len(words) - n + 1))
    return " ".join(words[start : start + n])


def derive(row, reference):
    kind = rng.randrange(6)
    words = reference.split()
    if kind == 0:
        return " ".join(words[: rng.randint(0, len(words))])
    if kind == 1:
        rng.shuffle(words)
        return " ".join(words)
    if kind == 2:
        return " ".join(w for w in words if rng.random() < 0.7).upper()
    if kind == 3:
        return short(row["paraphrased_answer"])
    if kind == 4:
        return short(rng.choice(row["perturbed_answer"]))
    return " ".join(w + rng.choice(["", "s", "ed", "ing", "ly", "-", "!"]) for w in words)


pairs = [
    ["", "a"],
    ["a", ""],
    ["…", "…"],
    ["É tude İstanbul K Straße", "e tude istanbul k strasse"],
    ["a a a b", "a b b a"],
    ["sky skies dying proceed news", "skies sky die proceeding new"],
]
forget = rows("forget10_perturbed.json")
for row in rng.sample(forget, 300):
    reference = short(row["answer"])
    pairs.append([reference, derive(row, reference)])


def score(pair):
    scores = scorer.score(pair[0], pair[1])
    return [list(scores[k]) for k in ("rouge1", "rougeL")]


words = set()
for row in rows("full.json"):
    words.update(re.findall(r"[a-z0-9]+", (row["question"] + " " + row["answer"]).lower()))
words = sorted(words)
letters = "aeiouybcdlnrst"
suffixes = (
    "ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness "
    "fulness ousness aliti iviti biliti fulli logi icate ative alize iciti ical ful ness al ance "
    "ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize e ll ies ied eed ed "
    "ing y s sses ss alliS"
).lower().split()
invented = sorted(
    {
        "".join(rng.choice(letters) for _ in range(rng.randint(0, 5))) + rng.choice(suffixes) + rng.choice(["", "", "s", "ed", "li", "y"])
        for _ in range(200000)
    }
)
if "--all-words" in sys.argv:
    path = sys.argv[sys.argv.index("--all-words") + 1]
    everything = [w for w in words + invented if len(w) > 3]
    pathlib.Path(path).write_text("".join(f"{w} {stemmer.stem(w)}\n" for w in everything))
chosen = [w for w in words[::6] + rng.sample(invented, 1500) if len(w) > 3]
golden = {
    "pairs": [[*pair, *score(pair)] for pair in pairs],
    "stems": " ".join(f"{w}:{stemmer.stem(w)}" for w in chosen),
}
out = here / "rouge.json"
out.write_text(json.dumps(golden, ensure_ascii=False, indent=0) + "\n")
print(len(golden["pairs"]), "pairs,", len(chosen), "stems,", out.stat().st_size, "bytes")
