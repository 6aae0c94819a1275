"""Sources of images: batches in a fixed order, preprocessed as they are handed out.

Pixels stay uint8 until a batch is asked for, which takes a quarter of the memory of what a network
is fed. Batches are plain iterators, so whoever goes through them can count them.
"""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32, Integer, Shaped

from accel.data.preprocessing import preprocess
from accel.images import spread

ImageBatch = Float32[np.ndarray, "batch height width channels"]
LabelBatch = Int32[np.ndarray, " batch"]


class LabelledSource(Protocol):
    """Images with their labels, which can be gone through more than once in the same order."""

    @property
    def class_count(self) -> int | None:
        """Number of classes, or None where the source cannot tell."""
        ...

    def __len__(self) -> int: ...

    def labelled_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of images and of their labels; only the last may be smaller."""
        ...


class PixelSource(abc.ABC):
    """Images that are stored as pixels and preprocessed batch by batch.

    Attributes:
        preprocessing: A name of ``PREPROCESSINGS``.
        class_count: Number of classes, or None where it is not known.
        groups: A number for each image, the same for images that were taken from one picture; None
            where each stands for itself. Images of one group are never on both sides of the split
            into images to fit to and images to measure on.
    """

    preprocessing: str
    class_count: int | None
    groups: Integer[np.ndarray, " images"] | None = None

    @property
    @abc.abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> tuple[np.ndarray, LabelBatch | None]:
        """The pixels ``[stop - start, height, width, channels]`` of some images, and the labels."""

    def take(self, indices: Integer[np.ndarray, " batch"]) -> tuple[np.ndarray, LabelBatch | None]:
        """The pixels of the images with these numbers, in this order, and the labels.

        Several threads ``read`` at once, since reading may mean decoding.
        """
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            read = list(threads.map(lambda index: self.read(int(index), int(index) + 1), indices))
        labels = [label for _, label in read if label is not None]
        return (
            np.concatenate([pixels for pixels, _ in read]),
            np.concatenate(labels) if len(labels) == len(read) else None,
        )

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """Preprocessed batches; only the last may be smaller.

        Raises:
            ValueError: If an image cannot be read; the message names it.
        """
        for pixels, _ in self._read_batches(batch_size):
            yield preprocess(pixels, self.preprocessing)

    def labelled_batches(self, batch_size: int) -> Iterator[tuple[ImageBatch, LabelBatch]]:
        """Preprocessed batches with the labels of their images.

        Raises:
            ValueError: If the source has no labels, or an image cannot be read.
        """
        for pixels, labels in self._read_batches(batch_size):
            if labels is None:
                raise ValueError("labels are needed here, but the images have none")
            yield preprocess(pixels, self.preprocessing), labels

    def loaded(self) -> ArrayImages:
        """The same images with all pixels in memory, for going through them several times."""
        pixels, labels = self.read(0, len(self))
        return ArrayImages(pixels, self.preprocessing, labels, self.class_count, self.groups)

    def spread(self, count: int) -> PixelSource:
        """``count`` of the images, or all if there are fewer: folders are ordered by class."""
        if count >= len(self):
            return self
        indices = spread(np.arange(len(self)), count)
        groups = None if self.groups is None else self.groups[indices]
        return ChosenImages(self, indices, self.preprocessing, self.class_count, groups)

    def _read_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, LabelBatch | None]]:
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, found {batch_size}")
        for start in range(0, len(self), batch_size):
            yield self.read(start, min(start + batch_size, len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayImages(PixelSource):
    """The images of an array.

    Attributes:
        pixels: ``[images, height, width, channels]``, uint8 unless the preprocessing says other.
        preprocessing: A name of ``PREPROCESSINGS``.
        labels: The classes of the images, or None.
        class_count: Number of classes, or None where it is not known.
        groups: Which images belong together (see ``PixelSource``), or None.

    Raises:
        ValueError: If there is no image, or shapes, labels, groups and preprocessing do not fit
            together.
    """

    pixels: Shaped[np.ndarray, "images height width channels"]
    preprocessing: str
    labels: Integer[np.ndarray, " images"] | None = None
    class_count: int | None = None
    groups: Integer[np.ndarray, " images"] | None = None

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or not len(self.pixels):
            raise ValueError(
                "images are an array [images, height, width, channels] of one image or more, found"
                f" the shape {self.pixels.shape}"
            )
        if self.labels is not None:
            if self.labels.shape != self.pixels.shape[:1]:
                raise ValueError(
                    f"{len(self.pixels)} images need as many labels, found labels of the shape"
                    f" {self.labels.shape}"
                )
            check_labels(self.labels, self.class_count)
        if self.groups is not None and self.groups.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"{len(self.pixels)} images need as many groups, found groups of the shape"
                f" {self.groups.shape}"
            )
        preprocess(self.pixels[:0], self.preprocessing)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width, channels = self.pixels.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, LabelBatch | None]:
        labels = None if self.labels is None else self.labels[start:stop].astype(np.int32)
        return self.pixels[start:stop], labels

    def take(self, indices: Integer[np.ndarray, " batch"]) -> tuple[np.ndarray, LabelBatch | None]:
        labels = None if self.labels is None else self.labels[indices].astype(np.int32)
        return self.pixels[indices], labels


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenImages(PixelSource):
    """The images of a source with these numbers, with its preprocessing, classes and groups."""

    source: PixelSource
    indices: Integer[np.ndarray, " images"]
    preprocessing: str
    class_count: int | None
    groups: Integer[np.ndarray, " images"] | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, LabelBatch | None]:
        return self.source.take(self.indices[start:stop])

    def take(self, indices: Integer[np.ndarray, " batch"]) -> tuple[np.ndarray, LabelBatch | None]:
        return self.source.take(self.indices[indices])


def check_labels(labels: Integer[np.ndarray, " images"], class_count: int | None) -> None:
    """Raises ValueError where a label is none of the classes 0 … ``class_count`` - 1."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are integers, found {labels.dtype}")
    wrong = (labels < 0) | (labels >= (np.inf if class_count is None else class_count))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        classes = "" if class_count is None else f" of {class_count} classes"
        raise ValueError(f"label {labels[first]} of image {first} is not a number{classes} from 0")
