"""Checkpoints of a training run, from which it goes on as if it had never been stopped.

A folder holds the newest checkpoint (Orbax; written aside and renamed when it is complete): the
arrays of the training state, and beside them, as JSON, what the run was asked to do and how far it
is. A folder serves one run: a run that was asked for something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")
NAMED_DIFFERENCES = 3


class TrainingCheckpoints:
    """The checkpoints of one run, used as a context manager.

    Args:
        folder: Where they are; made where it is missing.
        settings: All that the run's result hangs on, as JSON data; a nested mapping.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        # As JSON would give it back, so that it can be compared: tuples are lists there.
        self.settings = json.loads(json.dumps(settings))
        self.manager = ocp.CheckpointManager(
            self.folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1, cleanup_tmp_directories=True, enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Writes a checkpoint; the one before is removed when it is complete.

        Args:
            step: Number of steps done; a checkpoint of that step is replaced.
            state: A tree of arrays.
            position: Where the run is, as JSON data.
        """
        if step in self.manager.all_steps():
            self.manager.delete(step)
        record = {"settings": self.settings, "position": position}
        arrays = ocp.args.StandardSave(_by_path(state))
        self.manager.save(
            step, args=ocp.args.Composite(state=arrays, record=ocp.args.JsonSave(record))
        )

    def restore(self, state: State) -> tuple[State, dict[str, Any]] | None:
        """The state and the position of the newest checkpoint, None where there is none.

        Args:
            state: A tree of arrays like the one that was saved.

        Raises:
            ValueError: If the checkpoint is of another run; the message names what differs.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        record = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]
        if differences := _differences(record["settings"], self.settings):
            named = "; ".join(differences[:NAMED_DIFFERENCES])
            more = len(differences) - NAMED_DIFFERENCES
            raise ValueError(
                f"{self.folder} holds a checkpoint of another run: {named}"
                + (f"; and {more} more" if more > 0 else "")
            )
        # On this machine's device, whichever it was saved on.
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        expected = {
            path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
            for path, array in _by_path(state).items()
        }
        restored = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(expected))
        )["state"]
        leaves = [restored[path] for path in expected]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), record["position"]


def _by_path(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """What differs between two nested mappings, in words, one entry a value."""
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            difference
            for key in {**there, **here}
            for difference in _differences(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if there == here else [f"{name} is {there!r} there, {here!r} here"]
