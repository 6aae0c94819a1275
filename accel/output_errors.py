"""What other weights in one layer do to the network's outputs, by running the network.

    e = Σ_o  Σ‖f_o - f'_o‖² / Σ‖f_o‖²

with the sums in each o, an output of the network, over images; f' is what comes out with the other
kernel, and with something added to the layer's responses, as the chain's bias would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float64

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


class OutputErrors:
    """e of other weights in any layer of a network (see the module's docstring).

    The network is cut before every layer, so that each part of it is compiled once, however many
    layers there are before it.

    Args:
        program: The original network.
        calls: Its layers that may get other weights, in order of execution.
        batch_size: The batch size that the program was traced for.
    """

    def __init__(self, program: Program, calls: Sequence[LayerCall], batch_size: int):
        self.program = program
        self.calls = calls
        self.batch_size = batch_size
        self.cuts = [*map(program.live, calls), output_variables(program, batch_size)]
        self.parts = [
            self._jitted(given, wanted)
            for given, wanted in zip(self.cuts, self.cuts[1:], strict=False)
        ]

        @partial(jax.jit, compiler_options=program.options)
        def squares(outputs, others, mask):
            pairs = zip(outputs, others, strict=True)
            rows = (rows_by_image(f, batch_size) - rows_by_image(g, batch_size) for f, g in pairs)
            return [jnp.sum(jnp.square(row) * mask[:, None]) for row in rows]

        self.squares = squares

    def __call__(
        self, layer: int, batches: Sequence[Sequence[Any]], images: int, others: list[OtherWeights]
    ) -> Float64[np.ndarray, " others"]:
        """e of each of some weights; NaN or Inf where the network answers with such.

        An output that is zero for all images counts nothing.

        Args:
            layer: The layer's place among ``calls``.
            batches: What is alive before it (``Program.live``), for each batch of the images.
            images: How many there are; what the last batch is filled up with counts nothing.
            others: What the layer has in the place of its own weights.

        Raises:
            ValueError: If the original network answers with NaN or Inf.
        """
        kernel = np.asarray(self.calls[layer].layer.kernel[...])
        original = OtherWeights(kernel, np.zeros(kernel.shape[-1], np.float32))
        answers = self._answers(layer)
        energies = np.zeros(len(self.cuts[-1]))
        errors = np.zeros((len(others), len(energies)))
        for index, values in enumerate(batches):
            left = images - index * self.batch_size
            mask = (np.arange(self.batch_size) < left).astype(np.float32)
            expected = answers(original, values)
            energies += self._squares(expected, [jnp.zeros_like(f) for f in expected], mask)
            for which, weights in enumerate(others):
                errors[which] += self._squares(expected, answers(weights, values), mask)
        if not np.isfinite(energies).all():
            raise ValueError("the original network's outputs hold NaN or Inf")
        return np.sum(errors / np.where(energies > 0, energies, np.inf), axis=1)

    def _answers(self, at: int) -> Callable[[OtherWeights, Sequence[Any]], list[jax.Array]]:
        """The network's outputs with some weights in a layer, from what is alive before it."""
        call = self.calls[at]
        graphdef, state = nnx.split(call.layer)
        own = call.layer.kernel[...]
        run, parameters = self.program.segment([call.output, *self.cuts[at]], self.cuts[at + 1])

        @partial(jax.jit, compiler_options=self.program.options)
        def step(parameters, state, kernel, shift, values):
            layer = nnx.merge(graphdef, state)
            layer.kernel[...] = kernel
            response = (layer(values[0]) + shift).astype(specification(call.output).dtype)
            return run(parameters, [response, *values])

        def answers(weights: OtherWeights, values: Sequence[Any]) -> list[jax.Array]:
            kernel = weights.kernel.reshape(own.shape).astype(own.dtype)
            values = step(parameters, state, kernel, weights.shift, values)
            for part in self.parts[at + 1 :]:
                values = part(values)
            return list(values)

        return answers

    def _jitted(
        self, given: Sequence[jex.Var], wanted: Sequence[jex.Var]
    ) -> Callable[[Sequence[Any]], list[jax.Array]]:
        run, parameters = self.program.segment(given, wanted)
        jitted = jax.jit(run, compiler_options=self.program.options)
        return lambda values: jitted(parameters, values)

    def _squares(self, outputs, others, mask) -> Float64[np.ndarray, " outputs"]:
        return np.array(jax.device_get(self.squares(outputs, others, mask)), np.float64)


def _of_each_image(output: jax.ShapeDtypeStruct, batch_size: int) -> bool:
    """Whether an output is numbers that can be shared out among the images of a batch."""
    floating = jnp.issubdtype(output.dtype, jnp.floating)
    return floating and len(output.shape) > 0 and output.shape[0] % batch_size == 0
