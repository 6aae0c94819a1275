"""Writing files and folders so that nothing is lost when a run is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes a file, whole or not at all; its folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: the times of layers are a file that runs beside each other share.
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(file)


def begin_folder(text: str, out: Path) -> Path:
    """The folder ``OUT.partial`` of an unfinished run, new or left of the same experiment.

    Args:
        text: The experiment as text, to be told from others by.
        out: What the folder will be called when it is complete.

    Raises:
        FileExistsError: If the folder is there and of another experiment.
    """
    partial = out.with_name(f"{out.name}.partial")
    record = partial / "experiment.json"
    if record.exists() and record.read_text() != text:
        raise FileExistsError(
            f"{partial} holds an unfinished run of another experiment; remove it or choose another"
            " --out"
        )
    write_whole(record, text)
    return partial
