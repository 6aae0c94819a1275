"""Ranks by energies: how much of its responses, or of its kernel, each rank of a layer keeps.

Zhang, Zou, He, Sun, arXiv:1505.06798, section 3.4.
"""

from __future__ import annotations

import numpy as np

from accel.calibration import Calibration
from accel.decompositions import Decomposition
from accel.error_curves import rank_macs
from accel.program import LayerCall
from accel.rank_selection import (
    RANK_SELECTION,
    Candidate,
    LayerChoices,
    RankProblem,
    Rules,
    apply_rules,
    budget_from_speedup,
)
from accel.solvers import response_spectrum


def ranks_by_energy(
    calibration: Calibration, dense: bool, speedup: float, rank_selection: str, rules: Rules
) -> dict[str, Candidate | None]:
    """What becomes of each layer, by path; None where it stays as it is.

    Args:
        calibration: From ``calibrate``, for one kind of chain (and one for dense layers).
        dense: Whether to choose for dense layers or for convolutions.
        speedup: Their multiply-accumulates now over those wanted.
        rank_selection: A name of ``RANK_SELECTION``.
        rules: As in ``accelerate``.

    Raises:
        ValueError: If the speedup cannot be reached.
    """
    (decomposition,) = (kind for kind in calibration.decompositions if kind.dense == dense)
    fixed = apply_rules(calibration.widths, rules)
    calls, dense_macs = calibration.of_kind(dense)
    layers = []
    for call in calls:
        macs = rank_macs(call, decomposition)
        layers.append(
            LayerChoices(
                path=call.path,
                spectrum=_spectrum(calibration, call, decomposition, len(macs)),
                dense_macs=dense_macs[call.path],
                rank_macs=macs,
                fixed=fixed[call.path],
            )
        )
    total = sum(dense_macs.values())
    problem = RankProblem(
        layers=tuple(layers),
        other_macs=total - sum(layer.dense_macs for layer in layers),
        budget_macs=budget_from_speedup(total, speedup),
    )
    ranks = RANK_SELECTION[rank_selection](problem)
    found: dict[str, Candidate | None] = {}
    for call in calls:
        rank = ranks[call.path]
        found[call.path] = (
            None
            if rank is None
            else Candidate(decomposition.name, decomposition.ranks(call.layer, rank))
        )
    return found


def _spectrum(
    calibration: Calibration, call: LayerCall, decomposition: Decomposition, length: int
) -> np.ndarray:
    """Energies of a layer's ranks: of its responses (the paper) where they are what is cut.

    A chain without a last factor keeps all directions of the responses; what it cuts is the kernel.
    Ranks beyond the width of the responses (of a spatial split) hold no energy of their own.
    """
    if decomposition.has_last:
        targets = calibration.targets[call.path][calibration.fitting]
        spectrum = np.asarray(response_spectrum(targets.reshape(-1, targets.shape[-1])), np.float64)
    else:
        structure = decomposition.structure(call.layer)
        kernel = np.asarray(call.layer.kernel[...], np.float64).reshape(-1, structure.out_channels)
        s = structure.middle_taps
        unfolded = kernel[structure.order.reshape(-1)].reshape(s, -1, structure.out_channels)
        unfolded = unfolded.transpose(1, 0, 2).reshape(unfolded.shape[1], -1)
        spectrum = np.linalg.svd(unfolded, compute_uv=False) ** 2
    return np.pad(spectrum, (0, max(0, length - len(spectrum))))[:length]
