"""Sensitivity: the metric in which errors of a layer count at the network's outputs.

    S_l = P_l · Σ_o E[Jᵀ J] / E‖f_o‖²,      J = ∂f_o / ∂y_l

y_l is what layer l answers at one of its P_l positions, f_o are the outputs of the network, and the
means go over positions and images. If a layer is wrong by δ, independently from position to
position, the network's outputs are wrong by a relative squared error of E[δᵀ S_l δ], to first
order. So S tells which directions must be kept and which the network does not look at, in a unit
that is the same for all layers. It is measured for the responses and for what the activation makes
of them; in the former, where the activation cuts off is in the mean.

Jᵀ J is never built: for a random v of independent standard normal entries, E[(Jᵀv)(Jᵀv)ᵀ] = Jᵀ J,
and Jᵀ v of all layers at once is one backward pass. This is the output side of the Kronecker
factored Gauss-Newton matrix (Martens and Grosse, arXiv:1503.05671) for the squared error of the
outputs; no labels are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from accel.images import ArraySource, full_batches
from accel.interpreter import specification
from accel.output_errors import output_variables, rows_by_image
from accel.program import LayerCall, Program
from accel.progress import Progress
from accel.solvers.linear_algebra import contract


class Sensitivity(NamedTuple):
    """S of one layer, before and after its activation."""

    responses: Float64[np.ndarray, "d d"]
    activations: Float64[np.ndarray, "d d"]


# How much a direction counts that the outputs do not hang on to first order, as a share of the mean
# one. From 0.03 to 0.3 the error at the outputs is the same within 2 % (bundled network).
DAMPING = 0.1
WAY_OUT = "reconstruction='responses' with ranks by energies needs no gradients"
# Images to measure on: enough for four gradients a channel, within limits.
LEAST_IMAGES, MOST_IMAGES = 64, 256


def sensitivity_matrices(
    program: Program,
    calls: Sequence[LayerCall],
    images: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> dict[str, Sensitivity]:
    """S of every layer, by path (see the module's docstring).

    Args:
        program: The original network.
        calls: The layers to measure.
        images: Images, ``[images, …]``.
        batch_size: The batch size that the program was traced for.
        seed: Seed of v.
        progress: Receives what is being done.

    Raises:
        ValueError: If the network returns nothing of each image that can be differentiated, its
            outputs or gradients hold NaN or Inf, or no gradient reaches a layer that has a part in
            the outputs.
    """
    counted = output_variables(program, batch_size)
    outputs = [index for index, atom in enumerate(program.jaxpr.outvars) if atom in counted]
    if not outputs:
        raise ValueError(
            "the network returns no floating-point numbers of each image; errors at its outputs"
            f" cannot be measured ({WAY_OUT})"
        )
    variables = list(dict.fromkeys(v for call in calls for v in (call.output, call.activated)))
    run = program.with_added(variables)

    def answers(parameters, batch, added) -> list[jax.Array]:
        answered = run(parameters, batch, added)
        return [answered[index] for index in outputs]

    @partial(jax.jit, compiler_options=program.options)
    def energies(parameters, batch, mask):
        nothing = [0.0] * len(variables)
        rows = (rows_by_image(output, batch_size) for output in answers(parameters, batch, nothing))
        return jnp.stack([jnp.sum(jnp.square(row) * mask[:, None]) for row in rows])

    @partial(jax.jit, compiler_options=program.options)
    def moments(parameters, batch, scales, key):
        nothing = [jnp.zeros(s.shape, s.dtype) for s in map(specification, variables)]
        found, backward = jax.vjp(lambda added: answers(parameters, batch, added), nothing)
        directions = []
        for index, (output, scale) in enumerate(zip(found, scales, strict=True)):
            shape = rows_by_image(output, batch_size).shape
            v = jax.random.normal(jax.random.fold_in(key, index), shape)
            directions.append((scale[:, None] * v).reshape(output.shape).astype(output.dtype))
        (gradients,) = backward(directions)
        rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        return [contract("nd,ne->de", g, g) for g in (r.astype(jnp.float32) for r in rows)]

    # Two rounds: v has to be scaled by the energy of all images.
    batches = list(full_batches(ArraySource(images), batch_size))
    present = (np.arange(len(batches) * batch_size) < len(images)).astype(np.float32)
    masks = np.split(present, len(batches))
    progress.begin("what the outputs hang on", len(images))
    energy = sum(
        np.asarray(energies(program.parameters, batch, mask), np.float64)
        for batch, mask in zip(batches, masks, strict=True)
    )
    if not np.isfinite(energy).all():
        raise ValueError("the original network's outputs hold NaN or Inf")
    scales = np.where(energy > 0, 1 / np.sqrt(np.where(energy > 0, energy, 1)), 0)
    sums = {v: np.zeros(2 * specification(v).shape[-1:]) for v in variables}
    key = jax.random.key(seed)
    for index, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        scaled = np.outer(scales, mask).astype(np.float32)
        try:
            found = moments(program.parameters, batch, scaled, jax.random.fold_in(key, index))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"the network cannot be differentiated ({WAY_OUT}): {error}"
            ) from error
        for variable, matrix in zip(variables, jax.device_get(found), strict=True):
            sums[variable] += matrix
        for call in calls:
            if not all(np.isfinite(sums[v]).all() for v in (call.output, call.activated)):
                raise ValueError(
                    f"{call.path}: gradients of the outputs hold NaN or Inf ({WAY_OUT})"
                )
        progress.advance(int(mask.sum()))
    for call in calls:
        if not sums[call.activated].any() and _felt(program, call, batches[0]):
            raise ValueError(
                f"{call.path}: no gradient of the outputs reaches it, though they hang on it"
                f" ({WAY_OUT})"
            )
    return {call.path: Sensitivity(sums[call.output], sums[call.activated]) for call in calls}


def _felt(program: Program, call: LayerCall, batch: np.ndarray) -> bool:
    """Whether the outputs for some images change with what a layer returns.

    They need not, although they are computed from it: a branch may be multiplied by zero.
    """
    if not program.reaches_outputs(call.output):
        return False
    run = program.with_added([call.output])
    before, after = (run(program.parameters, batch, [added]) for added in (0.0, 1.0))
    return not all(map(np.array_equal, before, after))


def images_needed(calls: Sequence[LayerCall], batch_size: int) -> int:
    """How many images it takes to measure the sensitivity of these layers."""
    shapes = [specification(call.output).shape for call in calls]
    needed = max(4 * shape[-1] * batch_size / math.prod(shape[:-1]) for shape in shapes)
    return min(max(LEAST_IMAGES, math.ceil(needed)), MOST_IMAGES)


def whitening(
    sensitivity: Float64[np.ndarray, "d d"], damping: float = DAMPING
) -> tuple[Float64[np.ndarray, "d d"], Float64[np.ndarray, "d d"]]:
    """M and its inverse, symmetric, with ``M² ∝ S + damping · tr(S)/d · I``, of mean diagonal 1.

    Damping says how much a direction counts that the outputs do not hang on, to first order.
    A layer that the outputs do not hang on at all gets the identity.
    """
    width = len(sensitivity)
    mean = np.trace(sensitivity) / width
    if not mean > 0:
        return np.eye(width), np.eye(width)
    values, directions = np.linalg.eigh(sensitivity / mean)
    values = np.sqrt((np.maximum(values, 0) + damping) / (1 + damping))
    return (directions * values) @ directions.T, (directions / values) @ directions.T


def backward_bytes(program: Program) -> int:
    """What the backward pass keeps of one batch, at most: every activation, and its gradient."""
    total = 0
    for equation in program.jaxpr.eqns:
        for variable in equation.outvars:
            specified = specification(variable)
            total += math.prod(specified.shape) * specified.dtype.itemsize
    return 2 * total
