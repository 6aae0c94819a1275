"""Decompositions of a convolution into a chain of cheaper ones, by name."""

from accel.decompositions.base import Decomposition, Factor, Weights, composed
from accel.decompositions.channel import Channel
from accel.decompositions.channel_input import ChannelInput
from accel.decompositions.channel_spatial import ChannelSpatial
from accel.decompositions.spatial import Spatial
from accel.decompositions.split import Split, Structure
from accel.decompositions.tucker2 import Tucker2

DECOMPOSITIONS: dict[str, Decomposition] = {
    decomposition.name: decomposition
    for decomposition in (Channel(), ChannelInput(), Spatial(), ChannelSpatial(), Tucker2())
}

__all__ = [
    "DECOMPOSITIONS",
    "Channel",
    "ChannelInput",
    "ChannelSpatial",
    "Decomposition",
    "Factor",
    "Spatial",
    "Split",
    "Structure",
    "Tucker2",
    "Weights",
    "composed",
]
