"""Multiple-choice knapsack: one candidate of each layer, at least summed loss within a budget.

The problem is separable: choose one candidate of each layer so that the summed loss is least and
the summed cost fits the budget B. With a multiplier λ ≥ 0 every selection of summed cost C has

    loss = bound(λ) + excess + λ (B - C),      bound(λ) = Σ_l min_j (loss_lj + λ cost_lj) - λ B,

where excess ≥ 0 sums how far each chosen candidate is above its layer's minimum. So a selection
that fits and is within ``gap`` of the bound has an excess of at most ``gap``, and so has every part
of it. All of those are listed, layer by layer, keeping of the partial selections only those that no
other undercuts in both cost and loss. If whole selections within the gap turn up, the best of them
is the optimum; if not, the gap is widened. Near the best λ the gap is tiny, and so are the lists.
Exact up to float64 rounding. Kellerer, Pferschy, Pisinger, *Knapsack Problems* (2004), chapter 11
(bounds, reduced costs, dynamic programming with lists).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

# Sums of a hundred float64 terms are off by about 1e-14 of their value; excesses below this part of
# it are taken for zero, so that rounding cannot shut out the optimum.
ROUNDING = 1e-13


class Front(NamedTuple):
    """Selections that no other undercuts in both: cost strictly ascending, loss descending."""

    cost: Int64[np.ndarray, " n"]
    loss: Float64[np.ndarray, " n"]


def undominated(cost: Int64[np.ndarray, " n"], loss: Float64[np.ndarray, " n"]) -> np.ndarray:
    """Indices of the selections that no other undercuts in both, by ascending cost."""
    order = np.lexsort((loss, cost))
    sorted_loss = loss[order]
    lowest_before = np.minimum.accumulate(np.append(np.inf, sorted_loss[:-1]))
    return order[sorted_loss < lowest_before]


def solve(fronts: list[Front], budget: int) -> list[int]:
    """The index of the candidate chosen in each front (see the module's docstring).

    Args:
        fronts: The candidates of each layer, their costs counted from the cheapest one's.
        budget: What the chosen candidates may cost together, counted likewise; not negative.
    """
    if sum(int(front.cost[-1]) for front in fronts) <= budget:
        return [len(front.cost) - 1 for front in fronts]
    multiplier, feasible = _best_multiplier(fronts, budget)
    relaxed = [front.loss + multiplier * front.cost for front in fronts]
    excesses = [values - values.min() for values in relaxed]
    rounding = ROUNDING * sum(float(values.min()) for values in relaxed)
    slack = budget - sum(int(f.cost[i]) for f, i in zip(fronts, feasible, strict=True))
    # The multiplier's own selection has no excess, so it is this far above the bound: a gap that is
    # wide enough. The optimum is mostly much closer, hence the narrower ones before.
    largest_gap = multiplier * slack
    for gap in largest_gap / 4.0 ** np.arange(5, -1, -1):
        selection = _best_within(fronts, excesses, multiplier, budget, gap + rounding)
        if selection is not None:
            return selection
    raise AssertionError("no selection within the gap of one that fits")


def _best_multiplier(fronts: list[Front], budget: int) -> tuple[float, list[int]]:
    """The least λ whose cheapest relaxed selection fits the budget, and that selection."""

    def select(multiplier: float) -> tuple[list[int], int]:
        chosen = [int(np.argmin(front.loss + multiplier * front.cost)) for front in fronts]
        return chosen, sum(int(f.cost[i]) for f, i in zip(fronts, chosen, strict=True))

    # Beyond the steepest step of any front the cheapest candidates are chosen, and they fit.
    steepest = max(
        float((-np.diff(front.loss) / np.diff(front.cost)).max())
        for front in fronts
        if len(front.cost) > 1
    )
    low, high = 0.0, 2 * steepest
    while low < (middle := (low + high) / 2) < high:
        if select(middle)[1] <= budget:
            high = middle
        else:
            low = middle
    return high, select(high)[0]


def _best_within(
    fronts: list[Front],
    excesses: list[Float64[np.ndarray, " n"]],
    multiplier: float,
    budget: int,
    gap: float,
) -> list[int] | None:
    """The best of the selections whose loss is at most ``gap`` above the bound, if there is one."""
    near = [np.flatnonzero(excess <= gap) for excess in excesses]
    dearest_rest = sum(int(f.cost[k].max()) for f, k in zip(fronts, near, strict=True))
    cheapest_rest = sum(int(f.cost[k].min()) for f, k in zip(fronts, near, strict=True))
    cost, loss, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    origins: list[tuple[np.ndarray, np.ndarray]] = []
    for front, kept, front_excess in zip(fronts, near, excesses, strict=True):
        dearest_rest -= int(front.cost[kept].max())
        cheapest_rest -= int(front.cost[kept].min())
        cost = np.add.outer(cost, front.cost[kept])
        excess = np.add.outer(excess, front_excess[kept])
        unspent = np.maximum(budget - cost - dearest_rest, 0)
        promising = (excess + multiplier * unspent <= gap) & (cost + cheapest_rest <= budget)
        partial, candidate = np.nonzero(promising)
        cost, excess = cost[promising], excess[promising]
        loss = loss[partial] + front.loss[kept[candidate]]
        best = undominated(cost, loss)
        cost, loss, excess = cost[best], loss[best], excess[best]
        origins.append((partial[best], kept[candidate[best]]))
    if not loss.size:
        return None
    # All that are left fit the budget and are within the gap.
    state, selection = int(np.argmin(loss)), []
    for partial, candidate in reversed(origins):
        selection.append(int(candidate[state]))
        state = int(partial[state])
    return selection[::-1]
