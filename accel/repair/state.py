"""Where a repair stands, kept in a file: a run that was stopped goes on from it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization

from accel.program import Program

# Of the files; those of another are refused.
FORMAT = 3


def problem_digest(
    settings: object, programs: Sequence[Program], arrays: Sequence[np.ndarray | jax.Array]
) -> str:
    """Tells one run from every other, by all that its result hangs on.

    Args:
        settings: Whose ``repr`` says all of them.
        programs: The networks.
        arrays: Their parameters, the images, and what else there is.
    """
    digest = hashlib.sha256(repr((FORMAT, settings)).encode())
    for program in programs:
        digest.update(str(program.jaxpr).encode())
    for array in arrays:
        # With its shape, so that the same bytes cut otherwise are another run's; as bytes, since
        # arrays of bfloat16 have no buffer that can be hashed.
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_state(
    file: Path, problem: str, arrays: Sequence[jax.Array], told: Mapping[str, Any]
) -> None:
    """Writes a state to ``file``, whole or not at all.

    Args:
        file: Where it is kept; its folder is made where it is missing.
        problem: From ``problem_digest``.
        arrays: The arrays of the state.
        told: The rest of it: numbers, texts, lists and mappings of them.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    named = {str(index): array for index, array in enumerate(arrays)}
    content = {"problem": problem, "told": dict(told), "arrays": jax.device_get(named)}
    partial = file.with_suffix(".partial")
    partial.write_bytes(serialization.msgpack_serialize(content))
    partial.replace(file)


def load_state(file: Path, problem: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The arrays of the state in ``file``, and the rest of it.

    Raises:
        ValueError: If it is the state of another problem, or the file is damaged.
    """
    content: Any = None
    with contextlib.suppress(ValueError):
        content = serialization.msgpack_restore(file.read_bytes())
    if not isinstance(content, dict) or content.keys() != {"problem", "told", "arrays"}:
        raise ValueError(f"{file} is damaged; remove it to start again")
    if content["problem"] != problem:
        raise ValueError(
            f"{file} holds the state of another problem, another run's; remove it to start again"
        )
    arrays = content["arrays"]
    return [arrays[str(index)] for index in range(len(arrays))], content["told"]
