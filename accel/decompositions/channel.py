"""``channel``: a k×k convolution with fewer filters, then a 1×1 convolution.

The response ``y = W x + b₀`` at one position is replaced by ``M (W x + b₀) + b`` with M of rank d'.
Cost per output position: d'(k²c + d) instead of k²c·d. Zhang et al., arXiv:1505.06798, section 3.1,
figure 1.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition


@final
class Channel(Decomposition):
    """k×k with ``rank`` filters, then 1×1 (see the module's docstring)."""

    name = "channel"
    has_last = True

    def first_axes(self, axes: int) -> None:
        return None

    def ranks(self, conv: Any, rank: int) -> tuple[int]:
        return (rank,)

    def largest_rank(self, conv: Any) -> int:
        return conv.out_features
