"""``svd``: a dense layer to fewer features without a bias, then a dense layer with one.

``y = Wᵀ x + b₀`` is replaced by ``E (R x) + b``, R with r rows. Cost per row of the input: r(c + d)
instead of c·d. Data-free it is the truncated singular value decomposition of W, the classical way
(Denton et al., *Exploiting Linear Structure Within Convolutional Networks for Efficient
Evaluation*, arXiv:1404.0736; for fully connected layers Girshick, *Fast R-CNN*, arXiv:1504.08083,
section 3.1); on responses it is ``channel`` of a layer without taps.
"""

from __future__ import annotations

from typing import Any, final

from accel.decompositions.base import Decomposition


@final
class Svd(Decomposition):
    """Two dense layers with ``rank`` features between them (see the module's docstring)."""

    name = "svd"
    has_last = True
    dense = True

    def first_axes(self, axes: int) -> None:
        return None

    def ranks(self, conv: Any, rank: int) -> tuple[int]:
        return (rank,)

    def largest_rank(self, conv: Any) -> int:
        return min(conv.in_features, conv.out_features)
