"""``channel``: a k×k convolution with fewer filters, then a 1×1 convolution.

The response ``y = W x + b₀`` at one position is replaced by ``M (W x + b₀) + b`` with
``M = expand · reduce`` of rank d'. So the first factor has the d' filters ``reduce · W`` and no
bias; the second is ``expand`` with bias ``M b₀ + b``. Cost per output position: d'(k²c + d) instead
of k²c·d. Zhang et al., arXiv:1505.06798, section 3.1, figure 1.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np

from accel.decompositions.base import Decomposition, Factor, Weights


@final
class Channel(Decomposition):
    """k×k with ``rank`` filters, then 1×1 (see the module's docstring)."""

    name = "channel"

    def unsuitable(self, conv: Any) -> str | None:
        if conv.feature_group_count != 1:
            return f"grouped convolution ({conv.feature_group_count} groups)"
        if conv.mask is not None:
            return "masked kernel"
        if conv.input_dilation not in (None, 1) and set(conv.input_dilation) != {1}:
            return "dilated input (transposed convolution)"
        return None

    def factors(self, conv: Any, rank: int) -> tuple[Factor, ...]:
        return (
            Factor(
                conv.kernel_size,
                conv.in_features,
                rank,
                conv.strides,
                conv.padding,
                conv.kernel_dilation,
                use_bias=False,
            ),
            Factor((1,) * len(conv.kernel_size), rank, conv.out_features, 1, "VALID", 1, True),
        )

    def weights(self, kernel, bias, factorization):
        reduce, expand, last_bias = (np.asarray(part, np.float64) for part in factorization[:3])
        first = np.asarray(kernel, np.float64) @ reduce.T
        if bias is not None:
            last_bias = last_bias + expand @ (reduce @ np.asarray(bias, np.float64))
        last = expand.T.reshape((1,) * (kernel.ndim - 2) + expand.T.shape)
        return Weights(first, None), Weights(last, last_bias)
