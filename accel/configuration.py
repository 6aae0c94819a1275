"""Config files: Python files that define one frozen dataclass called ``config``."""

from __future__ import annotations

import runpy
from pathlib import Path

from accel.experiment import Experiment


def load_config(file: Path) -> Experiment:
    """The experiment that a config file defines.

    Raises:
        ValueError: If the file is not there or does not define one.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such config file")
    config = runpy.run_path(str(file)).get("config")
    if not isinstance(config, Experiment):
        raise ValueError(f"{file}: expected an Experiment called 'config', found {type(config)}")
    return config
