"""Reduced-rank regression: ``min_{M,b} Σ‖y - (M ŷ + b)‖² + ρ Σ_j ‖ŷ_j - mean ŷ_j‖² ‖M_j‖²``.

M has rank at most r; M_j is its column of input channel j. The published solution (Zhang et al.,
arXiv:1505.06798, section 3.2: the r leading left singular vectors of M̂ (Ŷ Ŷᵀ)^½, M̂ the full
regression) is taken in whitened coordinates, where (Ŷ Ŷᵀ)^½ is the identity and nothing has to be
inverted.
"""

from __future__ import annotations

import dataclasses
import math
from typing import final

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from accel.solvers.activations import Activation
from accel.solvers.base import Factors, Solver
from accel.solvers.linear_algebra import (
    Whitening,
    centre,
    contract,
    leading_left_singular_vectors,
    whiten,
)


def check_ridge(ridge: float) -> None:
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be a finite number of at least 0, found {ridge}")


def shrinkage(whitening: Whitening, ridge: float) -> Float[Array, " k"]:
    """``S² / (S² + ridge)``: how much of each whitened regression coefficient the ridge leaves."""
    squares = jnp.square(whitening.singular_values)
    # 0/0 in directions that the inputs lack.
    return jnp.where(squares > 0, squares / jnp.where(squares > 0, squares + ridge, 1), 0)


def factors_of(
    U: Float[Array, "d d"],
    A: Float[Array, "d k"],
    shrink: Float[Array, " k"],
    whitening: Whitening,
    mean: Float[Array, " d"],
) -> Factors:
    """M = U Uᵀ A diag(shrink) transform and the bias that sends mean inputs to ``mean``."""
    reduce = contract("dr,dk,ki->ri", U, A * shrink, whitening.transform)
    return Factors(
        reduce=reduce,
        expand=U,
        bias=mean - contract("dr,ri,i->d", U, reduce, whitening.mean),
    )


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReducedRankRegression(Solver):
    """The best linear solution, from any inputs; it ignores the activation.

    Attributes:
        ridge: ρ above: a penalty on M with every input channel scaled to unit variance, so relative
            to the mean squared singular value of those. Not changed by the units of a channel,
            which a network of ReLUs leaves open.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        check_ridge(self.ridge)

    def candidates(
        self,
        inputs: Float[Array, "n d_in"],
        targets: Float[Array, "n d"],
        rank: Int[Array, ""],
        activation: Activation,
        rounding: float,
    ) -> tuple[Factors, ...]:
        del activation
        whitening = whiten(inputs, rounding)
        centred, mean = centre(targets)
        A = contract("nd,nk->dk", centred, whitening.rows)
        shrink = shrinkage(whitening, self.ridge)
        U = leading_left_singular_vectors(A * jnp.sqrt(shrink), rank)
        return (factors_of(U, A, shrink, whitening, mean),)
