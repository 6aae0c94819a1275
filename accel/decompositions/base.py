"""What a decomposition is: the factors that replace a convolution, and their weights."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from accel.solvers.base import Factorization


@dataclasses.dataclass(frozen=True)
class Factor:
    """Shape of one convolution of a chain; strides, padding and dilation as ``flax.nnx.Conv``'s."""

    kernel_size: tuple[int, ...]
    in_channels: int
    out_channels: int
    strides: Any
    padding: Any
    kernel_dilation: Any
    use_bias: bool

    def macs(self, output_positions: int) -> int:
        """Multiply-accumulates per image with ``output_positions`` output positions per image."""
        taps = int(np.prod(self.kernel_size))
        return output_positions * taps * self.in_channels * self.out_channels


class Weights(NamedTuple):
    """Weights of one factor; ``kernel`` has the spatial axes first, then in, then out channels."""

    kernel: Float[np.ndarray, "... c_in c_out"]
    bias: Float[np.ndarray, " c_out"] | None


class Decomposition(abc.ABC):
    """A way to write a convolution as a chain of cheaper ones."""

    name: str

    @abc.abstractmethod
    def unsuitable(self, conv: Any) -> str | None:
        """Why this decomposition cannot take ``conv`` (a ``flax.nnx.Conv``), or None if it can."""

    @abc.abstractmethod
    def factors(self, conv: Any, rank: int) -> tuple[Factor, ...]:
        """The shapes of the chain that replaces ``conv`` at ``rank``."""

    @abc.abstractmethod
    def weights(
        self,
        kernel: Float[Array, "... c_in c_out"],
        bias: Float[Array, " c_out"] | None,
        factorization: Factorization,
    ) -> tuple[Weights, ...]:
        """The weights of the chain, from the convolution's own and a solver's factorization.

        Computed by NumPy in float64: JAX would compile every operation for every rank and keep the
        code as long as the process runs.
        """
