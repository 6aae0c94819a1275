"""The Fashion-MNIST images that come with the package, for the bundled network."""

from __future__ import annotations

from importlib import resources

import numpy as np

from accel.data.source import ArrayImages

CLASSES = 10


def fashion_calibration_images() -> ArrayImages:
    """3,000 training images of Fashion-MNIST, ``[3000, 28, 28, 1]``, without labels."""
    return ArrayImages(_read("calibration_images")[..., None], "fashion")


def fashion_test_images() -> ArrayImages:
    """The 10,000 test images of Fashion-MNIST, ``[10000, 28, 28, 1]``, with labels."""
    return ArrayImages(
        _read("test_images")[..., None], "fashion", _read("test_labels"), class_count=CLASSES
    )


def _read(name: str) -> np.ndarray:
    file = resources.files("accel.bundled").joinpath("fashion_mnist.npz")
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return arrays[name]
