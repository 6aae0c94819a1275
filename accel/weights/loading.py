"""Builds a network around the weights of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.models import ModelSpec
from accel.models.vgg import VGG
from accel.weights.errors import WeightError
from accel.weights.formats import read
from accel.weights.naming import Source, recognise

FLOATING = ("float16", "bfloat16", "float32", "float64")
LISTED = 5


def load(path: str | os.PathLike[str], spec: ModelSpec) -> VGG:
    """Builds the network that ``spec`` describes with the weights of a file.

    The file may be in any format of ``read`` and under any names of ``naming.recognise``. Every
    parameter must be there in the right shape, and nothing else may be: only the classifier's
    tensors where ``spec`` is a body alone, and PyTorch's ``num_batches_tracked``.

    Returns:
        The network in evaluation mode, its parameters in float32.

    Raises:
        WeightError: If the file cannot be read (see ``read``); if its tensors go by unknown names;
            if a tensor is missing, superfluous, of another shape, not of a floating type, or not
            finite in float32. The message names the file, the tensor, what was expected and what
            was found.
        ValueError: If ``spec`` cannot be built, or is of no VGG.
    """
    path = Path(path)
    # Nothing is drawn: the shapes alone make the network, and the weights are put in place of them.
    model = nnx.eval_shape(spec.build)
    if not isinstance(model, VGG):
        raise ValueError(
            f"{path}: files of weights are read for VGGs; weights of {spec.name} have to be in a"
            " folder that accel.save_model(folder, model, spec) wrote"
        )
    graphdef, parameters, _ = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    # The keys of dropout, which need values. XLA leaves out the parameters, which nothing uses.
    random_state = jax.jit(lambda: nnx.state(spec.build(), nnx.RngState))()

    variables = {
        ".".join(map(str, key)): (key, variable) for key, variable in nnx.to_flat_state(parameters)
    }
    shapes = {name: variable.shape for name, (_, variable) in variables.items()}
    tensors = read(path)
    naming = recognise(model, shapes, tensors)
    if naming is None:
        raise WeightError(
            f"{path}: expected the names of a VGG's tensors (such as features.0.weight), found "
            + (_listing(list(tensors)) or "no tensor")
        )
    known = {source.name for source in naming.sources.values()} | naming.ignored
    missing = [
        f"{source.name} ({name}, shape {source.shape})"
        for name, source in naming.sources.items()
        if source.name not in tensors
    ]
    superfluous = [f"{name} (shape {tensors[name].shape})" for name in tensors if name not in known]
    if missing or superfluous:
        faults = [("missing ", missing), ("found besides: ", superfluous)]
        raise WeightError(
            f"{path} does not fit {spec.name}: "
            + "; ".join(fault + _listing(names) for fault, names in faults if names)
        )
    loaded = [
        (key, variable.replace(_checked(path, name, naming.sources[name], tensors)))
        for name, (key, variable) in variables.items()
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded), random_state)
    model.eval()
    return model


def _checked(path: Path, name: str, source: Source, tensors: dict[str, np.ndarray]) -> jax.Array:
    tensor = tensors[source.name]
    where = f"{path}: {source.name} ({name})"
    if tensor.dtype.name not in FLOATING:
        raise WeightError(f"{where}: expected a floating type, found {tensor.dtype.name}")
    if tensor.shape != source.shape:
        raise WeightError(f"{where}: expected shape {source.shape}, found {tensor.shape}")
    # A value of float64 beyond float32's range becomes infinite, which the next check reports.
    with np.errstate(over="ignore"):
        parameter = np.asarray(source.to_flax(tensor), np.float32)
    if not np.isfinite(parameter).all():
        count = np.size(parameter) - np.isfinite(parameter).sum()
        raise WeightError(
            f"{where}: expected finite float32 values, found {count} of {parameter.size} that are "
            "NaN or infinite"
        )
    return jnp.array(parameter)


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
