"""Pictures in encoded form (JPEG, PNG, …) that are decoded when a batch asks for them."""

from __future__ import annotations

import dataclasses
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Integer
from PIL import Image

from accel.data.preprocessing import preprocess
from accel.data.source import LabelBatch, PixelSource
from accel.data.views import View, Viewer, as_rgb


class EncodedPicture(NamedTuple):
    """A picture, the name it has in error messages, and its class where it is known."""

    name: str
    content: Path | bytes
    label: int | None


class Pictures(Protocol):
    """Pictures by number, which may be read when they are asked for: a list, a file's records."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedPicture: ...


def decode(picture: EncodedPicture) -> Image.Image:
    """The picture in RGB; see ``as_rgb``.

    Raises:
        ValueError: If it cannot be decoded, with the picture's name.
    """
    content = picture.content
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
            return as_rgb(opened)
    # Broken files make Pillow's decoders raise nearly anything.
    except Exception as error:
        raise ValueError(f"{picture.name}: cannot be read as an image: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImages(PixelSource):
    """Views of encoded pictures, decoded by as many threads as there are cores.

    Attributes:
        pictures: The pictures; the views of each follow one another.
        preprocessing: A name of ``PREPROCESSINGS`` for RGB images.
        viewer: Which part of a picture is an image.
        class_count: Number of classes, or None where it is not known.
        groups: The picture of each image.
    """

    pictures: Pictures
    preprocessing: str
    viewer: Viewer
    class_count: int | None = None
    groups: Integer[np.ndarray, " images"] | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        pictures = np.arange(len(self.pictures))
        object.__setattr__(self, "groups", np.repeat(pictures, self.viewer.per_picture))
        preprocess(np.zeros((0, *self.image_shape), np.uint8), self.preprocessing)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.viewer.image_size, self.viewer.image_size, 3

    def __len__(self) -> int:
        return len(self.pictures) * self.viewer.per_picture

    def read(self, start: int, stop: int) -> tuple[np.ndarray, LabelBatch | None]:
        per_picture = self.viewer.per_picture

        def views(index: int) -> tuple[list[View], int | None]:
            picture = self.pictures[index]
            decoded = decode(picture)
            first = index * per_picture
            wanted = range(max(start, first) - first, min(stop, first + per_picture) - first)
            return [self.viewer.view(decoded, index, view) for view in wanted], picture.label

        pixels = np.empty((stop - start, *self.image_shape), np.uint8)
        labels: list[int | None] = []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            indices = range(start // per_picture, -(-stop // per_picture))
            for taken, label in threads.map(views, indices):
                pixels[len(labels) : len(labels) + len(taken)] = taken
                labels += [label] * len(taken)
        known = [label for label in labels if label is not None]
        if len(known) < len(labels):
            return pixels, None
        return pixels, np.array(known, np.int32)
