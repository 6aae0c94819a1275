"""What makes a refit of a gradient: the inverse of the curvature, in Kronecker factors.

For each factor of a chain, with C its gradient by weights ``[p (+ 1 with a bias), d]``,

    D = A⁻¹ C S⁻¹,

A the second moments of what the factor is given, S the sensitivity of the network's outputs to what
it answers (``accel.sensitivity``): Gauss-Newton, taking the positions of a map for independent.
Martens and Grosse, arXiv:1503.05671.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from accel.images import padded, spread
from accel.program import LayerCall, Program
from accel.progress import Progress
from accel.runs import patch_sampler, patch_size, sample_positions
from accel.sensitivity import images_needed, sensitivity_matrices
from accel.solvers.linear_algebra import contract

# Rows of patches for the second moments of a factor, at most.
ROWS = 12_000
MOMENT_IMAGES = 256
# What is added to A and S, as a share of A's diagonal (its inputs have units of their own, above
# all the 1 of a bias) and of the mean of S: small eigenvalues are not measured well enough to
# divide by.
DAMPING = 1e-2


def kronecker_preconditioner(
    program: Program,
    calls: Sequence[LayerCall],
    biased: Sequence[bool],
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """The function from C to A⁻¹ C S⁻¹, for all factors at once.

    Args:
        program: The network, traced for batches of ``batch_size``.
        calls: Its factors.
        biased: Whether each of them has a bias.
        images: What A and S are measured on; no more than are needed are looked at.
        batch_size: Images per batch.
        seed: Seed of all that is drawn.
        progress: Receives what is being done.
    """
    seen = images[spread(np.arange(len(images)), MOMENT_IMAGES)]
    moments = _moments(program, calls, biased, seen, batch_size, seed)
    needed = images_needed(calls, batch_size)
    sensitivity = sensitivity_matrices(
        program,
        calls,
        seen[spread(np.arange(len(seen)), needed)],
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    inverses = [
        (_inverse(A, np.diag(A)), _inverse(S, np.full(len(S), np.trace(S) / len(S))))
        for A, S in zip(moments, (sensitivity[call.path].responses for call in calls), strict=True)
    ]

    def precondition(gradients: list[jax.Array]) -> list[jax.Array]:
        return [
            contract("pq,qd,de->pe", left, C, right)
            for C, (left, right) in zip(gradients, inverses, strict=True)
        ]

    return precondition


def _moments(
    program: Program,
    calls: Sequence[LayerCall],
    biased: Sequence[bool],
    images: np.ndarray,
    batch_size: int,
    seed: int,
) -> list[np.ndarray]:
    """A of each factor; a bias is the weight of an input that is always 1."""
    per_image = math.ceil(ROWS / len(images))
    jaxpr = program.jaxpr.replace(constvars=[], outvars=[call.input for call in calls])
    inputs = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    jitted = jax.jit(
        lambda parameters, images: inputs(*parameters, images), compiler_options=program.options
    )
    samplers = [patch_sampler(program, call, batch_size) for call in calls]
    key = jax.random.key(seed)
    positions = [sample_positions(key, call, len(images), batch_size, per_image) for call in calls]
    sums = [
        np.zeros(2 * (patch_size(call) + bias,)) for call, bias in zip(calls, biased, strict=True)
    ]
    for first in range(0, len(images), batch_size):
        here = images[first : first + batch_size]
        given = jitted(program.parameters, padded(here, batch_size))
        for index, (sampler, at) in enumerate(zip(samplers, positions, strict=True)):
            chosen = at[first : first + len(here)]
            seen = np.asarray(sampler(given[index], padded(chosen, batch_size)))
            rows = seen[: len(here)].reshape(-1, seen.shape[-1])
            if biased[index]:
                rows = np.concatenate([rows, np.ones((len(rows), 1), rows.dtype)], 1)
            sums[index] += rows.T @ rows
    return [total / at.size for total, at in zip(sums, positions, strict=True)]


def _inverse(matrix: np.ndarray, sizes: np.ndarray) -> jax.Array:
    """The inverse of a matrix of second moments, damped in proportion to ``sizes``."""
    largest = sizes.max()
    damping = DAMPING * np.maximum(sizes, 1e-6 * largest) if largest > 0 else np.ones(len(sizes))
    return jnp.asarray(np.linalg.inv(matrix + np.diag(damping)), jnp.float32)
