"""Writes the vectors of this folder: rows, and the reference profile that the rule makes of them.

The rule is docs and code of `src/drift/profile.rs`; its second, independent implementation is the trainers', which is
imported here. Needs numpy. Run in this folder: python make.py
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "pipelines/churn"))
from reference_profile import build_profile  # noqa: E402


def main():
    rng = np.random.default_rng(7)
    n, window_rows = 2400, 200
    walk = np.empty(n)
    walk[0] = rng.normal()
    for i in range(1, n):
        walk[i] = 0.9 * walk[i - 1] + rng.normal()
    holes = rng.normal(50, 10, n)
    holes[rng.random(n) < 0.2] = np.nan
    columns = {
        "continuous": rng.normal(size=n),
        "skewed": np.round(rng.lognormal(3, 1.5, n), 2),
        "counts": rng.poisson(1.3, n).astype(float),
        "mostly_zero": np.where(rng.random(n) < 0.7, 0.0, np.round(rng.exponential(20, n), 3)),
        "constant": np.full(n, 0.1),
        "binary": (rng.random(n) < 0.03).astype(float),
        "autocorrelated": walk,
        "holes": holes,
        "never": np.full(n, np.nan),
    }
    # Values are written with few digits, to keep the file small; the profile is of what is written.
    columns = {name: np.round(values, 4) for name, values in columns.items()}
    times = 1_700_000_000_000 + 1000 * np.arange(n)
    shuffled = rng.permutation(n)
    vector = {
        "window_rows": window_rows,
        "times": times[shuffled].tolist(),
        "values": {
            name: [None if np.isnan(v) else float(v) for v in values[shuffled]] for name, values in columns.items()
        },
        "profile": build_profile(columns, times, window_rows),
    }
    with open("vectors.json", "w") as file:
        json.dump(vector, file, separators=(",", ":"))
        file.write("\n")


if __name__ == "__main__":
    main()
