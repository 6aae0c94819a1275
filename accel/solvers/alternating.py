"""Nonlinear reconstruction: ``min_{M,b} Σ‖r(y) - r(M ŷ + b)‖²``, rank M ≤ r.

Relaxed to ``min_{M,b,z} Σ‖r(y) - r(z)‖² + λ‖z - (M ŷ + b)‖²`` and solved by turns for z, which is
elementwise (``z_step``; a closed form for the ReLU), and for (M, b), which is reduced-rank
regression of z on ŷ. Zhang et al., arXiv:1505.06798, section 3.2 (equations 6 to 9).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from accel.solvers.activations import IDENTITY, Activation, activate, z_step
from accel.solvers.base import Factors, Solver, lower
from accel.solvers.linear_algebra import (
    centre,
    contract,
    leading_columns,
    leading_left_singular_vectors,
    whiten,
)
from accel.solvers.reduced_rank_regression import check_ridge, factors_of, shrinkage


class _Iterate(NamedTuple):
    """(M, b) in whitened coordinates: U, A, and the mean z̄ of z, with y' = Q (UUᵀA)ᵀ + z̄."""

    U: Float[Array, "d d"]
    A: Float[Array, "d k"]
    mean: Float[Array, " d"]


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(Solver):
    """Starts from reduced-rank regression and alternates; the best iterate is returned.

    Without an activation it is reduced-rank regression.

    Attributes:
        schedule: Pairs (λ, iterations), one after the other.
        ridge: As in ``ReducedRankRegression``, for the start and for every (M, b)-step.
    """

    schedule: tuple[tuple[float, int], ...] = ((0.01, 25), (1.0, 25))
    ridge: float = 0.0

    def __post_init__(self) -> None:
        check_ridge(self.ridge)
        for penalty, iterations in self.schedule:
            if not (0 < penalty < math.inf and iterations >= 1):
                raise ValueError(
                    "schedule must be pairs (λ, iterations) with λ > 0 and at least one iteration,"
                    f" found {(penalty, iterations)}"
                )

    @property
    def penalties(self) -> tuple[float, ...]:
        return tuple(penalty for penalty, times in self.schedule for _ in range(times))

    def candidates(
        self,
        inputs: Float[Array, "n d_in"],
        targets: Float[Array, "n d"],
        rank: Int[Array, ""],
        activation: Activation,
        rounding: float,
    ) -> tuple[Factors, ...]:
        whitening = whiten(inputs, rounding)
        shrink = shrinkage(whitening, self.ridge)
        centred, mean = centre(targets)
        A = contract("nd,nk->dk", centred, whitening.rows)
        U = leading_left_singular_vectors(A * jnp.sqrt(shrink), rank)
        start = _Iterate(U, A, mean)
        linear = factors_of(*start[:2], shrink, whitening, mean)
        if activation == IDENTITY:
            return (linear,)

        # The passes over all rows are in float32 even where the rest is in float64: they are nearly
        # all of the cost, and half of it this way. Orthonormal columns lose nothing to it: M and b
        # come out to about 1e-7, an error to which the least squares of their step are flat. What
        # is returned is measured, against the start, in the solver's dtype.
        rows = whitening.rows.astype(jnp.float32)
        row_sum = jnp.sum(whitening.rows, axis=0)
        wanted = targets.astype(jnp.float32)
        activated = activate(targets, activation).astype(jnp.float32)

        def linear_outputs(iterate: _Iterate) -> Float[Array, "n d"]:
            C = contract("er,dr,dk->ek", iterate.U, iterate.U, iterate.A * shrink)
            return contract("nk,dk->nd", rows, C.astype(jnp.float32)) + iterate.mean.astype(
                jnp.float32
            )

        def true_objective(outputs: Float[Array, "n d"]) -> Float[Array, ""]:
            errors = jnp.square(activated - activate(outputs, activation))
            return jnp.sum(errors.astype(targets.dtype))

        def step(
            state: tuple[_Iterate, _Iterate, Float[Array, ""]], penalty: Float[Array, ""]
        ) -> tuple[tuple[_Iterate, _Iterate, Float[Array, ""]], None]:
            current, best, least = state
            outputs = linear_outputs(current)
            best, least = lower(best, least, current, true_objective(outputs))
            # Relative to the targets' mean, so that a large one costs no digits of the covariance.
            z = z_step(outputs, wanted, activated, penalty, activation) - mean.astype(jnp.float32)
            z_mean = jnp.mean(z, axis=0, dtype=targets.dtype)
            A = contract("nd,nk->dk", z, rows).astype(targets.dtype) - jnp.outer(z_mean, row_sum)
            U = _leading_directions(A * jnp.sqrt(shrink), rank)
            return (_Iterate(U, A, mean + z_mean), best, least), None

        (last, best, least), _ = jax.lax.scan(
            step,
            (start, start, jnp.asarray(jnp.inf, targets.dtype)),
            jnp.asarray(self.penalties, jnp.float32),
        )
        best, _ = lower(best, least, last, true_objective(linear_outputs(last)))
        return linear, factors_of(best.U, best.A, shrink, whitening, best.mean)


def _leading_directions(matrix: Float[Array, "d k"], rank: Int[Array, ""]) -> Float[Array, "d d"]:
    """The ``rank`` leading left singular vectors, followed by columns of zeros.

    In float64 by the eigenvectors of A Aᵀ, many times faster than by the SVD of A. That squares A's
    singular values, so directions below 1e-8 of the largest are mixed up; they hold 1e-16 of the
    energy, which no step of an iteration notices. In float32 they would hold 1e-7 of it.
    """
    if matrix.dtype != jnp.float64:
        return leading_left_singular_vectors(matrix, rank)
    _, directions = jnp.linalg.eigh(contract("dk,ek->de", matrix, matrix))
    return leading_columns(directions[:, ::-1], rank)
