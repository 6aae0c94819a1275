"""Times of layers and of chains on disk: what was timed once is not timed again.

Of a chain the file has all that was measured of it, in proportion to the layer in whose place it
could stand; of the layers of a network what they took in turns with each other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from accel.compiler import Options, compile_together, matmul_precision
from accel.files import locked, write_whole
from accel.memory import one_pool
from accel.report.environment import device_name, versions
from accel.solvers.activations import Activation
from accel.timing_loops import Loop, compile_loop, seconds_over_places

# How layers are timed: what was timed otherwise is not comparable.
FORM = (
    "chains in proportion to the layer as it is, layers in turns with each other; all outputs"
    " written, nothing copied; weights as inference has them; in buffers used before"
)


class Place(NamedTuple):
    """A layer, shape and type of what it is given, and what follows."""

    layer: nnx.Module
    input_shape: tuple[int, ...]
    dtype: Any
    activation: Activation


def default_cache() -> Path:
    """Where times are kept: ``$XDG_CACHE_HOME/accel``, by default ``~/.cache/accel``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accel"


class TimeCache:
    """Times on disk, in one file a device and set of versions.

    Args:
        folder: Where the file lies; made where it is missing.
        options: What the compiler is told.

    Raises:
        ValueError: If the file holds no times.
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
        self._measured_on = where
        self._seconds, self._proportions = self._kept()

    def _kept(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """The times in the file."""
        if not self.file.exists():
            return {}, {}
        try:
            content = json.loads(self.file.read_text())
            seconds = {key: float(value) for key, value in content["seconds"].items()}
            proportions = {
                key: list(map(float, found)) for key, found in content["proportions"].items()
            }
            for time in itertools.chain(seconds.values(), *proportions.values()):
                if not 0 < time < math.inf:
                    raise ValueError(f"{time} is no time")
            return seconds, proportions
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file} holds no times of layers: {error!r}") from error

    def measured(self, place: Place, chain: nnx.Module) -> list[float]:
        """What one run of a chain took over one of the layer of a place, each time it was measured.

        ``save`` keeps what is put into this list.
        """
        key = f"{layer_text(chain)} for {place_text(place)}"
        return self._proportions.setdefault(key, [])

    def seconds(self, places: Sequence[Place]) -> list[float]:
        """``seconds_over_places`` of layers, which are timed if they are not known together."""
        names = [place_text(place) for place in places]
        together = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        keys = [f"{name} in turns with those of {together}" for name in names]
        if not all(key in self._seconds for key in keys):

            def looped(place: Place) -> Loop:
                return compile_loop(**place._asdict(), options=self.options)

            seconds = seconds_over_places(list(compile_together(looped, places)))
            self._seconds |= zip(keys, seconds, strict=True)
        return [self._seconds[key] for key in keys]

    def save(self) -> None:
        """Writes the file, whole or not at all.

        What others put there meanwhile stays; of a chain that they measured, too, the longer list.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.file.parent, wait=True):
            seconds, proportions = self._kept()
            for key, found in self._proportions.items():
                proportions[key] = max(found, proportions.get(key, []), key=len)
            content = {
                "measured_on": self._measured_on,
                "seconds": {**seconds, **self._seconds},
                "proportions": {key: found for key, found in proportions.items() if found},
            }
            write_whole(self.file, json.dumps(content, indent=1) + "\n")


def place_text(place: Place) -> str:
    """All that the time of a layer hangs on, with what it is given and what follows."""
    given = f"{np.dtype(place.dtype).name}{list(place.input_shape)}"
    return f"{layer_text(place.layer)} of {given} {place.activation}"


def layer_text(layer: nnx.Module) -> str:
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
