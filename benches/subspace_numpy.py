"""The dense way to RILA and retain bases in NumPy: covariances of n_out x n_out in f64, eigh of both.

python subspace_numpy.py N_OUT N_FORGET N_RETAIN RANK K BETA prints CPU seconds of one tensor.
"""

import sys
import time

import numpy as np

n_out, n_forget, n_retain, rank, k = map(int, sys.argv[1:6])
beta = float(sys.argv[6])
rng = np.random.default_rng(0)
h_f = rng.standard_normal((n_out, n_forget))
h_r = rng.standard_normal((n_out, n_retain))
began = time.process_time()
c_f = h_f @ h_f.T / n_forget
c_r = h_r @ h_r.T / n_retain
contrast, q = np.linalg.eigh((1 - beta) * c_f - beta * c_r)
of_retain, p = np.linalg.eigh(c_r)
q, p = q[:, ::-1][:, :rank], p[:, ::-1][:, :k]
assert contrast[-1] > 0 and of_retain[-1] > 0 and q.shape[1] == rank and p.shape[1] == k
print(time.process_time() - began)
