"""Times of layers, corrected by the times of whole networks.

What layers take one by one does not add up to what the network takes: the compiler fuses across
layers, and shares out work among cores otherwise. How far it is off hangs most on the kinds of the
chains. So random plans are timed as whole networks, and the times of each kind k are scaled:

    min_w  Σ_p u_p r_p² / Σ_p u_p + λ s ‖w‖²,    r_p = 1 - Σ_k (1 + w_k) t_pk / T_p

with u_p = min(1, δ / |r_p|), as in Huber's loss, since single plans can be far slower than their
layers; u and w are found by turns. T_p is the time of
the network of plan p over that of the original beside it, times the original's median, so that
whatever slows both down falls out; t_pk is the sum of the times of its layers of kind k, "left as
they are" among the kinds; s is the mean of the diagonal of the normal equations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float64

from accel.calibration import Calibration
from accel.device_times import LayerTimes
from accel.error_curves import ErrorCurve
from accel.inference import compile_inference
from accel.memory import kept_memory
from accel.plan import AccelerationPlan
from accel.program import specification
from accel.progress import Progress
from accel.rank_selection import Rules
from accel.selection import least_seconds, select_by_time
from accel.timed_plan import TimedPlan, time_plan

PLANS = 24
# λ: so that a kind that is in few of the plans about keeps its times.
RIDGE = 0.03
# δ: a plan that is off by more counts as an outlier.
OUTLIER = 0.03
ITERATIONS = 30
# What kinds may be scaled by: further off than that is noise.
SCALES = (0.5, 2.0)
# Random plans are to be this many times faster, by their layers' times.
FASTER = (1.5, 4.0)


def correct_times(
    calibration: Calibration,
    original: nnx.Module,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    batch_size: int,
    *,
    rules: Rules | None = None,
    seconds: float = 1.5,
    progress: Progress | None = None,
) -> dict[str, LayerTimes]:
    """The times of layers, scaled so that their sums tell the times of networks best.

    Args:
        calibration: From ``calibrate``.
        original: The network as it was given to ``calibrate``.
        times: From ``measure_times``.
        curves: From ``measure_errors``: the chains that there are.
        batch_size: Images per batch.
        rules: As in ``accelerate``.
        seconds: Time for timing one plan, in turns with the original.
        progress: Receives what is being done.
    """
    progress = progress or Progress()
    plans = random_plans(calibration, times, curves, PLANS, seed=0, rules=rules)
    image_shape = specification(calibration.program.images).shape[1:]
    compiled = compile_inference(original, (batch_size, *image_shape))
    progress.begin(f"timing networks at batch {batch_size}", len(plans))
    timed = []
    with kept_memory():
        for plan in plans:
            timed.append(time_plan(calibration, compiled, plan, times, seconds))
            progress.advance(1)
    kinds = list(dict.fromkeys(kind for plan in plans for kind in _kinds(plan, times)))
    scales = _scales(timed, times, kinds)
    return {path: _scaled(layer, scales) for path, layer in times.items()}


def random_plans(
    calibration: Calibration,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    count: int,
    *,
    seed: int,
    rules: Rules | None = None,
) -> list[AccelerationPlan]:
    """Plans that vary in kinds and ranks: the best ones for random errors and random budgets."""
    random = np.random.default_rng(seed)
    dense = sum(time.dense for time in times.values())
    least = least_seconds(calibration, times, curves, rules=rules)
    plans = []
    for _ in range(count):
        drawn = {
            path: dataclasses.replace(
                curve, errors=curve.errors * np.exp(random.standard_normal(len(curve.errors)))
            )
            for path, curve in curves.items()
        }
        budget = max(dense / random.uniform(*FASTER), least)
        plans.append(select_by_time(calibration, budget, times, drawn, rules=rules))
    return plans


def _kinds(plan: AccelerationPlan, times: Mapping[str, LayerTimes]) -> list[str | None]:
    return [layer.decomposition for layer in plan.layers if layer.path in times]


def _scales(
    timed: Sequence[TimedPlan],
    times: Mapping[str, LayerTimes],
    kinds: Sequence[str | None],
) -> dict[str | None, float]:
    """1 + w of each kind (see the module's docstring)."""
    original = float(np.median([plan.original_ms for plan in timed]))
    whole = np.array([original / plan.speedup for plan in timed])
    parts = np.array([_milliseconds(plan.plan, times, kinds) for plan in timed])
    relative = parts / whole[:, None]
    missing = 1 - relative.sum(axis=1)
    normal = relative.T @ relative / len(timed)
    ridge = RIDGE * np.trace(normal) / len(kinds) * np.eye(len(kinds))
    weights = np.zeros(len(kinds))
    for _ in range(ITERATIONS):
        residuals = np.abs(missing - relative @ weights)
        trust = np.minimum(1, OUTLIER / np.maximum(residuals, OUTLIER))
        weighed = relative.T * (trust / trust.sum())
        weights = np.linalg.solve(weighed @ relative + ridge, weighed @ missing)
    return dict(zip(kinds, np.clip(1 + weights, *SCALES).tolist(), strict=True))


def _milliseconds(
    plan: AccelerationPlan, times: Mapping[str, LayerTimes], kinds: Sequence[str | None]
) -> Float64[np.ndarray, " kinds"]:
    """The sums of the times of a plan's layers, by kind."""
    sums = np.zeros(len(kinds))
    for layer in plan.layers:
        if layer.path in times:
            sums[kinds.index(layer.decomposition)] += 1000 * times[layer.path].of(layer)
    return sums


def _scaled(times: LayerTimes, scales: Mapping[str | None, float]) -> LayerTimes:
    factors = [scales.get(candidate.decomposition, 1.0) for candidate in times.candidates]
    return dataclasses.replace(
        times, dense=times.dense * scales.get(None, 1.0), chains=times.chains * np.array(factors)
    )
