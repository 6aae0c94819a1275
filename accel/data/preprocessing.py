"""Preprocessings by name: pixels 0–255 to what a network was trained on, float32 in NHWC."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Shaped

Pixels = Shaped[np.ndarray, "batch height width channels"]
Images = Float32[np.ndarray, "batch height width channels"]

CAFFE_MEAN = np.array([103.939, 116.779, 123.68], np.float32)
TORCH_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
TORCH_STANDARD_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def caffe(pixels: Pixels) -> Images:
    """BGR minus (103.939, 116.779, 123.68): VGG in Caffe and in Keras."""
    _expect_channels(pixels, 3, "caffe")
    return pixels[..., ::-1].astype(np.float32) - CAFFE_MEAN


def torch(pixels: Pixels) -> Images:
    """RGB/255, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225): torchvision and timm."""
    _expect_channels(pixels, 3, "torch")
    return (pixels.astype(np.float32) / 255 - TORCH_MEAN) / TORCH_STANDARD_DEVIATION


def fashion(pixels: Pixels) -> Images:
    """Grey/255, minus 0.2860, over 0.3530: the bundled network."""
    _expect_channels(pixels, 1, "fashion")
    return (pixels.astype(np.float32) / 255 - 0.2860) / 0.3530


def unchanged(pixels: Pixels) -> Images:
    """The values as they are, in float32."""
    return pixels.astype(np.float32)


PREPROCESSINGS: dict[str, Callable[[Pixels], Images]] = {
    "caffe": caffe,
    "torch": torch,
    "fashion": fashion,
    "unchanged": unchanged,
}


def preprocess(pixels: Pixels, name: str) -> Images:
    """Applies the preprocessing called ``name``.

    Raises:
        ValueError: If the name is unknown, or the pixels have the wrong number of channels for it.
    """
    if name not in PREPROCESSINGS:
        raise ValueError(f"unknown preprocessing {name!r}; known: {', '.join(PREPROCESSINGS)}")
    return PREPROCESSINGS[name](pixels)


def _expect_channels(pixels: Pixels, channels: int, name: str) -> None:
    if pixels.shape[-1] != channels:
        raise ValueError(
            f"preprocessing {name!r} takes images of {channels} channels, found {pixels.shape[-1]}"
        )
