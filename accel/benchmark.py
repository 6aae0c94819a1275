"""What an acceleration gains on the device at hand: ``accel benchmark``.

The original and the network of a folder that ``accel run`` wrote, timed in rounds
(``accel.timing_rounds``); beside it what the compiler makes of both and where the time goes.
"""

from __future__ import annotations

import json
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
from accel.inference import Inference, with_any_weights
from accel.interpreter import specification
from accel.memory import kept_memory
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
from accel.timing_rounds import REPEATS, check_measurement, compile_networks, time_in_turns

BENCHMARK_FILE = "benchmark.json"


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
        compiled = compile_networks(networks, images.shape, computed_in)
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
