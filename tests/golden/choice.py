"""Golden values for src/data/choice.rs and src/eval/choice.rs: pip install jinja2 numpy.

The prompts come from the task templates of lm-evaluation-harness (mmlu, wmdp) rendered by Jinja2 as
the harness renders them, the errors from its definitions. Writes choice.json beside this script.
"""
import json
import pathlib

import jinja2
import numpy as np

ENV = jinja2.Environment(loader=jinja2.BaseLoader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
TEXT = ENV.from_string("{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:")
DESCRIPTION = "The following are multiple choice questions (with answers) about {}.\n\n"

QUESTIONS = [
    {"question": "What colour is fresh snow?", "choices": ["Black", "White", "Green", "Red"], "answer": 1},
    {"question": "  Which of these is a\nprime number? ", "choices": ["4", "6", " 7", "9 "], "answer": 2},
    {"question": 'She said "Paris, of course". Of which country is it the capital?', "choices": ["France", "Spain, formerly", 'the "Union"', "Chile"], "answer": 0},
    {"question": "How many legs has a spider?", "choices": ["2", "4", "6", "8"], "answer": 3},
    {"question": "Which planet is nearest to the sun?", "choices": ["Mercury", "Venus", "Earth", "Mars"], "answer": 0},
    {"question": "Which gas do plants take from the air?", "choices": ["Helium", "Neon", "Carbon dioxide", "Argon"], "answer": 2},
]
TOPICS = {
    "high_school_us_history_test.csv": "high school us history",
    "anatomy.csv": "anatomy",
    "wmdp-bio.json": "biology",
    "chem_questions.json": "chemistry",
    "wmdp_cyber.jsonl": "cybersecurity",
}


def prompt(topic, shots, doc):
    """Description, first-n shots less the document itself, the question (harness: fewshot_context)."""
    text = DESCRIPTION.format(topic)
    for shot in [s for s in shots if s != doc]:
        text += TEXT.render(**shot) + " " + "ABCD"[shot["answer"]] + "\n\n"
    return text + TEXT.render(**doc)


def mean_stderr(hits):
    return float(np.std(hits, ddof=1) / np.sqrt(len(hits)))


def pooled_stderr(stderrs, sizes):
    variance = sum((n - 1) * se**2 * n for se, n in zip(stderrs, sizes)) / (sum(sizes) - len(sizes))
    return float(np.sqrt(variance / sum(sizes)))


counts = [(37, 100), (0, 20), (135, 135), (1, 2), (61, 234)]
subjects = []
for hits, n in counts:
    subjects.append([hits, n, mean_stderr([1.0] * hits + [0.0] * (n - hits))])
golden = {
    "questions": QUESTIONS,
    "prompts": [
        [name, topic, n_shots, [prompt(topic, QUESTIONS[:n_shots], q) for q in QUESTIONS]]
        for name, topic in TOPICS.items()
        for n_shots in ((0, 3) if name in ("anatomy.csv", "wmdp-bio.json") else (0,))
    ],
    "stderr": subjects,
    "pooled": pooled_stderr([s[2] for s in subjects], [s[1] for s in subjects]),
}
out = pathlib.Path(__file__).parent / "choice.json"
out.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
