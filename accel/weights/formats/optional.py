"""Packages that only some formats need."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from accel.weights.errors import WeightError


def require(package: str, *, path: Path) -> Any:
    """Imports ``package``, which ``path`` can only be read with.

    Raises:
        WeightError: If it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise WeightError(
            f"{path}: reading {path.suffix} files needs the package {package}:"
            f" pip install {package}"
        ) from error
