"""Writing files and folders so that nothing is lost when a run is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked like this.
    fcntl = None


def write_whole(file: Path, text: str) -> None:
    """Writes a file, whole or not at all; its folder is made where it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Named by the process: the times of layers are a file that runs beside each other share.
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(file)


def check_new(out: Path) -> None:
    """Looks whether figures and the table of them, a ``.md`` beside it, can be written to ``out``.

    Raises:
        FileExistsError: If one of both files exists.
        ValueError: If they would be the same file.
    """
    table = out.with_suffix(".md")
    if out == table:
        raise ValueError(
            f"{out}: that is where the table of the figures goes; choose another --out"
        )
    for file in (out, table):
        if file.exists():
            raise FileExistsError(f"{file} exists already; nothing is overwritten")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from writing to a folder. Whatever ends this one lets go of it.

    Args:
        folder: The folder.
        wait: Whether to wait until no other process is writing to it.

    Raises:
        FileExistsError: If another process is writing to it, unless that is waited for.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise FileExistsError(
                f"another process is writing to {folder}; wait for it, or choose another --out"
            ) from None
        except OSError:
            # Not every file system can lock; there it is up to the user, as on Windows.
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def unfinished_folder(record: str, out: Path, *, free: Collection[str] = ()) -> Iterator[Path]:
    """The folder ``OUT.partial`` of an unfinished run, new or left of the same experiment.

    It is locked: a second process that is told the same ``out`` is refused. Where the run ends with
    an error before anything was written to it, it is removed: it is in nobody's way then.

    Args:
        record: The experiment as a JSON object, to be told from others by.
        out: What the folder will be called when it is complete.
        free: Keys of the record that may differ: nothing in the unfinished folder hangs on them.

    Raises:
        FileExistsError: If the folder is there and of another experiment, or in use.
    """
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        file = partial / "experiment.json"
        if file.exists() and _without(file.read_text(), free) != _without(record, free):
            raise FileExistsError(
                f"{partial} holds an unfinished run of another experiment; remove it or choose"
                " another --out"
            )
        write_whole(file, record)
        try:
            yield partial
        except BaseException:
            if list(partial.iterdir()) == [file]:
                file.unlink()
                partial.rmdir()
            raise


def _without(record: str, keys: Collection[str]) -> dict[str, object] | None:
    """The record without these keys; None where it is no record."""
    try:
        found = json.loads(record)
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    return {key: value for key, value in found.items() if key not in keys}
