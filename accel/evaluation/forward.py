"""Running a network on batches: in evaluation mode, compiled once, its weights as arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Forward:
    """A pure function ``(state, images) -> outputs`` of a network.

    Those of two networks that differ in nothing but their state are equal, so that a jitted
    function that takes one as a static argument is compiled once for both.
    """

    graphdef: nnx.GraphDef

    def __call__(self, state: Any, images: Any) -> Any:
        return nnx.merge(self.graphdef, state)(images)


def forward_function(model: nnx.Module) -> tuple[Forward, nnx.State]:
    """A pure function ``(state, images) -> outputs`` of a network, and the state to give it.

    The network is run in evaluation mode; ``model`` itself is not changed. Weights are arguments,
    not constants, so that neither compilation takes longer nor the compiled code more memory.
    """
    evaluated = nnx.clone(model)
    evaluated.eval()
    graphdef, state = nnx.split(evaluated)
    return Forward(graphdef), state


def output_shape(
    forward: Forward, state: nnx.State, batch: np.ndarray | jax.ShapeDtypeStruct, name: str
) -> tuple[int, ...]:
    """Shape of the outputs for a batch of images, found without computing them.

    Raises:
        ValueError: If the outputs are not one array with a row per image.
    """
    outputs = jax.eval_shape(forward, state, batch)
    if not hasattr(outputs, "shape") or outputs.shape[:1] != batch.shape[:1]:
        raise ValueError(
            f"{name}: expected one array of outputs with a row for each of {batch.shape[0]} images,"
            f" found {outputs}"
        )
    return outputs.shape


def check_finite(finite: np.ndarray, first: int, name: str) -> None:
    """Raises ValueError where ``finite`` (one a batch's image, from image ``first``) is False."""
    if not finite.all():
        image = first + int(np.flatnonzero(~finite)[0])
        raise ValueError(f"{name}: the outputs for image {image} hold NaN or Inf")
