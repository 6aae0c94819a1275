"""Measures whether a convolution and the 1×1 after it run faster as one kernel on a GPU.

    python scripts/measure_fused_pair.py --out FILE.json [--batch-sizes N ...]

The chain of ``channel`` writes its intermediate result to memory and reads it again. A Pallas
kernel keeps it on chip: each program takes a run of output positions, adds up the products of all
taps for all ranks in registers, multiplies by the 1×1 factor and adds bias and ReLU. It is timed in
turns with the two convolutions as XLA runs them, on the shapes of VGG-16's layers, in float32 (by
TF32, as XLA does) and bfloat16; for each pair the fastest of some tilings counts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from accel.files import check_new, write_whole
from accel.report.environment import command_line, device_name, versions
from accel.timing_rounds import check_measurement, time_rounds

KERNEL = 3
# A kernel further off than that, relative to the two convolutions, computes something else.
ALLOWED_ERROR = 0.02
# Height and width, channels in, rank, channels out: layers of VGG-16 at a quarter of the MACs.
LAYERS = {
    "conv1_2": (224, 64, 16, 64),
    "conv2_2": (112, 128, 32, 128),
    "conv3_2": (56, 256, 64, 256),
    "conv4_2": (28, 512, 128, 512),
}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is divided.

    Attributes:
        positions: Output positions of one program.
        channels: Channels read at a time.
        warps: Warps of one program.
        stages: How many reads are under way at a time.
    """

    positions: int
    channels: int
    warps: int
    stages: int


TILINGS = tuple(
    Tiling(positions, channels, warps, stages)
    for positions, channels, warps, stages in (
        (64, 32, 4, 3),
        (128, 32, 4, 3),
        (128, 32, 8, 3),
        (128, 64, 8, 3),
        (256, 32, 8, 3),
    )
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        out: The file to write; must not exist. The table of it goes beside it.
        batch_sizes: Images per batch.
        layers: Names of the layers.
        repeats: Most runs of each form.
        seconds: Time for all timed runs of one layer in one type at one batch size.
    """

    out: Path
    batch_sizes: tuple[int, ...] = (1, 64)
    layers: tuple[str, ...] = tuple(LAYERS)
    repeats: int = 50
    seconds: float = 2.0


def main() -> int:
    asked = tyro.cli(Measurement)
    check_new(asked.out)
    check_measurement("measuring pairs", asked.batch_sizes, asked.repeats, asked.seconds)
    if not asked.layers or not LAYERS.keys() >= set(asked.layers):
        raise ValueError(f"layers are some of {', '.join(LAYERS)}, found {asked.layers}")
    rows: list[dict[str, Any]] = []
    found = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "rows": rows,
    }
    for name, dtype, batch_size in itertools.product(
        asked.layers, ("float32", "bfloat16"), asked.batch_sizes
    ):
        rows.append(_measured(name, dtype, batch_size, asked))
        write_whole(asked.out, json.dumps(found, indent=2) + "\n")
        write_whole(asked.out.with_suffix(".md"), markdown(found))
        print(rows[-1], flush=True)
    return 0


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was found."""
    text = [
        "| layer | type | batch | two convolutions | one kernel | gain |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        one = row["one_ms"]
        found_ms = (
            "none runs | |" if one is None else f"{one:.3f} ms | {row['two_ms'] / one:.2f}× |"
        )
        text.append(
            f"| {row['layer']} | {row['dtype']} | {row['batch']} | {row['two_ms']:.3f} ms"
            f" | {found_ms}"
        )
    return "\n".join(text) + "\n"


def operands(name: str, dtype: str, batch_size: int) -> tuple[jax.Array, ...]:
    """Images, both kernels and the bias, drawn."""
    size, channels, rank, outputs = LAYERS[name]
    random = np.random.default_rng(0)

    def drawn(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * random.standard_normal(shape, np.float32), dtype)

    return (
        drawn(batch_size, size, size, channels),
        drawn(KERNEL, KERNEL, channels, rank, scale=(KERNEL * KERNEL * channels) ** -0.5),
        drawn(1, 1, rank, outputs, scale=rank**-0.5),
        drawn(outputs),
    )


def two_convolutions(
    images: jax.Array, first: jax.Array, second: jax.Array, bias: jax.Array
) -> jax.Array:
    """The pair as XLA runs it, with bias and ReLU."""
    for kernel in (first, second):
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return jax.nn.relu(images + bias)


def one_kernel(
    images: jax.Array,
    first: jax.Array,
    second: jax.Array,
    bias: jax.Array,
    *,
    tiling: Tiling,
    interpret: bool = False,
) -> jax.Array:
    """The same by one Pallas kernel.

    The padded image is a line of positions in which every tap is a constant distance away, so that
    a run of positions reads a run of positions for each tap. At the ends of rows it computes two
    positions that do not exist, which are cut off.
    """
    batch, height, width, channels = images.shape
    rank, outputs = second.shape[-2:]
    wide = width + KERNEL - 1
    count = pl.cdiv(height * wide, tiling.positions)
    taps = [row * wide + column for row in range(KERNEL) for column in range(KERNEL)]
    # Room for the last run of positions at the last tap.
    length = count * tiling.positions + taps[-1]
    padding = (KERNEL - 1) // 2
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    line = padded.reshape(batch, -1, channels)
    line = jnp.pad(line, ((0, 0), (0, max(0, length - line.shape[1])), (0, 0)))
    step = min(tiling.channels, channels)

    def kernel(line_ref, first_ref, second_ref, bias_ref, out_ref):
        image, begin = pl.program_id(0), pl.program_id(1) * tiling.positions

        def add(place: jax.Array, total: jax.Array) -> jax.Array:
            channel = pl.multiple_of(place * step, step)
            for tap, distance in enumerate(taps):
                read = line_ref[
                    image, pl.ds(begin + distance, tiling.positions), pl.ds(channel, step)
                ]
                total += jnp.dot(
                    read,
                    first_ref[tap, pl.ds(channel, step), :],
                    preferred_element_type=jnp.float32,
                )
            return total

        total = jnp.zeros((tiling.positions, rank), jnp.float32)
        total = jax.lax.fori_loop(0, channels // step, add, total).astype(images.dtype)
        out = min(64, outputs)
        for place in range(outputs // out):
            columns = pl.ds(place * out, out)
            answer = jnp.dot(total, second_ref[:, columns], preferred_element_type=jnp.float32)
            answer = jnp.maximum(answer + bias_ref[columns].astype(jnp.float32), 0.0)
            out_ref[image, pl.ds(begin, tiling.positions), columns] = answer.astype(images.dtype)

    answers = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, count * tiling.positions, outputs), images.dtype),
        grid=(batch, count),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 4,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
    )(line, first.reshape(-1, channels, rank), second.reshape(rank, outputs), bias)
    return answers[:, : height * wide].reshape(batch, height, wide, outputs)[:, :, :width]


def _measured(name: str, dtype: str, batch_size: int, asked: Measurement) -> dict[str, Any]:
    given = operands(name, dtype, batch_size)

    def bound(function: Callable[..., jax.Array]) -> Callable[[], Any]:
        compiled = jax.jit(function).lower(*given).compile()
        return lambda: jax.block_until_ready(compiled(*given))

    wanted = np.asarray(jax.jit(two_convolutions)(*given), np.float32)
    forms = {"two": bound(two_convolutions)}
    errors, refused = {}, {}
    for tiling in TILINGS:
        text = "-".join(map(str, dataclasses.astuple(tiling)))
        try:
            form = bound(functools.partial(one_kernel, tiling=tiling))
            answer = np.asarray(form(), np.float32)
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as reason:
            # What a tiling needs may be more than the chip has, and no CPU has such kernels.
            refused[text] = repr(reason)[:300]
            continue
        errors[text] = float(np.linalg.norm(answer - wanted) / np.linalg.norm(wanted))
        if errors[text] < ALLOWED_ERROR:
            forms[text] = form
    times = {
        text: float(np.median(taken))
        for text, taken in time_rounds(forms, asked.repeats, asked.seconds).items()
    }
    two = times.pop("two")
    best = min(times, key=lambda text: times[text], default=None)
    return {
        "layer": name,
        "dtype": dtype,
        "batch": batch_size,
        "two_ms": two,
        "one_ms": None if best is None else times[best],
        "tiling": best,
        "tilings_ms": times,
        "relative_errors": errors,
        "refused": refused,
    }


if __name__ == "__main__":
    raise SystemExit(main())
