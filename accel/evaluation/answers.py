"""What a network answers to the images of a source, computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.compiler import network_options
from accel.evaluation.forward import Forward, check_finite, forward_function, output_shape
from accel.images import padded

# Little beside what a run states that it needs: its statement does not count it.
KEPT_BYTES = 2**26


class Answers:
    """A network's outputs for the batches of one source of images.

    Whatever measures a network on the same images again gets them from here, as far as they fit a
    budget of memory; those beyond it are computed each time.

    Args:
        model: The network; it is not changed.
        name: What it is called in messages; by default its type's name.
        dtype: As in ``forward_function``.
        kept_bytes: The budget.
    """

    def __init__(
        self,
        model: nnx.Module,
        name: str | None = None,
        dtype: str | None = None,
        kept_bytes: int = KEPT_BYTES,
    ):
        self.name = name or type(model).__name__
        self.forward, self.state = forward_function(model, dtype)
        self._run = _run(tuple((network_options(model) or {}).items()))
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._free_bytes = kept_bytes

    def shape(self, batch: np.ndarray) -> tuple[int, ...]:
        """Shape of the outputs for a batch.

        Raises:
            ValueError: If they are not one array with a row per image.
        """
        return output_shape(self.forward, self.state, batch, self.name)

    def start(self, first: int, batch: np.ndarray, batch_size: int) -> Any:
        """Begins to compute the outputs for the images from ``first`` on, and does not wait.

        Nothing has to be done for those that are kept.
        """
        if (first, len(batch)) in self._kept:
            return None
        return self._run(self.forward, self.state, padded(batch, batch_size))

    def finish(self, first: int, count: int, started: Any) -> np.ndarray:
        """The outputs ``[count, …]``; waits for what ``start`` returned.

        Raises:
            ValueError: If they hold NaN or Inf.
        """
        kept = self._kept.get((first, count))
        if kept is not None:
            return kept
        found = np.asarray(started)[:count]
        finite = np.isfinite(found.reshape(count, -1))
        check_finite(np.asarray(finite.all(axis=1)), first, self.name)
        if found.nbytes <= self._free_bytes:
            self._free_bytes -= found.nbytes
            # Not the whole batch, where it was filled up.
            self._kept[first, count] = found.copy()
        return found


def answers_of(
    model: nnx.Module | Answers, name: str | None = None, dtype: str | None = None
) -> Answers:
    """The model's answers, none of which are kept; answers are returned as they are."""
    if isinstance(model, Answers):
        return model
    return Answers(model, name, dtype, kept_bytes=0)


def outputs(
    networks: Sequence[Answers], first: int, batch: np.ndarray, batch_size: int
) -> list[np.ndarray]:
    """What the networks answer to one batch; all are started before any is waited for."""
    started = [network.start(first, batch, batch_size) for network in networks]
    return [
        network.finish(first, len(batch), begun)
        for network, begun in zip(networks, started, strict=True)
    ]


@functools.cache
def _run(
    options: tuple[tuple[str, str | bool], ...],
) -> Callable[[Forward, nnx.State, np.ndarray], jax.Array]:
    """Runs a network; one function for all, so that networks of one shape are compiled once."""
    return jax.jit(
        lambda forward, state, images: forward(state, images),
        static_argnums=0,
        compiler_options=dict(options),
    )
