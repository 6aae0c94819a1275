"""How long networks take for a batch of images on the device at hand, timed in rounds.

Runs are interleaved: in each round every network runs once. ``latency`` times an accelerated
network against the original; what is faster by how much is told by the ratios of the rounds.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.evaluation.forward import check_dtype
from accel.inference import Inference, compile_inference
from accel.memory import kept_memory, page_faults

LEAST_REPEATS = 3
REPEATS = 30
# See ``time_rounds``.
PATIENCE = 3
# Most rounds before the clock starts, and how few pages of memory a round has to get from the
# system for the clock to start earlier: first runs get all of their memory anew, for a thousandth
# of a second for every few MiB, and a program in use does not.
SETTLING = 10
SETTLED = 256


def latency(
    original: nnx.Module,
    accelerated: nnx.Module,
    image_shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 16),
    repeats: int = REPEATS,
    seconds: float = 30.0,
    dtype: str | None = None,
) -> dict[str, dict[str, float]]:
    """Times both networks on the default device, a run of one after a run of the other.

    Runs are interleaved, and which network goes first changes from pair to pair, so that whatever
    else the machine does meets both alike. Both are compiled for inference (``compile_inference``)
    and run before the clock starts until they find the memory they need (``SETTLING``); images and
    weights are on the device already, and a run ends when its outputs are there.

    Args:
        original: The network that is the measure, called as ``original(images)``.
        accelerated: The other; neither is changed.
        image_shape: Shape of one image, ``(height, width, channels)``.
        batch_sizes: Images per batch; each is timed by itself.
        repeats: Most runs of each network per batch size.
        seconds: Time for all timed runs together, shared out equally among the batch sizes. Once a
            share is used up no more runs begin, but three of each network are always made.
        dtype: What both compute in, such as ``bfloat16``; None for the types that they have.

    Returns:
        By batch size as text: ``original_ms`` and ``accelerated_ms``, medians in milliseconds per
        batch; ``original_spread_ms`` and ``accelerated_spread_ms``, interquartile ranges;
        ``speedup``, the median of what a run of the original took over the run of the accelerated
        network beside it; ``speedup_error``, its relative standard error; ``runs``, the number of
        runs of each network.

    Raises:
        ValueError: If batch sizes, repeats or seconds are not positive, or the type is unknown.
    """
    check_measurement("latency", batch_sizes, repeats, seconds)
    check_dtype(dtype)
    networks = {"original": original, "accelerated": accelerated}
    with kept_memory():
        return {
            str(batch_size): time_in_turns(
                compile_networks(networks, (batch_size, *image_shape), dtype),
                repeats=repeats,
                seconds=seconds / len(batch_sizes),
            )
            for batch_size in batch_sizes
        }


def time_in_turns(
    networks: Mapping[str, Inference],
    *,
    repeats: int,
    seconds: float,
    peers: Mapping[str, Callable[[], Any]] | None = None,
    settled: Sequence[str] = (),
    precision: float | None = None,
) -> dict[str, float]:
    """Times compiled networks as ``latency`` does.

    The process keeps the memory that they free (see ``Inference``), for what is timed next.

    Args:
        networks: ``original`` and ``accelerated``, compiled for batches of one shape.
        repeats: Most runs of each.
        seconds: Time for all timed runs together, as in ``latency``.
        peers: What else takes part in the turns, by name.
        settled: Names of those that ran just before, so that they need not run untimed first.
        precision: If the speedup's relative standard error is larger when the time is up or all
            runs are made, they go on, ``PATIENCE`` times as long at most.

    Returns:
        A row of ``latency``, with the times of the peers as well.
    """
    shape = networks["original"].shape
    images = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))

    def runner(network: Inference) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(network(images))

    runs = {name: runner(network) for name, network in networks.items()} | dict(peers or {})

    def enough(times: Mapping[str, Sequence[float]]) -> bool:
        error = speedup_in_rounds(times["original"], times["accelerated"])[1]
        return precision is None or error <= precision

    milliseconds = time_rounds(runs, repeats, seconds, settled, enough)
    row: dict[str, float] = {}
    for name, times in milliseconds.items():
        low, median, high = np.percentile(times, [25, 50, 75])
        row[f"{name}_ms"] = float(median)
        row[f"{name}_spread_ms"] = float(high - low)
    row["speedup"], row["speedup_error"] = speedup_in_rounds(
        milliseconds["original"], milliseconds["accelerated"]
    )
    row["runs"] = len(milliseconds["original"])
    return row


def speedup_in_rounds(
    original: Sequence[float], accelerated: Sequence[float]
) -> tuple[float, float]:
    """How many times faster a network is, and the relative standard error of that.

    The median of the ratios of times of the same round. What slows the device down for longer than
    a round falls out of them: on CPUs that others used as well this median varied by 1.7 %, the
    ratio of both medians by 2.9 %. The error is told as if ratios were distributed normally, and of
    five rounds or so by a quarter too small.

    Args:
        original: Times from ``time_rounds``.
        accelerated: Those of the other network, round by round.
    """
    ratios = np.divide(original, accelerated)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    deviation = (high - low) / 1.349
    return float(median), float(1.2533 * deviation / math.sqrt(ratios.size) / median)


def time_rounds(
    runs: dict[str, Callable[[], Any]],
    repeats: int,
    seconds: float,
    settled: Sequence[str] = (),
    enough: Callable[[Mapping[str, Sequence[float]]], bool] = lambda _: True,
) -> dict[str, list[float]]:
    """Times of each run in milliseconds, taken in turns, after rounds that are not timed.

    Args:
        runs: What is timed, by name; each ends when its outputs are there.
        repeats: Most runs of each, if they are enough.
        seconds: Time for all, as in ``latency``, if that is enough.
        settled: Names of runs that are left out of the rounds that are not timed.
        enough: Tells of the times so far, when the time is up or all runs are made, whether they
            are enough; if not, more are taken, for ``PATIENCE`` times as long at most.
    """
    begin = time.perf_counter()
    for _ in range(SETTLING):
        before = page_faults()
        for name, run in runs.items():
            if name not in settled:
                run()
        if page_faults() - before < SETTLED or time.perf_counter() - begin > seconds:
            break
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    begin = time.perf_counter()
    for repeat in itertools.count():
        passed = time.perf_counter() - begin
        done = repeat >= repeats or (repeat >= LEAST_REPEATS and passed > seconds)
        if done and (passed > PATIENCE * seconds or enough(milliseconds)):
            break
        for name in order:
            start = time.perf_counter()
            runs[name]()
            milliseconds[name].append(1000 * (time.perf_counter() - start))
        order.reverse()
    return milliseconds


def check_measurement(name: str, batch_sizes: Sequence[int], repeats: int, seconds: float) -> None:
    """Raises ValueError where batch sizes, repeats or seconds are too small; ``name`` is told."""
    if not batch_sizes or min(batch_sizes) < 1 or repeats < LEAST_REPEATS or not seconds > 0:
        raise ValueError(
            f"{name} needs batch sizes of 1 or more, {LEAST_REPEATS} repeats or more and a time"
            f" above 0, found {tuple(batch_sizes)}, {repeats} and {seconds}"
        )


def compile_networks(
    networks: Mapping[str, nnx.Module], shape: tuple[int, ...], dtype: str | None
) -> dict[str, Inference]:
    """The networks compiled for batches of a shape, ``[batch, height, width, channels]``."""
    return {name: compile_inference(model, shape, dtype) for name, model in networks.items()}
