"""Golden values for src/eval/ks.rs: pip install scipy mpmath.

Exact p-values come from counting lattice paths with Python integers, asymptotic ones from SciPy's
kstwo; ties and D from scipy.stats.ks_2samp. Writes ks.json beside this script.
"""
import json
import math
import pathlib
import warnings

import mpmath
import numpy as np
from scipy import stats

warnings.simplefilter("ignore")
mpmath.mp.dps = 50


def exact_ln_p(n1, n2, distance):
    """ln P(n1 n2 D >= distance): paths that stay inside, counted in integers."""
    row = [0] * (n2 + 1)
    for i in range(n1 + 1):
        for j in range(n2 + 1):
            if abs(i * n2 - j * n1) >= distance:
                row[j] = 0
            elif i == 0 and j == 0:
                row[j] = 1
            else:
                row[j] = (row[j] if i else 0) + (row[j - 1] if j else 0)
    total = math.comb(n1 + n2, n1)
    p = mpmath.mpf(total - row[n2]) / mpmath.mpf(total)
    return float(mpmath.log(p))


counts = []
for n1, n2 in [(1, 1), (1, 5), (2, 3), (5, 5), (7, 11), (12, 18), (40, 40), (40, 39), (100, 117), (200, 200), (300, 300), (300, 299), (20, 400)]:
    step = math.gcd(n1, n2)
    for share in (0.02, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0):
        distance = max(step, round(share * n1 * n2 / step) * step)
        if [n1, n2, distance] not in [row[:3] for row in counts]:
            counts.append([n1, n2, distance, exact_ln_p(n1, n2, distance)])
# Below the range of f64: fully separated samples have two of C(2n, n) orders.
for n in (600, 2000):
    counts.append([n, n, n * n, float(mpmath.log(2) - mpmath.log(mpmath.binomial(2 * n, n)))])
counts.append([600, 600, 600 * 560, exact_ln_p(600, 600, 600 * 560)])

rng = np.random.default_rng(42)
samples = []
for n1, n2, shift, grid in [(8, 8, 0, 0), (8, 9, 1, 0), (40, 40, 0.3, 0), (40, 40, 1.5, 0), (30, 50, 0.5, 4), (25, 25, 0.2, 2), (60, 45, 0, 1), (10, 10, 0, 0.2)]:
    a, b = rng.normal(size=n1), rng.normal(size=n2) + shift
    if grid:
        a, b = np.round(a * grid) / grid, np.round(b * grid) / grid
    a, b = np.round(a, 4), np.round(b, 4)
    test = stats.ks_2samp(a, b, method="exact")
    samples.append([a.tolist(), b.tolist(), float(test.statistic), float(test.pvalue)])

asymptotic = []
for n1, n2 in [(10001, 5), (10001, 40), (12000, 150), (10001, 10001), (20000, 11000)]:
    m, n = max(n1, n2), min(n1, n2)
    en = int(np.round(m * n / (m + n)))
    for t in (0.3, 0.45, 0.6, 0.9, 1.3, 1.6, 2.2, 5.0, 12.0):
        d = t / math.sqrt(en)
        if d >= 1:
            continue
        distance = round(d * n1 * n2)
        p = float(stats.distributions.kstwo.sf(distance / (n1 * n2), en))
        asymptotic.append([n1, n2, distance, p])

golden = {"counts": counts, "samples": samples, "asymptotic": asymptotic}
out = pathlib.Path(__file__).parent / "ks.json"
out.write_text("{\n" + ",\n".join(f'"{k}": [\n' + ",\n".join(json.dumps(row) for row in v) + "\n]" for k, v in golden.items()) + "\n}\n")
for row in counts:
    if row[2] == row[0] * row[1]:
        print("fully separated", row[:2], "ln p", row[3], "p", mpmath.nstr(mpmath.exp(row[3]), 8))
print("scipy, 300/300 separated:", stats.ks_2samp(range(300), range(300, 600), method="exact").pvalue)
print("scipy, 40/39 separated:", stats.ks_2samp(range(40), range(40, 79), method="exact").pvalue, "exact", math.exp(exact_ln_p(40, 39, 40 * 39)))
print("scipy, 300/299 separated:", stats.ks_2samp(range(300), range(300, 599), method="exact").pvalue, "exact", math.exp(exact_ln_p(300, 299, 300 * 299)))
