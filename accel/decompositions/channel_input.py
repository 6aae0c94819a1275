"""``channel_input``: a 1×1 convolution to fewer channels, then the k×k convolution on these.

The mirror of ``channel``: ``W = Σ_r A_cr B_rd`` for every tap, one A for all. Cost per output
position: r(c + k²d) instead of k²c·d, the 1×1 at the positions of the input.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition


@final
class ChannelInput(Decomposition):
    """1×1 to ``rank`` channels, then k×k (see the module's docstring)."""

    name = "channel_input"
    has_last = False

    def first_axes(self, axes: int) -> tuple[int, ...]:
        return ()

    def ranks(self, conv: Any, rank: int) -> tuple[int]:
        return (rank,)

    def largest_rank(self, conv: Any) -> int:
        return conv.in_features
