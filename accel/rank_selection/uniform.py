"""Uniform ranks: every free layer keeps the same fraction of its own MACs.

d'_l is the largest rank with m_l(d'_l) ≤ f · D_l (or 1), with the largest f for which the network
fits the budget. The baseline of Zhang et al., arXiv:1505.06798, without rank selection.

Layers of one shape gain a rank at the same fraction, all or none of them, so up to one rank of each
of them can be left of the budget. It is not spent: ranks would then differ between equal layers.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction

from accel.rank_selection.problem import RankProblem, Ranks


def uniform(problem: RankProblem) -> Ranks:
    """Ranks by path; None where the layer stays dense (see the module's docstring)."""

    def ranks(fraction: Fraction) -> Ranks:
        if fraction == 1:
            return problem.complete({layer.path: None for layer in problem.free})
        return problem.complete(
            {
                layer.path: max(
                    1, bisect_right(layer.rank_macs.tolist(), fraction * layer.dense_macs)
                )
                for layer in problem.free
            }
        )

    # The fractions where some layer gains a rank, exactly: layers of one shape gain it together.
    # At 0 every layer has rank 1, which fits; at 1 every layer is dense.
    steps = {
        Fraction(int(layer.rank_macs[rank - 1]), layer.dense_macs)
        for layer in problem.free
        for rank in range(1, layer.largest_rank + 1)
    }
    fractions = sorted({Fraction(0), Fraction(1), *steps})
    fitting = bisect_right(
        fractions, problem.budget_macs, key=lambda fraction: problem.macs(ranks(fraction))
    )
    return ranks(fractions[fitting - 1])
