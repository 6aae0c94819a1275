"""Random views of images that need no label and no knowledge of the network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def augment(
    images: Float[Array, "batch *space channels"],
    key: Key[Array, ""],
    *,
    flip: bool,
    shift: float,
) -> Float[Array, "batch *space channels"]:
    """Each image flipped left to right with probability 1/2, and moved in every direction.

    Args:
        images: The images; the last axis of space is the one that is flipped.
        key: Source of chance.
        flip: Whether to flip.
        shift: The most that an image is moved, as a share of its size. The edge is repeated where
            nothing is left, so that no colour comes in that the image does not have.
    """
    flip_key, shift_key = jax.random.split(key)
    last = images.ndim - 2
    for axis in range(1, last + 1):
        size = images.shape[axis]
        most = int(shift * size)
        moved = jax.random.randint(
            jax.random.fold_in(shift_key, axis), (len(images), 1), -most, most + 1
        )
        places = jnp.clip(jnp.arange(size) + moved, 0, size - 1)
        if flip and axis == last:
            flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1))
            places = jnp.where(flipped, size - 1 - places, places)
        images = jax.vmap(lambda image, at, axis=axis: jnp.take(image, at, axis=axis - 1))(
            images, places
        )
    return images
