"""Measures in which form XLA runs a network and its chains fastest on this device.

    python scripts/measure_runtime_forms.py CONFIG REPORT --out FILE.json [--batch-sizes N ...]

The network of the config and the one that the plan of a run (its ``report.json``) makes of it, both
with drawn weights, are timed in turns in several forms: as ``jax.jit`` runs them, with weights
inside the program (on CPU; elsewhere laid out in memory as the program wants them), with
convolutions by Eigen (on CPU), as ``accel.compile_inference`` does it, which also pools by slices
on CPU, and with what else was tried: 1×1 convolutions as products of matrices, convolutions of few
channels that compute several columns at once, and ranks filled up to multiples of 8 or 16. So are
their gradients by all weights, as ``jax.jit`` compiles them and as training here does. The device
should have nothing else to do.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

from accel.batch_norm import find_foldable, fold_batch_norm
from accel.compiler import Options, network_options
from accel.configuration import load_config
from accel.evaluation.forward import forward_function
from accel.experiment import Experiment
from accel.files import check_new, write_whole
from accel.inference import compile_inference, compile_with_weights, with_any_weights
from accel.memory import kept_memory, use_one_pool
from accel.plan import AccelerationPlan, LayerPlan
from accel.report.environment import command_line, device_name, versions
from accel.rewrite import rewrite
from accel.timing_rounds import check_measurement, speedup_in_rounds, time_rounds

COMPILED = "accel.compile_inference"
# Of that many channels at most, a convolution spends more on gathering what its taps read than on
# multiplying it; columns that are computed at once share it.
FEW_CHANNELS = 16
COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        config: An experiment's config: its network.
        report: ``report.json`` of a run on that network: its plan, and the shape of its images.
        out: The file to write; must not exist. The table of it goes beside it.
        batch_sizes: Images per batch.
        repeats: Most runs of each form.
        seconds: Time for all timed runs at a batch size, of the networks, and as much again of
            their gradients.
    """

    config: tyro.conf.Positional[Path]
    report: tyro.conf.Positional[Path]
    out: Path
    batch_sizes: tuple[int, ...] = (1, 8)
    repeats: int = 30
    seconds: float = 120.0


def main() -> int:
    use_one_pool()
    asked = tyro.cli(Measurement)
    check_new(asked.out)
    check_measurement("measuring forms", asked.batch_sizes, asked.repeats, asked.seconds)
    layers, shape, mac_speedup = planned_by(asked.report)
    original = with_any_weights(load_config(asked.config, Experiment).model.build())
    found: dict[str, Any] = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "mac_speedup": mac_speedup,
        "batches": {},
    }
    for batch_size in asked.batch_sizes:
        times: dict[str, list[float]] = {}
        for forms in runs(original, layers, (batch_size, *shape)):
            print(f"timing {len(forms)} forms at batch {batch_size}", file=sys.stderr)
            with kept_memory():
                times |= time_rounds(forms, asked.repeats, asked.seconds)
        found["batches"][str(batch_size)] = {name: _row(name, times) for name in times}
        write_whole(asked.out, json.dumps(found, indent=2) + "\n")
        write_whole(asked.out.with_suffix(".md"), markdown(found))
    print(markdown(found))
    return 0


def planned_by(report: Path) -> tuple[list[LayerPlan], tuple[int, ...], float]:
    """What a run made of each layer, the shape of its images, and its speedup in MACs.

    Raises:
        ValueError: If the file is no report of a run.
    """
    try:
        content = json.loads(report.read_text())
        layers = [
            LayerPlan(layer["path"], layer["decomposition"], tuple(layer["ranks"]))
            for layer in content["layers"]
        ]
        return layers, tuple(content["settings"]["image_shape"]), content["macs"]["speedup"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report of a run: {error!r}") from error


def _row(name: str, times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Quartiles of a form's times; of the accelerated network also how much faster it is."""
    low, median, high = np.percentile(times[name], [25, 50, 75]).tolist()
    row = {"low_ms": low, "median_ms": median, "high_ms": high}
    network, form = name.split(": ", 1)
    if network != "original":
        # What else was tried is held against the original as it is compiled for inference.
        against = times.get(f"original: {form}", times[f"original: {COMPILED}"])
        row["speedup"], row["speedup_error"] = speedup_in_rounds(against, times[name])
    return row


def runs(
    original: nnx.Module, layers: list[LayerPlan], shape: tuple[int, ...]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """What runs each network in each form once, by ``NETWORK: FORM``, and likewise its gradient."""
    images = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))
    evaluated = nnx.clone(original)
    evaluated.eval()
    pairs = find_foldable(evaluated, images)
    folded = fold_batch_norm(evaluated, pairs)

    def planned(step: int = 1) -> nnx.Module:
        """The network of the plan, its ranks filled up to multiples of ``step``."""
        filled = [
            dataclasses.replace(layer, ranks=tuple(-(-rank // step) * step for rank in layer.ranks))
            for layer in layers
        ]
        return with_any_weights(rewrite(folded, AccelerationPlan(tuple(filled), pairs)))

    def bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(function(*arguments, images))

    forms: dict[str, Callable[[], Any]] = {}
    gradients: dict[str, Callable[[], Any]] = {}
    on_cpu = jax.default_backend() == "cpu"
    weights = "weights inside the program" if on_cpu else "weights laid out for the program"
    accelerated = planned()
    for name, network in (("original", original), ("accelerated", accelerated)):
        forward, state = forward_function(network)
        forms[f"{name}: jax.jit"] = bound(jax.jit(forward), state)
        options = network_options(network)
        for form, told in {weights: None, "and convolutions by Eigen": options}.items():
            if form == weights or options is not None:
                program, arguments = compile_with_weights(
                    lambda network, images: network(images), forward, state, images, options=told
                )
                forms[f"{name}: {form}"] = bound(program, *arguments)
        forms[f"{name}: {COMPILED}"] = bound(compile_inference(network, shape))
        for form, options in (("jax.jit", None), ("accel", network_options(network))):
            gradients[f"{name}: gradient, {form}"] = bound(*gradient(network, options))
    others = {
        "and 1×1 as products of matrices": with_products(accelerated),
        "and few channels by four columns": with_columns(accelerated),
        "and ranks in steps of 8": planned(8),
        "and ranks in steps of 16": planned(16),
    }
    for name, network in others.items():
        forms[f"accelerated: {name}"] = bound(compile_inference(network, shape))
    return forms, gradients


def gradient(network: nnx.Module, options: Options | None) -> tuple[Callable[..., Any], Any, Any]:
    """The jitted gradient of the sum of squares of the outputs, and its first two arguments."""
    evaluated = nnx.clone(network)
    evaluated.eval()
    graphdef, parameters, rest = nnx.split(evaluated, nnx.Param, ...)

    def squares(parameters: Any, rest: Any, images: jax.Array) -> jax.Array:
        return jax.numpy.sum(jax.numpy.square(nnx.merge(graphdef, parameters, rest)(images)))

    return jax.jit(jax.grad(squares), compiler_options=options), parameters, rest


def with_products(network: nnx.Module) -> nnx.Module:
    """A copy whose 1×1 convolutions with strides of 1 are products of matrices."""
    copy = nnx.clone(network)

    def convolve(inputs, kernel, strides, padding, **settings):
        *taps, _, _ = kernel.shape
        plain = isinstance(padding, str) and all(s == 1 for s in (*taps, *strides))
        if not plain:
            return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **settings)
        return jax.numpy.matmul(inputs, kernel.reshape(kernel.shape[-2:]))

    for _, layer in nnx.iter_graph(copy):
        if isinstance(layer, nnx.Conv) and layer.feature_group_count == 1:
            layer.conv_general_dilated = convolve
    return copy


def with_columns(network: nnx.Module) -> nnx.Module:
    """A copy whose convolutions of few channels compute ``COLUMNS`` neighbouring columns at once.

    Each of these is a group of output channels of one wider kernel, which is zero where a column
    reads nothing: (w + COLUMNS - 1) / w times the MACs, but each input is gathered less often.
    """
    copy = nnx.clone(network)

    def convolve(inputs, kernel, strides, padding, **settings):
        height, width, channels, outputs = kernel.shape
        fits = padding == "SAME" and tuple(strides) == (1, 1) and inputs.shape[2] % COLUMNS == 0
        if not fits or width == 1 or channels > FEW_CHANNELS:
            return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **settings)
        moved = [
            jax.numpy.pad(kernel, ((0, 0), (column, COLUMNS - 1 - column), (0, 0), (0, 0)))
            for column in range(COLUMNS)
        ]
        wide = jax.numpy.stack(moved, axis=-2)
        edges = [((taps - 1) // 2, taps // 2) for taps in (height, width)]
        together = jax.lax.conv_general_dilated(
            inputs, wide.reshape(*wide.shape[:3], -1), (1, COLUMNS), edges, **settings
        )
        return together.reshape(*inputs.shape[:3], outputs)

    for _, layer in nnx.iter_graph(copy):
        plain = isinstance(layer, nnx.Conv) and layer.feature_group_count == 1
        if plain and len(layer.kernel_size) == 2:
            layer.conv_general_dilated = convolve
    return copy


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was found: a row a form, speedups over the original in the same form."""
    sizes = list(found["batches"])
    text = [
        "| network and form | " + " | ".join(f"batch {size} | speedup" for size in sizes) + " |",
        "|---|" + "--:|--:|" * len(sizes),
    ]
    for name in found["batches"][sizes[0]]:
        cells = []
        for size in sizes:
            row = found["batches"][size][name]
            speedup = f"{row['speedup']:.2f}×" if "speedup" in row else ""
            cells += [f"{row['median_ms']:.1f} ms", speedup]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
