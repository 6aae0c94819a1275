"""Images and labels in IDX files, the format of MNIST and Fashion-MNIST; plain or gzipped.

A file is two zero bytes, a byte for the type of the values (8: unsigned bytes), a byte for the
number of dimensions, each dimension as a big-endian 32-bit integer, and the values in C order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from accel.data.source import ArrayImages

UNSIGNED_BYTES = 8
GZIP_MAGIC = b"\x1f\x8b"


def idx_images(
    images_file: Path, labels_file: Path, preprocessing: str, *, class_count: int | None = None
) -> ArrayImages:
    """The grey images ``[images, height, width, 1]`` of one IDX file with the labels of another.

    Args:
        images_file: Three dimensions of unsigned bytes.
        labels_file: One dimension of unsigned bytes, as many as there are images.
        preprocessing: A name of ``PREPROCESSINGS`` for grey images.
        class_count: Number of classes, which the files do not tell; None if it is not known.

    Raises:
        ValueError: If a file is not there, no such IDX file or broken off, or the files do not fit
            together; the message names the file.
    """
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_file} holds {len(images)} images, {labels_file} {len(labels)} labels"
        )
    return ArrayImages(images[..., None], preprocessing, labels, class_count)


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file with that number of dimensions.

    Raises:
        ValueError: If the file is not there, of another kind, broken off, or longer than it says.
    """
    try:
        content = Path(file).read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error
    magic = bytes([0, 0, UNSIGNED_BYTES, dimensions])
    if content[:4] != magic:
        raise ValueError(
            f"{file}: expected an IDX file of unsigned bytes with {dimensions} dimensions, which"
            f" begins with {magic.hex()}, found {content[:4].hex()}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{file}: breaks off within its header")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{file}: its header says {shape}, {math.prod(shape)} bytes; found"
            f" {len(content) - start}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
