"""Times of layers, corrected by the times of whole networks.

What layers take one by one does not add up to what the network takes: the compiler fuses across
layers, and shares out work among cores otherwise; and there is more in it than these layers. How
far it is off hangs most on the kinds of the chains. So random plans are timed as whole networks,
and the times of each kind k are scaled:

    min_(v, c)  Σ_p u_p r_p² / Σ_p u_p + λ s Σ_k (v_k - v̄)²,    r_p = 1 - (c + Σ_k v_k t_pk) / T_p

with u_p = min(1, δ / |r_p|), as in Huber's loss, since single plans can be far slower than their
layers; u and (v, c) are found by turns. v̄ is the mean of the scales v, to which those of rare kinds
fall back; c ≥ 0 the time of all else. T_p is the time of the network of plan p over that of the
original beside it, times the original's median, so that whatever slows both down falls out; the
original is one of the p. t_pk is the sum of the times of its layers of kind k, "left as they are"
among the kinds; s is the mean of the diagonal of the normal equations of v.

Plans are made of chains that look fast, some of which are told too fast: so all of these plans are
slower than they look. That is corrected as well, but then other chains look fast, some of which may
have been timed twice only. So plans are drawn in ``STAGES``, each by the times as all stages before
have corrected them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from accel.calibration import Calibration
from accel.device_times import LayerTimes
from accel.error_curves import ErrorCurve
from accel.inference import Inference
from accel.memory import kept_memory
from accel.plan import AccelerationPlan
from accel.progress import Progress
from accel.rank_selection import Rules
from accel.selection import least_seconds, select_by_time
from accel.timed_plan import TimedPlan, time_plans

STAGES = 3
PLANS = 6  # In each stage.
# λ: so that a kind that is in few of the plans has about the mean scale.
RIDGE = 0.03
# δ: a plan that is off by more counts as an outlier.
OUTLIER = 0.03
ITERATIONS = 30
# What kinds may be scaled by, as shares of the mean scale: further off than that is noise.
SCALES = (0.5, 2.0)
# A network may have few plans: how many are drawn for each that is wanted.
DRAWS = 4
# Random plans are to be this many times faster, by their layers' times.
FASTER = (1.5, 4.0)


def correct_times(
    calibration: Calibration,
    original: Inference,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    *,
    rules: Rules | None = None,
    seconds: float = 1.5,
    progress: Progress | None = None,
) -> dict[str, LayerTimes]:
    """The times of layers, scaled so that their sums tell the times of networks best.

    The time of what is no layer that can be replaced is shared out equally among the layers: it is
    in the time of each, whatever becomes of it.

    Args:
        calibration: From ``calibrate``.
        original: The network as it was given to ``calibrate``, compiled for the batches.
        times: From ``measure_times``.
        curves: From ``measure_errors``: the chains that there are.
        rules: As in ``accelerate``.
        seconds: Time for timing one plan, in turns with the original.
        progress: Receives what is being done.
    """
    progress = progress or Progress()
    progress.begin(f"timing networks at batch {original.shape[0]}", STAGES * PLANS)
    timed: list[TimedPlan] = []
    corrected = dict(times)
    with kept_memory():
        for stage in range(STAGES):
            plans = random_plans(
                calibration,
                corrected,
                curves,
                PLANS,
                seed=stage,
                rules=rules,
                without=[found.plan for found in timed],
            )
            for found in time_plans(calibration, original, plans, times, seconds):
                timed.append(found)
                progress.advance(1)
            progress.advance(PLANS - len(plans))
            scales, rest = _fitted(timed, times)
            share = rest / 1000 / len(times)
            corrected = {path: _corrected(layer, scales, share) for path, layer in times.items()}
    return corrected


def random_plans(
    calibration: Calibration,
    times: Mapping[str, LayerTimes],
    curves: Mapping[str, ErrorCurve],
    count: int,
    *,
    seed: int,
    rules: Rules | None = None,
    without: Sequence[AccelerationPlan] = (),
) -> list[AccelerationPlan]:
    """Plans that vary in kinds and ranks: the best ones for random errors and random budgets.

    No two are equal, and none is one of ``without``; there are fewer than ``count`` where so many
    are not found.
    """
    random = np.random.default_rng(seed)
    dense = sum(time.dense for time in times.values())
    least = least_seconds(calibration, times, curves, rules=rules)
    plans: list[AccelerationPlan] = []
    for _ in range(DRAWS * count):
        drawn = {
            path: dataclasses.replace(
                curve, errors=curve.errors * np.exp(random.standard_normal(len(curve.errors)))
            )
            for path, curve in curves.items()
        }
        budget = max(dense / random.uniform(*FASTER), least)
        plan = select_by_time(calibration, budget, times, drawn, rules=rules)
        if plan not in plans and plan not in without:
            plans.append(plan)
        if len(plans) == count:
            break
    return plans


def _kinds(plan: AccelerationPlan, times: Mapping[str, LayerTimes]) -> list[str | None]:
    return [layer.decomposition for layer in plan.layers if layer.path in times]


class _Fitted(NamedTuple):
    """Scales of the times of kinds, and milliseconds of all that is no layer."""

    scales: Mapping[str | None, float]
    rest: float


def _fitted(timed: Sequence[TimedPlan], times: Mapping[str, LayerTimes]) -> _Fitted:
    """v and c (see the module's docstring); v̄ for the kinds that are in no plan."""
    used = (kind for plan in timed for kind in _kinds(plan.plan, times))
    kinds = list(dict.fromkeys([None, *used]))
    original = float(np.median([plan.original_ms for plan in timed]))
    dense = np.zeros(len(kinds))
    dense[kinds.index(None)] = 1000 * sum(layer.dense for layer in times.values())
    parts = np.array([dense, *(_milliseconds(plan.plan, times, kinds) for plan in timed)])
    whole = np.array([original, *(original / plan.speedup for plan in timed)])
    relative = np.column_stack([parts, np.ones(len(whole))]) / whole[:, None]
    solved = _robust_ridge(relative)
    if solved[-1] < 0:
        solved = np.append(_robust_ridge(relative[:, :-1], rest=False), 0.0)
    scales, rest = solved[:-1], float(solved[-1])
    mean = float(scales.mean())
    if mean <= 0:
        # Noise, where these layers are next to nothing of the network's time.
        scales, mean = np.ones_like(scales), 1.0
    scales = np.clip(scales, mean * SCALES[0], mean * SCALES[1])
    every = dict.fromkeys(
        candidate.decomposition for layer in times.values() for candidate in layer.candidates
    )
    return _Fitted(
        {**dict.fromkeys(every, mean), **dict(zip(kinds, scales.tolist(), strict=True))}, rest
    )


def _robust_ridge(
    relative: Float64[np.ndarray, "plans columns"], *, rest: bool = True
) -> Float64[np.ndarray, " columns"]:
    """The v, and with ``rest`` the c after them, at which the rows add up to 1 best."""
    plans, columns = relative.shape
    kinds = columns - 1 if rest else columns
    normal = relative.T @ relative / plans
    penalty = np.zeros((columns, columns))
    penalty[:kinds, :kinds] = np.eye(kinds) - 1 / kinds
    penalty *= RIDGE * np.trace(normal[:kinds, :kinds]) / kinds
    solved = np.zeros(columns)
    trust = np.ones(plans)
    for _ in range(ITERATIONS):
        weighed = relative.T * (trust / trust.sum())
        # Least squares, since kinds or the rest may be too little to tell from others.
        solved = np.linalg.lstsq(weighed @ relative + penalty, weighed.sum(axis=1))[0]
        trust = OUTLIER / np.maximum(np.abs(1 - relative @ solved), OUTLIER)
    return solved


def _milliseconds(
    plan: AccelerationPlan, times: Mapping[str, LayerTimes], kinds: Sequence[str | None]
) -> Float64[np.ndarray, " kinds"]:
    """The sums of the times of a plan's layers, by kind."""
    sums = np.zeros(len(kinds))
    for layer in plan.layers:
        if layer.path in times:
            sums[kinds.index(layer.decomposition)] += 1000 * times[layer.path].of(layer)
    return sums


def _corrected(times: LayerTimes, scales: Mapping[str | None, float], share: float) -> LayerTimes:
    """Times scaled by kind, and a share of the rest added, in seconds."""
    factors = np.array([scales[candidate.decomposition] for candidate in times.candidates])
    return dataclasses.replace(
        times, dense=times.dense * scales[None] + share, chains=times.chains * factors + share
    )
