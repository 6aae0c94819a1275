"""Responses to try solvers on, from benign to degenerate, and what NumPy makes of a solution."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from accel.solvers import Factorization, Responses

DEFECTS = ("dead", "duplicated", "scaled", "constant")
# Rows and channels, with more rows and with fewer. Only two shapes, as each is compiled.
SHAPES = ((120, 20), (12, 20))


class Problem(NamedTuple):
    name: str
    responses: Responses
    rank: int


def make_problem(seed: int, dtype: type[np.floating] = np.float64) -> Problem:
    """A problem with any of ``DEFECTS``, symmetric or with inputs that differ from the targets.

    Consecutive seeds go through all combinations; 200 of them hold each six times or more.
    """
    random = np.random.default_rng(seed)
    n, d = SHAPES[seed % len(SHAPES)]
    chosen = seed // len(SHAPES)
    defects = [defect for bit, defect in enumerate(DEFECTS) if chosen >> bit & 1]
    asymmetric = bool(random.integers(2))

    decay = np.arange(1, d + 1) ** -random.uniform(0, 2)
    targets = random.standard_normal((n, d)) * decay @ random.standard_normal((d, d))
    targets += random.uniform(-1, 1, d) * targets.std(0)
    if "duplicated" in defects:
        targets[:, d // 2 :] = targets[:, : d - d // 2]
    if "scaled" in defects:
        targets *= 10 ** random.uniform(-6, 6, d)
    inputs = targets.copy()
    if asymmetric:
        inputs += 0.3 * targets.std(0) * random.standard_normal((n, d))
        if "duplicated" in defects:
            inputs[:, d // 2 :] = inputs[:, : d - d // 2]
    for defect, value in (("dead", 0.0), ("constant", 1234.567)):
        if defect in defects:
            channels = random.choice(d, 3, replace=False)
            targets[:, channels] = value
            inputs[:, channels] = value
    name = "+".join([f"{n}x{d}", *defects, "asymmetric" if asymmetric else "symmetric"])
    responses = Responses(inputs.astype(dtype), targets.astype(dtype))
    return Problem(name, responses, int(random.integers(1, d)))


def squared_error(responses: Responses, factorization: Factorization, activation: str) -> float:
    """``Σ‖r(y) - r(ŷ')‖²`` by NumPy in float64."""
    inputs, targets = (np.asarray(rows, np.float64) for rows in responses)
    reduce, expand, bias = (np.asarray(factor, np.float64) for factor in factorization[:3])
    outputs = inputs @ reduce.T @ expand.T + bias
    assert activation in ("relu", "identity")
    if activation == "relu":
        targets, outputs = np.maximum(targets, 0), np.maximum(outputs, 0)
    return float(((targets - outputs) ** 2).sum())
