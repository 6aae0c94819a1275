"""Exact ranks: the maximum of the energy objective, by multiple-choice knapsack.

In logarithms the problem is separable: of each layer one candidate (a rank that pays, or dense) is
chosen so that the summed loss log(E(d)/E(r)) is least and the summed MACs fit the budget.
"""

from __future__ import annotations

import numpy as np

from accel.rank_selection.knapsack import Front, solve, undominated
from accel.rank_selection.problem import LayerChoices, RankProblem, Ranks


def exact_energy(problem: RankProblem) -> Ranks:
    """Ranks by path; None where the layer stays dense (see the module's docstring)."""
    layers = problem.free
    least = problem.complete({layer.path: 1 for layer in layers})
    budget = problem.budget_macs - problem.macs(least)
    fronts, choices = [], []
    for layer in layers:
        front, ranks = _candidates(layer)
        # What the cheapest candidate costs is spent in any case.
        fronts.append(front._replace(cost=front.cost - front.cost[0]))
        choices.append(ranks)
    selection = solve(fronts, budget)
    return problem.complete(
        {
            layer.path: ranks[index]
            for layer, ranks, index in zip(layers, choices, selection, strict=True)
        }
    )


def _candidates(layer: LayerChoices) -> tuple[Front, list[int | None]]:
    ranks: list[int | None] = [*range(1, layer.largest_rank + 1), None]
    cost = np.array([layer.macs(rank) for rank in ranks], np.int64)
    loss = np.array([-layer.log_energy(rank) for rank in ranks])
    kept = undominated(cost, loss)
    return Front(cost[kept], loss[kept]), [ranks[index] for index in kept]
