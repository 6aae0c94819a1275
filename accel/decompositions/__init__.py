"""Decompositions of a layer into a chain of cheaper ones, by name."""

from accel.decompositions.base import Decomposition, Factor, Weights, composed
from accel.decompositions.channel import Channel
from accel.decompositions.channel_input import ChannelInput
from accel.decompositions.channel_spatial import ChannelSpatial
from accel.decompositions.spatial import Spatial
from accel.decompositions.spatial_swapped import SpatialSwapped
from accel.decompositions.structure import Split, Structure
from accel.decompositions.svd import Svd
from accel.decompositions.tucker2 import Tucker2

DECOMPOSITIONS: dict[str, Decomposition] = {
    decomposition.name: decomposition
    for decomposition in (
        Channel(),
        ChannelInput(),
        Spatial(),
        SpatialSwapped(),
        ChannelSpatial(),
        Tucker2(),
        Svd(),
    )
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
    "Svd",
    "Tucker2",
    "Weights",
    "composed",
]
