"""Activations that a layer can be fitted through, and the elementwise step of a fit by turns.

Another activation is one line in ``ACTIVATIONS``: a function of an array, elementwise and
differentiable almost everywhere. Networks that call it are found by what it traces to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = str

IDENTITY: Activation = "identity"
RELU: Activation = "relu"
ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    IDENTITY: lambda rows: rows,
    RELU: lambda rows: jnp.maximum(rows, 0),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "hard_silu": jax.nn.hard_silu,
    "gelu": jax.nn.gelu,
    "exact_gelu": partial(jax.nn.gelu, approximate=False),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
# Where z is looked for between y' and y, and how often the best of these is improved. The turns
# after this one go on from there, so that more of either gains nothing.
SHARES = (0.25, 0.5, 0.75, 1.0)
NEWTON_STEPS = 2


def activate(rows: Float[Array, "n d"], activation: Activation) -> Float[Array, "n d"]:
    """``r(rows)``."""
    return ACTIVATIONS[activation](rows)


def z_step(
    linear: Float[Array, "n d"],
    targets: Float[Array, "n d"],
    activated: Float[Array, "n d"],
    penalty: Float[Array, ""],
    activation: Activation,
) -> Float[Array, "n d"]:
    """Elementwise ``argmin_z (r(y) - r(z))² + λ (z - y')²``, never worse than ``z = y'``.

    For the ReLU that is the closed form of Zhang et al., arXiv:1505.06798, section 3.2. For any
    other r it is looked for between y', where the second term is 0, and y, where the first is, and
    improved by Gauss-Newton steps, each taken only where it lowers the sum.

    Args:
        linear: y' = M ŷ + b.
        targets: y.
        activated: r(y).
        penalty: λ > 0.
        activation: r.
    """
    if activation == RELU:
        return relu_z_step(linear, activated, penalty)
    r = ACTIVATIONS[activation]

    def cost(z: Float[Array, "n d"], given: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return jnp.square(activated - given) + penalty * jnp.square(z - linear)

    best, least = linear, cost(linear, r(linear))
    for share in SHARES:
        z = linear + share * (targets - linear)
        found = cost(z, r(z))
        best, least = jnp.where(found < least, z, best), jnp.minimum(found, least)
    for _ in range(NEWTON_STEPS):
        given, slope = jax.jvp(r, (best,), (jnp.ones_like(best),))
        step = (activated - given) * slope + penalty * (linear - best)
        z = best + step / (jnp.square(slope) + penalty)
        found = cost(z, r(z))
        best, least = jnp.where(found < least, z, best), jnp.minimum(found, least)
    return best


def relu_z_step(
    linear: Float[Array, "n d"], activated: Float[Array, "n d"], penalty: Float[Array, ""]
) -> Float[Array, "n d"]:
    """``z_step`` for the ReLU.

    The best z ≤ 0 is ``min(0, y')``, the best z ≥ 0 is ``max(0, (λ y' + r(y)) / (λ + 1))``; the
    cheaper one is taken.
    """
    inactive = jnp.minimum(0, linear)
    active = jnp.maximum(0, (penalty * linear + activated) / (penalty + 1))
    inactive_cost = jnp.square(activated) + penalty * jnp.square(inactive - linear)
    active_cost = jnp.square(activated - active) + penalty * jnp.square(active - linear)
    return jnp.where(inactive_cost < active_cost, inactive, active)
