"""Greedy ranks: from full rank, always drop the eigenvalue with the least (ΔE/E)/ΔC.

ΔE/E = σ_{d'} / Σ_{a≤d'} σ_a is the part of its layer's energy that the last kept eigenvalue holds,
and ΔC the MACs of that one rank. Dropping ends as soon as Σ min(m_l(d'_l), D_l) fits the budget.
Zhang et al., arXiv:1505.06798, on rank selection for the whole model.

What is left of the budget (less than the MACs of one rank) is not spent on other layers: the paper
does not, and ``exact_energy`` is there for whoever wants the last of it.
"""

from __future__ import annotations

import heapq

from accel.rank_selection.problem import LayerChoices, RankProblem, Ranks


def greedy_energy(problem: RankProblem) -> Ranks:
    """Ranks by path; None where the layer stays dense (see the module's docstring)."""
    layers = {layer.path: layer for layer in problem.free}
    ranks = {path: layer.width for path, layer in layers.items()}
    excess = problem.macs(problem.complete(ranks)) - problem.budget_macs
    heap = [
        (_loss_per_mac(layer, layer.width), path)
        for path, layer in layers.items()
        if layer.width > 1
    ]
    heapq.heapify(heap)
    while excess > 0:
        _, path = heapq.heappop(heap)
        layer, rank = layers[path], ranks[path] - 1
        excess -= layer.macs(rank + 1) - layer.macs(rank)
        ranks[path] = rank
        if rank > 1:
            heapq.heappush(heap, (_loss_per_mac(layer, rank), path))
    return problem.complete(ranks)


def _loss_per_mac(layer: LayerChoices, rank: int) -> float:
    energy = layer.energies[rank - 1]
    # A layer without energy has nothing to lose: its ranks are the first to go.
    share = energy and layer.spectrum[rank - 1] / layer.spectrum[0] / energy
    step = layer.rank_macs[rank - 1] - layer.rank_macs[rank - 2]
    return float(share) / float(step)
