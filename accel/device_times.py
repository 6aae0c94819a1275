"""Times of single layers and of the chains that could replace them, on the device at hand.

A layer is timed with the activation that follows inside a loop of one compiled program: no
dispatch, and no fresh memory for its outputs, is in the time, as in the middle of a network. The
chains that could replace it are timed in turns with it, and told in proportion to it. Of each kind
a few ranks are timed, round and other numbers apart; between them times are interpolated over MACs.
At last the layers as they are are timed in turns with each other: a device that was slower while
one of them was timed made it, and all its chains, look worth more than the others.
What was timed once is kept on disk, by device, versions and shapes.

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
import jax.numpy as jnp
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
# How often everything that could stand in one place is timed, in turns, and of how many chains at
# once: the longer a pass, the less the layer as it is tells of the device's speed meanwhile; and
# all of their programs are held.
PASSES = 3
TOGETHER = 16
# How often the layers of all places are timed in turns: shares of some ten layers, which decide how
# much of a budget each place is given.
PASSES_OVER_PLACES = 9
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
    layers: Sequence[nnx.Module],
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> list[float]:
    """Seconds that a layer, and what could stand in its place, take on the device, in turns.

    The activation that follows is in the time. The process keeps the memory that is freed, as in
    inference (``accel.memory.kept_memory``).

    Args:
        layers: The layer as it is and the others; the values of their weights do not matter.
        input_shape: Shape of what they are given, the batch first.
        dtype: Type of what they are given.
        activation: What follows.
        options: What the compiler is told, as for the network that the layer is of.
    """
    looped = partial(
        _looped, input_shape=input_shape, dtype=dtype, activation=activation, options=options
    )
    return seconds_in_turns(list(compile_together(looped, layers)))


class _Loop(NamedTuple):
    """A compiled program that runs a layer some times.

    It is given weights, the number of turns, images and outputs, and returns these two, in the same
    memory.
    """

    program: jax.stages.Compiled
    arguments: tuple[Any, ...]
    images: jax.ShapeDtypeStruct
    outputs: list[jax.ShapeDtypeStruct]


def _looped(
    layer: nnx.Module,
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> _Loop:
    """Compiles a layer for ``seconds_in_turns``; the arguments are those of ``layer_seconds``."""
    forward, state = forward_function(with_any_weights(layer))
    images = jax.ShapeDtypeStruct(tuple(input_shape), dtype)
    output = jax.eval_shape(forward, state, images)
    runs = _runs_per_turn(math.prod(output.shape) * output.dtype.itemsize)
    outputs = [jax.ShapeDtypeStruct(output.shape, output.dtype)] * runs

    def looped(
        network: Callable[[jax.Array], jax.Array],
        count: int,
        images: jax.Array,
        outputs: list[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array]]:
        """``count`` turns that run the layer, each time on images that hang on the outputs before.

        They are the same, but the compiler must not know, or it would run the layer once. (Writing
        one element instead made it copy all of them at every run.) The outputs are handed from turn
        to turn, so that all of them are computed.
        """

        def turn(
            _: Any, carried: tuple[jax.Array, list[jax.Array]]
        ) -> tuple[jax.Array, list[jax.Array]]:
            images, outputs = carried
            outputs = list(outputs)
            for run in range(runs):
                before = outputs[run - 1]
                images, outputs[run - 1] = jax.lax.optimization_barrier((images, before))
                outputs[run] = activate(network(images), activation)
            return images, outputs

        return jax.lax.fori_loop(0, count, turn, (images, outputs))

    # How often is an argument, so that the program is compiled once. Images and outputs are
    # donated: copying them would be a tenth of a layer's time and more where large images go
    # through few channels.
    program, arguments = compile_with_weights(
        looped, forward, state, 1, images, outputs, donated=(1, 2), options=options
    )
    return _Loop(program, arguments, images, outputs)


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
    keep_free_memory()
    buffers = _Buffers(loops[0])
    first, *others = (_Timer(loop, buffers) for loop in loops)
    passes = []
    for number in range(PASSES):
        order = (first, *others, first)
        backwards = number % 2 == 1
        times = [timer.seconds() for timer in (reversed(order) if backwards else order)]
        passes.append(times[::-1] if backwards else times)
    times = np.array(passes)
    beside = times[:, [0, -1]]
    proportions = times[:, 1:-1] / beside.mean(axis=1, keepdims=True)
    least = float(beside.min())
    return [least, *(least * np.median(proportions, axis=0)).tolist()]


def seconds_over_places(loops: Sequence[_Loop]) -> list[float]:
    """Seconds of one run of layers of different places of a network, in turns with each other.

    Of each the median of its shares of a pass counts, times the least that a pass took. Images and
    outputs are made anew for each turn, so that those of one place alone are held at a time.
    """
    keep_free_memory()
    passes = []
    for number in range(PASSES_OVER_PLACES):
        backwards = number % 2 == 1
        order = reversed(loops) if backwards else loops
        times = [_Timer(loop, _Buffers(loop)).seconds() for loop in order]
        passes.append(times[::-1] if backwards else times)
    times = np.array(passes)
    whole = times.sum(axis=1)
    return (whole.min() * np.median(times / whole[:, None], axis=0)).tolist()


class _Buffers:
    """Images and outputs of one place of a network, which all layers use that are timed for it."""

    def __init__(self, loop: _Loop):
        self.images = jnp.ones(loop.images.shape, loop.images.dtype)
        self.outputs = [jnp.zeros(output.shape, output.dtype) for output in loop.outputs]

    def seconds(self, loop: _Loop, count: int) -> float:
        """Seconds of so many turns of the loop."""
        start = time.perf_counter()
        self.images, self.outputs = jax.block_until_ready(
            loop.program(*loop.arguments, count, self.images, self.outputs)
        )
        return time.perf_counter() - start


class _Timer:
    """Times a layer that has run before, so that it needs no more memory."""

    def __init__(self, loop: _Loop, buffers: _Buffers):
        self.loop, self.buffers = loop, buffers
        self.count = 1
        buffers.seconds(loop, 1)

    def seconds(self) -> float:
        """Seconds of one run of the layer, from as many as take long enough."""
        while (passed := self.buffers.seconds(self.loop, self.count)) < TIMED_SECONDS / 2:
            self.count = max(2 * self.count, round(TIMED_SECONDS * self.count / passed))
        return passed / (self.count * len(self.loop.outputs))


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
        keys = [_key(Place(layer, tuple(input_shape), dtype, activation)) for layer in layers]
        unknown = {key: layer for key, layer in zip(keys, layers, strict=True) if key not in known}
        unknown.pop(keys[0], None)
        if unknown or keys[0] not in known:
            looped = partial(
                _looped,
                input_shape=input_shape,
                dtype=dtype,
                activation=activation,
                options=self.options,
            )
            first, others = looped(layers[0]), list(unknown)
            for begin in range(0, max(1, len(others)), TOGETHER):
                group = others[begin : begin + TOGETHER]
                loops = compile_together(looped, [unknown[key] for key in group])
                least, *found = seconds_in_turns([first, *loops])
                scale = known.setdefault(keys[0], least) / least
                known |= {key: scale * value for key, value in zip(group, found, strict=True)}
        return [known[key] for key in keys]

    def seconds_over_places(self, places: Sequence[Place]) -> list[float]:
        """``seconds_over_places`` of layers, which are timed if they are not known together."""
        known = self.content["seconds"]
        names = [_key(place) for place in places]
        together = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        keys = [f"{name} in turns with those of {together}" for name in names]
        if not all(key in known for key in keys):

            def looped(place: Place) -> _Loop:
                return _looped(**place._asdict(), options=self.options)

            seconds = seconds_over_places(list(compile_together(looped, places)))
            known |= zip(keys, seconds, strict=True)
        return [known[key] for key in keys]

    def save(self) -> None:
        """Writes the file, whole or not at all; what others put there meanwhile stays."""
        self.content["seconds"] = {**self._kept(), **self.content["seconds"]}
        write_whole(self.file, json.dumps(self.content, indent=1) + "\n")


class Place(NamedTuple):
    """A layer, shape and type of what it is given, and what follows."""

    layer: nnx.Module
    input_shape: tuple[int, ...]
    dtype: Any
    activation: Activation


def _key(place: Place) -> str:
    given = f"{np.dtype(place.dtype).name}{list(place.input_shape)}"
    return f"{_text(place.layer)} of {given} {place.activation}"


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
    places = {key: _place(same[0], batch_size, dtype) for key, same in alike.items()}
    times: dict[str, LayerTimes] = {}
    for key, same in alike.items():
        call = same[0]
        progress.describe(f"timing {call.path} at batch {batch_size}")
        timed = partial(_timed, known, places[key], dtype)
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
    progress.describe(f"timing all layers in turns at batch {batch_size}")
    with kept_memory():
        seconds_of = known.seconds_over_places(list(places.values()))
    known.save()
    for same, seconds in zip(alike.values(), seconds_of, strict=True):
        for path in (call.path for call in same):
            scale = seconds / times[path].dense
            times[path] = dataclasses.replace(
                times[path], dense=seconds, chains=scale * times[path].chains
            )
    return times


def _place(call: LayerCall, batch_size: int, dtype: str | None) -> Place:
    """The layer of a call, computed in a type."""
    given = specification(call.input)
    # What a layer is given has the images' axis in front, or the network could not be cut.
    shape = (batch_size * call.rows_per_image, *given.shape[1:])
    if dtype is None:
        return Place(call.layer, shape, given.dtype, call.activation)
    return Place(in_dtype(call.layer, dtype), shape, dtype, call.activation)


def _timed(
    known: TimeCache, place: Place, dtype: str | None, chains: Sequence[nnx.Module]
) -> list[float]:
    """Seconds of the layer of a place and of chains in it, computed in a type."""
    cast = [chain if dtype is None else in_dtype(chain, dtype) for chain in chains]
    return known.seconds([place.layer, *cast], *place[1:])


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
