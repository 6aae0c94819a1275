"""Images to calibrate on, and which of them are fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Bool, Integer

HELD_OUT_FRACTION = 0.1


class ImageSource(Protocol):
    """Images that can be gone through more than once, always in the same order.

    A source may also have ``groups``, a number for each image, to say which of them belong together
    (windows of one picture); see ``split_images``.
    """

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Batches ``[batch, height, width, channels]``; only the last may be smaller."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """The images of an array ``[images, height, width, channels]``."""

    images: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size]


def full_batches(source: ImageSource, batch_size: int) -> Iterator[np.ndarray]:
    """The source's batches, the last one filled up (``padded``) so that one compilation serves all.

    Raises:
        ValueError: If an image holds NaN or Inf, or the source hands out more or fewer images than
            its length says.
    """
    first = 0
    for batch in source.batches(batch_size):
        batch = np.asarray(batch)
        if not np.isfinite(batch).all():
            bad = first + int(np.flatnonzero(~np.isfinite(batch).reshape(len(batch), -1).all(1))[0])
            raise ValueError(f"calibration image {bad} holds NaN or Inf")
        first += len(batch)
        if len(batch) < batch_size:
            batch = padded(batch, batch_size)
        yield batch
    if first != len(source):
        raise ValueError(f"the image source has length {len(source)} but gave {first} images")


def padded(batch: np.ndarray, batch_size: int) -> np.ndarray:
    """The batch filled up to ``batch_size`` with copies of its last row, so that one compilation
    serves all. Zeros would do harm in a network that divides by what it finds in an image.
    """
    missing = batch_size - len(batch)
    return np.concatenate([batch, np.repeat(batch[-1:], missing, 0)]) if missing else batch


def spread(indices: np.ndarray, count: int) -> np.ndarray:
    """That many of the indices at most, spread evenly over all of them."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), count))
    return indices[places.round().astype(int)]


def images_at(source: ImageSource, indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Some of the images of a source, by ascending index."""
    found, first = [], 0
    for batch in source.batches(batch_size):
        here = indices[(indices >= first) & (indices < first + len(batch))]
        found.append(np.asarray(batch)[here - first])
        first += len(batch)
        if first > indices[-1]:
            break
    return np.concatenate(found)


def image_groups(source: ImageSource) -> Integer[np.ndarray, " images"]:
    """The group of each image; a source that tells of none has each image stand for itself.

    Raises:
        ValueError: If the source has groups, but not one for each image.
    """
    groups = getattr(source, "groups", None)
    if groups is None:
        return np.arange(len(source))
    if np.shape(groups) != (len(source),):
        raise ValueError(
            f"the image source has {len(source)} images and groups of the shape {np.shape(groups)}"
        )
    return np.asarray(groups)


def split_images(
    key: jax.Array, groups: Integer[np.ndarray, " images"], held_out: float
) -> Bool[np.ndarray, " images"]:
    """Which images are fitted to; the others, at least one group, are held out to measure errors.

    Groups are drawn as a whole: windows of one picture overlap, and an error measured on windows of
    pictures that were fitted to would be too small.

    Args:
        key: Key of the draw.
        groups: The group of each image.
        held_out: The share of groups to hold out.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(
            f"calibration needs images of 2 pictures or more, so that one of them can be held out,"
            f" found {len(groups)} of {len(names)}"
        )
    order = np.asarray(jax.random.permutation(key, len(names)))
    drawn = order[: max(1, round(held_out * len(names)))]
    return ~np.isin(members, drawn)


def checked_fitting(
    source: ImageSource, fitting: np.ndarray | None, seed: int
) -> Bool[np.ndarray, " images"]:
    """Which images are used for fitting: those that are given, or those of ``fitting_images``.

    Raises:
        ValueError: If it is not one boolean an image, or leaves none to fit to or to measure on.
    """
    if len(source) < 2:
        raise ValueError(f"fitting and measuring needs 2 images or more, found {len(source)}")
    if fitting is None:
        return fitting_images(source, seed)
    fitting = np.asarray(fitting)
    if fitting.shape != (len(source),) or fitting.dtype != bool:
        raise ValueError(
            f"fitting says True or False of each of {len(source)} images, found the shape"
            f" {fitting.shape} and the type {fitting.dtype}"
        )
    if fitting.all() or not fitting.any():
        raise ValueError("fitting leaves no image to measure on, or none to fit to")
    return fitting


def fitting_images(source: ImageSource, seed: int) -> Bool[np.ndarray, " images"]:
    """Which images of a source are used for fitting: all but a tenth, drawn by the seed."""
    _, key = jax.random.split(jax.random.key(seed))  # The other key draws positions.
    return split_images(key, image_groups(source), HELD_OUT_FRACTION)
