"""Reads ``.safetensors``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file, by its name there."""
    return load_file(path)
