"""Runs of the original and the accelerated network over the calibration images, once each.

The original network runs over the calibration images once and leaves the responses of all its
layers at sampled positions (``OriginalRun``). The accelerated network also runs over
them once, but in step with its own making: ``AcceleratedRun`` stands before one convolution after
the other with all images, hands out what that convolution would answer to the inputs it now gets,
and steps over it once its replacement is known. What is alive between two steps is kept on the host
up to a budget of bytes; batches beyond it are computed again from the last place where they fitted.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from accel.images import ImageSource, full_batches
from accel.interpreter import specification
from accel.program import LayerCall, Program


def outputs_per_image(call: LayerCall, batch_size: int) -> int:
    """Number of output positions of a layer for one image."""
    positions = math.prod(specification(call.output).shape[:-1])
    if positions % batch_size:
        raise ValueError(
            f"{call.path}: {positions} output positions cannot be shared out among {batch_size}"
            " images; is the first axis of the images the batch?"
        )
    return positions // batch_size


def patch_size(call: LayerCall) -> int:
    """Number of input values that one output position of a layer is computed from."""
    return math.prod(call.layer.kernel.shape[:-1])


def sample_positions(
    key: jax.Array, call: LayerCall, images: int, batch_size: int, per_image: int
) -> Int[np.ndarray, "images positions"]:
    """Output positions (flat indices) at which a layer is looked at, drawn for each image.

    Every position is equally likely. They are spread: the positions of an image are drawn one from
    each of ``per_image`` equal stretches of the map. A map with fewer positions is taken whole.
    """
    available = outputs_per_image(call, batch_size)
    count = min(per_image, available)
    layer_key = jax.random.fold_in(key, zlib.crc32(call.path.encode()) & 0x7FFFFFFF)
    offset = np.asarray(jax.random.uniform(layer_key, (images, count)), np.float64)
    positions = ((np.arange(count) + offset) * (available / count)).astype(np.int32)
    return np.minimum(positions, available - 1)


class OriginalRun:
    """The original network's only pass over the calibration images.

    Args:
        program: The original network.
        calls: The convolutions to look at, in order of execution; the pass ends at the last.
        source: Calibration images.
        batch_size: The batch size that the program was traced for.
        positions: Where each convolution is looked at, by path.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[LayerCall],
        source: ImageSource,
        batch_size: int,
        positions: Mapping[str, Int[np.ndarray, "images positions"]],
    ):
        self.calls = calls
        self.source = source
        self.batch_size = batch_size
        self.positions = positions
        run, self.parameters = program.segment([program.images], [call.output for call in calls])

        def sampled(parameters, images, positions):
            responses = run(parameters, [images])
            return [
                jnp.take_along_axis(
                    response.reshape(batch_size, -1, response.shape[-1]), p[:, :, None], axis=1
                )
                for response, p in zip(responses, positions, strict=True)
            ]

        images = specification(program.images)
        at = [
            jax.ShapeDtypeStruct((batch_size, positions[call.path].shape[1]), jnp.int32)
            for call in calls
        ]
        lowered = jax.jit(sampled).lower(self.parameters, images, at)
        self.compiled = lowered.compile(program.options)

    @property
    def working_bytes(self) -> int:
        """What the compiled pass needs for one batch, its results included (0 if not known)."""
        analysis = self.compiled.memory_analysis()
        if analysis is None:
            return 0
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    @property
    def response_bytes(self) -> int:
        """Size of all that ``responses`` returns."""
        widths = {call.path: specification(call.output).shape[-1] for call in self.calls}
        return sum(4 * p.size * widths[path] for path, p in self.positions.items())

    def responses(
        self, progress: Callable[[int], None] = lambda images: None
    ) -> dict[str, Float[np.ndarray, "images positions d"]]:
        """The responses (before the activation) at the sampled positions, by path.

        Raises:
            ValueError: If a response is NaN or Inf; the message holds the path of the first layer
                that has one.
        """
        images = len(self.source)
        rows = {
            call.path: np.empty(
                (*self.positions[call.path].shape, specification(call.output).shape[-1]), np.float32
            )
            for call in self.calls
        }
        for index, batch in enumerate(full_batches(self.source, self.batch_size)):
            first, last = index * self.batch_size, min((index + 1) * self.batch_size, images)
            at = [
                _padded_slice(self.positions[call.path], first, self.batch_size)
                for call in self.calls
            ]
            responses = jax.device_get(self.compiled(self.parameters, batch, at))
            for call, response in zip(self.calls, responses, strict=True):
                if not np.isfinite(response[: last - first]).all():
                    raise ValueError(
                        f"{call.path}: the original network's responses hold NaN or Inf"
                    )
                rows[call.path][first:last] = response[: last - first]
            progress(last - first)
        return rows


def _bytes(variable: jex.Var) -> int:
    specified = specification(variable)
    return specified.size * specified.dtype.itemsize


def _padded_slice(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    part = rows[first : first + count]
    return np.pad(part, ((0, count - len(part)), (0, 0)))


@dataclasses.dataclass
class _Place:
    """Where one batch of images stands: before which call (-1: at the images), with which values.

    Values are None where the images can be had again from their source.
    """

    call: int = -1
    values: list[np.ndarray] | None = None

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values or ())


class AcceleratedRun:
    """The accelerated network's only pass over the calibration images, one layer at a time.

    Args:
        program: The original network.
        calls: The convolutions to be replaced, in order of execution.
        source: Calibration images.
        batch_size: The batch size that the program was traced for.
        cache_bytes: How much may be kept on the host between two layers.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[LayerCall],
        source: ImageSource,
        batch_size: int,
        cache_bytes: int,
    ):
        self.program = program
        self.calls = list(calls)
        self.source = source
        self.batch_size = batch_size
        self.cache_bytes = cache_bytes
        self.places = [_Place() for _ in range(-(-len(source) // batch_size))]
        self.replaced = 0
        self.steps: list[Callable[[Any], list[jax.Array]]] = [self._first_step()]
        self.segments_run = 0

    @property
    def live_bytes(self) -> int:
        """The most that is alive before any one of the convolutions, for all images together."""
        sets = (self.program.live(call) for call in self.calls)
        most = max(sum(_bytes(v) for v in live) for live in sets)
        return most * len(self.places)

    def patches(
        self,
        positions: Int[np.ndarray, "images positions"],
        progress: Callable[[int], None] = lambda images: None,
    ) -> Float[np.ndarray, "images positions p"]:
        """What the next convolution sees of the accelerated network's activations.

        Moves all images on to that convolution, which itself is not computed.

        Returns:
            The patch under the kernel at each sampled output position, its axes (taps, then input
            channels) in the order of the kernel's and flattened: ``p = Π taps · c``.

        Raises:
            ValueError: If an activation is NaN or Inf; the message holds the layer's path.
        """
        call = self.calls[self.replaced]
        sampler = patch_sampler(self.program, call, self.batch_size)
        rows = np.empty((*positions.shape, patch_size(call)), np.float32)
        for index, values in enumerate(self.values(len(self.places))):
            first = index * self.batch_size
            last = min(first + self.batch_size, len(self.source))
            batch_positions = _padded_slice(positions, first, self.batch_size)
            seen = np.asarray(sampler(values[0], batch_positions))[: last - first]
            if not np.isfinite(seen).all():
                raise ValueError(
                    f"{call.path}: the accelerated network's activations hold NaN or Inf"
                )
            rows[first:last] = seen
            progress(last - first)
        return rows

    def values(self, batches: int) -> Iterator[Sequence[Any]]:
        """What is alive before the next convolution, for each of the first batches.

        Moves these on to that convolution, as far as they fit into the cache.
        """
        at = self.replaced
        kept = sum(place.bytes for place in self.places)
        images = self._images(batches)
        for index, place in enumerate(self.places[:batches]):
            values: Sequence[Any] = [next(images)] if place.values is None else place.values
            for step in self.steps[place.call + 1 : at + 1]:
                values = step(values)
                self.segments_run += 1
            new = _Place(at, [np.asarray(value) for value in values])
            if kept - place.bytes + new.bytes <= self.cache_bytes:
                kept += new.bytes - place.bytes
                self.places[index] = new
            yield values

    def replace(self, replacement: nnx.Module) -> None:
        """Puts ``replacement`` in the place of the convolution that all images stand before."""
        if self.replaced + 1 < len(self.calls):
            call = self.calls[self.replaced]
            given, wanted = (
                self.program.live(self.calls[index]) for index in (self.replaced, self.replaced + 1)
            )
            graphdef, state = nnx.split(replacement)
            run, parameters = self.program.segment([call.output, *given], wanted)

            @partial(jax.jit, compiler_options=self.program.options)
            def step(parameters, state, values):
                output = nnx.merge(graphdef, state)(values[0])
                output = output.astype(specification(call.output).dtype)
                return run(parameters, [output, *values])

            self.steps.append(lambda values: step(parameters, state, values))
        self.replaced += 1

    def keep(self) -> None:
        """Leaves the convolution that all images stand before as it is."""
        if self.replaced + 1 < len(self.calls):
            given = self.program.live(self.calls[self.replaced])
            wanted = self.program.live(self.calls[self.replaced + 1])
            run, parameters = self.program.segment(given, wanted)
            jitted = jax.jit(run, compiler_options=self.program.options)
            self.steps.append(lambda values: jitted(parameters, values))
        self.replaced += 1

    def _first_step(self) -> Callable[[Any], list[jax.Array]]:
        run, parameters = self.program.segment(
            [self.program.images], self.program.live(self.calls[0])
        )
        jitted = jax.jit(run, compiler_options=self.program.options)
        return lambda values: jitted(parameters, values)

    def _images(self, batches: int) -> Iterator[np.ndarray]:
        """Of the first batches of images, those that have to be had from their source again."""
        places = self.places[:batches]
        if all(place.values is not None for place in places):
            return
        for place, batch in zip(places, full_batches(self.source, self.batch_size), strict=False):
            if place.values is None:
                yield batch


def patch_sampler(
    program: Program, call: LayerCall, batch_size: int
) -> Callable[[Any, Any], Float[Array, "batch positions p"]]:
    """A jitted function ``(input of the call, positions) -> patches that these positions see``."""
    dense = isinstance(call.layer, nnx.Linear)
    return (_row_sampler if dense else _convolution_sampler)(program, call, batch_size)


def _convolution_sampler(
    program: Program, call: LayerCall, batch_size: int
) -> Callable[[Any, Any], Float[Array, "batch positions p"]]:
    """A jitted function ``(input of the call, positions) -> patches that these positions see``.

    Strides, dilation and padding are read off the call's one convolution equation, whose operand is
    what remains of the input after whatever the layer did before (casts, circular padding, merged
    batch axes).
    """
    equations = program.jaxpr.eqns[call.start : call.stop]
    (equation,) = (e for e in equations if e.primitive.name == "conv_general_dilated")
    operand, kernel = (atom for atom in equation.invars if isinstance(atom, jex.Var))
    prepare, parameters = program.segment([call.input], [operand])
    strides: tuple[int, ...] = equation.params["window_strides"]
    dilation: tuple[int, ...] = equation.params["rhs_dilation"]
    edges = [(low, high, 0) for low, high in equation.params["padding"]]
    taps = specification(kernel).shape[:-2]

    @partial(jax.jit, compiler_options=program.options)
    def sample(parameters, inputs, positions):
        (x,) = prepare(parameters, [inputs])
        # Negative padding cuts off.
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        map_shape = specification(equation.outvars[0]).shape[1:-1]
        per_image = outputs_per_image(call, batch_size)
        flat = positions + jnp.arange(batch_size)[:, None] * per_image
        batch, *place = jnp.unravel_index(flat.reshape(-1), (x.shape[0], *map_shape))
        # One index array an axis: [rows, 1, …, taps of this axis, …, 1].
        axes = len(taps)
        indices = [
            (
                place[axis].reshape(-1, *(1,) * axes) * strides[axis]
                + (jnp.arange(taps[axis]) * dilation[axis]).reshape(
                    1, *(-1 if other == axis else 1 for other in range(axes))
                )
            )
            for axis in range(axes)
        ]
        windows = x[(batch.reshape(-1, *(1,) * axes), *indices)]
        return windows.reshape(*positions.shape, -1).astype(jnp.float32)

    return lambda inputs, positions: sample(parameters, inputs, positions)


def _row_sampler(
    program: Program, call: LayerCall, batch_size: int
) -> Callable[[Any, Any], Float[Array, "batch positions c"]]:
    """``_convolution_sampler`` of a dense layer: an output position sees one row of the input.

    The row is read off the operand of the call's one product, after casts.
    """
    equations = program.jaxpr.eqns[call.start : call.stop]
    (equation,) = (e for e in equations if e.primitive.name == "dot_general")
    operand, _ = (atom for atom in equation.invars if isinstance(atom, jex.Var))
    prepare, parameters = program.segment([call.input], [operand])

    @partial(jax.jit, compiler_options=program.options)
    def sample(parameters, inputs, positions):
        (x,) = prepare(parameters, [inputs])
        rows = x.reshape(batch_size, -1, x.shape[-1])
        return jnp.take_along_axis(rows, positions[:, :, None], axis=1).astype(jnp.float32)

    return lambda inputs, positions: sample(parameters, inputs, positions)
