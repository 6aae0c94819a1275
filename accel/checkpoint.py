"""Model folders: a network in a folder from which it is rebuilt without the original weights.

A folder holds ``model.json`` (name and options), ``plan.json`` where the network is accelerated,
and ``checkpoint/`` (Orbax). It is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from accel.batch_norm import fold_batch_norm
from accel.models import MODELS, ModelSpec
from accel.plan import AccelerationPlan
from accel.rewrite import rewrite

FORMAT = 1


def save_model(
    folder: Path,
    model: nnx.Module,
    spec: ModelSpec | None = None,
    plan: AccelerationPlan | None = None,
) -> None:
    """Writes ``model`` to a new folder.

    Args:
        folder: Where to; must not exist yet.
        model: The network.
        spec: What the original network is built from; without it ``load_model`` has to be told.
        plan: What was done to the original network, if anything.

    Raises:
        FileExistsError: If the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not ``NAME.partial``, under which an unfinished run keeps what it has solved.
    partial = folder.with_name(f"{folder.name}.saving")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    description = {
        "format": FORMAT,
        "model": None if spec is None else {"name": spec.name, "options": dict(spec.options)},
    }
    (partial / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    if plan is not None:
        (partial / "plan.json").write_text(plan.to_json())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((partial / "checkpoint").resolve(), _arrays(model))
    partial.rename(folder)


def load_model(folder: Path, build: Callable[[], nnx.Module] | None = None) -> nnx.Module:
    """The network that ``save_model`` wrote, in evaluation mode.

    Args:
        folder: Where it is.
        build: Builds the original network, for networks that are not among ``accel.models``, such
            as ``ModelSpec("package.module:function").build``; its parameters are never computed.

    Raises:
        ValueError: If the folder is no model folder, or the network that is built does not fit it.
    """
    folder = Path(folder)
    saved_spec(folder)  # Whatever builds the network: what is no model folder shows now.
    build = build or known_spec(folder).build
    plan = saved_plan(folder)

    def rebuild() -> nnx.Module:
        model = build()
        return model if plan is None else rewrite(fold_batch_norm(model, plan.folded), plan)

    model = nnx.eval_shape(rebuild)
    # On this machine's device, whichever it was saved on.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    expected = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
        for path, array in _arrays(model).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata((folder / "checkpoint").resolve()).item_metadata
        _check_fit(folder, expected, saved)
        restored = checkpointer.restore((folder / "checkpoint").resolve(), expected)
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        variable.set_value(restored["/".join(map(str, path))])
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    model.eval()
    return model


def known_spec(folder: Path, builder: str | None = None) -> ModelSpec:
    """What the network in a model folder was built from, one of the networks of ``accel.models``.

    A folder is data: it may choose among them, but name no code to be imported.

    Args:
        folder: Where it is.
        builder: The name of a builder of the user's own, ``package.module:function``, that is to be
            imported: the one that the folder names, or of a folder that names none.

    Raises:
        ValueError: If the folder is no model folder, or of another network.
    """
    spec = saved_spec(folder)
    if builder is not None:
        if spec is not None and spec.name != builder:
            raise ValueError(f"{folder} is of a network built by {spec.name}, not by {builder}")
        return spec or ModelSpec(builder)
    if spec is None:
        fault = "does not say how its original network is built"
    elif spec.name not in MODELS:
        fault = f"is of a network built by {spec.name}, code that is not run at a folder's word"
    else:
        return spec
    raise ValueError(
        f"{folder} {fault}; name the builder (--builder package.module:function), or call"
        " load_model(folder, build=…) with a function without arguments that builds the original"
        " network"
    )


def saved_spec(folder: Path) -> ModelSpec | None:
    """What the network in a model folder was built from, None where the folder does not say.

    Raises:
        ValueError: If the folder is no model folder.
    """
    try:
        description = json.loads((Path(folder) / "model.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no model folder: {error}") from error
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder}: expected format {FORMAT} in model.json, found {description.get('format')}"
        )
    return None if description["model"] is None else ModelSpec(**description["model"])


def saved_plan(folder: Path) -> AccelerationPlan | None:
    """What was done to the original network of a model folder, None where nothing was.

    Raises:
        ValueError: If the folder's plan cannot be read.
    """
    file = Path(folder) / "plan.json"
    return AccelerationPlan.from_json(file.read_text()) if file.exists() else None


def _arrays(model: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """The arrays of a model by path; shapes alone where the model is abstract."""
    return {
        "/".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def _check_fit(folder: Path, expected: dict, saved: dict) -> None:
    for path in [*expected, *saved]:
        if path not in saved:
            raise ValueError(f"{folder}: the network needs {path!r}, which was not saved")
        if path not in expected:
            raise ValueError(f"{folder}: holds {path!r}, which the network does not have")
        # The state of a random generator is saved in another shape than it has.
        is_key = jnp.issubdtype(expected[path].dtype, jax.dtypes.prng_key)
        if not is_key and tuple(expected[path].shape) != tuple(saved[path].shape):
            raise ValueError(
                f"{folder}: {path!r} has shape {tuple(saved[path].shape)}, the network needs"
                f" {tuple(expected[path].shape)}"
            )
        # Restoring would turn one type into the other without a word.
        if not is_key and saved[path].dtype != expected[path].dtype:
            raise ValueError(
                f"{folder}: {path!r} is {saved[path].dtype}, the network needs"
                f" {expected[path].dtype}"
            )
