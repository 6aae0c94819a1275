"""File formats: each module here has one ``read`` from a path to arrays by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from accel.weights.errors import WeightError
from accel.weights.formats import keras, onnx, safetensors, torch

READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".safetensors": safetensors.read,
    ".pth": torch.read,
    ".pt": torch.read,
    ".h5": keras.read,
    ".hdf5": keras.read,
    ".onnx": onnx.read,
}


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads every weight of a file, in the file's order and dtypes; the suffix names the format.

    ``.safetensors`` and ``.pth``/``.pt`` (a dictionary of tensors) keep the names and the layouts
    of the file. ``.h5``/``.hdf5`` (Keras) and ``.onnx`` give ``layer/kernel`` and ``layer/bias`` in
    Flax's layouts: see ``formats.keras`` and ``formats.onnx``.

    Raises:
        WeightError: If the suffix is unknown, the file is missing, empty, truncated, corrupt or of
            another kind, a pickle in it would run code, or the package that reads it is not
            installed.
    """
    path = Path(path)
    if not path.exists():
        raise WeightError(f"{path}: no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise WeightError(
            f"{path}: unknown suffix {path.suffix!r} of a weight file; expected one of "
            + ", ".join(READERS)
        )
    if not path.is_file():
        raise WeightError(f"{path}: expected a file, found a folder")
    if path.stat().st_size == 0:
        raise WeightError(f"{path}: the file is empty")
    try:
        return reader(path)
    except WeightError:
        raise
    except Exception as error:
        # On damaged files the formats' libraries raise whatever their parsers stumble over
        # (OSError, RuntimeError, KeyError, protobuf's DecodeError …).
        raise WeightError(
            f"{path}: cannot be read as a {path.suffix} file, it may be truncated or of another "
            f"format ({type(error).__name__}: {error})"
        ) from error
