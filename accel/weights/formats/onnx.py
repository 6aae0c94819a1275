"""Reads the weights of a VGG-shaped ``.onnx`` graph.

What an exporter calls a weight means nothing (``onnx::Conv_43``), so weights are found through the
nodes that use them. Up to the last convolution the graph must be one that a chain of convolutions,
ReLUs and 2×2 poolings can stand for; anything else there would load and compute something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel.weights.errors import WeightError
from accel.weights.formats.layouts import channels_last_rows
from accel.weights.formats.optional import require

# Before the last convolution: the nodes that may stand there, and for each the attributes that
# matter with ONNX's default and the values they may have.
BODY: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "Conv": {
        "strides": ([1, 1], ([1, 1],)),
        "dilations": ([1, 1], ([1, 1],)),
        "group": (1, (1,)),
        "pads": ([0, 0, 0, 0], ([1, 1, 1, 1],)),
    },
    "MaxPool": {
        "kernel_shape": (None, ([2, 2],)),
        "strides": ([1, 1], ([2, 2],)),
        "pads": ([0, 0, 0, 0], ([0, 0, 0, 0],)),
        "auto_pad": (b"NOTSET", (b"NOTSET", b"VALID")),
        "ceil_mode": (0, (0,)),
    },
    "Relu": {},
    "Transpose": {"perm": (None, ([0, 2, 3, 1], [0, 3, 1, 2]))},
}


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation of the graph, called by its first output: the names of nodes may be empty."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]


def read(path: Path) -> dict[str, np.ndarray]:
    """Every weight in the order of the graph, ``output/kernel`` and ``output/bias``.

    ``Conv`` nodes give ``[height, width, in, out]`` kernels; ``Gemm`` and ``MatMul`` nodes give
    ``[in, out]`` kernels, the rows after a flattening in (height, width, channel) order. Floating
    weights of other nodes keep their own names.

    Raises:
        WeightError: If onnx is not installed, the graph has no convolution, or its body is not of
            VGG's shape: a node other than ``Conv``, ``MaxPool``, ``Relu`` and ``Transpose``, no
            ``Relu`` between two ``Conv``, or other strides, paddings, dilations, groups or pooling
            windows.
    """
    onnx = require("onnx", path=path)
    graph = onnx.load(path).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [
        Node(
            name=node.output[0],
            kind=node.op_type,
            inputs=tuple(node.input),
            attributes={a.name: onnx.helper.get_attribute_value(a) for a in node.attribute},
        )
        for node in graph.node
    ]
    convolutions = [index for index, node in enumerate(nodes) if node.kind == "Conv"]
    if not convolutions:
        raise WeightError(f"{path}: expected a graph with convolutions, found no Conv node")
    last = convolutions[-1]
    body = dict(_body_weights(path, nodes[: last + 1], stored))
    *_, channels = body[f"{nodes[last].name}/kernel"].shape
    return body | dict(_head_weights(nodes[last + 1 :], stored, channels))


def _body_weights(
    path: Path, nodes: Sequence[Node], stored: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    unrectified = None
    for previous, node in zip((None, *nodes), nodes, strict=False):
        if node.kind not in BODY:
            raise WeightError(
                f"{path}: node {node.name!r}: expected one of {', '.join(BODY)} before the last "
                f"convolution, found {node.kind}"
            )
        if previous is not None and previous.name not in node.inputs:
            raise WeightError(
                f"{path}: node {node.name!r}: expected a chain of nodes up to the last "
                f"convolution, found one that does not follow {previous.name!r}"
            )
        attributes = node.attributes
        if node.kind == "Conv" and attributes.get("auto_pad") in (b"SAME_UPPER", b"SAME_LOWER"):
            # What "same" means for the 3×3 kernels and strides of one that are asked for here.
            attributes = attributes | {"pads": [1, 1, 1, 1]}
        for attribute, (default, allowed) in BODY[node.kind].items():
            found = attributes.get(attribute, default)
            if found not in allowed:
                raise WeightError(
                    f"{path}: {node.kind} node {node.name!r}: expected {attribute} "
                    f"{' or '.join(map(str, allowed))}, found {found}"
                )
        if node.kind == "Relu":
            unrectified = None
        if node.kind != "Conv":
            continue
        if unrectified is not None:
            raise WeightError(
                f"{path}: Conv node {node.name!r}: expected a Relu between it and the convolution"
                f" before, {unrectified!r}, found none"
            )
        unrectified = node.name
        for role, weight in zip(("kernel", "bias"), node.inputs[1:], strict=False):
            if weight not in stored:
                raise WeightError(
                    f"{path}: Conv node {node.name!r}: expected its {role} {weight!r} in the "
                    "file, found no tensor of that name (the graph was exported without weights)"
                )
            axes = (2, 3, 1, 0) if role == "kernel" else (0,)
            yield f"{node.name}/{role}", stored[weight].transpose(axes)


def _head_weights(
    nodes: Sequence[Node], stored: Mapping[str, np.ndarray], channels: int
) -> Iterator[tuple[str, np.ndarray]]:
    channels_last, dense_layer = False, None
    for node in nodes:
        weights = [name for name in node.inputs if name in stored]
        if node.kind == "Transpose":
            channels_last = node.attributes.get("perm") == [0, 2, 3, 1]
        elif node.kind in ("Gemm", "MatMul") and node.inputs[1] in stored:
            kernel = stored[node.inputs[1]] * node.attributes.get("alpha", 1.0)
            if node.attributes.get("transB", 0):
                kernel = kernel.T
            if dense_layer is None and not channels_last:
                kernel = channels_last_rows(kernel, channels)
            dense_layer = node
            yield f"{node.name}/kernel", kernel
            if node.kind == "Gemm" and len(node.inputs) > 2:
                bias = stored[node.inputs[2]] * node.attributes.get("beta", 1.0)
                yield f"{node.name}/bias", bias
        elif node.kind == "Add" and dense_layer and dense_layer.name in node.inputs and weights:
            yield f"{dense_layer.name}/bias", stored[weights[0]]
        else:
            for name in weights:
                # Whole numbers are shapes and axes.
                if not np.issubdtype(stored[name].dtype, np.integer):
                    yield name, stored[name]
