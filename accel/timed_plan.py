"""A plan and its time: a network of its shape is timed before anything is fitted.

The time of a network does not hang on the values of its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accel.calibration import Calibration
from accel.compiler import compile_together
from accel.device_times import LayerTimes
from accel.inference import Inference, compile_inference, with_any_weights
from accel.plan import AccelerationPlan
from accel.rewrite import rewrite
from accel.timing_rounds import time_in_turns


@dataclasses.dataclass(frozen=True)
class TimedPlan:
    """A plan, and the time of networks of that shape.

    Attributes:
        plan: What becomes of each layer.
        batch_size: Images per batch.
        dtype: What both networks compute in; None for the types that they have.
        original_ms: Median time of the original for a batch, in milliseconds.
        accelerated_ms: The same of a network of the plan's shape, in turns with the original.
        layers_ms: The sum of the times of its layers.
        speedup: The original's time over the other's beside it, the median of all rounds.
        speedup_error: Its relative standard error.
        found_by: What it was chosen by, ``"times of layers"`` or ``"MACs"``, where a search tells.
    """

    plan: AccelerationPlan
    batch_size: int
    dtype: str | None
    original_ms: float
    accelerated_ms: float
    layers_ms: float
    speedup: float
    speedup_error: float
    found_by: str | None = None

    def figures(self) -> dict[str, Any]:
        """All but the plan, for a report."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "plan"}


def time_plans(
    calibration: Calibration,
    original: Inference,
    plans: Sequence[AccelerationPlan],
    times: Mapping[str, LayerTimes],
    seconds: float,
    precision: float | None = None,
) -> Iterator[TimedPlan]:
    """Times networks of the plans' shapes, with any weights, each in turns with the original.

    Args:
        calibration: From ``calibrate``.
        original: The original network, compiled for the batches; the others compute in the same
            type.
        plans: What becomes of each layer.
        times: The times of the layers; each of the chains is among those of the error curves.
        seconds: How long to time one plan.
        precision: How small the relative standard error of a speedup is to be, if that does not
            take longer than ``PATIENCE`` times ``seconds`` (``accel.timing_rounds``).
    """

    def compiled(plan: AccelerationPlan) -> Inference:
        network = with_any_weights(rewrite(calibration.model, plan))
        return compile_inference(network, original.shape, original.dtype)

    settled: tuple[str, ...] = ()
    for plan, network in zip(plans, compile_together(compiled, plans), strict=True):
        pair = {"original": original, "accelerated": network}
        row = time_in_turns(
            pair, repeats=200, seconds=seconds, settled=settled, precision=precision
        )
        settled = ("original",)
        yield TimedPlan(
            plan,
            original.shape[0],
            original.dtype,
            row["original_ms"],
            row["accelerated_ms"],
            sum_ms(plan, times),
            row["speedup"],
            row["speedup_error"],
        )


def time_plan(
    calibration: Calibration,
    original: Inference,
    plan: AccelerationPlan,
    times: Mapping[str, LayerTimes],
    seconds: float,
    precision: float | None = None,
) -> TimedPlan:
    """``time_plans`` for one plan."""
    (timed,) = time_plans(calibration, original, [plan], times, seconds, precision)
    return timed


def sum_ms(plan: AccelerationPlan, times: Mapping[str, LayerTimes]) -> float:
    """The sum of the times of a plan's layers, in milliseconds."""
    return 1000 * sum(times[layer.path].of(layer) for layer in plan.layers if layer.path in times)
