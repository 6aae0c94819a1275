"""Times of single layers and of the chains that could replace them, on the device at hand.

Chains that could replace a layer are timed in turns with it, and told in proportion to it
(``accel.timing_loops``). Of each kind a few ranks are timed, round and other numbers apart; between
them times are interpolated over MACs. At last the layers as they are are timed in turns with each
other: a device that was slower while one of them was timed made it, and all its chains, look worth
more than the others. What was timed once is kept on disk, by device, versions and shapes.

Times of layers do not quite add up to that of a network, whose compiler fuses across them. So
``accel.time_correction`` corrects them, and ``accel.latency_budget`` times each plan as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float64

from accel.compiler import Options, compile_together, matmul_precision
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import in_dtype
from accel.files import write_whole
from accel.interpreter import specification
from accel.memory import kept_memory, one_pool
from accel.plan import LayerPlan
from accel.program import LayerCall
from accel.progress import Progress
from accel.rank_selection import Candidate
from accel.report.environment import device_name, versions
from accel.rewrite import chain_for
from accel.solvers.activations import Activation
from accel.timing_loops import Loop, compile_loop, seconds_in_turns, seconds_over_places

# How many chains at once are timed in turns: the longer a pass over them, the less the layer as it
# is tells of the device's speed meanwhile; and all of their programs are held.
TOGETHER = 16
# How layers are timed: what was timed otherwise is not comparable.
FORM = (
    "median of three, each in proportion to the layer as it is; all outputs written, nothing"
    " copied; weights as inference has them"
)
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
                compile_loop,
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

            def looped(place: Place) -> Loop:
                return compile_loop(**place._asdict(), options=self.options)

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
