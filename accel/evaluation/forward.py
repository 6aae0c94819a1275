"""Running a network on batches: in evaluation mode, compiled once, its weights as arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Forward:
    """A pure function ``(state, images) -> outputs`` of a network.

    Those of two networks that differ in nothing but their state are equal, so that a jitted
    function that takes one as a static argument is compiled once for both.

    Attributes:
        graphdef: The network without its state.
        dtype: What it computes in where that is not left to it (see ``forward_function``).
    """

    graphdef: nnx.GraphDef
    dtype: str | None = None

    def __call__(self, state: Any, images: Any) -> Any:
        if self.dtype is None:
            return nnx.merge(self.graphdef, state)(images)
        outputs = nnx.merge(self.graphdef, state)(jnp.asarray(images, self.dtype))
        return jax.tree.map(
            lambda o: o.astype(jnp.float32) if jnp.issubdtype(o.dtype, jnp.floating) else o, outputs
        )


def forward_function(model: nnx.Module, dtype: str | None = None) -> tuple[Forward, nnx.State]:
    """A pure function ``(state, images) -> outputs`` of a network, and the state to give it.

    The network is run in evaluation mode; ``model`` itself is not changed. Weights are arguments,
    not constants, so that neither compilation takes longer nor the compiled code more memory.

    Args:
        model: The network.
        dtype: What to compute in, such as ``bfloat16``: images and weights are of this type, and
            all between that does not name another in the network's own code; outputs are float32.
            None for the types that the network has.

    Raises:
        ValueError: If ``dtype`` is not one of ``DTYPES``.
    """
    evaluated = nnx.clone(model) if dtype is None else in_dtype(model, dtype)
    evaluated.eval()
    graphdef, state = nnx.split(evaluated)
    return Forward(graphdef, dtype), state


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError if it is not None and not one of ``DTYPES``."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"a network can be computed in {', '.join(DTYPES)}, found {dtype!r}")


def in_dtype(model: nnx.Module, dtype: str) -> nnx.Module:
    """A copy with all floating-point variables, and the layers that say a type, of another type.

    Raises:
        ValueError: If ``dtype`` is not one of ``DTYPES``, or a value is beyond its range, such as a
            variance of batch norm above 65,504 in float16.
    """
    check_dtype(dtype)
    cast = nnx.clone(model)
    for path, part in nnx.iter_graph(cast):
        if isinstance(part, nnx.Variable):
            if jnp.issubdtype(part.dtype, jnp.floating):
                # By the host: JAX would compile it, for every shape that there is.
                before = np.asarray(part[...])
                with np.errstate(over="ignore"):
                    after = before.astype(jnp.dtype(dtype))
                lost = np.isfinite(before) & ~np.isfinite(after)
                if lost.any():
                    name, value = "/".join(map(str, path)), float(before[lost][0])
                    raise ValueError(f"{name}: a value of {value:.3g} is beyond {dtype}'s range")
                # Assignment to ``part[...]`` would keep the type.
                part.set_value(jax.device_put(after))
        elif isinstance(part, nnx.Module) and getattr(part, "dtype", None) is not None:
            # A layer's own type would turn what it is given back.
            setattr(part, "dtype", jnp.dtype(dtype))  # noqa: B010 (not every module has one)
    return cast


def output_shape(
    forward: Forward, state: nnx.State, batch: np.ndarray | jax.ShapeDtypeStruct, name: str
) -> tuple[int, ...]:
    """Shape of the outputs for a batch of images, found without computing them.

    Raises:
        ValueError: If the network cannot be called with such images, or its outputs are not one
            array with a row per image.
    """
    try:
        outputs = jax.eval_shape(forward, state, batch)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be called with images of shape {batch.shape} and type {batch.dtype}:"
            f" {error}"
        ) from error
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
