"""Centring, whitening and leading directions, without ever squaring a condition number.

Everything works in the dtype of its arguments and is traced: ranks are array values, and what lies
beyond a rank is masked with zeros instead of being cut off.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A standard deviation below this many ulps of the channel's magnitude is the rounding of a
# constant.
CONSTANT_ULPS = 4
# Rank-deficient responses (copied channels, scales from 1e-6 to 1e6) leave singular values of at
# most 6 ulps of the largest one behind a Householder QR, from 16 to 256 channels; five times that.
DEPENDENT_ULPS = 32


def contract(subscripts: str, *operands: Array) -> Array:
    """``einsum`` in full precision: accelerators would round the factors to bfloat16 or TF32."""
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def centre(rows: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, " d"]]:
    """The rows minus their mean, and that mean."""
    mean = jnp.mean(rows, axis=0)
    centred = rows - mean
    # The mean is off by its own rounding, which would stand as a constant in every row.
    rest = jnp.mean(centred, axis=0)
    return centred - rest, mean + rest


class Whitening(NamedTuple):
    """Centred rows in orthonormal coordinates, ``rows = (inputs - mean) @ transform.T``.

    Attributes:
        rows: Orthonormal columns; a column of zeros for each direction that the inputs lack.
        transform: From centred inputs to whitened coordinates.
        mean: Mean of the inputs.
        singular_values: Singular values of the inputs with every channel centred and scaled to unit
            length, in descending order; 0 for each direction that the inputs lack.
    """

    rows: Float[Array, "n k"]
    transform: Float[Array, "k d_in"]
    mean: Float[Array, " d_in"]
    singular_values: Float[Array, " k"]


def whiten(inputs: Float[Array, "n d_in"], rounding: float) -> Whitening:
    """Whitens rows through Y - ȳ = Q R D and R = U S Vᵀ: rows Q U, transform S⁻¹ Vᵀ D⁻¹.

    D holds the lengths of the centred channels. Taking it out first makes S tell copied channels
    from small ones: a live channel that is 1e12 times smaller than its neighbours keeps its
    direction, which a cut-off relative to the largest raw singular value would delete.

    Args:
        inputs: The rows; ``k = min(n, d_in)``.
        rounding: Relative rounding of the inputs: machine epsilon of the coarsest dtype that they
            have been through. Directions that are no larger are noise and are cut off, as a map
            that needs them is not a map one can apply in that dtype.
    """
    count = inputs.shape[0]
    centred, mean = centre(inputs)
    # By the largest entry first, as the squares of 1e-25 are no float32.
    largest = jnp.max(jnp.abs(centred), axis=0)
    largest = jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(centred / largest, axis=0) * largest
    live = length > CONSTANT_ULPS * rounding * jnp.sqrt(count) * jnp.abs(mean)
    inverse_length = jnp.where(live, 1 / jnp.where(live, length, 1), 0)
    orthonormal, triangle = jnp.linalg.qr(centred * inverse_length)
    left, singular_values, right = jnp.linalg.svd(triangle, full_matrices=False)
    kept = singular_values > DEPENDENT_ULPS * rounding * singular_values[0]
    inverse = jnp.where(kept, 1 / jnp.where(kept, singular_values, 1), 0)
    rows = contract("nj,jk->nk", orthonormal, left) * kept
    transform = inverse[:, None] * right * inverse_length
    if inputs.dtype == jnp.float32:
        rows, transform = _refined(centred, transform, kept)
    return Whitening(rows, transform, mean, singular_values * kept)


def _refined(
    centred: Float[Array, "n d_in"], transform: Float[Array, "k d_in"], kept: Bool[Array, " k"]
) -> tuple[Float[Array, "n k"], Float[Array, "k d_in"]]:
    """Whitened rows and their transform, true to each other and orthonormal to a few ulps.

    A float32 QR leaves columns that are orthonormal to about 1e-6, and in a direction of singular
    value s the transform gives other rows than Q U by 1e-7 / s. An iteration takes its steps as if
    both were exact, and the errors add up along its path: to 4e-4 of the objective in 50 steps.
    In float64 they are far below all that matters.

    The rows are the transform's own, made orthonormal by ``Q ← Q (3 I - QᵀQ) / 2``, which squares
    QᵀQ's distance from I. That is at most 1 / DEPENDENT_ULPS: two steps bring it down to 1e-6 in
    the worst case, and to rounding in any other.
    """
    rows = contract("ni,ki->nk", centred, transform)
    for _ in range(2):
        missing = (jnp.diag(kept.astype(rows.dtype)) - contract("nj,nk->jk", rows, rows)) / 2
        # Added to what is there, so that a small correction is not rounded to the digits of I.
        rows = rows + contract("nj,jk->nk", rows, missing)
        transform = transform + contract("jk,ki->ji", missing, transform)
    return rows, transform


def leading_columns(
    directions: Float[Array, "d m"], rank: Int[Array, ""]
) -> Float[Array, "d max(d,m)"]:
    """The first ``rank`` columns, followed by columns of zeros up to a square matrix."""
    d, available = directions.shape
    kept = directions * (jnp.arange(available) < rank)
    return jnp.pad(kept, ((0, 0), (0, max(0, d - available))))


def principal_directions(rows: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """Complete orthonormal basis of principal directions of centred rows, the largest first."""
    triangle = jnp.linalg.qr(rows, mode="r")
    _, _, right = jnp.linalg.svd(triangle, full_matrices=True)
    return right.T


def leading_left_singular_vectors(
    matrix: Float[Array, "d k"], rank: Int[Array, ""]
) -> Float[Array, "d d"]:
    """The ``rank`` leading left singular vectors, followed by columns of zeros."""
    left, _, _ = jnp.linalg.svd(matrix, full_matrices=False)
    return leading_columns(left, rank)
