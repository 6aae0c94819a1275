"""A network compiled for inference: the form in which networks are timed, and should be used.

What was found by measurement on CPU (XLA of jaxlib 0.10, the body of VGG-16, two cores): where
weights are constants of the program the compiler packs them once; where they are arguments it packs
them anew at every run, which costs the narrow layers of an accelerated network most. Convolutions
run faster by Eigen than joined with others by YNNPACK (``accel.compiler``), maximum pooling as the
maximum of slices (``accel.pooling``). Memory that a run frees has to stay with the process, or the
next one begins with page faults (``keep_free_memory``; for blocks above 64 MiB ``use_one_pool`` as
well, which a program has to call before JAX is used, as the command line does). On other devices
weights are arguments, laid out in memory as the program wants them; what that gains on a GPU has
not been measured.

Also tried there, and no gain over convolutions by Eigen: 1×1 convolutions as products of matrices,
and ranks filled up to multiples of 8 or 16 (scripts/measure_runtime_forms.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Format, Layout

from accel.compiler import Options, network_options
from accel.evaluation.forward import Forward, forward_function
from accel.memory import keep_free_memory
from accel.pooling import with_sliced_pooling

# Beyond this much, compiling a program with its weights inside takes too long (about 10 s for half
# of it) and several times the memory.
CONSTANT_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Inference:
    """A network compiled for batches of one shape; called with such a batch it gives the outputs.

    Once it was called the process keeps memory that it frees, for the next run, until
    ``accel.memory.stop_keeping_free_memory`` is called.

    Attributes:
        shape: Shape of a batch of images, ``(batch, height, width, channels)``.
        dtype: What it computes in (see ``forward_function``); None for the types that it has.
        program: What the compiler made of it.
        arguments: What the program is given before the images: the weights, or nothing where they
            are part of it.
        seconds: Time to trace and to compile it.
    """

    shape: tuple[int, ...]
    dtype: str | None
    program: jax.stages.Compiled
    arguments: tuple[Any, ...]
    seconds: float

    def __call__(self, images: Any) -> Any:
        keep_free_memory()
        return self.program(*self.arguments, images)


def compile_inference(
    model: nnx.Module, shape: Sequence[int], dtype: str | None = None
) -> Inference:
    """Compiles a network for inference on the default device.

    Args:
        model: The network, called as ``model(images)``, in evaluation mode; it is not changed, and
            what it becomes later does not reach the compiled network.
        shape: Shape of a batch of float32 images, ``(batch, height, width, channels)``.
        dtype: What to compute in (see ``forward_function``).
    """
    forward, state = forward_function(model, dtype)
    images = jax.ShapeDtypeStruct(tuple(shape), np.float32)
    start = time.perf_counter()

    def answer(network: Callable[[jax.Array], Any], images: jax.Array) -> Any:
        return (with_sliced_pooling(network) if jax.default_backend() == "cpu" else network)(images)

    program, arguments = compile_with_weights(
        answer, forward, state, images, options=network_options(model)
    )
    return Inference(images.shape, dtype, program, arguments, time.perf_counter() - start)


def compile_with_weights(
    function: Callable[..., Any],
    forward: Forward,
    state: Any,
    *inputs: Any,
    donated: Sequence[int] = (),
    options: Options | None,
) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """Compiles what a function does with a network, its weights in the form that is fastest.

    Args:
        function: Called with the network, a function of images, and the inputs.
        forward: The network's function.
        state: Its weights.
        inputs: Arrays, or their shapes and types.
        donated: Places of the inputs whose memory the outputs take over.
        options: What the compiler is told.

    Returns:
        The program, and what it has to be given before the inputs: the weights, laid out in memory
        as the program wants them, or nothing where they are part of it.
    """
    weights, structure = jax.tree.flatten(state)

    def of_network(weights: Sequence[Any], *inputs: Any) -> Any:
        # Put together inside each trace: variables may be used only where they were made.
        return function(lambda images: forward(structure.unflatten(weights), images), *inputs)

    weight_bytes = sum(leaf.nbytes for leaf in weights)
    if jax.default_backend() == "cpu" and weight_bytes <= CONSTANT_BYTES:
        jitted = jax.jit(partial(of_network, weights), donate_argnums=tuple(donated))
        return jitted.lower(*inputs).compile(options), ()
    # Left to itself, a program gets its weights row by row and lays them out anew at every run.
    kernels = [leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in weights]
    formats = [Format(Layout.AUTO) if kernel else None for kernel in kernels]
    jitted = jax.jit(
        of_network,
        in_shardings=(formats, *(None for _ in inputs)),
        keep_unused=True,
        donate_argnums=tuple(1 + place for place in donated),
    )
    # Their shapes alone: of arrays that are bound to a device the layout cannot be chosen.
    shapes = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if kernel else leaf
        for leaf, kernel in zip(weights, kernels, strict=True)
    ]
    program = jitted.lower(shapes, *inputs).compile(options)
    wanted = program.input_formats[0][0]
    laid_out = [
        jax.device_put(leaf, as_wanted) if kernel else leaf
        for leaf, as_wanted, kernel in zip(weights, wanted, kernels, strict=True)
    ]
    return program, (laid_out,)


def with_any_weights(model: nnx.Module) -> nnx.Module:
    """A copy with weights that mean nothing, for timing: kernels of a plan that is not solved yet.

    They are drawn, since a compiler could leave out what is done with constants that are zero.
    """
    drawn = nnx.clone(model)
    random = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(drawn, nnx.Param)):
        if jnp.issubdtype(variable.dtype, jnp.floating):
            # By the number of inputs of an output, so that nothing grows out of bounds.
            outputs = variable.shape[-1] if variable.ndim else 1
            scale = max(1, variable.size // outputs) ** -0.5
            values = scale * np.asarray(random.standard_normal(variable.shape), np.float32)
            variable[...] = jax.device_put(values.astype(variable.dtype))
    return drawn
