"""Eigenvalues of the covariance of a layer's responses: how much energy each direction holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from accel.solvers.base import arithmetic, as_finite_rows, widest_dtype
from accel.solvers.linear_algebra import centre


def response_spectrum(
    targets: Float[Array, "n d"] | Float[np.ndarray, "n d"],
) -> Float[Array, " d"]:
    """Eigenvalues of ``(1/n) Σ (y - ȳ)(y - ȳ)ᵀ``, descending and not negative.

    Taken as squared singular values of the centred rows, without forming the covariance, in float64
    wherever the backend has it; returned in the dtype of the targets, at least float32. With n ≤ d
    all but the first n - 1 are zero, up to rounding.

    Raises:
        ValueError: If the targets are not rows, or have NaN or infinite values.
    """
    dtype = widest_dtype()
    with arithmetic(dtype):
        rows = as_finite_rows("targets", targets)
        returned = jnp.promote_types(rows.dtype, "float32")
        return _eigenvalues(rows.astype(dtype)).astype(returned)


@jax.jit
def _eigenvalues(rows: Float[Array, "n d"]) -> Float[Array, " d"]:
    n, d = rows.shape
    centred, _ = centre(rows)
    triangle = jnp.linalg.qr(centred, mode="r")
    singular_values = jnp.linalg.svd(triangle, compute_uv=False)
    return jnp.pad(jnp.square(singular_values) / n, (0, d - min(n, d)))
