"""Convolutions whose gradient by their kernel is fast on CPU, for training there.

XLA on CPU (jaxlib 0.10) computes that gradient as a convolution with a window of the size of the
images, five to ten times slower than the convolution itself, which is then most of a training step.
It is also a sum of outer products, over images n and positions p, for each tap t of the kernel,

    ∂L/∂W_t = Σ_n Σ_p  x_n(s·p + d·t - pad) ⊗ ∂L/∂y_n(p)

with strides s and dilation d: one product of matrices a tap, of some images at a time so that what
they read stays in the cache. Measured on two cores this takes 0.2 to 0.6 of XLA's time, and less
for 1×1 kernels; only where images have few positions and many channels do both take the same time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Positions that are multiplied at a time, at least: fewer make products too small for two cores,
# several times as many no longer stay in the cache.
POSITIONS = 1024

Pads = tuple[tuple[int, int], ...]


def with_fast_kernel_gradients(model: nnx.Module) -> nnx.Module:
    """A copy of a network to be trained on the default device; its outputs are the same.

    On CPU its convolutions (``nnx.Conv`` that computes by ``jax.lax.conv_general_dilated``) get the
    gradient of this module. On other devices nothing is changed.
    """
    copy = nnx.clone(model)
    if jax.default_backend() == "cpu":
        for _, layer in nnx.iter_graph(copy):
            if (
                isinstance(layer, nnx.Conv)
                and layer.conv_general_dilated is jax.lax.conv_general_dilated
            ):
                layer.conv_general_dilated = convolve
    return copy


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    precision: Any = None,
    **others: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` as ``nnx.Conv`` calls it, channels last.

    Grouped convolutions and those of dilated inputs keep XLA's gradient, and so do those that are
    asked for a type of their outputs.
    """
    asked_for_type = others.get("preferred_element_type") is not None
    if feature_group_count != 1 or any(d != 1 for d in lhs_dilation) or asked_for_type:
        return jax.lax.conv_general_dilated(
            inputs,
            kernel,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            feature_group_count=feature_group_count,
            precision=precision,
            **others,
        )
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel.shape, rhs_dilation, strict=False)]
        padding = jax.lax.padtype_to_pads(inputs.shape[1:-1], reach, window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(inputs, kernel, tuple(window_strides), pads, tuple(rhs_dilation), precision)


def _convolved(
    inputs: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    pads: Pads,
    dilation: tuple[int, ...],
    precision: Any,
) -> jax.Array:
    last = len(strides) + 1
    inner = tuple(range(1, last))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, last, *inner), (last, last - 1, *(i - 1 for i in inner)), (0, last, *inner)
    )
    return jax.lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        precision=precision,
    )


_convolve = jax.custom_vjp(_convolved, nondiff_argnums=(2, 3, 4, 5))


def _forward(inputs, kernel, *settings):
    return _convolved(inputs, kernel, *settings), (inputs, kernel)


def _backward(strides, pads, dilation, precision, kept, gradient):
    inputs, kernel = kept
    settings = (strides, pads, dilation, precision)
    _, by_inputs = jax.vjp(lambda given: _convolved(given, kernel, *settings), inputs)
    return (
        *by_inputs(gradient),
        kernel_gradient(inputs, gradient, kernel.shape, *settings).astype(kernel.dtype),
    )


def kernel_gradient(
    inputs: jax.Array,
    gradient: jax.Array,
    shape: tuple[int, ...],
    strides: Sequence[int],
    pads: Pads,
    dilation: Sequence[int],
    precision: Any = None,
) -> jax.Array:
    """``∂L/∂W`` of a convolution (see the module's docstring), summed in float32 or more.

    Args:
        inputs: What was convolved, ``[images, …, in]``.
        gradient: ``∂L/∂y`` of its outputs, ``[images, …, out]``.
        shape: Shape of the kernel, ``(…, in, out)``.
        strides, pads, dilation, precision: Of the convolution.
    """
    images, *positions, outputs = gradient.shape
    together = _images_together(images, math.prod(positions))
    taps = list(itertools.product(*map(range, shape[:-2])))
    total_type = jnp.promote_types(gradient.dtype, jnp.float32)
    padding = [(0, 0, 0), *((low, high, 0) for low, high in pads), (0, 0, 0)]

    def add(sums, part):
        seen, felt = part
        seen = jax.lax.pad(seen, jnp.zeros((), seen.dtype), padding)
        felt = felt.reshape(-1, outputs)

        def product(tap: Sequence[int]) -> jax.Array:
            start = [t * d for t, d in zip(tap, dilation, strict=True)]
            end = [
                s + (p - 1) * stride + 1
                for s, p, stride in zip(start, positions, strides, strict=True)
            ]
            under = jax.lax.slice(
                seen,
                (0, *start, 0),
                (together, *end, seen.shape[-1]),
                (1, *strides, 1),
            )
            return jnp.matmul(
                under.reshape(-1, seen.shape[-1]).T,
                felt,
                precision=precision,
                preferred_element_type=total_type,
            )

        return [total + product(tap) for total, tap in zip(sums, taps, strict=True)], None

    nothing = [jnp.zeros(shape[-2:], total_type) for _ in taps]
    parts = [array.reshape(-1, together, *array.shape[1:]) for array in (inputs, gradient)]
    return jnp.stack(jax.lax.scan(add, nothing, parts)[0]).reshape(shape)


def _images_together(images: int, positions: int) -> int:
    """The fewest images, of which the batch has a multiple, that have ``POSITIONS`` positions."""
    fitting = (n for n in range(1, images) if images % n == 0 and n * positions >= POSITIONS)
    return next(fitting, images)


_convolve.defvjp(_forward, _backward)
