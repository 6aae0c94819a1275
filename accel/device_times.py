"""Times of single layers and of the chains that could replace them, on the device at hand.

A layer is timed with the activation that follows inside a loop of one compiled program: no
dispatch, and no fresh memory for its outputs, is in the time, as in the middle of a network. Of
each kind of chain a few ranks are timed, round and other numbers apart; between them times are
interpolated over MACs. What was timed once is kept on disk, by device, versions and shapes.

Times of layers do not quite add up to that of a network, whose compiler fuses across them. So
``accel.time_correction`` corrects them, and ``accel.latency_budget`` times each plan as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float64

from accel.compiler import Options, compile_together, matmul_precision
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import forward_function, in_dtype
from accel.files import write_whole
from accel.inference import compile_with_weights, with_any_weights
from accel.interpreter import specification
from accel.memory import keep_free_memory, kept_memory, one_pool
from accel.plan import LayerPlan
from accel.program import LayerCall
from accel.progress import Progress
from accel.rank_selection import Candidate
from accel.report.environment import device_name, versions
from accel.rewrite import chain_for
from accel.solvers.activations import Activation, activate

# A timed program runs a layer for so long.
TIMED_SECONDS = 0.02
# How often everything that could stand in one place is timed, in turns.
PASSES = 3
# How layers are timed: what was timed otherwise is not comparable.
FORM = (
    "median of three, each in proportion to the layer as it is; all outputs written, nothing"
    " copied; weights as inference has them"
)
# Elsewhere than on CPU a turn of the loop runs a layer more than once, unless its outputs are
# larger than this: then the layer takes long enough, and they too much memory to be held often.
SMALL_OUTPUT = 2**24
# Which chains are timed, as places among those of one kind by ascending MACs, from first to last.
SHARES = (0.0, 0.08, 0.25, 0.6, 1.0)
# Chains of which all ranks are multiples of this fill vectors and tiles: on CPU a chain of rank 16
# is faster than one of rank 14. They are timed apart from the others.
STEP = 8


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTimes:
    """Times of one layer for a batch.

    Attributes:
        dense: Seconds of the layer as it is.
        candidates: The chains of its error curve.
        chains: Seconds of each.
    """

    dense: float
    candidates: tuple[Candidate, ...]
    chains: Float64[np.ndarray, " k"]

    def of(self, layer: LayerPlan) -> float:
        """Seconds of what a plan makes of the layer.

        Raises:
            ValueError: If the chain is none of the candidates.
        """
        if layer.decomposition is None:
            return self.dense
        chain = Candidate(layer.decomposition, layer.ranks)
        if chain not in self.candidates:
            raise ValueError(f"{layer.path}: {chain} was not timed")
        return float(self.chains[self.candidates.index(chain)])


def layer_seconds(
    layer: nnx.Module,
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> float:
    """Seconds that a layer or a chain takes, with the activation that follows, on the device.

    The process keeps the memory that is freed, as in inference (``accel.memory.kept_memory``).

    Args:
        layer: The layer; the values of its weights do not matter.
        input_shape: Shape of what it is given, the batch first.
        dtype: Type of what it is given.
        activation: What follows.
        options: What the compiler is told, as for the network that the layer is of.
    """
    loop = _looped(layer, input_shape, dtype, activation, options)
    return seconds_in_turns([loop])[0]


class _Loop(NamedTuple):
    """A compiled program that runs a layer some times."""

    program: jax.stages.Compiled
    arguments: tuple[Any, ...]
    inputs: jax.ShapeDtypeStruct
    runs_per_turn: int


def _looped(
    layer: nnx.Module,
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> _Loop:
    """Compiles a layer for ``_seconds``; the arguments are those of ``layer_seconds``."""
    forward, state = forward_function(with_any_weights(layer))
    inputs = jax.ShapeDtypeStruct(tuple(input_shape), dtype)
    outputs = jax.eval_shape(forward, state, inputs)
    runs = _runs_per_turn(math.prod(outputs.shape) * outputs.dtype.itemsize)

    def looped(
        network: Callable[[jax.Array], jax.Array], count: int, images: jax.Array
    ) -> list[jax.Array]:
        """``count`` turns that run the layer, each time on inputs that hang on the outputs before.

        They are the same, but the compiler must not know, or it would run the layer once. (Writing
        one element instead made it copy all of them at every run.) The outputs are handed from turn
        to turn, so that all of them are computed.
        """

        def turn(
            _: Any, carried: tuple[jax.Array, list[jax.Array]]
        ) -> tuple[jax.Array, list[jax.Array]]:
            inputs, outputs = carried
            outputs = list(outputs)
            for run in range(runs):
                before = outputs[run - 1]
                inputs, outputs[run - 1] = jax.lax.optimization_barrier((inputs, before))
                outputs[run] = activate(network(inputs), activation)
            return inputs, outputs

        nothing = [jax.numpy.zeros(outputs.shape, outputs.dtype) for _ in range(runs)]
        return jax.lax.fori_loop(0, count, turn, (images, nothing))[1]

    # How often is an argument, so that the program is compiled once.
    program, arguments = compile_with_weights(looped, forward, state, 1, inputs, options=options)
    return _Loop(program, arguments, inputs, runs)


def _runs_per_turn(output_bytes: int) -> int:
    """How often a turn of the loop runs the layer: once on CPU.

    Elsewhere the host has to look after each turn whether there is another one, which takes as long
    as a small layer.
    """
    return 1 if jax.default_backend() == "cpu" or output_bytes > SMALL_OUTPUT else 4


def seconds_in_turns(loops: Sequence[_Loop]) -> list[float]:
    """Seconds of one run of each layer, all of which could stand in one place of a network.

    The first one is the layer as it is. Each pass over them begins and ends with it, and the others
    are told in proportion to it: of each the median of its proportions counts, times the least that
    the first one took. So what slows the device down for a while does not make the layer that is
    timed just then look worse than the others.
    """
    images = _images(loops[0])
    first, *others = (_Timer(loop, images) for loop in loops)
    times = np.array(
        [[timer.seconds() for timer in (first, *others, first)] for _ in range(PASSES)]
    )
    beside = times[:, [0, -1]]
    proportions = times[:, 1:-1] / beside.mean(axis=1, keepdims=True)
    least = float(beside.min())
    return [least, *(least * np.median(proportions, axis=0)).tolist()]


def _images(loop: _Loop) -> jax.Array:
    return jax.device_put(np.ones(loop.inputs.shape, loop.inputs.dtype))


class _Timer:
    """Times a layer, which has run by then, so that it needs no more memory."""

    def __init__(self, loop: _Loop, images: jax.Array):
        self.loop, self.images = loop, images
        keep_free_memory()
        self._passed(1)
        # The loop begins with copies of what it is given: a tenth of a layer's time and more where
        # large images go through few channels. What is left has to be more than their noise.
        self.handing_over = min(self._passed(0), self._passed(0))
        enough = max(TIMED_SECONDS / 2, self.handing_over)
        self.count = 1
        while (passed := self._passed(self.count)) - self.handing_over < enough:
            self.count = max(2 * self.count, round(TIMED_SECONDS * self.count / passed))

    def _passed(self, count: int) -> float:
        """Seconds of so many turns of the loop, and of what comes before and after them."""
        start = time.perf_counter()
        jax.block_until_ready(self.loop.program(*self.loop.arguments, count, self.images))
        return time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds of one run of the layer."""
        # What is handed over takes no less than the least, but for the clock's noise.
        passed = max(self._passed(self.count) - self.handing_over, 1e-9)
        return passed / (self.count * self.loop.runs_per_turn)


def default_cache() -> Path:
    """Where times are kept: ``$XDG_CACHE_HOME/accel``, by default ``~/.cache/accel``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel"


class TimeCache:
    """Times of layers on disk, in one file a device and set of versions.

    Args:
        folder: Where the file lies; made where it is missing.
        options: What the compiler is told.
    """

    def __init__(self, folder: Path, options: Options | None):
        self.options = options
        kept = ("jax", "jaxlib", "flax")
        where = {"device": device_name(), **{name: versions().get(name) for name in kept}}
        where |= {"form": FORM, "memory": "one pool" if one_pool() else "the usual pools"}
        where["compiler"] = options
        where["precision"] = matmul_precision()
        where["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
        text = json.dumps(where, sort_keys=True)
        self.file = folder / f"times-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self.content: dict[str, Any] = {"measured_on": where, "seconds": {}}
        self.content["seconds"] = self._kept()

    def _kept(self) -> dict[str, float]:
        """The times in the file."""
        if not self.file.exists():
            return {}
        try:
            content = json.loads(self.file.read_text())
            return {key: float(value) for key, value in content["seconds"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} holds no times of layers: {error!r}") from error

    def seconds(
        self,
        layers: Sequence[nnx.Module],
        input_shape: Sequence[int],
        dtype: Any,
        activation: Activation,
    ) -> list[float]:
        """``seconds_in_turns`` of the layers, of which those are timed that are not known.

        The first one is timed again beside them, and what they take is told in proportion to what
        is known of it.
        """
        known = self.content["seconds"]
        shape = f"{np.dtype(dtype).name}{list(input_shape)}"
        keys = [f"{_text(layer)} of {shape} {activation}" for layer in layers]
        by_key = dict(zip(keys, layers, strict=True))
        timed = [key for key in by_key if key == keys[0] or key not in known]
        if keys[0] not in known or len(timed) > 1:
            looped = partial(
                _looped,
                input_shape=input_shape,
                dtype=dtype,
                activation=activation,
                options=self.options,
            )
            loops = list(compile_together(looped, [by_key[key] for key in timed]))
            found = seconds_in_turns(loops)
            scale = known.get(keys[0], found[0]) / found[0]
            new = {key: scale * value for key, value in zip(timed, found, strict=True)}
            self.content["seconds"] = known = {**new, **known}
        return [known[key] for key in keys]

    def save(self) -> None:
        """Writes the file, whole or not at all; what others put there meanwhile stays."""
        self.content["seconds"] = {**self._kept(), **self.content["seconds"]}
        write_whole(self.file, json.dumps(self.content, indent=1) + "\n")


def _text(layer: nnx.Module) -> str:
    """All of a layer that its time hangs on: types, shapes, strides, precision; not its values."""
    parts = []
    for _, part in nnx.iter_graph(layer):
        if isinstance(part, nnx.Conv | nnx.Linear):
            fields = {
                name: getattr(part, name, None)
                for name in ("strides", "padding", "kernel_dilation", "input_dilation")
            }
            fields |= {name: str(getattr(part, name)) for name in ("dtype", "precision")}
            fields["groups"] = getattr(part, "feature_group_count", 1)
            kernel = part.kernel[...]
            parts.append(
                f"{type(part).__name__}{list(kernel.shape)} {kernel.dtype}"
                f" bias={part.bias is not None} {fields}"
            )
    return "; ".join(parts)


def measure_times(
    calls: Sequence[LayerCall],
    curves: Mapping[str, ErrorCurve],
    batch_size: int,
    *,
    dtype: str | None = None,
    options: Options | None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerTimes]:
    """Times of all layers and of the chains of their error curves, by path.

    Layers of the same shape are timed once, for the chains of all of them.

    Args:
        calls: The layers that can be replaced.
        curves: From ``measure_errors``: the chains to choose from.
        batch_size: Images per batch.
        dtype: What the layers compute in, such as ``bfloat16``; None for the types that they have.
        options: What the compiler is told (``Program.options``).
        cache: A folder that keeps times; by default ``default_cache()``.
        progress: Receives what is being done.
    """
    progress = progress or Progress()
    known = TimeCache(cache or default_cache(), options)
    progress.begin(f"timing layers at batch {batch_size}", len(calls))
    alike: dict[str, list[LayerCall]] = {}
    for call in calls:
        key = f"{_text(call.layer)} of {specification(call.input)} {call.activation}"
        alike.setdefault(key, []).append(call)
    times: dict[str, LayerTimes] = {}
    for same in alike.values():
        call = same[0]
        progress.describe(f"timing {call.path} at batch {batch_size}")
        timed = partial(_timed, known, call, batch_size, dtype)
        chosen = [curves[other.path] for other in same]
        macs = {
            chain: int(cost)
            for curve in chosen
            for chain, cost in zip(curve.candidates, curve.macs, strict=True)
        }
        with kept_memory():
            dense, seconds = _dense_and_chain_seconds(call.layer, macs, timed)
        for other, curve in zip(same, chosen, strict=True):
            chains = np.array([seconds[chain] for chain in curve.candidates])
            times[other.path] = LayerTimes(dense, curve.candidates, chains)
        known.save()
        progress.advance(len(same))
    return times


def _timed(
    known: TimeCache,
    call: LayerCall,
    batch_size: int,
    dtype: str | None,
    chains: Sequence[nnx.Module],
) -> list[float]:
    """Seconds of the layer of a call and of chains in its place, computed in a type."""
    layers = [call.layer, *chains]
    given = specification(call.input)
    # What a layer is given has the images' axis in front, or the network could not be cut.
    shape = (batch_size * call.rows_per_image, *given.shape[1:])
    if dtype is None:
        return known.seconds(layers, shape, given.dtype, call.activation)
    cast = [in_dtype(layer, dtype) for layer in layers]
    return known.seconds(cast, shape, dtype, call.activation)


def _dense_and_chain_seconds(
    layer: nnx.Module,
    macs: Mapping[Candidate, int],
    timed: Callable[[Sequence[nnx.Module]], list[float]],
) -> tuple[float, dict[Candidate, float]]:
    """The times of a layer as it is and of its chains, whose MACs are given."""
    seconds: dict[Candidate, float] = {}
    groups: dict[tuple[str, bool], list[Candidate]] = {}
    for chain in sorted(macs, key=lambda chain: macs[chain]):
        step = all(rank % STEP == 0 for rank in chain.ranks)
        groups.setdefault((chain.decomposition, step), []).append(chain)
    chosen = {
        group: [chains[place] for place in sorted({round(s * (len(chains) - 1)) for s in SHARES})]
        for group, chains in groups.items()
    }
    every = list(itertools.chain.from_iterable(chosen.values()))
    dense, *taken = timed([_chain(layer, chain) for chain in every])
    found = dict(zip(every, taken, strict=True))
    for group, chains in groups.items():
        places = chosen[group]
        # Of two ranks, other balances at equal MACs were up to a quarter apart; as a rule less.
        between = np.interp(
            [macs[c] for c in chains], [macs[c] for c in places], [found[c] for c in places]
        )
        seconds |= dict(zip(chains, between.tolist(), strict=True))
    return dense, seconds


def _chain(layer: Any, chain: Candidate) -> nnx.Module:
    return chain_for(layer, DECOMPOSITIONS[chain.decomposition].factors(layer, *chain.ranks))
