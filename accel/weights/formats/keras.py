"""Reads the HDF5 weight files of Keras (``.h5``, ``.weights.h5``).

Two layouts are in use. The older one (``save_weights`` and ``save`` of Keras 1 and 2, ``save`` to
``.h5`` of Keras 3, and the published files of ``keras.applications``) has one group a layer, listed
in order by the attribute ``layer_names``; a group's datasets are listed by ``weight_names``. A
whole model has these groups in ``model_weights``. The other (``save_weights`` of Keras 3) has one
group a layer in ``layers``, called by its class and a number (``conv2d_3``), with the datasets
``vars/0``, ``vars/1`` and the layer's name as an attribute of ``vars``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from accel.weights.errors import WeightError
from accel.weights.formats.optional import require

# Keras 1 called them block1_conv1_W_1:0 and block1_conv1_b_1:0.
ROLES = {"kernel": re.compile(r"kernel|_W(_\d+)?$"), "bias": re.compile(r"bias|_b(_\d+)?$")}

# functional/layers/conv2d_3/vars/0: layers of a nested model stand in a group of their own.
NUMBERED_WEIGHT = re.compile(r"((?:.*/)?)(\w+?)(?:_(\d+))?/vars/(\d+)")
KINDS = ("conv2d", "dense")


def read(path: Path) -> dict[str, np.ndarray]:
    """Every weight as ``layer/kernel``, ``layer/bias`` or ``layer/…``, in the order of the layers.

    Kernels are ``[height, width, in, out]`` or ``[in, out]``, the rows after a flattening in
    (height, width, channel) order: Flax's layouts.

    Raises:
        WeightError: If h5py is not installed or the file is not one of Keras.
    """
    h5py = require("h5py", path=path)
    with h5py.File(path, "r") as file:
        layer_groups = file.get("model_weights", file)
        if "layer_names" in layer_groups.attrs:
            return dict(_listed_layers(layer_groups))
        if "layers" in file:
            return dict(_numbered_layers(file["layers"]))
    raise WeightError(
        f"{path}: not a weight file of Keras: expected the attribute 'layer_names' or the group "
        "'layers', found neither"
    )


def _listed_layers(layer_groups: Any) -> Iterator[tuple[str, np.ndarray]]:
    for group_name in map(_text, layer_groups.attrs["layer_names"]):
        group = layer_groups[group_name]
        for weight_name in map(_text, group.attrs["weight_names"]):
            # A group of a nested model holds several layers, named within the weight names.
            layer, _, weight = weight_name.rpartition("/")
            weight = re.sub(r":\d+$", "", weight)
            role = next((role for role, form in ROLES.items() if form.search(weight)), weight)
            yield f"{layer or group_name}/{role}", group[weight_name][()]


def _numbered_layers(layers: Any) -> Iterator[tuple[str, np.ndarray]]:
    weights = []

    def collect(path: str, item: Any) -> None:
        if match := NUMBERED_WEIGHT.fullmatch(path):
            model, kind, number, index = match.groups(default="")
            # The file lists layers alphabetically; the numbers are the network's order, kind by
            # kind. Convolutions and then dense layers come after everything else, so that a layer
            # whose place is unknown never counts as part of a classifier.
            rank = KINDS.index(kind) if kind in KINDS else -1
            layer = _text(item.parent.attrs.get("name", path.removesuffix(f"/vars/{index}")))
            role = ("kernel", "bias")[int(index)] if rank >= 0 and index in "01" else index
            weights.append(((rank, model, int(number or 0), int(index)), f"{layer}/{role}", item))

    layers.visititems(collect)
    for _, name, dataset in sorted(weights, key=lambda weight: weight[0]):
        yield name, dataset[()]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
