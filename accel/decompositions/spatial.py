"""``spatial``: a k×1 convolution, then a 1×k convolution.

``W_ijcd = Σ_r V_icr H_jrd``. Cost per position: r·k(c + d) instead of k²c·d. Jaderberg, Vedaldi,
Zisserman, *Speeding up Convolutional Neural Networks with Low Rank Expansions*, arXiv:1405.3866,
scheme 2; data-free it is the singular value decomposition of the kernel as a kc×kd matrix.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition, unfolding_rank


@final
class Spatial(Decomposition):
    """k×1 to ``rank`` channels, then 1×k (see the module's docstring)."""

    name = "spatial"
    has_last = False

    def first_axes(self, axes: int) -> tuple[int, ...]:
        return (0,)

    def ranks(self, conv: Any, rank: int) -> tuple[int]:
        return (rank,)

    def largest_rank(self, conv: Any) -> int:
        return unfolding_rank(conv, self.first_axes(len(conv.kernel_size)))
