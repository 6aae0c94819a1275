"""Selection of what becomes of each layer: kind and ranks of its chain, for one budget.

The second step of ``accelerate``. By errors that are measured (``measure_errors``), over all kinds
of chain at once; or by energies, as in the paper (Zhang et al., arXiv:1505.06798, section 3.4), for
one kind. Dense layers have a budget of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from accel.calibration import Calibration
from accel.chain_filters import on_own_line
from accel.decompositions import DECOMPOSITIONS, Decomposition
from accel.device_times import LayerTimes
from accel.energies import ranks_by_energy
from accel.error_curves import ErrorCurve, macs_of, rank_macs
from accel.measurements import measure_errors
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import LayerCall, named_layers
from accel.rank_selection import (
    RANK_SELECTION,
    Candidate,
    LayerErrors,
    Rules,
    apply_rules,
    budget_from_speedup,
    check_speedup,
    least_cost,
    measured_error,
)

MEASURED_ERROR = "measured_error"
NANOSECONDS = 1e9


def select_ranks(
    calibration: Calibration,
    speedup: float,
    *,
    rank_selection: str = MEASURED_ERROR,
    rules: Rules | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    dense_speedup: float | None = None,
) -> AccelerationPlan:
    """Chooses what becomes of each layer so that the network gets cheaper by ``speedup``.

    Args:
        calibration: From ``calibrate``.
        speedup: As in ``accelerate``.
        rank_selection: As in ``accelerate``.
        rules: As in ``accelerate``.
        curves: From ``measure_errors``, which is called where they are needed and not given.
        dense_speedup: As in ``accelerate``; needs a calibration with ``dense_layers``.
    """
    check_rank_selection(rank_selection, calibration.decompositions)
    if dense_speedup is not None:
        check_speedup("dense_speedup", dense_speedup)
        if not calibration.dense_macs:
            raise ValueError("dense_speedup: calibrated without dense layers (dense_layers=True)")
    if rank_selection == MEASURED_ERROR and curves is None:
        curves = measure_errors(calibration)

    def choose(dense: bool, speedup: float) -> dict[str, Candidate | None]:
        if curves is not None and rank_selection == MEASURED_ERROR:
            return _by_measured_error(calibration, dense, speedup, rules or {}, curves)
        return ranks_by_energy(calibration, dense, speedup, rank_selection, rules or {})

    chosen = choose(False, speedup)
    if dense_speedup is not None:
        try:
            chosen |= choose(True, dense_speedup)
        except ValueError as error:
            raise ValueError(f"dense_speedup: {error}") from error
    return _plan(calibration, chosen, rules or {})


def select_by_time(
    calibration: Calibration,
    seconds: float,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    *,
    rules: Rules | None = None,
) -> AccelerationPlan:
    """Chooses what becomes of each convolution so that all of them together take so long.

    A layer for which every chain takes longer stays as it is.

    Args:
        calibration: From ``calibrate``.
        seconds: What the convolutions that can be replaced may take together, by ``times``.
        times: From ``measure_times``.
        curves: From ``measure_errors``.
        rules: As in ``accelerate``.

    Raises:
        ValueError: If that cannot be reached.
    """

    layers = _timed_layers(calibration, times, curves, rules or {})
    chosen = measured_error(layers, 0, int(NANOSECONDS * seconds), "ns per batch")
    return _plan(calibration, chosen, rules or {})


def least_seconds(
    calibration: Calibration,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    *,
    rules: Rules | None = None,
) -> float:
    """The least that ``select_by_time`` can be asked for; the arguments are the same."""
    # Half a nanosecond more, so that rounding it cannot ask for less.
    return (least_cost(_timed_layers(calibration, times, curves, rules or {})) + 0.5) / NANOSECONDS


def _timed_layers(
    calibration: Calibration,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    rules: Rules,
) -> list[LayerErrors]:
    def costs(call: LayerCall) -> tuple[np.ndarray, int]:
        time = times[call.path]
        return np.rint(NANOSECONDS * time.chains).astype(np.int64), round(NANOSECONDS * time.dense)

    return _layer_errors(calibration, curves, rules, costs)


def select_by_parameters(
    calibration: Calibration,
    ratio: float,
    curves: Mapping[str, ErrorCurve],
    *,
    rules: Rules | None = None,
) -> AccelerationPlan:
    """Chooses what becomes of each convolution so that all have ``ratio`` times fewer parameters.

    Args:
        calibration: From ``calibrate``.
        ratio: Kernels' and biases' parameters of all convolutions now over those wanted.
        curves: From ``measure_errors``.
        rules: As in ``accelerate``.

    Raises:
        ValueError: If that cannot be reached.
    """
    check_speedup("parameter_ratio", ratio)

    def costs(call: LayerCall) -> tuple[np.ndarray, int]:
        chains = [
            sum(
                factor.macs(1) + factor.use_bias * factor.out_channels
                for factor in DECOMPOSITIONS[candidate.decomposition].factors(
                    call.layer, *candidate.ranks
                )
            )
            for candidate in curves[call.path].candidates
        ]
        return np.array(chains, np.int64), _parameters(call.layer)

    layers = _layer_errors(calibration, curves, rules or {}, costs)
    total = sum(_parameters(layer) for _, layer in named_layers(calibration.model, (nnx.Conv,)))
    other = total - sum(layer.dense_cost for layer in layers)
    chosen = measured_error(layers, other, budget_from_speedup(total, ratio), "parameters")
    return _plan(calibration, chosen, rules or {})


def _parameters(layer: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param)))


def select_within_error(
    calibration: Calibration,
    allowed_error: float,
    curves: Mapping[str, ErrorCurve],
    *,
    rules: Rules | None = None,
) -> AccelerationPlan:
    """The plan of fewest MACs whose measured errors add up to no more than ``allowed_error``.

    The sum estimates the relative squared error of the network's outputs. How the errors of several
    layers work together is not in it: ``search_within_loss`` measures that.

    Args:
        calibration: From ``calibrate``.
        allowed_error: The largest sum of the errors of ``curves``.
        curves: From ``measure_errors``.
        rules: As in ``accelerate``.

    Raises:
        ValueError: If no plan is that good; only rules that fix ranks can bring that about.
    """

    layers = _layer_errors(calibration, curves, rules or {}, _macs_of(calibration, curves))
    # The least error falls with the budget, so that bisection finds the cheapest one.
    high = sum(layer.dense_cost for layer in layers)
    least, chosen = _least_error(layers, high)
    if least > allowed_error:
        raise ValueError(
            f"an allowed_error of {allowed_error:g} cannot be kept: with the ranks that rules fix,"
            f" {least:.4g} is the least"
        )
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        try:
            error, found = _least_error(layers, middle)
        except ValueError:
            low = middle
            continue
        if error <= allowed_error:
            high, chosen = middle, found
        else:
            low = middle
    return _plan(calibration, chosen, rules or {})


def reachable_errors(
    calibration: Calibration, curves: Mapping[str, ErrorCurve], *, rules: Rules | None = None
) -> tuple[float, float]:
    """The least sum of errors of a plan that replaces a layer, and that of the cheapest plan.

    Between them ``select_within_error`` has plans to choose from; the arguments are the same.

    Raises:
        ValueError: If no layer can be replaced; only rules can bring that about.
    """
    layers = _layer_errors(calibration, curves, rules or {}, _macs_of(calibration, curves))
    dense = sum(layer.dense_cost for layer in layers)
    return _least_error(layers, dense - 1)[0], _least_error(layers, least_cost(layers))[0]


def _least_error(
    layers: Sequence[LayerErrors], budget: int
) -> tuple[float, dict[str, Candidate | None]]:
    """The least sum of errors that costs no more than the budget, and what it chooses."""
    chosen = measured_error(layers, 0, budget)
    errors = (
        layer.errors[layer.candidates.index(candidate)]
        for layer in layers
        if (candidate := chosen[layer.path]) is not None
    )
    return math.fsum(errors), chosen


def conv_macs_of(calibration: Calibration, plan: AccelerationPlan) -> int:
    """MACs per image of all convolutions of a network that a plan has been carried out on."""
    calls = {call.path: call for call in calibration.calls}
    macs = dict(calibration.macs)
    for layer in plan.layers:
        if layer.decomposition is not None and layer.path in macs:
            kind = DECOMPOSITIONS[layer.decomposition]
            macs[layer.path] = macs_of(calls[layer.path], kind, layer.ranks)
    return sum(macs.values())


def choice_digest(asked: object, curves: Mapping[str, ErrorCurve], rules: Rules) -> str:
    """Tells a choice of plans from every other: the errors hang on network, images and kinds."""
    digest = hashlib.sha256(repr((asked, sorted(rules.items()))).encode())
    for path, curve in sorted(curves.items()):
        digest.update(f"{path} {curve.candidates}".encode())
        digest.update(curve.errors.tobytes())
    return digest.hexdigest()


def _layer_errors(
    calibration: Calibration,
    curves: Mapping[str, ErrorCurve],
    rules: Rules,
    costs: Callable[[LayerCall], tuple[np.ndarray, int]],
    *,
    dense: bool = False,
) -> list[LayerErrors]:
    """The layers to choose for, convolutions or dense ones.

    ``costs`` gives the costs of a layer's chains, and its own.
    """
    fixed = apply_rules(calibration.widths, rules)
    calls, _ = calibration.of_kind(dense)
    layers = []
    for call in calls:
        chains, dense_cost = costs(call)
        curve = curves[call.path]
        candidates, errors = curve.candidates, curve.errors
        if isinstance(fixed[call.path], int):
            # A rule fixes a rank, and so the other one, too.
            own = [on_own_line(call, candidate) for candidate in candidates]
            candidates = tuple(itertools.compress(candidates, own))
            chains, errors = chains[np.flatnonzero(own)], errors[np.flatnonzero(own)]
        layers.append(
            LayerErrors(call.path, candidates, chains, errors, dense_cost, fixed[call.path])
        )
    return layers


def _plan(
    calibration: Calibration, chosen: Mapping[str, Candidate | None], rules: Rules
) -> AccelerationPlan:
    """The plan of all layers; the reason is said of each that is not replaced."""
    fixed = apply_rules(calibration.widths, rules)
    plans = []
    for path in _execution_order(calibration):
        if path in calibration.left_out:
            plans.append(LayerPlan(path, reason=calibration.left_out[path]))
        elif path not in chosen:
            plans.append(LayerPlan(path, reason="no dense_speedup given"))
        elif (candidate := chosen[path]) is None:
            if fixed[path] == "dense":
                reason = "by rule"
            elif _has_cheaper_chain(calibration, path):
                reason = "kept by the rank selection"
            else:
                reason = "cheaper as it is"
            plans.append(LayerPlan(path, reason=reason))
        else:
            plans.append(LayerPlan(path, candidate.decomposition, candidate.ranks))
    return AccelerationPlan(tuple(plans), calibration.folded)


def _has_cheaper_chain(calibration: Calibration, path: str) -> bool:
    (call,) = (call for call in calibration.calls if call.path == path)
    macs = {**calibration.macs, **calibration.dense_macs}[path]
    dense = isinstance(call.layer, nnx.Linear)
    return any(
        rank_macs(call, kind)[0] < macs
        for kind in calibration.decompositions
        if kind.dense == dense and kind.unsuitable(call.layer) is None
    )


def _by_measured_error(
    calibration: Calibration,
    dense: bool,
    speedup: float,
    rules: Rules,
    curves: Mapping[str, ErrorCurve],
) -> dict[str, Candidate | None]:
    layers = _layer_errors(calibration, curves, rules, _macs_of(calibration, curves), dense=dense)
    total = sum(calibration.of_kind(dense)[1].values())
    other = total - sum(layer.dense_cost for layer in layers)
    return measured_error(layers, other, budget_from_speedup(total, speedup))


def _macs_of(
    calibration: Calibration, curves: Mapping[str, ErrorCurve]
) -> Callable[[LayerCall], tuple[np.ndarray, int]]:
    """Costs in MACs per image, for ``_layer_errors``."""
    macs = {**calibration.macs, **calibration.dense_macs}
    return lambda call: (curves[call.path].macs, macs[call.path])


def check_rank_selection(name: str, decompositions: Sequence[Decomposition]) -> None:
    """Raises ValueError where the name is unknown or does not serve these decompositions."""
    if name != MEASURED_ERROR and name not in RANK_SELECTION:
        known = ", ".join((*RANK_SELECTION, MEASURED_ERROR))
        raise ValueError(f"unknown rank selection {name!r}; known: {known}")
    kinds = [kind.name for kind in decompositions if not kind.dense]
    if name != MEASURED_ERROR and len(kinds) != 1:
        raise ValueError(
            f"{name} chooses ranks of one kind of chain, found {', '.join(kinds)}; choose"
            f" one, or {MEASURED_ERROR}"
        )


def _execution_order(calibration: Calibration) -> list[str]:
    called = [call.path for call in calibration.program.calls]
    return [*called, *(path for path in calibration.left_out if path not in called)]
