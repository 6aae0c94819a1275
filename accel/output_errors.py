"""What other weights in one layer do to the network's outputs, by running the network.

    e = Σ_o  Σ‖f_o - f'_o‖² / Σ‖f_o‖²

with the sums in each o, an output of the network, over images; f' is what comes out with the other
kernel, and with something added to the layer's responses, as the chain's bias would.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64

from accel.images import ArraySource, full_batches
from accel.interpreter import specification
from accel.program import LayerCall, Program


class OtherWeights(NamedTuple):
    """What a layer has in the place of its own weights.

    Attributes:
        kernel: As a matrix, its taps and input channels flattened.
        shift: What is added to the responses.
    """

    kernel: Float[np.ndarray, "p d"]
    shift: Float[np.ndarray, " d"]


def output_variables(program: Program, batch_size: int) -> list[jex.Var]:
    """The outputs of a network that are floating-point numbers of each image of a batch."""
    return [
        variable
        for variable in program.jaxpr.outvars
        if isinstance(variable, jex.Var) and _of_each_image(specification(variable), batch_size)
    ]


def rows_by_image(output: Float[Array, "rows ..."], batch_size: int) -> Float[Array, "batch k"]:
    """An output with one row an image."""
    return output.reshape(batch_size, -1).astype(jnp.float32)


def output_errors(
    program: Program,
    call: LayerCall,
    images: np.ndarray,
    batch_size: int,
    others: Sequence[OtherWeights],
) -> Float64[np.ndarray, " others"]:
    """e of each of some weights in a layer (see the module's docstring).

    Up to the layer the network runs once, on from there once for each. An output that is zero for
    all images counts nothing.

    Args:
        program: The original network.
        call: The layer.
        images: Images to measure on, ``[images, …]``.
        batch_size: The batch size that the program was traced for.
        others: What the layer has in the place of its own weights.
    """
    given = program.live(call)
    before, before_parameters = program.segment([program.images], given)
    wanted = output_variables(program, batch_size)
    after, after_parameters = program.segment([call.output, *given], wanted)
    graphdef, state = nnx.split(call.layer)
    own = np.asarray(call.layer.kernel[...])
    reach = jax.jit(before, compiler_options=program.options)

    @partial(jax.jit, compiler_options=program.options)
    def answers(parameters, state, kernel, shift, values):
        layer = nnx.merge(graphdef, state)
        layer.kernel[...] = kernel
        response = layer(values[0]) + shift
        response = response.astype(specification(call.output).dtype)
        outputs = after(parameters, [response, *values])
        return [rows_by_image(output, batch_size) for output in outputs]

    def answered(weights: OtherWeights, values) -> list[np.ndarray]:
        kernel = weights.kernel.reshape(own.shape).astype(own.dtype)
        found = answers(after_parameters, state, kernel, weights.shift, values)
        return [np.asarray(rows, np.float64) for rows in found]

    original = OtherWeights(own, np.zeros(own.shape[-1], np.float32))
    energies = np.zeros(len(wanted))
    errors = np.zeros((len(others), len(wanted)))
    left = len(images)
    for batch in full_batches(ArraySource(images), batch_size):
        values = reach(before_parameters, [batch])
        here = slice(min(left, batch_size))
        left -= batch_size
        expected = answered(original, values)
        energies += [np.sum(np.square(rows[here])) for rows in expected]
        for index, weights in enumerate(others):
            found = answered(weights, values)
            errors[index] += [
                np.sum(np.square(f[here] - g[here])) for f, g in zip(expected, found, strict=True)
            ]
    return np.sum(errors / np.where(energies > 0, energies, np.inf), axis=1)


def _of_each_image(output: jax.ShapeDtypeStruct, batch_size: int) -> bool:
    """Whether an output is numbers that can be shared out among the images of a batch."""
    floating = jnp.issubdtype(output.dtype, jnp.floating)
    return floating and len(output.shape) > 0 and output.shape[0] % batch_size == 0
