"""Kind and rank of every layer by measured errors, exactly: a multiple-choice knapsack.

minimise  Σ_l e_l(j_l)    subject to    Σ_l C_l(j_l) ≤ budget - other

over one candidate j of each layer l: a chain at certain ranks, or dense (e = 0). The cost C counts
MACs, parameters or time. e is what the chain adds to the relative error at the network's outputs,
estimated from measurements (``accel.error_curves``). There the errors of different layers add up to
first order, which the product of energies (``exact_energy``) does not know of: it weighs a layer
whose errors die out like one whose errors are seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

from accel.rank_selection.knapsack import Front, solve, undominated


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A chain that can replace a layer: the name of its decomposition, and its ranks."""

    decomposition: str
    ranks: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerErrors:
    """What a layer can be replaced by, at what cost and with what error.

    Attributes:
        path: Path of the layer in the module tree.
        candidates: The chains.
        costs: Cost of each: MACs per image, or time.
        errors: Relative error at the network's outputs of each, e.
        dense_cost: Cost of the layer as it is.
        fixed: What a rule demands: None (free), ``"dense"``, or a rank, the leading one of a chain.
    """

    path: str
    candidates: tuple[Candidate, ...]
    costs: Int64[np.ndarray, " k"]
    errors: Float64[np.ndarray, " k"]
    dense_cost: int
    fixed: Literal["dense"] | int | None = None


def measured_error(
    layers: Sequence[LayerErrors],
    other_cost: int,
    budget: int,
    unit: str = "MACs per image",
) -> dict[str, Candidate | None]:
    """The chain of each layer, by path; None where it stays dense.

    Args:
        layers: The layers that can be replaced.
        other_cost: Cost of what is never replaced.
        budget: What all may cost together.
        unit: What costs are counted in.

    Raises:
        ValueError: If the budget cannot be met; the message says the largest reachable speedup.
    """
    fronts, options = _fronts(layers)
    least = sum(int(front.cost[0]) for front in fronts)
    slack = budget - other_cost - least
    if slack < 0:
        original = other_cost + sum(layer.dense_cost for layer in layers)
        reachable = int(1000 * original / (other_cost + least)) / 1000
        raise ValueError(
            f"a budget of {budget:,} {unit} cannot be met: with the cheapest chain in"
            f" every layer, {other_cost + least:,} of {original:,} are left; the largest reachable"
            f" speedup is {reachable:.3f}×"
        )
    chosen = solve([front._replace(cost=front.cost - front.cost[0]) for front in fronts], slack)
    return {
        layer.path: choices[index]
        for layer, choices, index in zip(layers, options, chosen, strict=True)
    }


def least_cost(layers: Sequence[LayerErrors]) -> int:
    """The cost of the cheapest that rules allow of each layer, summed."""
    return sum(int(front.cost[0]) for front in _fronts(layers)[0])


def _fronts(layers: Sequence[LayerErrors]) -> tuple[list[Front], list[list[Candidate | None]]]:
    """What can be chosen of each layer and is not undercut, and what each of these is."""
    fronts, options = [], []
    for layer in layers:
        cost = np.append(layer.costs, layer.dense_cost)
        loss = np.append(layer.errors, 0.0)
        # A chain that costs as much as the layer itself leaves it dense, whatever a rule says.
        allowed = np.array([_allowed(layer, candidate) for candidate in layer.candidates], bool)
        allowed &= layer.costs < layer.dense_cost
        allowed = np.append(allowed, not (isinstance(layer.fixed, int) and allowed.any()))
        chosen = np.flatnonzero(allowed)
        kept = chosen[undominated(cost[chosen], loss[chosen])]
        fronts.append(Front(cost[kept], loss[kept]))
        choices = [*layer.candidates, None]
        options.append([choices[index] for index in kept])
    return fronts, options


def _allowed(layer: LayerErrors, candidate: Candidate) -> bool:
    if layer.fixed is None:
        return True
    return layer.fixed != "dense" and candidate.ranks[0] == layer.fixed
