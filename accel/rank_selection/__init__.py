"""Rank selection: how many directions each layer keeps so that the whole network fits a budget.

A method by energies is one function ``RankProblem -> {path: rank, or None for dense}`` in a file of
its own and one line in ``RANK_SELECTION``. ``measured_error`` chooses the kind of chain as well,
from errors that were measured.
"""

from collections.abc import Callable

from accel.rank_selection.exact_energy import exact_energy
from accel.rank_selection.greedy_energy import greedy_energy
from accel.rank_selection.measured_error import Candidate, LayerErrors, least_cost, measured_error
from accel.rank_selection.problem import (
    LayerChoices,
    RankProblem,
    Ranks,
    budget_from_speedup,
    check_speedup,
)
from accel.rank_selection.rules import Rule, Rules, apply_rules
from accel.rank_selection.uniform import uniform

RANK_SELECTION: dict[str, Callable[[RankProblem], Ranks]] = {
    "uniform": uniform,
    "greedy_energy": greedy_energy,
    "exact_energy": exact_energy,
}

__all__ = [
    "RANK_SELECTION",
    "Candidate",
    "LayerChoices",
    "LayerErrors",
    "RankProblem",
    "Ranks",
    "Rule",
    "Rules",
    "apply_rules",
    "budget_from_speedup",
    "check_speedup",
    "least_cost",
    "measured_error",
]
