"""Conversions of kernels between the layouts of other frameworks and Flax's."""

from __future__ import annotations

import math

import numpy as np


def channels_last_rows(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Reorders the rows of a dense kernel that follows a flattening of square feature maps.

    Args:
        kernel: ``[channels · size · size, out]``, rows in (channel, height, width) order.
        channels: Channels of the feature maps.

    Returns:
        The kernel with its rows in (height, width, channel) order; the kernel itself where its rows
        are not those of square maps with so many channels.
    """
    rows, out_features = kernel.shape
    size = math.isqrt(rows // channels)
    if channels * size**2 != rows:
        return kernel
    maps = kernel.reshape(channels, size, size, out_features)
    return maps.transpose(1, 2, 0, 3).reshape(rows, out_features)
