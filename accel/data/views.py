"""Views: which part of a picture a network gets to see."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

View = UInt8[np.ndarray, "size size 3"]


class Viewer(Protocol):
    """A way to take square views of ``image_size`` pixels from pictures of any size."""

    @property
    def image_size(self) -> int: ...

    @property
    def per_picture(self) -> int:
        """Number of views of each picture."""
        ...

    def view(self, picture: Image.Image, picture_index: int, view_index: int) -> View:
        """One view of an RGB picture that stands at ``picture_index`` in its source."""
        ...


@dataclasses.dataclass(frozen=True)
class CentreView:
    """The paper's single view: shorter side resized to 256, the centre of 224×224 pixels.

    Sizes are rounded and pixels interpolated (bilinear, antialiased) as torchvision does.
    """

    image_size: int = 224
    shorter_side: int = 256

    def __post_init__(self) -> None:
        _check_sizes(self.image_size, self.shorter_side)

    @property
    def per_picture(self) -> int:
        return 1

    def view(self, picture: Image.Image, picture_index: int, view_index: int) -> View:
        resized = _resized(picture, self.shorter_side)
        left = round((resized.width - self.image_size) / 2)
        top = round((resized.height - self.image_size) / 2)
        return _window(resized, left, top, self.image_size)


@dataclasses.dataclass(frozen=True)
class RandomWindows:
    """Several windows of each picture, resized as for ``CentreView``, half of them mirrored.

    A window depends on the seed and on its place in the source alone, so that a source gives the
    same images each time it is gone through, whatever the batches.
    """

    per_picture: int
    seed: int = 0
    image_size: int = 224
    shorter_side: int = 256

    def __post_init__(self) -> None:
        _check_sizes(self.image_size, self.shorter_side)
        if self.per_picture < 1:
            raise ValueError(f"per_picture is 1 or more, found {self.per_picture}")

    def view(self, picture: Image.Image, picture_index: int, view_index: int) -> View:
        resized = _resized(picture, self.shorter_side)
        generator = np.random.default_rng((self.seed, picture_index, view_index))
        left = int(generator.integers(resized.width - self.image_size + 1))
        top = int(generator.integers(resized.height - self.image_size + 1))
        window = _window(resized, left, top, self.image_size)
        return window[:, ::-1] if generator.random() < 0.5 else window


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB, upright, with white behind what is transparent.

    Raises:
        ValueError: If the values have no known range (32-bit integers and floats).
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        # Pillow would clip these to 255 instead of scaling them.
        grey = np.asarray(picture).astype(np.uint16)
        picture = Image.fromarray(np.rint(grey / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode!r} have no known range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _resized(picture: Image.Image, shorter_side: int) -> Image.Image:
    shorter = min(picture.size)
    width, height = (shorter_side * side // shorter for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _window(picture: Image.Image, left: int, top: int, size: int) -> View:
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def _check_sizes(image_size: int, shorter_side: int) -> None:
    if not 1 <= image_size <= shorter_side:
        raise ValueError(
            f"image_size is from 1 to shorter_side, found {image_size} and {shorter_side}"
        )
