"""How long a network takes for a batch of images on the device at hand.

``latency`` times two networks against each other; ``benchmark`` does so for the folder that
``accel run`` wrote, and says beside it what the compiler makes of both and where the time goes.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.checkpoint import known_spec, load_model, saved_plan
from accel.cost import count_conv_macs
from accel.evaluation.forward import check_dtype, in_dtype
from accel.files import write_whole
from accel.inference import Inference, compile_inference, with_any_weights
from accel.interpreter import specification
from accel.memory import kept_memory, page_faults
from accel.peers import onnx_runner, torch_runner
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import Program, named_layers, trace
from accel.progress import Progress
from accel.report.benchmark import (
    BatchBenchmark,
    Benchmark,
    LayerBenchmark,
    NetworkBenchmark,
    PeerBenchmark,
)
from accel.report.environment import device_name, versions
from accel.rewrite import FactorizedConv
from accel.timing_loops import layer_seconds

LEAST_REPEATS = 3
REPEATS = 30
# See ``time_rounds``.
PATIENCE = 3
# Most rounds before the clock starts, and how few pages of memory a round has to get from the
# system for the clock to start earlier: first runs get all of their memory anew, for a thousandth
# of a second for every few MiB, and a program in use does not.
SETTLING = 10
SETTLED = 256
BENCHMARK_FILE = "benchmark.json"


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
                _compiled(networks, (batch_size, *image_shape), dtype),
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


def benchmark(
    folder: Path,
    out: Path,
    command: str,
    *,
    image_shape: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    seconds: float = 30.0,
    dtype: str | None = None,
    onnx: Path | None = None,
    torch: str | None = None,
    builder: str | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Measures what an acceleration gains on the default device, and writes it to a file.

    The original network is built anew from what the model folder says, with fresh parameters, since
    a folder holds the weights of the accelerated one alone; times do not depend on the values of
    weights. Both networks are timed as ``latency`` does, and each convolution and the chain in its
    place by themselves (``layer_seconds``).

    Args:
        folder: What ``accel run`` wrote: ``model/`` and ``report.json``.
        out: The file to write; must not exist yet.
        command: The command that was given, for the record.
        image_shape: Shape of one image, ``(height, width, channels)``; by default that of the
            images of the run, from ``report.json``.
        batch_sizes: Images per batch; each is measured by itself.
        seconds: Time for all timed runs of the networks, as in ``latency``. What compilation and
            the single layers take comes on top.
        dtype: What both networks compute in; by default what the run evaluated in, or float32.
        onnx: The original network as an ONNX file, to be timed in turns with both, in float32, by
            ONNX Runtime.
        torch: Where a function that builds the original network in PyTorch is to be imported from,
            ``package.module:function``; timed like the ONNX file.
        builder: Where the builder of a network of the user's own is to be imported from,
            ``package.module:function``, which a folder is not trusted to say alone.
        progress: Receives what is being measured.

    Raises:
        FileExistsError: If ``out`` exists.
        ValueError: If the folder holds no accelerated network or not what its original is built
            from, if the shape of the images is unknown or does not fit the network, if batch sizes
            or seconds are not positive, the type is unknown, or a peer cannot be run; before
            anything is measured.
    """
    check_measurement("benchmark", batch_sizes, REPEATS, seconds)
    check_dtype(dtype)
    if out.exists():
        raise FileExistsError(f"{out} exists already; nothing is overwritten")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder to write {out.name} to")
    model_folder = folder / "model"
    spec, plan = known_spec(model_folder, builder), saved_plan(model_folder)
    if plan is None or not plan.layers:
        raise ValueError(f"{model_folder} holds no accelerated network")
    report = folder / "report.json"
    told = image_shape is not None and (dtype is not None or not report.exists())
    recorded = {} if told else _settings(report)
    computed_in = dtype or recorded.get("inference_dtype") or "float32"
    check_dtype(computed_in)
    shape = _image_shape(folder, recorded, image_shape)
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    # Of the abstract network, so that a shape which does not fit shows before weights are read.
    macs_original = count_conv_macs(nnx.eval_shape(spec.build), image)
    original = with_any_weights(spec.build())
    accelerated = load_model(model_folder, spec.build)
    macs_accelerated = count_conv_macs(accelerated, image)
    total, left = sum(macs_original.values()), sum(macs_accelerated.values())
    macs = {"original": total, "accelerated": left, "speedup": total / left}
    peers = {batch_size: _peers(onnx, torch, shape, batch_size) for batch_size in batch_sizes}
    progress = progress or Progress()
    networks = {"original": original, "accelerated": accelerated}
    batches = []
    not_timed: dict[str, str] = {}
    for batch_size in batch_sizes:
        progress.say(f"timing both networks at batch {batch_size}")
        images = jax.ShapeDtypeStruct((batch_size, *shape), np.float32)
        compiled = _compiled(networks, images.shape, computed_in)
        with kept_memory():
            row = time_in_turns(
                compiled,
                repeats=REPEATS,
                seconds=seconds / len(batch_sizes),
                peers=peers[batch_size],
            )
        whole = {name: _network_benchmark(name, compiled[name], row) for name in compiled}
        program = trace(original, images)
        not_timed |= program.left_out
        times = _times_of_layers(program, accelerated, batch_size, computed_in, progress)
        layers = [
            LayerBenchmark(
                path=path,
                decomposition=_planned(plan, path).decomposition,
                ranks=_planned(plan, path).ranks,
                macs_original=_macs_inside(macs_original, path),
                macs_accelerated=_macs_inside(macs_accelerated, path),
                original_ms=before,
                accelerated_ms=after,
                original_share=before / row["original_ms"],
                accelerated_share=after / row["accelerated_ms"],
            )
            for path, (before, after) in times.items()
        ]
        flops, flops_left = (whole[name].xla_flops for name in ("original", "accelerated"))
        batches.append(
            BatchBenchmark(
                batch_size=batch_size,
                runs=int(row["runs"]),
                original=whole["original"],
                accelerated=whole["accelerated"],
                macs_speedup=macs["speedup"],
                xla_speedup=flops / flops_left if flops and flops_left else None,
                measured_speedup=row["speedup"],
                measured_over_macs=row["speedup"] / macs["speedup"],
                peers={
                    name: PeerBenchmark(row[f"{name}_ms"], row[f"{name}_spread_ms"])
                    for name in peers[batch_size]
                },
                layers=tuple(layers),
            )
        )
    result = Benchmark(
        model=spec.name,
        device=device_name(),
        versions=versions(),
        command=command,
        dtype=computed_in,
        image_shape=shape,
        macs=macs,
        batches=tuple(batches),
        not_timed=not_timed,
    )
    write_whole(out, result.to_json())
    return result


def _peers(
    onnx: Path | None, torch: str | None, image_shape: Sequence[int], batch_size: int
) -> dict[str, Callable[[], Any]]:
    """What runs the original network in other runtimes, by their names."""
    return dict(
        [
            *([] if onnx is None else [onnx_runner(onnx, image_shape, batch_size)]),
            *([] if torch is None else [torch_runner(torch, image_shape, batch_size)]),
        ]
    )


def xla_flops(compiled: jax.stages.Compiled) -> float | None:
    """Floating-point operations of a program by XLA's cost analysis, None where it does not tell.

    A multiply-accumulate is two of them. On GPUs it leaves out what it hands to cuDNN, that is all
    convolutions.
    """
    if jax.default_backend() == "gpu":
        return None
    flops = (compiled.cost_analysis() or {}).get("flops")
    # For what it does not know, such as a call of foreign code, XLA says -1.
    return float(flops) if flops is not None and flops > 0 else None


def check_measurement(name: str, batch_sizes: Sequence[int], repeats: int, seconds: float) -> None:
    """Raises ValueError where batch sizes, repeats or seconds are too small; ``name`` is told."""
    if not batch_sizes or min(batch_sizes) < 1 or repeats < LEAST_REPEATS or not seconds > 0:
        raise ValueError(
            f"{name} needs batch sizes of 1 or more, {LEAST_REPEATS} repeats or more and a time"
            f" above 0, found {tuple(batch_sizes)}, {repeats} and {seconds}"
        )


def _settings(report: Path) -> dict[str, Any]:
    """The settings that the report of a run tells."""
    try:
        return dict(json.loads(report.read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report of a run: {error!r}") from error


def _image_shape(
    folder: Path, recorded: Mapping[str, Any], given: Sequence[int] | None
) -> tuple[int, ...]:
    """Shape of one image: what was given, or what the report of a run says."""
    source = "--image-size"
    if given is None:
        source = f"{folder / 'report.json'}: image_shape"
        given = recorded.get("image_shape")
    if given is None:
        raise ValueError(
            f"{folder / 'report.json'} does not say which shape its images had; give it"
            " (--image-size HEIGHT WIDTH CHANNELS)"
        )
    listed = isinstance(given, list | tuple) and len(given) > 0
    if not listed or not all(isinstance(size, int) and size >= 1 for size in given):
        raise ValueError(f"{source} is height, width and channels, 1 or more each, found {given}")
    return tuple(given)


def _times_of_layers(
    program: Program, accelerated: nnx.Module, batch_size: int, dtype: str, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each convolution of the original and of what stands in its place, by path.

    A convolution that was left as it was is timed once: a difference would be noise.
    """
    chains = dict(named_layers(accelerated, (FactorizedConv,)))
    progress.begin(f"timing layers at batch {batch_size}", len(program.calls))
    times: dict[str, tuple[float, float]] = {}
    for call in program.calls:
        given = specification(call.input)
        layers = [call.layer, *([chains[call.path]] if call.path in chains else [])]
        with kept_memory():
            seconds = layer_seconds(
                [in_dtype(layer, dtype) for layer in layers],
                given.shape,
                dtype,
                call.activation,
                program.options,
            )
        times[call.path] = (1000 * seconds[0], 1000 * seconds[-1])
        progress.advance(1)
    return times


def _planned(plan: AccelerationPlan, path: str) -> LayerPlan:
    """What the plan makes of a layer; those that it does not name stay as they are."""
    return next((layer for layer in plan.layers if layer.path == path), LayerPlan(path))


def _macs_inside(macs: Mapping[str, int], path: str) -> int:
    return sum(n for at, n in macs.items() if at == path or at.startswith(f"{path}/"))


def _compiled(
    networks: Mapping[str, nnx.Module], shape: tuple[int, ...], dtype: str | None
) -> dict[str, Inference]:
    """The networks compiled for batches of a shape, ``[batch, height, width, channels]``."""
    return {name: compile_inference(model, shape, dtype) for name, model in networks.items()}


def _network_benchmark(
    name: str, compiled: Inference, row: Mapping[str, float]
) -> NetworkBenchmark:
    memory = compiled.program.memory_analysis()
    return NetworkBenchmark(
        median_ms=row[f"{name}_ms"],
        interquartile_range_ms=row[f"{name}_spread_ms"],
        compile_seconds=compiled.seconds,
        xla_flops=xla_flops(compiled.program),
        xla_temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
    )
