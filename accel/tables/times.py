"""Times of whole networks in a table, from the plans in its lines.

A network's time does not hang on the values of its weights: one of the plan's shape is timed in
turns with the original, and nothing is calibrated or solved for it. So lines get their times
whenever these are asked for, on the machine at hand. Lines of one plan share them: the stages of a
network, and often its seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from accel.batch_norm import find_foldable, fold_batch_norm
from accel.inference import with_any_weights
from accel.plan import AccelerationPlan, LayerPlan
from accel.progress import Progress
from accel.rewrite import rewrite
from accel.timing_rounds import latency

Line = dict[str, Any]


def times_of(line: Line) -> dict[str, dict[str, float]]:
    """A line's times: by batch size, as ``latency`` gives them, with their environment's number."""
    # Earlier versions timed a network in the call that measured its line.
    return {
        batch_size: {"environment": line["environment"], **row}
        for batch_size, row in line.get("latency", {}).items()
    }


def lacking_times(lines: Sequence[Line], batch_sizes: Sequence[int]) -> bool:
    """Whether a line lacks its time at one of the batch sizes."""
    return any(str(size) not in line.get("latency", {}) for line in lines for size in batch_sizes)


def add_times(
    lines: Sequence[Line],
    original: nnx.Module,
    image_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int],
    seconds: float,
    dtype: str | None,
    environment: int,
    progress: Progress,
) -> Iterator[None]:
    """Gives lines the times that they lack, in ``latency``; hands over whenever a plan is done.

    A plan that some of its lines have a time of is not timed again for the others.

    Args:
        lines: With the plan in ``layers``; those that lack times are changed.
        original: The original network.
        image_shape: Shape of one image, ``(height, width, channels)``.
        batch_sizes: Images per batch; each is timed by itself.
        seconds: How long to time a plan.
        dtype: What both networks compute in, as in ``latency``.
        environment: The number of the environment at hand.
        progress: Receives the times.
    """
    if not lacking_times(lines, batch_sizes):
        return
    of_plan: dict[tuple[LayerPlan, ...], list[Line]] = {}
    for line in lines:
        of_plan.setdefault(_planned(line), []).append(line)
    lacking = {
        layers: sharing
        for layers, sharing in of_plan.items()
        if lacking_times(sharing, batch_sizes)
    }
    batch = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    evaluated = nnx.clone(original)
    evaluated.eval()
    pairs = find_foldable(evaluated, batch)
    folded = fold_batch_norm(evaluated, pairs)
    for number, (layers, sharing) in enumerate(lacking.items(), 1):
        times: dict[str, Mapping[str, float]] = {}
        for line in sharing:
            times |= times_of(line)
        missing = [size for size in batch_sizes if str(size) not in times]
        if missing:
            network = with_any_weights(rewrite(folded, AccelerationPlan(layers, pairs)))
            measured = latency(
                original,
                network,
                image_shape,
                batch_sizes=missing,
                seconds=seconds,
                dtype=dtype,
            )
            times |= {size: {**row, "environment": environment} for size, row in measured.items()}
            found = ", ".join(f"{row['speedup']:.2f}× at batch {b}" for b, row in measured.items())
            progress.say(f"timed: plan {number} of {len(lacking)}, {found}")
        for line in sharing:
            line["latency"] = {**times, **times_of(line)}
        yield


def _planned(line: Line) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(layer["path"], layer["decomposition"], tuple(layer["ranks"]))
        for layer in line["layers"]
    )
