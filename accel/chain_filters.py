"""Which of the chains that could replace layers are considered at all.

By what a device likes (``with_rank_multiple``), by what can be worth timing
(``with_promising_chains``), and by the rules of the user.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np

from accel.calibration import Calibration
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import ErrorCurve, check_rank_multiple
from accel.program import LayerCall
from accel.rank_selection import Candidate, Rules, apply_rules

# Chains of which all ranks are multiples of this fill the vectors of most devices, or half of them:
# on CPU a chain of rank 16 is faster than one of rank 14.
VECTOR = 8
# See ``with_promising_chains``.
BEATEN = 0.4
MANY = 8


def with_rank_multiple(
    calibration: Calibration,
    curves: Mapping[str, ErrorCurve],
    rank_multiple: int,
    *,
    rules: Rules | None = None,
) -> Mapping[str, ErrorCurve]:
    """The curves with chains alone whose ranks are all multiples of ``rank_multiple``.

    Vectors and tiles of a device are full at such ranks: on CPU (64 channels, tucker2) a chain of
    ranks 16 took a third less time than one of ranks 18. The chains of layers whose rank a rule
    fixes all stay.

    Args:
        calibration: From ``calibrate``.
        curves: From ``measure_errors`` with the same ``rank_multiple``.
        rank_multiple: As in ``accelerate``.
        rules: As in ``accelerate``.

    Raises:
        ValueError: If no layer has such a chain.
    """
    check_rank_multiple(rank_multiple)
    if rank_multiple == 1:
        return curves
    fixed = apply_rules(calibration.widths, rules or {})
    kept = {
        path: curve
        if isinstance(fixed[path], int)
        else curve.chosen([all(r % rank_multiple == 0 for r in c.ranks) for c in curve.candidates])
        for path, curve in curves.items()
    }
    if not any(curve.candidates for curve in kept.values()):
        raise ValueError(
            f"rank_multiple of {rank_multiple}: no layer has a cheaper chain with such ranks"
        )
    return kept


def measured_multiple(rank_multiple: int) -> int:
    """What ranks are rounded to where errors are measured for a budget in time.

    Those that were asked for, or else those that fill vectors (``with_promising_chains``).
    """
    return VECTOR if rank_multiple == 1 else rank_multiple


def with_promising_chains(
    calibration: Calibration,
    curves: Mapping[str, ErrorCurve],
    *,
    rank_multiple: int = 1,
    rules: Rules | None = None,
) -> Mapping[str, ErrorCurve]:
    """The curves without chains that are hardly worth it, which spares the time of timing them.

    Two heuristics, each right mostly, not always. Where no multiple of ranks is asked for, and a
    layer is wide enough for ``MANY`` first ranks in chains of a kind that fill vectors, these alone
    stay of that kind. (On the real VGG-16 others took 5 % and 3 % more time than they at the same
    MACs, at batches of 8 and 1, and 1 % less than those of the next larger ranks: medians of 124
    chains.) And a chain goes if another has no more than ``BEATEN`` times its MACs and no larger
    error. Of layers for which there is a rule the chains stay that it allows.

    Args:
        calibration: From ``calibrate``.
        curves: From ``measure_errors``, with ranks rounded to ``measured_multiple``.
        rank_multiple: As in ``accelerate``.
        rules: As in ``accelerate``.
    """
    fixed = apply_rules(calibration.widths, rules or {})
    calls = {call.path: call for call in calibration.calls}

    def chosen(path: str, curve: ErrorCurve) -> ErrorCurve:
        rule = fixed[path]
        if rule == "dense":
            return curve.chosen([False] * len(curve.candidates))
        if rule is not None:
            return curve.chosen(
                [
                    chain.ranks[0] == rule and on_own_line(calls[path], chain)
                    for chain in curve.candidates
                ]
            )
        return _not_beaten(_filling_vectors(curve) if rank_multiple == 1 else curve)

    return {path: chosen(path, curve) for path, curve in curves.items()}


def fills_vectors(chain: Candidate) -> bool:
    """Whether all ranks of a chain are multiples of ``VECTOR``."""
    return all(rank % VECTOR == 0 for rank in chain.ranks)


def _filling_vectors(curve: ErrorCurve) -> ErrorCurve:
    filling: dict[str, set[int]] = {}
    for chain in curve.candidates:
        first = filling.setdefault(chain.decomposition, set())
        if fills_vectors(chain):
            first.add(chain.ranks[0])
    return curve.chosen(
        [
            len(filling[chain.decomposition]) < MANY or fills_vectors(chain)
            for chain in curve.candidates
        ]
    )


def _not_beaten(curve: ErrorCurve) -> ErrorCurve:
    order = np.argsort(curve.macs, kind="stable")
    least = np.minimum.accumulate(np.append(np.inf, curve.errors[order]))
    cheaper = np.searchsorted(curve.macs[order], BEATEN * curve.macs, side="right")
    return curve.chosen((curve.errors < least[cheaper]).tolist())


def on_own_line(call: LayerCall, candidate: Candidate) -> bool:
    """Whether the ranks of a chain are those that its decomposition chooses by one number."""
    decomposition = DECOMPOSITIONS[candidate.decomposition]
    largest = decomposition.largest_rank(call.layer)
    # Along the line the sum of the ranks ascends.
    place = bisect.bisect_left(
        range(1, largest + 1),
        sum(candidate.ranks),
        key=lambda rank: sum(decomposition.ranks(call.layer, rank)),
    )
    return place < largest and decomposition.ranks(call.layer, place + 1) == candidate.ranks
