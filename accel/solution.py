"""The solution of one layer, and its file: what a run that was stopped does not solve again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from accel.decompositions import Split

# Raised when layers come to be solved in another way: what was solved before is solved anew.
SOLUTION_FORMAT = 2


class Solution(NamedTuple):
    """The factors of a layer, and its relative error on rows that were not used for fitting."""

    split: Split
    response_error: float


def save_solution(folder: Path, path: str, solution: Solution, problem: str) -> None:
    """Writes the solution of the layer at ``path`` to a file of its own, whole or not at all.

    Args:
        folder: Where to.
        path: The layer.
        solution: Its solution.
        problem: What it is the solution of, as text that is the same for the same problem only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = _file(folder, path)
    partial = file.with_suffix(".partial")
    parts = {name: part for name, part in solution.split._asdict().items() if part is not None}
    with partial.open("wb") as stream:
        np.savez(
            stream,
            **parts,
            response_error=np.asarray(solution.response_error),
            problem=np.asarray(problem),
        )
    partial.replace(file)


def load_solution(folder: Path, path: str, problem: str) -> Solution | None:
    """The solution of the layer at ``path``, or None if there is none yet.

    Raises:
        ValueError: If there is one of another problem: the folder belongs to another run.
    """
    file = _file(folder, path)
    if not file.exists():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        split = Split(arrays.get("first"), arrays["middle"], arrays.get("last"), arrays["bias"])
        response_error = float(arrays["response_error"])
        found = str(arrays["problem"])
    if found != problem:
        raise ValueError(
            f"{path}: {file} holds the solution of another problem, of another run or device;"
            f" remove {folder} to solve its layers again"
        )
    return Solution(split, response_error)


def _file(folder: Path, path: str) -> Path:
    return folder / f"{path.replace('/', '.')}.npz"
