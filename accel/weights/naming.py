"""Which tensor of a file is which parameter of a VGG.

A parameter is called by its path in the model (``conv1_1.kernel``, ``norm1_1.scale``,
``fc6.bias``). A naming gives, for each of them, the name and the shape its tensor has in the file
and the way into Flax's layout.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from accel.models.vgg import VGG
from accel.weights.formats.layouts import channels_last_rows

Shape = tuple[int, ...]

# What Flax calls the parameters of a batch normalisation, and what PyTorch calls them.
BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from.

    Attributes:
        name: The tensor's name in the file.
        shape: The shape it must have there.
        to_flax: Takes that tensor to the parameter's layout.
    """

    name: str
    shape: Shape
    to_flax: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor


@dataclasses.dataclass(frozen=True)
class Naming:
    """The sources of all parameters, and the names of tensors that a file may have besides."""

    sources: Mapping[str, Source]
    ignored: frozenset[str]


def recognise(
    model: VGG, shapes: Mapping[str, Shape], tensors: Mapping[str, np.ndarray]
) -> Naming | None:
    """The naming that the tensors of a file follow, or None if it is not a known one.

    Known are this project's own names, those of torchvision and timm (``features.0.weight``), and
    layers in order as the readers of Keras and ONNX files give them (``layer/kernel``).

    A model without a classifier may be read from a file with one: its tensors are ignored.

    Args:
        model: The network the tensors are for.
        shapes: Shape of each parameter of the model by its path.
        tensors: The tensors of the file by name, in the file's order.
    """
    if any(name.endswith("/kernel") for name in tensors):
        return _layers_in_order(model, shapes, tensors)
    if any(re.match(r"conv\d+_\d+\.", name) for name in tensors):
        sources = {path: Source(path, shape) for path, shape in shapes.items()}
        return Naming(sources, frozenset() if model.dense_names else _matching(r"fc\d+\.", tensors))
    if any(name.startswith("features.") for name in tensors):
        timm = any(name.startswith(("pre_logits.", "head.")) for name in tensors)
        # A count of training steps, which only a momentum of None would use.
        ignored = _matching(r"features\.\d+\.num_batches_tracked$", tensors)
        if not model.dense_names:
            ignored |= _matching(r"(classifier|pre_logits|head)\.", tensors)
        return Naming(dict(_torch_sources(model, shapes, timm=timm)), ignored)
    return None


def _matching(pattern: str, names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if re.match(pattern, name))


def _torch_sources(
    model: VGG, shapes: Mapping[str, Shape], *, timm: bool
) -> Iterator[tuple[str, Source]]:
    """The names of torchvision's VGG, or with ``timm`` those of timm's.

    ``features`` counts convolutions, batch normalisations, ReLUs and poolings; ``classifier``
    counts linear layers, ReLUs and dropouts. timm has the hidden layers as convolutions,
    ``pre_logits.fc1`` and ``pre_logits.fc2``. Features are flattened in (channel, height, width)
    order.
    """
    index = 0
    channels = 0
    for stage in model.stages:
        for name in stage:
            height, width, in_channels, channels = shapes[f"conv{name}.kernel"]
            yield (
                f"conv{name}.kernel",
                Source(
                    f"features.{index}.weight",
                    (channels, in_channels, height, width),
                    lambda tensor: tensor.transpose(2, 3, 1, 0),
                ),
            )
            yield f"conv{name}.bias", Source(f"features.{index}.bias", (channels,))
            if model.batch_norm:
                for ours, theirs in BATCH_NORM.items():
                    source = Source(f"features.{index + 1}.{theirs}", (channels,))
                    yield f"norm{name}.{ours}", source
            index += 3 if model.batch_norm else 2
        index += 1
    for number, name in enumerate(model.dense_names):
        rows, out_features = shapes[f"{name}.kernel"]
        if number > 0:
            channels = rows  # no map to flatten: one position
        size = math.isqrt(rows // channels)
        is_last = name == model.dense_names[-1]
        if timm and not is_last:
            layer = f"pre_logits.fc{number + 1}"
            shape = (out_features, channels, size, size)
        else:
            layer = "head.fc" if timm else f"classifier.{3 * number}"
            shape = (out_features, rows)
        yield f"{name}.kernel", Source(f"{layer}.weight", shape, _from_torch_dense(channels))
        yield f"{name}.bias", Source(f"{layer}.bias", (out_features,))


def _from_torch_dense(channels: int) -> Callable[[np.ndarray], np.ndarray]:
    def to_flax(tensor: np.ndarray) -> np.ndarray:
        return channels_last_rows(tensor.reshape(tensor.shape[0], -1).T, channels)

    return to_flax


def _layers_in_order(
    model: VGG, shapes: Mapping[str, Shape], tensors: Mapping[str, np.ndarray]
) -> Naming:
    """The names ``layer/kernel`` and ``layer/bias``, kernels in Flax's layout.

    Batch normalisation is not known here: no Keras VGG has it, and exporters to ONNX fold it.
    """
    kernels = {
        name.removesuffix("/kernel"): tensor.ndim
        for name, tensor in tensors.items()
        if name.endswith("/kernel")
    }
    convolutions = [layer for layer, ndim in kernels.items() if ndim == 4]
    dense_layers = [layer for layer, ndim in kernels.items() if ndim == 2]
    stages = [name.split("_") for stage in model.stages for name in stage]
    convolution_names = {
        f"conv{stage}_{place}": f"block{stage}_conv{place}" for stage, place in stages
    }
    dense_names = {name: f"fc{place}" for place, name in enumerate(model.dense_names, start=1)}
    if model.dense_names:
        dense_names[model.dense_names[-1]] = "predictions"
    layers = _pair(convolution_names, r"block\d+_conv\d+", convolutions, "convolution")
    layers |= _pair(dense_names, r"fc\d+|predictions", dense_layers, "fully connected layer")
    sources = {}
    for path, shape in shapes.items():
        layer, parameter = path.split(".")
        sources[path] = Source(f"{layers.get(layer, layer)}/{parameter}", shape)
    ignored = frozenset()
    if convolutions and not model.dense_names:
        in_body = [name.startswith(f"{convolutions[-1]}/") for name in tensors]
        ignored = frozenset(list(tensors)[len(in_body) - in_body[::-1].index(True) :])
    return Naming(sources, ignored)


def _pair(
    keras_names: Mapping[str, str], pattern: str, found: Sequence[str], kind: str
) -> dict[str, str]:
    """The file's layer for each of the model's: by Keras' name if all have one, else in order."""
    named = {match[0]: layer for layer in found if (match := re.search(pattern, layer))}
    if len(named) == len(found):
        return {layer: named.get(name, name) for layer, name in keras_names.items()}
    return {
        layer: found[index] if index < len(found) else f"{kind} {index + 1}"
        for index, layer in enumerate(keras_names)
    }
