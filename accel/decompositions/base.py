"""What a decomposition is: the chain of convolutions that replaces one, and how it is found.

All chains are made of the same three parts, any of which may be missing:

- a *first* factor that mixes the input channels and some of the taps, ``c → rank``;
- a *middle* factor that has the other taps;
- a 1×1 *last* factor, ``rank → d``.

``channel`` is middle and last; ``spatial``, ``spatial_swapped`` and ``channel_input`` are first and
middle; ``channel_spatial`` and ``tucker2`` have all three. So a decomposition says which taps its
first factor takes and whether there is a last one; the rest follows.

A dense layer is a convolution without taps: its patch is a row of its input. ``svd`` is middle and
last of such a layer.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import jax
import numpy as np
from jaxtyping import Float

from accel.decompositions.structure import Split, Structure


@dataclasses.dataclass(frozen=True)
class Factor:
    """Shape of one layer of a chain; strides, padding and dilation as ``flax.nnx.Conv``'s.

    The kernel of a dense layer has the size ``()``.

    Attributes:
        axes: The spatial axes whose taps, stride and padding are this factor's.
    """

    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    strides: Any
    padding: Any
    kernel_dilation: Any
    use_bias: bool
    axes: tuple[int, ...]

    def macs(self, output_positions: int) -> int:
        """Multiply-accumulates per image with ``output_positions`` output positions per image."""
        taps = int(np.prod(self.kernel_size))
        return output_positions * taps * self.in_channels * self.out_channels


class Weights(NamedTuple):
    """Weights of one factor; ``kernel`` has the spatial axes first, then in, then out channels."""

    kernel: Float[np.ndarray, "... c_in c_out"]
    bias: Float[np.ndarray, " c_out"] | None


class Decomposition(abc.ABC):
    """A way to write a layer as a chain of cheaper ones.

    Attributes:
        name: What it is called.
        has_last: Whether the chain ends in a 1×1 factor.
        balances: At which multiples of the ratio of the two ranks that ``ranks`` gives, second over
            first, ``measured_error`` looks for the best chain.
        dense: Whether it replaces dense layers (``flax.nnx.Linear``), not convolutions
            (``flax.nnx.Conv``); ``conv`` below stands for either.
    """

    name: str
    has_last: bool
    balances: tuple[float, ...] = (1.0,)
    dense: bool = False

    @abc.abstractmethod
    def first_axes(self, axes: int) -> tuple[int, ...] | None:
        """Of so many spatial axes, those whose taps the first factor takes; None without one."""

    @abc.abstractmethod
    def ranks(self, conv: Any, rank: int) -> tuple[int, ...]:
        """The ranks that are chosen together by one number, 1 … ``largest_rank(conv)``."""

    @abc.abstractmethod
    def largest_rank(self, conv: Any) -> int:
        """The rank at which the chain can reproduce ``conv``."""

    def unsuitable(self, conv: Any) -> str | None:
        """Why this decomposition cannot take ``conv``, or None if it can."""
        if self.dense != (not kernel_size(conv)):
            return (
                "a convolution" if self.dense else "a dense layer, which has no taps: svd is for it"
            )
        if self.dense:
            # What another product than the plain one computes is unknown (it may quantize, say).
            return None if conv.dot_general is jax.lax.dot_general else "a product of its own"
        if conv.conv_general_dilated is not jax.lax.conv_general_dilated:
            return "a convolution of its own"
        if conv.feature_group_count != 1:
            return f"grouped convolution ({conv.feature_group_count} groups)"
        if conv.mask is not None:
            return "masked kernel"
        if np.any(np.asarray(conv.input_dilation or 1) != 1):
            return "dilated input (transposed convolution)"
        first = self.first_axes(len(conv.kernel_size))
        if first is None:
            return None
        rest = [axis for axis in range(len(conv.kernel_size)) if axis not in first]
        taps = lambda axes: math.prod(conv.kernel_size[axis] for axis in axes)  # noqa: E731
        if first and (taps(first) == 1 or taps(rest) == 1):
            return f"a kernel of {'×'.join(map(str, conv.kernel_size))} has nothing to separate"
        if not first and taps(rest) == 1 and not self.has_last:
            return "a 1×1 convolution is mirrored by itself; channel does the same"
        return None

    @final
    def structure(self, conv: Any) -> Structure:
        """How the kernel of ``conv`` is cut into the chain's parts."""
        taps = kernel_size(conv)
        return Structure(
            taps,
            conv.in_features,
            conv.out_features,
            self.first_axes(len(taps)),
            self.has_last,
        )

    @final
    def factors(self, conv: Any, *ranks: int) -> tuple[Factor, ...]:
        """The shapes of the chain that replaces ``conv`` at the ranks.

        Raises:
            ValueError: If it is not one rank for each inner width of the chain, or one is below 1.
        """
        taps = kernel_size(conv)
        axes = tuple(range(len(taps)))
        first = self.first_axes(len(axes))
        wanted = (first is not None) + self.has_last
        if len(ranks) != wanted or min(ranks) < 1:
            raise ValueError(f"{self.name} takes {wanted} ranks of 1 or more, found {ranks}")
        middle = axes if first is None else tuple(axis for axis in axes if axis not in first)
        steps = [] if first is None else [first]
        steps += [middle, *([()] if self.has_last else [])]
        widths = [conv.in_features, *ranks, conv.out_features]
        strides, padding, dilation = (
            (conv.strides, conv.padding, conv.kernel_dilation) if axes else ((), "VALID", ())
        )
        return tuple(
            Factor(
                kernel_size=tuple(taps[a] if a in own else 1 for a in axes),
                in_channels=widths[index],
                out_channels=widths[index + 1],
                strides=_along(strides, own, axes, 1),
                padding=_padding_along(padding, own, axes),
                kernel_dilation=_along(dilation, own, axes, 1),
                use_bias=index == len(steps) - 1,
                axes=own,
            )
            for index, own in enumerate(steps)
        )

    @final
    def macs(
        self, conv: Any, ranks: Sequence[int], input_size: Sequence[int], output_size: Sequence[int]
    ) -> int:
        """Multiply-accumulates per image of the chain.

        Args:
            conv: The layer it replaces.
            ranks: The chain's ranks.
            input_size: Spatial size of what ``conv`` is given (of a dense layer: what is between
                the batch and the features; empty for ``[batch, features]``).
            output_size: Spatial size of what it returns.
        """
        size, total = list(input_size), 0
        for factor in self.factors(conv, *ranks):
            for axis in factor.axes:
                size[axis] = output_size[axis]
            total += factor.macs(math.prod(size))
        return total

    @final
    def weights(self, conv: Any, ranks: Sequence[int], split: Split) -> tuple[Weights, ...]:
        """The weights of the chain, from the parts that a fit has found.

        By NumPy: JAX would compile every operation for every rank and keep the code as long as the
        process runs.
        """
        factors = self.factors(conv, *ranks)
        parts = [part for part in (split.first, split.middle, split.last) if part is not None]
        return tuple(
            Weights(
                np.asarray(part).reshape(
                    *factor.kernel_size, factor.in_channels, factor.out_channels
                ),
                np.asarray(split.bias) if factor.use_bias else None,
            )
            for factor, part in zip(factors, parts, strict=True)
        )


def kernel_size(layer: Any) -> tuple[int, ...]:
    """Taps of a layer along each spatial axis: none for a dense layer."""
    return tuple(layer.kernel.shape[:-2])


def unfolding_rank(conv: Any, first_axes: Sequence[int]) -> int:
    """The largest rank of a kernel as a matrix: some axes' taps and the inputs by all the rest."""
    taps = kernel_size(conv)
    first = math.prod(taps[axis] for axis in first_axes)
    return min(first * conv.in_features, math.prod(taps) // first * conv.out_features)


def composed(weights: Sequence[Weights]) -> Float[np.ndarray, "... c d"]:
    """The kernel of the one layer that a chain computes; its factors share no taps."""
    kernel = weights[0].kernel
    for following, _ in weights[1:]:
        kernel = kernel @ following
    return kernel


def _along(values: Any, own: Sequence[int], axes: Sequence[int], neutral: int) -> tuple[int, ...]:
    """Strides or dilations, ``neutral`` on the axes that are not the factor's own."""
    if values is None or isinstance(values, int):
        values = (neutral if values is None else values,) * len(axes)
    return tuple(values[axis] if axis in own else neutral for axis in axes)


def _padding_along(padding: Any, own: Sequence[int], axes: Sequence[int]) -> Any:
    if not own:
        return "VALID"
    # By name (SAME, CIRCULAR, …) every axis is padded for its own taps: none where there is one.
    if isinstance(padding, str):
        return padding
    if isinstance(padding, int):
        padding = (padding,) * len(axes)
    return tuple(padding[axis] if axis in own else (0, 0) for axis in axes)
