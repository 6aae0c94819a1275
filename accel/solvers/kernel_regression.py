"""Ridge regression of a layer's responses on its patches, with the layer's own kernel as prior.

minimise  (1/n) Σ‖(y - ȳ) - Wᵀ(x - x̄)‖² + ρ Σ_j v_j ‖W_j - W₀_j‖²

over kernels W, where x are the patches that the layer sees in the accelerated network, y the
responses of the original network, W₀ the original kernel and v_j the variance of input value j.
Up to a constant this is ``tr (W - W*)ᵀ G (W - W*)`` with ``G = cov(x) + ρ diag(v)``: the best
kernel W* and a metric in which whatever replaces it has to be close to it. With many rows W* takes
back what the layers before have lost; with few it stays at W₀. The asymmetric objective of Zhang et
al., arXiv:1505.06798, section 3.3, for all taps instead of the responses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from accel.solvers.linear_algebra import contract

# Tenfold steps: around its minimum the error on other images is flat.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Taken where there are too few images to set some aside for choosing.
CAUTIOUS_RIDGE = 1.0
# Variances below this part of the mean one count as that much: an input that hardly varied here may
# vary more on other images, where a coefficient without a prior would do any harm.
LEAST_VARIANCE = 1e-6
CHUNK = 4096


class KernelFit(NamedTuple):
    """The best kernel and its metric, see the module's docstring.

    Attributes:
        kernel: W*.
        metric: G.
        patch_mean: x̄.
        target_mean: ȳ.
        ridge: ρ.
        penalty: ρ v, which is part of G.
    """

    kernel: Float[Array, "p d"]
    metric: Float[Array, "p p"]
    patch_mean: Float[Array, " p"]
    target_mean: Float[Array, " d"]
    ridge: float
    penalty: Float[Array, " p"]


class Moments(NamedTuple):
    """Sums over rows, about means that are given."""

    rows: int
    patches: Float[Array, "p p"]
    cross: Float[Array, "p d"]
    energy: Float[Array, ""]

    def plus(self, other: Moments) -> Moments:
        return Moments(
            self.rows + other.rows,
            self.patches + other.patches,
            self.cross + other.cross,
            self.energy + other.energy,
        )


def fit_kernel(
    patches: Float[np.ndarray, "n p"],
    targets: Float[np.ndarray, "n d"],
    kernel: Float[np.ndarray, "p d"],
    tuning: Bool[np.ndarray, " n"],
    ridges: Sequence[float] = RIDGES,
) -> KernelFit:
    """The best kernel, with the ρ of ``ridges`` that does best on rows it was not fitted to.

    Args:
        patches: Finite rows.
        targets: Responses of the original network at the same positions.
        kernel: W₀.
        tuning: The rows that choose ρ; W* is then fitted to all rows. With a single ρ they are
            not looked at; without any, or without others, ρ is 1.
    """
    dtype = jnp.float64 if jax.config.read("jax_enable_x64") else jnp.float32
    patch_mean = patches.mean(0, dtype=np.float64).astype(np.float32)
    target_mean = targets.mean(0, dtype=np.float64).astype(np.float32)
    prior = jnp.asarray(kernel, dtype)

    def moments(rows: Bool[np.ndarray, " n"] | None) -> Moments:
        chosen = np.arange(len(patches)) if rows is None else np.flatnonzero(rows)
        sums = None
        for start in range(0, len(chosen), CHUNK):
            part = chosen[start : start + CHUNK]
            # Filled up with rows of zeros, so that every chunk has one compilation.
            x, y = (
                jnp.asarray(np.pad(values[part] - mean, ((0, CHUNK - len(part)), (0, 0))))
                for values, mean in ((patches, patch_mean), (targets, target_mean))
            )
            added = Moments(len(part), *(product.astype(dtype) for product in _products(x, y)))
            sums = added if sums is None else sums.plus(added)
        assert sums is not None
        return sums

    if len(ridges) == 1 or tuning.all() or not tuning.any():
        all_rows, ridge = moments(None), ridges[0] if len(ridges) == 1 else CAUTIOUS_RIDGE
    else:
        fitted, others = moments(~tuning), moments(tuning)
        errors = [
            float(_error(others, _solution(fitted, prior, np.float32(ridge)))) for ridge in ridges
        ]
        all_rows, ridge = fitted.plus(others), ridges[int(np.argmin(errors))]
    best = _solution(all_rows, prior, np.float32(ridge))
    metric, penalty = _penalized(all_rows, np.float32(ridge))
    return KernelFit(
        best,
        metric,
        jnp.asarray(patch_mean, dtype),
        jnp.asarray(target_mean, dtype),
        ridge,
        penalty,
    )


@jax.jit
def _penalized(
    moments: Moments, ridge: Float[Array, ""]
) -> tuple[Float[Array, "p p"], Float[Array, " p"]]:
    """G and its part ρ v."""
    covariance = moments.patches / moments.rows
    variances = jnp.diag(covariance)
    mean = jnp.mean(variances)
    floor = jnp.where(mean > 0, LEAST_VARIANCE * mean, 1)
    penalty = ridge * jnp.maximum(variances, floor)
    return covariance + jnp.diag(penalty), penalty


@jax.jit
def _solution(
    moments: Moments, prior: Float[Array, "p d"], ridge: Float[Array, ""]
) -> Float[Array, "p d"]:
    """W* = W₀ + G⁻¹ (cov(x, y) - cov(x) W₀): the change is small where W₀ is good already."""
    # Scaled to a diagonal of ones plus ρ, so that units do not matter to the Cholesky factor.
    metric, _ = _penalized(moments, ridge)
    scale = jax.lax.rsqrt(jnp.diag(metric))
    factor = jax.scipy.linalg.cho_factor(metric * scale * scale[:, None])
    missing = moments.cross - contract("pq,qd->pd", moments.patches, prior)
    solved = jax.scipy.linalg.cho_solve(factor, scale[:, None] * missing / moments.rows)
    return prior + scale[:, None] * solved


@jax.jit
def _error(moments: Moments, kernel: Float[Array, "p d"]) -> Float[Array, ""]:
    explained = 2 * moments.cross - contract("pq,qd->pd", moments.patches, kernel)
    return moments.energy - jnp.sum(kernel * explained)


@jax.jit
def _products(
    x: Float[Array, "n p"], y: Float[Array, "n d"]
) -> tuple[Float[Array, "p p"], Float[Array, "p d"], Float[Array, ""]]:
    """Products of a few thousand rows in float32; they are added up in the solution's dtype.

    The products are nearly all of the cost, and ρ is far above the 1e-7 that they lose.
    """
    return (
        contract("np,nq->pq", x, x),
        contract("np,nd->pd", x, y),
        jnp.sum(jnp.square(y)),
    )
