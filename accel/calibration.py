"""Calibration: what the original network answers at sampled positions, at the price of one pass.

The first step of ``accelerate``. Batch normalisation is folded, the network traced and its
convolutions found in their true order of execution; how much memory the whole run takes is stated
before the images are gone through.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.batch_norm import find_foldable, fold_batch_norm
from accel.cost import count_conv_macs
from accel.decompositions import DECOMPOSITIONS, Decomposition
from accel.images import (
    ArraySource,
    ImageSource,
    fitting_images,
    image_groups,
    split_images,
)
from accel.memory import available_bytes, resident_bytes
from accel.program import LayerCall, Program, specification, trace
from accel.progress import Progress
from accel.rank_selection import Rules, apply_rules
from accel.runs import AcceleratedRun, OriginalRun, patch_size, sample_positions
from accel.sensitivity import backward_bytes

ALL_KINDS = tuple(DECOMPOSITIONS)
# Of the images that are fitted, the part that also chooses how strongly to regularise.
TUNING_FRACTION = 0.2
GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the original network said about the calibration images.

    Attributes:
        model: The network with batch normalisation folded, in evaluation mode.
        folded: The batch normalisations that were folded, with the convolutions that took them in.
        program: The same network, traced.
        calls: The convolutions that can be replaced, in order of execution.
        left_out: The other convolutions, and why each stays as it is.
        decompositions: The kinds of chain to choose from.
        source: The calibration images.
        batch_size: The batch size that the program was traced for.
        seed: Seed of all that is drawn.
        fitting: Which images are used for fitting; the others measure the error.
        tuning: Which of the fitting images choose how strongly to regularise.
        positions: Where each convolution was looked at, by path.
        targets: The responses there, ``[images, positions, d]`` float32, by path.
        macs: Multiply-accumulates per image of every convolution of the network, by path or, where
            it is no module of its own, by place in the program.
        seconds: Time that calibrating took, compilation included.
        stated_peak_bytes: Bound on the host memory of the whole run, stated before it began.
        cache_bytes: How much of it may hold the accelerated network's activations.
    """

    model: nnx.Module
    folded: Mapping[str, str]
    program: Program
    calls: tuple[LayerCall, ...]
    left_out: Mapping[str, str]
    decompositions: tuple[Decomposition, ...]
    source: ImageSource
    batch_size: int
    seed: int
    fitting: np.ndarray
    tuning: np.ndarray
    positions: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    macs: Mapping[str, int]
    seconds: float
    stated_peak_bytes: int
    cache_bytes: int

    @property
    def widths(self) -> dict[str, int]:
        """Output channels of every convolution that can be replaced, by path."""
        return _widths(self.calls)


def decompositions_named(names: str | Sequence[str]) -> tuple[Decomposition, ...]:
    """The decompositions of these names.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in DECOMPOSITIONS:
            raise ValueError(f"unknown decomposition {name!r}; known: {', '.join(DECOMPOSITIONS)}")
    if not names:
        raise ValueError(f"no decomposition given; known: {', '.join(DECOMPOSITIONS)}")
    return tuple(DECOMPOSITIONS[name] for name in dict.fromkeys(names))


def calibrate(
    model: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    *,
    decompositions: str | Sequence[str] = ALL_KINDS,
    positions_per_image: int = 10,
    batch_size: int = 16,
    cache_bytes: int | None = None,
    seed: int = 0,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Runs the original network once over the images and keeps its responses at sampled positions.

    One calibration serves any number of plans, solvers and speedups. The arguments are those of
    ``accelerate``; ``rules`` are only checked here, so that a mistake shows before the work.
    """
    progress = progress or Progress()
    start = time.perf_counter()
    kinds = decompositions_named(decompositions)
    source = (
        ArraySource(np.asarray(images)) if isinstance(images, np.ndarray | jax.Array) else images
    )
    if len(source) < 2:
        raise ValueError(f"calibration needs 2 images or more, found {len(source)}")
    if positions_per_image < 1 or batch_size < 1:
        raise ValueError(
            "positions_per_image and batch_size are 1 or more, found"
            f" {positions_per_image} and {batch_size}"
        )
    _check_parameters(model)
    batch_size = min(batch_size, len(source))
    first = np.asarray(next(iter(source.batches(batch_size))))
    batch = jax.ShapeDtypeStruct(first.shape, first.dtype)
    evaluated = nnx.clone(model)
    evaluated.eval()
    folded_pairs = find_foldable(evaluated, batch)
    folded = fold_batch_norm(evaluated, folded_pairs)
    program = trace(folded, batch)
    left_out = dict(program.left_out)
    for call in program.calls:
        reasons = [kind.unsuitable(call.layer) for kind in kinds]
        if all(reasons):
            left_out[call.path] = str(reasons[0])
    calls = tuple(call for call in program.calls if call.path not in left_out)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} has no convolution to accelerate: "
            + (", ".join(f"{path} ({reason})" for path, reason in left_out.items()) or "none found")
        )
    apply_rules(_widths(calls), rules or {})

    position_key, image_key = jax.random.split(jax.random.key(seed))
    fitting = fitting_images(source, seed)
    tuning = fitting & ~split_images(
        jax.random.fold_in(image_key, 1), image_groups(source), TUNING_FRACTION
    )
    positions = {
        call.path: sample_positions(
            position_key, call, len(source), batch_size, positions_per_image
        )
        for call in calls
    }
    run = OriginalRun(program, calls, source, batch_size, positions)
    stated, cache = _memory_needed(run, program, source, batch_size, cache_bytes)
    progress.say(
        f"calibrating {len(calls)} convolutions on {len(source)} images; host memory stays under"
        f" {stated / GIBIBYTE:.1f} GiB, {cache / GIBIBYTE:.1f} GiB of it for activations"
    )
    progress.begin("original network", len(source))
    targets = run.responses(progress.advance)
    return Calibration(
        model=folded,
        folded=folded_pairs,
        program=program,
        calls=calls,
        left_out=left_out,
        decompositions=kinds,
        source=source,
        batch_size=batch_size,
        seed=seed,
        fitting=fitting,
        tuning=tuning,
        positions=positions,
        targets=targets,
        macs=count_conv_macs(folded, batch),
        seconds=time.perf_counter() - start,
        stated_peak_bytes=stated,
        cache_bytes=cache,
    )


def _check_parameters(model: nnx.Module) -> None:
    for path, value in nnx.to_flat_state(nnx.state(model)):
        array = value[...]
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise ValueError(f"{'/'.join(map(str, path))}: the parameter holds NaN or Inf")


def _memory_needed(
    run: OriginalRun,
    program: Program,
    source: ImageSource,
    batch_size: int,
    cache_bytes: int | None,
) -> tuple[int, int]:
    """Bounds on the host memory of a run: in all, and of it for cached activations."""
    if cache_bytes is None:
        available = available_bytes()
        cache_bytes = 4 * GIBIBYTE if available is None else available // 4
    live = AcceleratedRun(program, run.calls, source, batch_size, cache_bytes).live_bytes
    cache = min(cache_bytes, live)
    # Solving and differentiating are done one after the other.
    work = max(
        backward_bytes(program),
        *(_solving_bytes(call, run.positions[call.path].size) for call in run.calls),
    )
    parameters = sum(value.nbytes for value in program.parameters)
    needed = (
        resident_bytes()
        + run.response_bytes
        + run.working_bytes
        + cache
        # The accelerated network: its weights, and the working set of one of its steps.
        + parameters
        + run.working_bytes
        + work
        # Compiled code and the allocator's slack.
        + GIBIBYTE // 2
    )
    return needed, cache


def _solving_bytes(call: LayerCall, rows: int) -> int:
    """What fitting one layer takes on the host, at most."""
    patch, width = patch_size(call), specification(call.output).shape[-1]
    return (
        # Patches, those of them that are fitted, and their features, in float32.
        rows * 3 * patch * 4
        # A solver: inputs and targets in float32, and about ten float64 arrays of that size.
        + rows * width * (2 * 4 + 10 * 8)
        # Second moments of patches and of features, the metric, what is made of them on the way.
        + 20 * 8 * patch**2
    )


def _widths(calls: Sequence[LayerCall]) -> dict[str, int]:
    return {call.path: specification(call.output).shape[-1] for call in calls}
