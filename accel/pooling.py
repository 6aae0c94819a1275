"""Maximum pooling in the form that runs fastest on CPU: the maximum of strided slices.

The compiler turns its own equation for it (``reduce_window_max``) into loops over single numbers.
Slices, one for each place in the window, it joins with the bias and the activation before them to
one pass over the image. The result is the same number for number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from accel.interpreter import equations_inside, interpret, specification

# Larger windows were not measured: the maximum over a whole image, say, would be too many slices.
LARGEST_WINDOW = 25
# Types that know of an infinity, which is what lies outside of an image.
INFINITE = tuple(map(jnp.dtype, (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)))


def with_sliced_pooling(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with maximum pooling as maxima of slices.

    Pooling inside control flow (scan, while, cond) stays as it is. It is traced when called, so
    that it is to be jitted.
    """

    def sliced(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        if not any(_is_pooling(equation) for equation in equations_inside(program)):
            return function(*arguments)
        outputs = interpret(program, jax.tree.leaves(arguments), _is_pooling, _pooled)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return sliced


def _is_pooling(equation: jex.JaxprEqn) -> bool:
    if equation.primitive.name != "reduce_window_max":
        return False
    given, pooled = equation.params, specification(equation.outvars[0])
    dilations = (*given["base_dilation"], *given["window_dilation"])
    return (
        pooled.dtype in INFINITE
        and all(pooled.shape)
        and all(step == 1 for step in dilations)
        and math.prod(given["window_dimensions"]) <= LARGEST_WINDOW
    )


def _pooled(equation: jex.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """What ``reduce_window_max`` returns."""
    (images,) = inputs
    given = equation.params
    lowest = jnp.array(-jnp.inf, images.dtype)
    padded = jax.lax.pad(images, lowest, [(*edges, 0) for edges in given["padding"]])
    size, strides = specification(equation.outvars[0]).shape, given["window_strides"]
    pooled = None
    for place in _places(given["window_dimensions"]):
        last = [
            start + (count - 1) * stride + 1
            for start, count, stride in zip(place, size, strides, strict=True)
        ]
        part = jax.lax.slice(padded, place, last, strides)
        pooled = part if pooled is None else jnp.maximum(pooled, part)
    return [pooled]


def _places(window: Sequence[int]) -> list[tuple[int, ...]]:
    """The offsets of all places in a window."""
    if not window:
        return [()]
    return [(first, *rest) for first in range(window[0]) for rest in _places(window[1:])]
