"""Latency: how long a network takes for a batch of images on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.evaluation.forward import forward_function

LEAST_REPEATS = 3


def latency(
    original: nnx.Module,
    accelerated: nnx.Module,
    image_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 16),
    repeats: int = 30,
    seconds: float = 30.0,
) -> dict[str, dict[str, float]]:
    """Times both networks on the default device, a run of one after a run of the other.

    Runs are interleaved, and which network goes first changes from pair to pair, so that whatever
    else the machine does meets both alike. Both are compiled and run once before the clock starts;
    images and weights are on the device already, and a run ends when its outputs are there.

    Args:
        original: The network that is the measure, called as ``original(images)``.
        accelerated: The other; neither is changed.
        image_shape: Shape of one image, ``(height, width, channels)``.
        batch_sizes: Images per batch; each is timed by itself.
        repeats: Most runs of each network per batch size.
        seconds: Time for all timed runs together, shared out equally among the batch sizes. Once a
            share is used up no more runs begin, but three of each network are always made.

    Returns:
        By batch size as text: ``original_ms`` and ``accelerated_ms``, medians in milliseconds per
        batch; ``original_spread_ms`` and ``accelerated_spread_ms``, interquartile ranges;
        ``speedup``, the ratio of the medians; ``runs``, the number of runs of each network.

    Raises:
        ValueError: If batch sizes, repeats or seconds are not positive.
    """
    if not batch_sizes or min(batch_sizes) < 1 or repeats < LEAST_REPEATS or seconds <= 0:
        raise ValueError(
            f"latency needs batch sizes of 1 or more, {LEAST_REPEATS} repeats or more and a time"
            f" above 0, found {tuple(batch_sizes)}, {repeats} and {seconds}"
        )
    networks = {
        "original": forward_function(original),
        "accelerated": forward_function(accelerated),
    }
    table: dict[str, dict[str, float]] = {}
    for batch_size in batch_sizes:
        shape = (batch_size, *image_shape)
        images = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))
        runs = {name: _compiled(*network, images) for name, network in networks.items()}
        milliseconds = _interleaved(runs, repeats, seconds / len(batch_sizes))
        row: dict[str, float] = {}
        for name, times in milliseconds.items():
            low, median, high = np.percentile(times, [25, 50, 75])
            row[f"{name}_ms"] = float(median)
            row[f"{name}_spread_ms"] = float(high - low)
        row["speedup"] = row["original_ms"] / row["accelerated_ms"]
        row["runs"] = len(milliseconds["original"])
        table[str(batch_size)] = row
    return table


def _compiled(
    forward: Callable[[Any, Any], Any], state: nnx.State, images: jax.Array
) -> Callable[[], Any]:
    """A compiled run of the network, which returns when the outputs are there."""
    compiled = jax.jit(forward).lower(state, images).compile()
    return lambda: jax.block_until_ready(compiled(state, images))


def _interleaved(
    runs: dict[str, Callable[[], Any]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Times of each run in milliseconds, after one run of each that is not timed."""
    for run in runs.values():
        run()
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= LEAST_REPEATS and time.perf_counter() - begin > seconds:
            break
        for name in order:
            start = time.perf_counter()
            runs[name]()
            milliseconds[name].append(1000 * (time.perf_counter() - start))
        order.reverse()
    return milliseconds
