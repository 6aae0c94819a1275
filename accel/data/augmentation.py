"""Augmentations: pure functions ``(key, images) -> images`` that leave every image its class.

They run on the device, inside the jitted training step, on preprocessed batches
``[batch, height, width, channels]``, whose shape and type they keep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Images = Float[Array, "batch height width channels"]
Augmentation = Callable[[jax.Array, Images], Images]


@dataclasses.dataclass(frozen=True)
class FlipAndShift:
    """Mirrors half of the images left to right, and shifts each by a few pixels.

    Shifts are drawn uniformly, one for height and one for width of each image; what comes in over
    an edge repeats that edge, which is as good as black where images have black margins and needs
    no knowledge of what black is after preprocessing.

    Attributes:
        flip: Whether to mirror; not for images whose class hangs on left and right, such as digits.
        shift: The largest shift in pixels, either way; 0 for none.
    """

    flip: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ValueError(f"shift is 0 or more pixels, found {self.shift}")

    def __call__(self, key: jax.Array, images: Images) -> Images:
        flip_key, shift_key = jax.random.split(key)
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        if self.shift:
            margin = (self.shift, self.shift)
            padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)), mode="edge")
            corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * self.shift + 1)
            images = jax.vmap(
                lambda image, corner: jax.lax.dynamic_slice(
                    image, (corner[0], corner[1], 0), images.shape[1:]
                )
            )(padded, corners)
        return images
