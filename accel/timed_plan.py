"""A plan and its time: a network of its shape is timed before anything is fitted.

The time of a network does not hang on the values of its weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flax import nnx

from accel.benchmark import latency
from accel.calibration import Calibration
from accel.device_times import LayerTimes
from accel.inference import with_any_weights
from accel.plan import AccelerationPlan
from accel.program import specification
from accel.rewrite import rewrite


@dataclasses.dataclass(frozen=True)
class TimedPlan:
    """A plan, and the time of networks of that shape.

    Attributes:
        plan: What becomes of each layer.
        batch_size: Images per batch.
        original_ms: Median time of the original for a batch, in milliseconds.
        accelerated_ms: The same of a network of the plan's shape, in turns with the original.
        layers_ms: The sum of the times of its layers, by which the plan was made.
        speedup: Ratio of the medians.
    """

    plan: AccelerationPlan
    batch_size: int
    original_ms: float
    accelerated_ms: float
    layers_ms: float
    speedup: float

    def figures(self) -> dict[str, float]:
        """All but the plan, for a report."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "plan"}


def time_plan(
    calibration: Calibration,
    original: nnx.Module,
    plan: AccelerationPlan,
    times: Mapping[str, LayerTimes],
    batch_size: int,
    seconds: float,
) -> TimedPlan:
    """Times a network of the plan's shape, with any weights, in turns with the original.

    Args:
        calibration: From ``calibrate``.
        original: The original network.
        plan: What becomes of each layer.
        times: The times of its layers; each of its chains is among those of the error curves.
        batch_size: Images per batch.
        seconds: How long to time.
    """
    network = with_any_weights(rewrite(calibration.model, plan))
    image_shape = specification(calibration.program.images).shape[1:]
    (row,) = latency(
        original, network, image_shape, batch_sizes=(batch_size,), repeats=200, seconds=seconds
    ).values()
    return TimedPlan(
        plan,
        batch_size,
        row["original_ms"],
        row["accelerated_ms"],
        sum_ms(plan, times),
        row["speedup"],
    )


def sum_ms(plan: AccelerationPlan, times: Mapping[str, LayerTimes]) -> float:
    """The sum of the times of a plan's layers, in milliseconds."""
    return 1000 * sum(times[layer.path].of(layer) for layer in plan.layers if layer.path in times)
