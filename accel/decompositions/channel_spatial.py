"""``channel_spatial``: a k×1, then a 1×k, then a 1×1 convolution; the paper's "3d" variant.

``spatial`` whose 1×k factor has fewer filters d', followed by a 1×1 factor to d. Cost per position:
k c d'' + k d'' d' + d' d. The two ranks are chosen equal, as in the published configurations. Zhang
et al., arXiv:1505.06798, section 3.5.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition
from accel.decompositions.spatial import Spatial


@final
class ChannelSpatial(Decomposition):
    """k×1, 1×k, 1×1 with the ranks (d'', d') (see the module's docstring)."""

    name = "channel_spatial"
    has_last = True

    def first_axes(self, axes: int) -> tuple[int, ...]:
        return (0,)

    def ranks(self, conv: Any, rank: int) -> tuple[int, int]:
        return min(rank, Spatial().largest_rank(conv)), min(rank, conv.out_features)

    def largest_rank(self, conv: Any) -> int:
        return max(Spatial().largest_rank(conv), conv.out_features)
