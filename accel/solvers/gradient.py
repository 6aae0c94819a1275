"""Reconstruction by autodiff: ``min Σ ℓ(r(y), r(M ŷ + b))``, rank M ≤ r, for any r and ℓ.

M = E L is minimised over its factors and b by L-BFGS, from reduced-rank regression. Where
``Alternating`` relaxes the problem and takes closed forms, this one goes down the true objective,
and needs nothing of activation and loss but their derivatives. It is not convex: after other
roundings the descent may end elsewhere, a little better or worse.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from accel.solvers.activations import Activation, activate
from accel.solvers.base import Factors, Solver, lower
from accel.solvers.linear_algebra import (
    centre,
    contract,
    leading_left_singular_vectors,
    whiten,
)

# Iterations of which L-BFGS keeps the gradients.
MEMORY = 10
# How often a step is shortened at most.
BACKTRACKS = 20


class _Parameters(NamedTuple):
    """In whitened coordinates and units of the targets: ``y' = σ (√n Q Lᵀ Eᵀ + b)``."""

    expand: Float[Array, "d d"]
    reduce: Float[Array, "d k"]
    bias: Float[Array, " d"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Solver):
    """Starts from reduced-rank regression; the best iterate is returned.

    Another loss is a subclass with a ``loss`` of its own, a frozen dataclass like this one. Its
    settings are fields: by them and by the class's name a run that is resumed tells solvers apart.

    Attributes:
        iterations: Of L-BFGS.
    """

    iterations: int = 50

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be 1 or more, found {self.iterations}")

    def candidates(
        self,
        inputs: Float[Array, "n d_in"],
        targets: Float[Array, "n d"],
        rank: Int[Array, ""],
        activation: Activation,
        rounding: float,
    ) -> tuple[Factors, ...]:
        whitening = whiten(inputs, rounding)
        centred, mean = centre(targets)
        A = contract("nd,nk->dk", centred, whitening.rows)
        # Columns beyond the rank are zero, and so are the rows of L there: no gradient moves both.
        U = leading_left_singular_vectors(A, rank)
        # Of variance 1, so that L and b have the same curvature.
        length = jnp.sqrt(jnp.asarray(len(targets), targets.dtype))
        rows = length * whitening.rows
        size = jnp.sqrt(jnp.mean(jnp.square(targets)))
        unit = jnp.where(size > 0, size, 1)
        start = _Parameters(U, contract("dr,dk->rk", U, A) / (unit * length), mean / unit)
        wanted = activate(targets, activation)

        def error(found: _Parameters) -> Float[Array, ""]:
            inner = contract("nk,rk->nr", rows, found.reduce)
            outputs = contract("nr,dr->nd", inner, found.expand) + found.bias
            return self.loss(wanted, activate(unit * outputs, activation))

        scale = error(start)
        scale = jnp.where(scale > 0, scale, 1)

        def objective(found: _Parameters) -> Float[Array, ""]:
            return error(found) / scale

        # Compiles in half the time of the default search. Steps that rounding decides on are taken.
        search = optax.scale_by_backtracking_linesearch(
            BACKTRACKS, rtol=8 * float(jnp.finfo(targets.dtype).eps), store_grad=True
        )
        descent = optax.lbfgs(memory_size=MEMORY, linesearch=search)
        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(state: tuple[_Parameters, optax.OptState, _Parameters, Array], _: None):
            current, memory, best, least = state
            value, gradient = value_and_grad(current, state=memory)
            best, least = lower(best, least, current, jnp.asarray(value))
            updates, memory = descent.update(
                gradient, memory, current, value=value, grad=gradient, value_fn=objective
            )
            following = cast(_Parameters, optax.apply_updates(current, updates))
            return (following, memory, best, least), None

        # The search may go uphill where the curvature is negative: what is lowest is returned.
        begun = (start, descent.init(start), start, jnp.asarray(jnp.inf, targets.dtype))
        (last, _, best, least), _ = jax.lax.scan(step, begun, length=self.iterations)
        best, _ = lower(best, least, last, objective(last))

        def factors(found: _Parameters) -> Factors:
            reduce = length * contract("rk,ki->ri", found.reduce, whitening.transform)
            bias = unit * found.bias
            E = unit * found.expand
            return Factors(reduce, E, bias - contract("dr,ri,i->d", E, reduce, whitening.mean))

        return factors(start), factors(best)
