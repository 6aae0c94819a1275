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
from accel.cost import count_conv_macs, count_dense_macs
from accel.decompositions import DECOMPOSITIONS, Decomposition
from accel.images import (
    ArraySource,
    ImageSource,
    fitting_images,
    image_groups,
    split_images,
)
from accel.interpreter import specification
from accel.memory import available_bytes, resident_bytes
from accel.program import LayerCall, Program, named_layers, path_name, trace
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
        calls: The layers that can be replaced, in order of execution: convolutions and, where they
            were asked for, dense layers.
        left_out: All else that convolves, and why each stays as it is.
        decompositions: The kinds of chain to choose from.
        source: The calibration images.
        batch_size: The batch size that the program was traced for.
        seed: Seed of all that is drawn.
        fitting: Which images are used for fitting; the others measure the error.
        tuning: Which of the fitting images choose how strongly to regularise.
        positions: Where each layer was looked at, by path.
        targets: The responses there, ``[images, positions, d]`` float32, by path.
        macs: Multiply-accumulates per image of every convolution of the network, by path or, where
            it is no module of its own, by place in the program.
        dense_macs: The same of every dense layer, by path; empty where they were not asked for.
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
    dense_macs: Mapping[str, int]
    seconds: float
    stated_peak_bytes: int
    cache_bytes: int

    @property
    def widths(self) -> dict[str, int]:
        """The largest rank that a rule can fix of every layer that can be replaced, by path."""
        return _widths(self.calls)

    def of_kind(self, dense: bool) -> tuple[list[LayerCall], Mapping[str, int]]:
        """The dense layers, or convolutions, that can be replaced, and MACs of all there are."""
        calls = [call for call in self.calls if isinstance(call.layer, nnx.Linear) == dense]
        return calls, self.dense_macs if dense else self.macs


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


def layer_kinds(names: str | Sequence[str], dense_layers: bool) -> tuple[Decomposition, ...]:
    """The kinds of chain to choose from: those named, of convolutions, and all of dense layers.

    A choice among the chains of convolutions says nothing about dense layers, and of these there is
    no choice; so they need not be named.

    Raises:
        ValueError: As ``decompositions_named``, or if none of those named is for convolutions.
    """
    named = decompositions_named(names)
    kinds = [kind for kind in named if not kind.dense]
    if not kinds:
        raise ValueError(
            f"{', '.join(kind.name for kind in named)}: for dense layers only; name a decomposition"
            " of convolutions"
        )
    dense = [kind for kind in DECOMPOSITIONS.values() if kind.dense]
    return (*kinds, *(dense if dense_layers else ()))


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
    dense_layers: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Runs the original network once over the images and keeps its responses at sampled positions.

    One calibration serves any number of plans, solvers and speedups. The arguments are those of
    ``accelerate``; ``rules`` are only checked here, so that a mistake shows before the work.
    ``dense_layers`` says whether dense layers are looked at, too, so that plans can replace them.
    """
    progress = progress or Progress()
    start = time.perf_counter()
    kinds = layer_kinds(decompositions, dense_layers)
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
    program = trace(folded, batch, (nnx.Conv, nnx.Linear) if dense_layers else (nnx.Conv,))
    left_out = dict(program.left_out)
    for call in program.calls:
        dense = isinstance(call.layer, nnx.Linear)
        reasons = [kind.unsuitable(call.layer) for kind in kinds if kind.dense == dense]
        rows = specification(call.input).shape[0]
        if all(reasons):
            left_out[call.path] = str(reasons[0])
        elif dense and rows != batch_size:
            left_out[call.path] = f"its input has {rows} rows for a batch of {batch_size} images"
    calls = tuple(call for call in program.calls if call.path not in left_out)
    macs = count_conv_macs(folded, batch)
    found_layers = {*left_out, *(call.path for call in calls)}
    modules = {path_name(parts): type(node).__name__ for parts, node in nnx.iter_graph(folded)}
    # Their MACs count, so they are told of, too.
    left_out |= {
        path: f"computed by {modules[path]}, which is no nnx.Conv"
        for path in macs
        if path not in found_layers
    }
    for layer_type, name in ((nnx.Conv, "convolution"), (nnx.Linear, "dense layer")):
        wanted = dense_layers or layer_type is nnx.Conv
        if wanted and not any(isinstance(call.layer, layer_type) for call in calls):
            found = dict(named_layers(folded, (layer_type,)))
            raise ValueError(
                f"{type(model).__name__} has no {name} to accelerate: "
                + (", ".join(f"{path} ({left_out[path]})" for path in found) or "none found")
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
        f"calibrating {len(calls)} layers on {len(source)} images; host memory stays under"
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
        macs=macs,
        dense_macs=count_dense_macs(folded, batch) if dense_layers else {},
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
    return {
        call.path: min(call.layer.in_features, call.layer.out_features)
        if isinstance(call.layer, nnx.Linear)
        else specification(call.output).shape[-1]
        for call in calls
    }
