"""The steps of distillation: averaged gradients, those of kernels made orthogonal.

A kernel is a matrix from what it is given to its outputs, ``[taps · inputs, outputs]``. Where
U Σ Vᵀ is the singular value decomposition of its averaged gradient, its step is along U Vᵀ: in all
directions alike, though gradients are far larger in some, in the factors of a chain above all. (On
the bundled network at 4× this needs less than half of Adam's steps.) Muon: Jordan et al.,
https://kellerjordan.github.io/posts/muon, 2024; Liu et al., arXiv:2502.16982.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

WARM_UP = 0.1
# Above this many rows and columns, as in the first dense layers of VGG-16, making a matrix
# orthogonal would take longer than the gradient.
LARGEST = 2048


def descent(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Steps of a size in proportion to that of each array.

    Args:
        learning_rate: The root mean square of the highest step, as a share of that of the array:
            the scales of the factors of one chain are arbitrary, so that no absolute rate could
            suit them all. It rises over the first tenth and falls as a cosine.
        steps: How many there will be.
    """
    rise = max(1, round(WARM_UP * steps))
    # From a step above 0: none is spent on nothing.
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / rise, learning_rate, rise, max(2, steps)
    )
    directions: dict[Hashable, optax.GradientTransformation] = {
        "matrix": _orthogonal(),
        "other": optax.scale_by_adam(),
    }
    return optax.chain(
        optax.partition(directions, lambda arrays: jax.tree.map(_label, arrays)),
        # Both forget the size of gradients, so that their steps are what is clipped: after a batch
        # with unusual gradients no array moves by more than the learning rate's share of its size.
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(schedule),
    )


def _label(array: jax.Array) -> str:
    """Biases and the like have no directions, and go by Adam."""
    return "matrix" if array.ndim > 1 and min(_shape(array)) <= LARGEST else "other"


def _shape(array: jax.Array) -> tuple[int, int]:
    """Rows and columns of a kernel as a matrix."""
    return math.prod(array.shape[:-1]), array.shape[-1]


def _orthogonal() -> optax.GradientTransformation:
    """U Vᵀ of the averaged gradients, scaled to a root mean square of one."""

    def axes(arrays: optax.Updates) -> optax.Updates:
        def of(array: jax.Array) -> MuonDimensionNumbers:
            return MuonDimensionNumbers(tuple(range(array.ndim - 1)), (array.ndim - 1,))

        return jax.tree.map(of, arrays)

    def scaled(array: jax.Array) -> jax.Array:
        # The longer side's root is all it takes, but for a gradient of less than full rank.
        mean_square = jnp.mean(jnp.square(array))
        return array * jax.lax.rsqrt(jnp.maximum(mean_square, jnp.finfo(array.dtype).tiny))

    return optax.chain(
        scale_by_muon(weight_dimension_numbers=axes),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
    )
