"""Decompositions of a convolution into a chain of cheaper ones, by name."""

from accel.decompositions.base import Decomposition, Factor, Weights
from accel.decompositions.channel import Channel

DECOMPOSITIONS: dict[str, Decomposition] = {
    decomposition.name: decomposition for decomposition in (Channel(),)
}

__all__ = ["DECOMPOSITIONS", "Channel", "Decomposition", "Factor", "Weights"]
