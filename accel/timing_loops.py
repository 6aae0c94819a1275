"""Seconds that layers take on the device, each in a loop of one compiled program.

The activation that follows is in the time; no dispatch, and no fresh memory for outputs, as in the
middle of a network. Layers are timed in turns, since the speed of a device changes: those that
could stand in one place of a network in proportion to the one that does, those of different places
as shares of a pass over all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.compiler import Options, compile_together
from accel.evaluation.forward import forward_function
from accel.inference import compile_with_weights, with_any_weights
from accel.memory import keep_free_memory
from accel.solvers.activations import Activation, activate

# A timed program runs a layer for so long.
TIMED_SECONDS = 0.02
# How often everything that could stand in one place is timed, in turns, by ``seconds_in_turns``.
PASSES = 3
# After how many others the layer as it is is timed again: the longer that takes, the less it tells
# of the device's speed meanwhile.
TOGETHER = 16
# How often the layers of all places are timed in turns: shares of some ten layers, which decide how
# much of a budget each place is given.
PASSES_OVER_PLACES = 9
# Elsewhere than on CPU a turn of the loop runs a layer more than once, unless its outputs are
# larger than this: then the layer takes long enough, and they too much memory to be held often.
SMALL_OUTPUT = 2**24


def layer_seconds(
    layers: Sequence[nnx.Module],
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> list[float]:
    """Seconds that a layer, and what could stand in its place, take on the device, in turns.

    The activation that follows is in the time. The process keeps the memory that is freed, as in
    inference (``accel.memory.kept_memory``).

    Args:
        layers: The layer as it is and the others; the values of their weights do not matter.
        input_shape: Shape of what they are given, the batch first.
        dtype: Type of what they are given.
        activation: What follows.
        options: What the compiler is told, as for the network that the layer is of.
    """
    looped = partial(
        compile_loop, input_shape=input_shape, dtype=dtype, activation=activation, options=options
    )
    return seconds_in_turns(list(compile_together(looped, layers)))


class Loop(NamedTuple):
    """A compiled program that runs a layer some times.

    It is given weights, the number of turns, images and outputs, and returns these two, in the same
    memory.
    """

    program: jax.stages.Compiled
    arguments: tuple[Any, ...]
    images: jax.ShapeDtypeStruct
    outputs: list[jax.ShapeDtypeStruct]


def compile_loop(
    layer: nnx.Module,
    input_shape: Sequence[int],
    dtype: Any,
    activation: Activation,
    options: Options | None,
) -> Loop:
    """Compiles a layer for ``seconds_in_turns``; the arguments are those of ``layer_seconds``."""
    forward, state = forward_function(with_any_weights(layer))
    images = jax.ShapeDtypeStruct(tuple(input_shape), dtype)
    output = jax.eval_shape(forward, state, images)
    runs = _runs_per_turn(math.prod(output.shape) * output.dtype.itemsize)
    outputs = [jax.ShapeDtypeStruct(output.shape, output.dtype)] * runs

    def looped(
        network: Callable[[jax.Array], jax.Array],
        count: int,
        images: jax.Array,
        outputs: list[jax.Array],
    ) -> tuple[jax.Array, list[jax.Array]]:
        """``count`` turns that run the layer, each time on images that hang on the outputs before.

        They are the same, but the compiler must not know, or it would run the layer once. (Writing
        one element instead made it copy all of them at every run.) The outputs are handed from turn
        to turn, so that all of them are computed.
        """

        def turn(
            _: Any, carried: tuple[jax.Array, list[jax.Array]]
        ) -> tuple[jax.Array, list[jax.Array]]:
            images, outputs = carried
            outputs = list(outputs)
            for run in range(runs):
                before = outputs[run - 1]
                images, outputs[run - 1] = jax.lax.optimization_barrier((images, before))
                outputs[run] = activate(network(images), activation)
            return images, outputs

        return jax.lax.fori_loop(0, count, turn, (images, outputs))

    # How often is an argument, so that the program is compiled once. Images and outputs are
    # donated: copying them would be a tenth of a layer's time and more where large images go
    # through few channels.
    program, arguments = compile_with_weights(
        looped, forward, state, 1, images, outputs, donated=(1, 2), options=options
    )
    return Loop(program, arguments, images, outputs)


def _runs_per_turn(output_bytes: int) -> int:
    """How often a turn of the loop runs the layer: once on CPU.

    Elsewhere the host has to look after each turn whether there is another one, which takes as long
    as a small layer.
    """
    return 1 if jax.default_backend() == "cpu" or output_bytes > SMALL_OUTPUT else 4


def seconds_in_turns(loops: Sequence[Loop]) -> list[float]:
    """Seconds of one run of each layer, all of which could stand in one place of a network.

    The first one is the layer as it is, to which the others are told in proportion
    (``proportions``): of each the median of ``PASSES`` counts, times the least that the first one
    took. So what slows the device down for a while does not make the layer that is timed just then
    look worse than the others.
    """
    keep_free_memory()
    first, *others = map(Timer, loops)
    passes = [proportions(first, others, backwards=number % 2 == 1) for number in range(PASSES)]
    least = min(found.seconds for found in passes)
    medians = np.median([found.others for found in passes], axis=0)
    return [least, *(least * medians).tolist()]


def seconds_over_places(loops: Sequence[Loop]) -> list[float]:
    """Seconds of one run of layers of different places of a network, in turns with each other.

    Of each the median of its shares of a pass counts, times the least that a pass took. Images and
    outputs are made anew for each turn, so that those of one place alone are held at a time.
    """
    keep_free_memory()
    timers = list(map(Timer, loops))
    passes = []
    for number in range(PASSES_OVER_PLACES):
        backwards = number % 2 == 1
        times = [
            timer.seconds(_used_buffers(timer.loop))
            for timer in (reversed(timers) if backwards else timers)
        ]
        passes.append(times[::-1] if backwards else times)
    times = np.array(passes)
    whole = times.sum(axis=1)
    return (whole.min() * np.median(times / whole[:, None], axis=0)).tolist()


class Timer:
    """Times a layer.

    Attributes:
        loop: Its program.
        count: How many turns of it take long enough; 0 before the first time.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.count = 0

    def seconds(self, buffers: _Buffers) -> float:
        """Seconds of one run of the layer, from as many as take long enough."""
        if not self.count:
            # Once before, so that it needs no more memory.
            buffers.seconds(self.loop, 1)
            self.count = 1
        while (passed := buffers.seconds(self.loop, self.count)) < TIMED_SECONDS / 2:
            self.count = max(2 * self.count, round(TIMED_SECONDS * self.count / passed))
        return passed / (self.count * len(self.loop.outputs))


class Proportions(NamedTuple):
    """Times of one pass over layers that could stand in one place.

    Attributes:
        seconds: The least that one run of the layer as it is took.
        others: What one run of each of the others took, over that of the layer as it is.
    """

    seconds: float
    others: list[float]


def proportions(first: Timer, others: Sequence[Timer], *, backwards: bool = False) -> Proportions:
    """Times layers in one pass, in proportion to the layer as it is.

    That is timed before and after every ``TOGETHER`` of them, which are told in proportion to the
    mean of both.

    Args:
        first: The layer as it is.
        others: What could stand in its place.
        backwards: From the last of the others to the first.
    """
    buffers = _used_buffers(first.loop)
    order = list(reversed(others)) if backwards else list(others)
    beside, found = [first.seconds(buffers)], []
    for begin in range(0, max(1, len(order)), TOGETHER):
        taken = [timer.seconds(buffers) for timer in order[begin : begin + TOGETHER]]
        beside.append(first.seconds(buffers))
        found += [2 * seconds / (beside[-2] + beside[-1]) for seconds in taken]
    return Proportions(min(beside), found[::-1] if backwards else found)


class _Buffers:
    """Images and outputs of one place of a network, which all layers use that are timed for it."""

    def __init__(self, loop: Loop):
        self.images = jnp.ones(loop.images.shape, loop.images.dtype)
        self.outputs = [jnp.zeros(output.shape, output.dtype) for output in loop.outputs]

    def seconds(self, loop: Loop, count: int) -> float:
        """Seconds of so many turns of the loop."""
        start = time.perf_counter()
        self.images, self.outputs = jax.block_until_ready(
            loop.program(*loop.arguments, count, self.images, self.outputs)
        )
        return time.perf_counter() - start


def _used_buffers(loop: Loop) -> _Buffers:
    """Buffers that the layer has run in: its first run in new ones can take a fifth longer."""
    buffers = _Buffers(loop)
    buffers.seconds(loop, 1)
    return buffers
