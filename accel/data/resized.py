"""Small images at the size and with the three channels that networks for photographs take."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Integer
from PIL import Image

from accel.data.preprocessing import preprocess
from accel.data.source import LabelBatch, PixelSource


@dataclasses.dataclass(frozen=True, eq=False)
class ResizedImages(PixelSource):
    """The images of a source in RGB, resized to squares when they are read.

    Pixels are interpolated bilinearly, by Pillow as for pictures of folders (see
    ``accel.data.views``), and rounded to 0–255. Grey images have the same value in all channels.
    Only the pixels of the source are kept, and of what is read no more than one batch.

    Attributes:
        source: Images ``[height, width, 1]`` or ``[height, width, 3]``, uint8.
        image_size: Height and width of the resized images.
        preprocessing: A name of ``PREPROCESSINGS`` for RGB images; the source's is not applied.
        class_count, groups: Those of the source.

    Raises:
        ValueError: If the source's images have other channels, the size is less than 1, or the
            preprocessing does not fit.
    """

    source: PixelSource
    image_size: int
    preprocessing: str
    class_count: int | None = dataclasses.field(init=False)
    groups: Integer[np.ndarray, " images"] | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if self.source.image_shape[-1] not in (1, 3):
            raise ValueError(
                f"only images of 1 or 3 channels are resized, found {self.source.image_shape[-1]}"
            )
        if self.image_size < 1:
            raise ValueError(f"image_size is 1 or more, found {self.image_size}")
        object.__setattr__(self, "class_count", self.source.class_count)
        object.__setattr__(self, "groups", self.source.groups)
        preprocess(np.zeros((0, *self.image_shape), np.uint8), self.preprocessing)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_size, self.image_size, 3

    def __len__(self) -> int:
        return len(self.source)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, LabelBatch | None]:
        pixels, labels = self.source.read(start, stop)
        return self._resized(pixels), labels

    def take(self, indices: Integer[np.ndarray, " batch"]) -> tuple[np.ndarray, LabelBatch | None]:
        pixels, labels = self.source.take(indices)
        return self._resized(pixels), labels

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        size = (self.image_size, self.image_size)
        resized = np.empty((len(pixels), *self.image_shape), np.uint8)
        for index, image in enumerate(pixels):
            # Pillow takes grey images without an axis of channels.
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            grey_or_rgb = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
            resized[index] = grey_or_rgb.reshape(*size, -1)
        return resized
