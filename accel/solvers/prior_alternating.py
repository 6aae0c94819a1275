"""Nonlinear reconstruction of the end of a chain, with the original kernel as prior.

    min_{M,b}  (1/n) Σ‖r(y) - r(Mᵀ u + b)‖² + tr (V M - W₀)ᵀ R (V M - W₀),    rank M ≤ r

u = Vᵀ (x - x̄) is what the chain's first part V makes of a patch x, W₀ the original kernel, and R a
diagonal penalty. As in ``alternating``, z is put in the place of y: it is chosen elementwise in a
relaxation, and M is the regression of z on u by turns (Zhang et al., arXiv:1505.06798, section
3.2). Two things are new. The prior keeps the regression from fitting noise where there are few rows
for many channels. And what is cut to the rank is measured in a metric Hᵀ H of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from accel.solvers.activations import IDENTITY, Activation, activate, z_step
from accel.solvers.base import lower
from accel.solvers.linear_algebra import contract

# Directions of u, each of its values scaled to energy 1, that hold less than this part of the
# largest one's energy are left out: u comes in float32, which knows its directions to 1e-7, their
# energies to the square of it and to rounding.
LEAST_ENERGY = 1e-8


class Prior(NamedTuple):
    """``Vᵀ R V`` and ``Vᵀ R W₀``: the prior's part of the regression."""

    moments: Float[Array, "k k"] | Float[np.ndarray, "k k"]
    cross: Float[Array, "k d"] | Float[np.ndarray, "k d"]


class Ending(NamedTuple):
    """M = left @ right, and b; left and right are cut to the rank, or right is None."""

    left: Float[np.ndarray, "k m"]
    right: Float[np.ndarray, "m d"] | None
    bias: Float[np.ndarray, " d"]

    @property
    def matrix(self) -> Float[np.ndarray, "k d"]:
        """M."""
        return self.left if self.right is None else self.left @ self.right


def fit_ending(
    inputs: Float[np.ndarray, "n k"],
    targets: Float[np.ndarray, "n d"],
    prior: Prior,
    rank: int | None,
    whiten: Float[np.ndarray, "d d"],
    unwhiten: Float[np.ndarray, "d d"],
    penalties: Sequence[float],
    activation: Activation,
) -> Ending:
    """M and b, in the arithmetic that is in scope (see the module's docstring).

    Args:
        inputs: u, of mean zero.
        targets: y, at the same positions.
        prior: Of M.
        rank: r; None where M is not cut to a rank.
        whiten: H.
        unwhiten: H⁻¹.
        penalties: λ of each turn; none for the linear solution, which every fit starts from.
        activation: r; without one the linear solution is all there is.

    Returns:
        The iterate with the least objective, each channel weighed by the metric's diagonal.
    """
    ceiling = None if rank is None else np.int32(rank)
    turns = () if activation == IDENTITY else tuple(penalties)
    left, right, bias = _fit(inputs, targets, prior, ceiling, whiten, unwhiten, turns, activation)
    left, bias = np.asarray(left), np.asarray(bias)
    if rank is None:
        return Ending(left, None, bias)
    return Ending(left[:, :rank], np.asarray(right)[:rank], bias)


class _Iterate(NamedTuple):
    """M in whitened coordinates, cut, and b."""

    left: Float[Array, "k d"]
    right: Float[Array, "d d"] | None
    bias: Float[Array, " d"]

    @property
    def matrix(self) -> Float[Array, "k d"]:
        return self.left if self.right is None else contract("kr,rd->kd", self.left, self.right)


@partial(jax.jit, static_argnames=("penalties", "activation"))
def _fit(inputs, targets, prior, rank, whiten, unwhiten, penalties, activation):
    dtype = prior.moments.dtype
    n, d = targets.shape
    moments = contract("nk,nl->kl", inputs, inputs).astype(dtype) / n + prior.moments
    # In units of its own each input counts as a direction, however small it is beside the others.
    sizes = jnp.diag(moments)
    units = jax.lax.rsqrt(jnp.where(sizes > 0, sizes, 1))
    energies, directions = jnp.linalg.eigh(moments * units * units[:, None])
    least = max(LEAST_ENERGY, 16 * len(energies) * float(jnp.finfo(dtype).eps))
    kept = energies > least * energies[-1]
    directions = units[:, None] * directions
    transform = directions * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, energies, 1)), 0)
    # Rows and penalty together are the identity in these coordinates: regression is a product.
    rows = contract("nk,kl->nl", inputs, transform.astype(jnp.float32))
    penalty = contract("kl,km,mo->lo", transform, prior.moments, transform)
    pull = contract("kl,kd->ld", transform, prior.cross)
    activated = activate(targets, activation)
    weights = jnp.sum(jnp.square(whiten), axis=0)

    def regression(z: Float[Array, "n d"]) -> _Iterate:
        mean = jnp.mean(z, axis=0, dtype=dtype)
        centred = z - mean.astype(jnp.float32)
        full = contract("nk,nd->kd", rows, centred).astype(dtype) / n + pull
        if rank is None:
            return _Iterate(full, None, mean)
        weighed = contract("kd,de->ke", full, whiten)
        _, basis = jnp.linalg.eigh(contract("kd,ke->de", weighed, weighed))
        basis = basis[:, ::-1] * (jnp.arange(d) < rank)
        left = contract("kd,dr->kr", weighed, basis)
        return _Iterate(left, contract("dr,de->re", basis, unwhiten), mean)

    def responses(current: _Iterate) -> Float[Array, "n d"]:
        product = contract("nk,kd->nd", rows, current.matrix.astype(jnp.float32))
        return product + current.bias.astype(jnp.float32)

    def objective(current: _Iterate, found: Float[Array, "n d"]) -> Float[Array, ""]:
        matrix = current.matrix
        errors = jnp.mean(jnp.square(activated - activate(found, activation)), axis=0)
        penalties = jnp.sum(matrix * (contract("kl,ld->kd", penalty, matrix) - 2 * pull), axis=0)
        return jnp.sum(weights * (errors.astype(dtype) + penalties))

    def turn(state, strength):
        current, best, least = state
        found = responses(current)
        best, least = lower(best, least, current, objective(current, found))
        z = z_step(found, targets, activated, strength, activation)
        return (regression(z), best, least), None

    start = regression(targets)
    best = start
    if penalties:
        state = (start, start, jnp.asarray(jnp.inf, dtype))
        strengths = jnp.asarray(penalties, jnp.float32)
        (last, best, least), _ = jax.lax.scan(turn, state, strengths)
        best, _ = lower(best, least, last, objective(last, responses(last)))
    return contract("kl,lr->kr", transform, best.left), best.right, best.bias
