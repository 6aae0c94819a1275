"""A budget in measured time: the network shall be so many times faster on the device at hand.

Times of single layers (``accel.device_times``), corrected by those of whole networks
(``accel.time_correction``), propose a plan, a network of that shape is timed as a whole beside the
original, and what was found corrects the next proposal, until the speedup that is measured is the
one that was asked for. Then plans of the fewest MACs are timed that promise less error than the
best of these. No layer is fitted for that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from flax import nnx

from accel.calibration import Calibration
from accel.chain_filters import (
    measured_multiple,
    with_promising_chains,
    with_rank_multiple,
)
from accel.device_times import LayerTimes, measure_times
from accel.error_curves import ErrorCurve
from accel.inference import compile_inference
from accel.interpreter import specification
from accel.measurements import measure_errors
from accel.memory import kept_memory
from accel.plan import AccelerationPlan
from accel.progress import Progress
from accel.rank_selection import Rules, check_speedup
from accel.selection import (
    conv_macs_of,
    least_seconds,
    select_by_time,
    select_ranks,
    select_within_error,
)
from accel.time_correction import correct_times
from accel.timed_plan import TimedPlan, sum_ms, time_plan
from accel.timing_rounds import time_in_turns

# The search by time ends where a speedup is this close to the one asked for. Of all plans that are
# not slower than that, the one of the smallest error is taken; if there is none, the fastest,
# within LIMIT.
TOLERANCE = 0.015
LIMIT = 0.05
ROUNDS = 9
# From this round on, plans are mixed of those tried before.
MIXED = 4
# What is left of a budget that gave a plan that was timed already, if none is faster than wanted.
STEP = 0.97
# Times of layers are noisy, and what is chosen by them is more often told too fast than too slow;
# MACs have no noise. So a plan of the fewest MACs is timed as well, of so much of the best plan's
# error; where it has time to spare, so are others with as many more MACs.
LESS = 0.95
ROUNDS_BY_MACS = 3
TIMES, MACS = "times of layers", "MACs"
# Plans are timed for longer where the speedup's relative standard error is larger than this.
PRECISION = 0.01


def select_for_latency(
    calibration: Calibration,
    original: nnx.Module,
    speedup: float | None = None,
    *,
    milliseconds: float | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
    times: Mapping[str, LayerTimes] | None = None,
    rank_multiple: int = 1,
    rules: Rules | None = None,
    seconds: float = 6.0,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> TimedPlan:
    """Chooses what becomes of each convolution so that the network runs as fast as asked for.

    Args:
        calibration: From ``calibrate``.
        original: The network that is the measure, as it was given to ``calibrate``.
        speedup: Its time for a batch over that of the accelerated network, on the default device.
        milliseconds: The time for a batch, instead of ``speedup``; the original is timed first.
        batch_size: Images per batch.
        dtype: What both networks compute in when they are timed, such as ``bfloat16``; None for the
            types that they have.
        curves: From ``measure_errors`` with ``measured_multiple``; it is called where they are not
            given.
        times: From ``correct_times`` for this batch size and type, which is called after
            ``measure_times`` where they are not given.
        rank_multiple: As in ``accelerate``.
        rules: As in ``accelerate``.
        seconds: Time for timing one plan, in turns with the original; three times as long at most
            on a device whose speed changes.
        cache: Folder of the times of layers; by default ``accel.time_cache.default_cache()``.
        progress: Receives what is being done.

    Raises:
        ValueError: If all plans are slower by more than 5 %; the message says the largest speedup
            that was measured. If the original does not take longer than ``milliseconds``, or both
            are given, or neither.
    """
    if speedup is not None and milliseconds is not None:
        raise ValueError(
            f"a speedup or milliseconds can be asked for, not both: found"
            f" {speedup} and {milliseconds}"
        )
    if speedup is not None:
        check_speedup("latency_speedup", speedup)
    elif milliseconds is None:
        raise ValueError("neither a speedup nor milliseconds are asked for")
    image_shape = specification(calibration.program.images).shape[1:]
    compiled = compile_inference(original, (batch_size, *image_shape), dtype)
    if milliseconds is not None:
        networks = {"original": compiled, "accelerated": compiled}
        with kept_memory():
            row = time_in_turns(networks, repeats=200, seconds=seconds)
        speedup = row["original_ms"] / milliseconds
        if speedup <= 1:
            raise ValueError(
                f"latency_ms of {milliseconds:g}: the original takes {row['original_ms']:.3g} ms"
                f" at batch {batch_size} already"
            )
    assert speedup is not None
    progress = progress or Progress()
    if curves is None:
        measured = measure_errors(
            calibration, rank_multiple=measured_multiple(rank_multiple), progress=progress
        )
        curves = with_rank_multiple(calibration, measured, rank_multiple, rules=rules)
    calls = [call for call in calibration.calls if isinstance(call.layer, nnx.Conv)]
    if times is None:
        curves = with_promising_chains(
            calibration, curves, rank_multiple=rank_multiple, rules=rules
        )
        uncorrected = measure_times(
            calls,
            curves,
            batch_size,
            dtype=dtype,
            options=calibration.program.options,
            cache=cache,
            progress=progress,
        )
        times = correct_times(
            calibration,
            compiled,
            uncorrected,
            curves,
            rules=rules,
            seconds=seconds / 4,
            progress=progress,
        )
    dense = sum(times[call.path].dense for call in calls)
    lowest = least_seconds(calibration, times, curves, rules=rules)
    # As slow as rules let it be: the layers as they are, but for those with a fixed rank.
    untouched = select_by_time(calibration, max(2 * dense, lowest), times, curves, rules=rules)
    tried: list[TimedPlan] = []
    budget = dense / speedup

    def time_and_tell(plan: AccelerationPlan, found_by: str) -> TimedPlan:
        timed = time_plan(calibration, compiled, plan, times, seconds, PRECISION)
        timed = dataclasses.replace(timed, found_by=found_by)
        progress.say(
            f"batch {batch_size}: {timed.original_ms:.2f} ms → {timed.accelerated_ms:.2f} ms,"
            f" {timed.speedup:.2f}× of {speedup:g}× asked for, by {found_by}"
        )
        tried.append(timed)
        return timed

    with kept_memory():
        for round_ in range(ROUNDS):
            budget = max(budget, lowest)
            plan = select_by_time(calibration, budget, times, curves, rules=rules)
            mixed = None
            if round_ >= MIXED or _tried(plan, tried):
                mixed = _mixed(tried, untouched, times, 1000 * budget, 1 / speedup)
            while mixed is None and _tried(plan, tried) and budget > lowest:
                budget = max(STEP * budget, lowest)
                plan = select_by_time(calibration, budget, times, curves, rules=rules)
            plan = mixed or plan
            if _tried(plan, tried):
                break
            timed = time_and_tell(plan, TIMES)
            if abs(timed.speedup / speedup - 1) <= TOLERANCE:
                break
            budget = _next_budget(tried, 1000 * dense, 1 / speedup) / 1000
        plan = _by_macs(calibration, speedup, tried, curves, rules)
        for _ in range(ROUNDS_BY_MACS):
            if plan is None or _tried(plan, tried):
                break
            timed = time_and_tell(plan, MACS)
            if timed.speedup < (1 + TOLERANCE) * speedup:
                break
            plan = _as_fast_by_macs(calibration, speedup, timed, curves, rules)
    best = _best(tried, speedup, curves)
    if best is not None:
        return best
    fastest = max(tried, key=lambda timed: timed.speedup)
    if fastest.speedup >= (1 - LIMIT) * speedup:
        return fastest
    raise ValueError(
        f"a latency_speedup of {speedup:g} was not reached on this device at batch {batch_size}:"
        f" the best of {len(tried)} plans that were timed is {fastest.speedup:.2f}×"
    )


def _best(
    tried: Sequence[TimedPlan], speedup: float, curves: Mapping[str, ErrorCurve]
) -> TimedPlan | None:
    """The plan of the smallest error of those that are fast enough; None where none is.

    It is not always the one closest to the speedup: where times jump, a faster plan can have the
    smaller error.
    """
    fast_enough = [timed for timed in tried if timed.speedup >= (1 - TOLERANCE) * speedup]
    return min(fast_enough, key=lambda timed: _error(timed.plan, curves), default=None)


def _by_macs(
    calibration: Calibration,
    speedup: float,
    tried: Sequence[TimedPlan],
    curves: Mapping[str, ErrorCurve],
    rules: Rules | None,
) -> AccelerationPlan | None:
    """A plan of the fewest MACs that is better than the best one tried, if it is fast enough.

    Where none is fast enough it is the one that would be, by the time and the MACs of the fastest.
    None where there is no such plan.
    """
    best = _best(tried, speedup, curves)
    if best is None:
        fastest = max(tried, key=lambda timed: timed.speedup)
        return _as_fast_by_macs(calibration, speedup, fastest, curves, rules)
    try:
        allowed = LESS * _error(best.plan, curves)
        return select_within_error(calibration, allowed, curves, rules=rules)
    except ValueError:  # With the ranks that rules fix the error cannot be that small.
        return None


def _as_fast_by_macs(
    calibration: Calibration,
    speedup: float,
    timed: TimedPlan,
    curves: Mapping[str, ErrorCurve],
    rules: Rules | None,
) -> AccelerationPlan | None:
    """The plan of the least error that is as fast, if networks take time in proportion to MACs.

    None where it would have more MACs than the original, or fewer than can be.
    """
    total = sum(calibration.macs.values())
    macs = conv_macs_of(calibration, timed.plan) * timed.speedup / speedup
    if macs >= total:
        return None
    try:
        return select_ranks(calibration, total / macs, curves=curves, rules=rules)
    except ValueError:
        return None


def _error(plan: AccelerationPlan, curves: Mapping[str, ErrorCurve]) -> float:
    """The sum of the measured errors of a plan's chains."""
    return math.fsum(curves[layer.path].of(layer) for layer in plan.layers if layer.path in curves)


def _tried(plan: AccelerationPlan, tried: Sequence[TimedPlan]) -> bool:
    return any(plan == earlier.plan for earlier in tried)


def _mixed(
    tried: Sequence[TimedPlan],
    untouched: AccelerationPlan,
    times: Mapping[str, LayerTimes],
    layers_ms: float,
    wanted: float,
) -> AccelerationPlan | None:
    """A plan between the two that are next to the share ``wanted``, on either side.

    Where the compiler fuses one plan otherwise than the next, no plan in between follows from the
    sum of times. So the layers of the slower one are replaced by those of the faster, from the
    first on, as many as bring the sum closest to ``layers_ms``. None where all of these plans have
    been tried, or all that were tried are slower.

    Args:
        tried: The plans that were timed.
        untouched: The slower one where all of them are faster.
        times: From ``measure_times``.
        layers_ms: The sum of layers' times to come close to.
        wanted: Share of the original's time.
    """
    slower = [timed for timed in tried if 1 / timed.speedup > wanted]
    faster = [timed for timed in tried if 1 / timed.speedup <= wanted]
    if not faster:
        return None
    after = min(faster, key=lambda timed: timed.speedup).plan.layers
    before = max(slower, key=lambda timed: timed.speedup).plan if slower else untouched
    plans = [
        dataclasses.replace(before, layers=(*after[:count], *before.layers[count:]))
        for count in range(1, len(after))
    ]
    new = [plan for plan in plans if not _tried(plan, tried)]
    return min(new, key=lambda plan: abs(sum_ms(plan, times) - layers_ms), default=None)


def _next_budget(tried: Sequence[TimedPlan], dense_ms: float, wanted: float) -> float:
    """The sum of layers' times, in ms, at which the network should take the share ``wanted``.

    The network's time, as a share of the original's (so that whatever slows both down falls out),
    is taken as a straight line in the sum of its layers' times: between the two plans, the original
    among them, that are next to the one wanted on either side; through the original and the fastest
    where all are slower, but no more than halving the sum in one step.
    """
    points = [(dense_ms, 1.0), *((plan.layers_ms, 1 / plan.speedup) for plan in tried)]
    # There is always a slower one: the original.
    slower = min((p for p in points if p[1] > wanted), key=lambda p: p[1])
    faster = max((p for p in points if p[1] <= wanted), key=lambda p: p[1], default=None)
    if faster is not None:
        share = (wanted - faster[1]) / (slower[1] - faster[1])
        return faster[0] + share * (slower[0] - faster[0])
    least = min(point[0] for point in points)
    if slower[0] >= dense_ms:
        # All plans are slower than the original: no line through it tells anything.
        return least / 2
    gained = (1 - slower[1]) / (dense_ms - slower[0])
    return slower[0] - min((slower[1] - wanted) / gained, slower[0] / 2)
