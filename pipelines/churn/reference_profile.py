"""The reference profile of a bundle: what its features and its predictions looked like in training.

The rule is that of `src/drift/profile.rs`, implemented a second time so that trainers need nothing but numpy; the test vectors
in `tests/data/profile` hold the two together. Other trainers may import or copy this file.
"""

import numpy as np

EDGES = 200  # most edges of a column
CELLS = 20  # cells that PSI and the verdict use


def build_profile(columns, times, window_rows):
    """Frozen histograms of columns (name → float64 values, missing as NaN) and `times` (ms), rows in time order."""
    window_rows = max(1, min(window_rows, len(times) // 10))
    made = [column_profile(name, values, window_rows) for name, values in columns.items()]
    effects = design_effects([spread for _, spread in made])
    return {
        "format": 1,
        "rows": len(times),
        "from": int(times[0]),
        "to": int(times[-1]),
        "window_rows": window_rows,
        "columns": [{**column, "design_effect": float(effect)} for (column, _), effect in zip(made, effects)],
    }


def column_profile(name, values, window_rows):
    present = np.sort(values[np.isfinite(values)])
    n = len(present)
    distinct = np.unique(present)
    if n == 0:
        edges = np.array([])
    elif len(distinct) < EDGES:
        # Below the smallest value, so that what the reference never saw has a bin of its own on both sides.
        below = distinct[0] - 2.0**-20 * max(abs(distinct[0]), 1.0)
        edges = np.concatenate([[below], distinct])
    else:
        edges = np.unique(present[[-(-k * n // EDGES) - 1 for k in range(1, EDGES + 1)]])

    def histogram(column):
        column = column[np.isfinite(column)]
        return np.bincount(np.searchsorted(edges, column, side="left"), minlength=len(edges) + 1)

    counts = histogram(values)
    up_to = np.cumsum(counts)[:-1]
    psi_edges = sorted({int(np.argmax(CELLS * up_to >= k * n)) for k in range(1, CELLS)}) if n else []
    if n and counts[0] == 0 and len(psi_edges) < CELLS - 1 and psi_edges[0] != 0:
        psi_edges.insert(0, 0)

    def cells(column):
        parts = np.split(histogram(column), [edge + 1 for edge in psi_edges])
        return np.array([part.sum() for part in parts] + [(~np.isfinite(column)).sum()])

    whole = cells(values)
    starts = range(0, len(values) - window_rows + 1, window_rows)
    windows = [cells(values[start : start + window_rows]) for start in starts]
    column = {
        "name": name,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "missing": int(whole[-1]),
        "psi_edges": psi_edges,
    }
    return column, spread(whole, windows, window_rows)


def spread(whole, windows, window_rows):
    """Excess of the windows' spread over that of independent rows, its noise, and windows less one."""
    rows, freedom = int(whole.sum()), len(windows) - 1
    groups, start = [], 0
    for end in range(1, len(whole) + 1):
        if whole[start:end].sum() >= 5.0 * rows / window_rows:
            groups.append([start, end])
            start = end
    if freedom < 2 or len(groups) < 2:
        return None
    groups[-1][1] = len(whole)

    def grouped(cells):
        return np.array([cells[a:b].sum() for a, b in groups], dtype=float)

    everything = grouped(whole)
    scale = np.sqrt(window_rows * (rows - window_rows) / rows)
    deviations = np.array(
        [
            scale * (here / window_rows - (everything - here) / (rows - window_rows)) / np.sqrt(everything / rows)
            for here in map(grouped, windows)
        ]
    )
    products = deviations @ deviations.T
    trace = products.trace() / freedom
    if trace <= 0:
        return None
    unbiased = ((products**2).sum() - trace**2 * freedom) / ((freedom - 1) * (freedom + 2))
    noise = 2 / freedom * np.sqrt(1 + freedom / (2 * len(groups)))
    return unbiased / trace - 1, noise, freedom


def design_effects(spreads):
    """How much more windows differ than independent rows would make them, a factor a column."""
    excesses = sorted(s[0] for s in spreads if s)
    common = max(0.0, excesses[len(excesses) // 2]) if excesses else 0.0
    effects = []
    for s in spreads:
        own = s[0] if s and s[0] > 3 * s[1] else 0.0
        effects.append(1 + max(own, common) * (1 + 10 / s[2]) if s else 1.0)
    return effects
