"""Chains as matrices: how patches of a kernel fall into parts, and a chain's factors by them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Structure(NamedTuple):
    """How the patches of a kernel are cut into the parts of a chain.

    Attributes:
        taps: The kernel's spatial size.
        in_channels: c.
        out_channels: d.
        first_axes: Axes whose taps the first factor takes; None without a first factor.
        has_last: Whether there is a 1×1 factor at the end.
    """

    taps: tuple[int, ...]
    in_channels: int
    out_channels: int
    first_axes: tuple[int, ...] | None
    has_last: bool

    @property
    def middle_taps(self) -> int:
        """Number of values of s."""
        first = self.first_axes or ()
        return math.prod(n for axis, n in enumerate(self.taps) if axis not in first)

    @property
    def order(self) -> Int[np.ndarray, "s u"]:
        """Where the value (s, u) of a patch stands in the flattened ``[taps…, c]`` patch."""
        axes = range(len(self.taps))
        first = self.first_axes or ()
        rest = [axis for axis in axes if axis not in first]
        indices = np.arange(math.prod(self.taps) * self.in_channels)
        indices = indices.reshape(*self.taps, self.in_channels)
        indices = indices.transpose(*rest, *first, len(self.taps))
        return indices.reshape(self.middle_taps, -1)


class Split(NamedTuple):
    """The factors of a chain as matrices, and the bias at its end, on the host.

    Attributes:
        first: ``[u, r₁]``, or None.
        middle: ``[s·r₁, m]`` (``[patch, m]`` without a first factor), m = r₂ or d.
        last: ``[r₂, d]``, or None.
        bias: ``[d]``.
    """

    first: Float[np.ndarray, "u r"] | None
    middle: Float[np.ndarray, "q m"]
    last: Float[np.ndarray, "m d"] | None
    bias: Float[np.ndarray, " d"]

    def features(
        self, structure: Structure, patches: Float[np.ndarray, "n p"]
    ) -> Float[np.ndarray, "n q"]:
        """What the middle factor is given for each patch."""
        if self.first is None:
            return patches
        # By tap, so that no reordered copy of all patches is made.
        parts = [patches[:, columns] @ self.first for columns in structure.order]
        return np.concatenate(parts, axis=1)

    def __call__(
        self, structure: Structure, patches: Float[np.ndarray, "n p"]
    ) -> Float[np.ndarray, "n d"]:
        """The responses of the chain to patches."""
        outputs = self.features(structure, patches) @ self.middle
        if self.last is not None:
            outputs = outputs @ self.last
        return outputs + self.bias

    def kernel(self, structure: Structure) -> Float[np.ndarray, "p d"]:
        """The one kernel that the chain computes."""
        kernel = self.middle if self.last is None else self.middle @ self.last
        if self.first is None:
            return kernel
        s, rank = structure.middle_taps, self.first.shape[1]
        by_tap = self.first @ kernel.reshape(s, rank, -1)
        found = np.empty((structure.order.size, kernel.shape[1]), kernel.dtype)
        found[structure.order.reshape(-1)] = by_tap.reshape(len(found), -1)
        return found

    def rounded(self) -> Split:
        """The same in float32, as layers have it."""
        return Split(*(None if part is None else part.astype(np.float32) for part in self))  # type: ignore[arg-type]
