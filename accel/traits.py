"""What tells networks and images from others of the same name and shape."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from flax import nnx

from accel.data.source import PixelSource
from accel.program import path_name

# As many images stand for all of them where a checkpoint is compared with the run at hand.
SAMPLED_IMAGES = 64


def traits_of_images(images: PixelSource) -> dict[str, Any]:
    """What tells images from others; of the pixels and labels a sample, so that it is quick."""
    count = min(len(images), SAMPLED_IMAGES)
    pixels, labels = images.take(np.linspace(0, len(images) - 1, count).astype(int))
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    digest.update(repr(None if labels is None else labels.tolist()).encode())
    return {
        "count": len(images),
        "shape": images.image_shape,
        "preprocessing": images.preprocessing,
        "digest": digest.hexdigest(),
    }


def traits_of_network(network: nnx.Module) -> dict[str, Any]:
    """What tells a network from others: its arrays, by shape and type and all their values."""
    arrays, digest = {}, hashlib.sha256()
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Not(nnx.RngState))):
        arrays[path_name(path)] = f"{variable.dtype}{list(variable.shape)}"
        digest.update(np.asarray(variable[...]).tobytes())
    return {"type": type(network).__name__, "arrays": arrays, "weights": digest.hexdigest()}
