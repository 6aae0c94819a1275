"""Config files: Python files that define one frozen dataclass called ``config``."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TypeVar

Config = TypeVar("Config")


def load_config(file: Path, kind: type[Config]) -> Config:
    """The experiment that a config file defines.

    Args:
        file: The file.
        kind: What the experiment has to be: ``Experiment`` or ``Finetuning``.

    Raises:
        ValueError: If the file is not there or does not define one.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such config file")
    # A config's own network may be defined in a file beside it; installed packages come first.
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    config = runpy.run_path(str(file)).get("config")
    if not isinstance(config, kind):
        raise ValueError(
            f"{file}: expected 'config' to be of type {kind.__name__}, found {type(config)}"
        )
    return config
