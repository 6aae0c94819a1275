"""A small VGG with random weights, its output by NumPy, and files of it as other tools write them.

Everything is derived from one ``Weights``, in PyTorch's layouts: kernels ``[out, in, height,
width]``, dense weights ``[out, in]``, flattening in (channel, height, width) order.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from accel.models import ModelSpec

Weights = dict[str, dict[str, np.ndarray]]

STAGES = (("1_1", "1_2"), ("2_1", "2_2"), ("3_1", "3_2", "3_3"))
NAMES = [name for stage in STAGES for name in stage]
WIDTHS = (64, 64, 128, 128, 256, 256, 256)
POOLED_SIZE, HIDDEN, CLASSES = 2, 12, 3
OPTIONS = {
    "in_channels": 3,
    "num_classes": CLASSES,
    "hidden_features": (HIDDEN, HIDDEN),
    "pool_last": True,
    "pooled_size": POOLED_SIZE,
}
SPEC = ModelSpec("small_vgg", OPTIONS)
BATCH_NORM_SPEC = ModelSpec("small_vgg", OPTIONS | {"batch_norm": True})
BODY_SPEC = ModelSpec("small_vgg", {"in_channels": 3, "num_classes": None})

# Where torchvision's nn.Sequential has the convolutions of these stages.
FEATURES = dict(zip(NAMES, (0, 2, 5, 7, 10, 12, 14), strict=True))
BATCH_NORM_FEATURES = dict(zip(NAMES, (0, 3, 7, 10, 14, 17, 20), strict=True))
DENSE = ("fc6", "fc7", "fc8")


def random_weights(*, batch_norm: bool = False) -> Weights:
    generator = np.random.default_rng(0)
    weights: Weights = {}
    in_channels = 3
    for name, channels in zip(NAMES, WIDTHS, strict=True):
        scale = np.sqrt(2 / (9 * in_channels))
        weights[f"conv{name}"] = {
            "weight": scale * generator.standard_normal((channels, in_channels, 3, 3)),
            "bias": 0.1 * generator.standard_normal(channels),
        }
        if batch_norm:
            weights[f"norm{name}"] = {
                "weight": generator.uniform(0.5, 1.5, channels),
                "bias": 0.1 * generator.standard_normal(channels),
                "running_mean": 0.1 * generator.standard_normal(channels),
                "running_var": generator.uniform(0.5, 1.5, channels),
            }
        in_channels = channels
    in_features = in_channels * POOLED_SIZE**2
    for name, out_features in zip(DENSE, (HIDDEN, HIDDEN, CLASSES), strict=True):
        weights[name] = {
            "weight": generator.standard_normal((out_features, in_features)) / in_features**0.5,
            "bias": generator.standard_normal(out_features),
        }
        in_features = out_features
    return {
        layer: {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        for layer, tensors in weights.items()
    }


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 16, 16, 3)).astype(np.float32)


def body_output(weights: Weights, images: np.ndarray) -> np.ndarray:
    """The last activation in float64, ``[batch, channels, height, width]``."""
    x = images.astype(np.float64).transpose(0, 3, 1, 2)
    for stage, names in enumerate(STAGES):
        if stage > 0:
            x = max_pool(x)
        for name in names:
            conv = weights[f"conv{name}"]
            padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
            x = np.tensordot(windows, conv["weight"].astype(np.float64), ((1, 4, 5), (1, 2, 3)))
            x = x.transpose(0, 3, 1, 2) + conv["bias"][:, None, None]
            if norm := weights.get(f"norm{name}"):
                variance = norm["running_var"].astype(np.float64) + 1e-5
                x = (x - norm["running_mean"][:, None, None]) / np.sqrt(variance)[:, None, None]
                x = norm["weight"][:, None, None] * x + norm["bias"][:, None, None]
            x = np.maximum(x, 0)
    return x


def network_output(weights: Weights, images: np.ndarray) -> np.ndarray:
    """The logits in float64."""
    x = max_pool(body_output(weights, images))
    x = x.reshape(x.shape[0], -1)
    for name in DENSE:
        x = x @ weights[name]["weight"].T.astype(np.float64) + weights[name]["bias"]
        if name != DENSE[-1]:
            x = np.maximum(x, 0)
    return x


def max_pool(x: np.ndarray) -> np.ndarray:
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels, height // 2, 2, width // 2, 2).max((3, 5))


# The same weights under the names and in the layouts of other tools.


def channels_last(weights: Weights, name: str) -> np.ndarray:
    """A dense layer's weight ``[in, out]``, its inputs in (height, width, channel) order."""
    weight = weights[name]["weight"]
    if name == DENSE[0]:
        maps = weight.reshape(HIDDEN, WIDTHS[-1], POOLED_SIZE, POOLED_SIZE)
        weight = np.stack([m.transpose(1, 2, 0).ravel() for m in maps])
    return weight.T


def native(weights: Weights) -> dict[str, np.ndarray]:
    """``conv1_1.kernel``, as this project's own files have them."""
    ours = {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "var",
    }
    tensors = {}
    for layer, values in weights.items():
        for name, tensor in values.items():
            if layer.startswith("norm"):
                tensors[f"{layer}.{ours[name]}"] = tensor
            elif name == "bias":
                tensors[f"{layer}.bias"] = tensor
            elif layer.startswith("conv"):
                tensors[f"{layer}.kernel"] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
            else:
                tensors[f"{layer}.kernel"] = np.ascontiguousarray(channels_last(weights, layer))
    return tensors


def torchvision(weights: Weights) -> dict[str, np.ndarray]:
    """``features.0.weight`` … ``classifier.6.bias``."""
    batch_norm = "norm1_1" in weights
    features = BATCH_NORM_FEATURES if batch_norm else FEATURES
    layers = {f"features.{index}": f"conv{name}" for name, index in features.items()}
    if batch_norm:
        layers |= {f"features.{index + 1}": f"norm{name}" for name, index in features.items()}
    layers |= {"classifier.0": "fc6", "classifier.3": "fc7", "classifier.6": "fc8"}
    tensors = {
        f"{theirs}.{name}": tensor
        for theirs, layer in layers.items()
        for name, tensor in weights[layer].items()
    }
    if batch_norm:
        for index in features.values():
            tensors[f"features.{index + 1}.num_batches_tracked"] = np.array(7, np.int64)
    return tensors


def timm(weights: Weights) -> dict[str, np.ndarray]:
    """As ``torchvision``, with the hidden layers as convolutions."""
    tensors = torchvision(weights)
    for theirs, layer in {
        "classifier.0": "pre_logits.fc1",
        "classifier.3": "pre_logits.fc2",
    }.items():
        weight = tensors.pop(f"{theirs}.weight")
        size = POOLED_SIZE if theirs == "classifier.0" else 1
        tensors[f"{layer}.weight"] = weight.reshape(HIDDEN, -1, size, size)
        tensors[f"{layer}.bias"] = tensors.pop(f"{theirs}.bias")
    for name in ("weight", "bias"):
        tensors[f"head.fc.{name}"] = tensors.pop(f"classifier.6.{name}")
    return tensors


def keras_layers(weights: Weights) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kernel and bias by Keras' name of the layer, in order."""
    layers = {}
    for name in NAMES:
        stage, place = name.split("_")
        conv = weights[f"conv{name}"]
        layers[f"block{stage}_conv{place}"] = (conv["weight"].transpose(2, 3, 1, 0), conv["bias"])
    for name, layer in zip(DENSE, ("fc1", "fc2", "predictions"), strict=True):
        layers[layer] = (channels_last(weights, name), weights[name]["bias"])
    return layers


def write_keras_applications(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """As Keras 1 wrote the published files: ``block1_conv1/block1_conv1_W_1:0``."""
    _write_listed(path, layers, "{0}_W_1:0", "{0}_b_1:0")


def write_keras_2(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """As ``save_weights`` of Keras 2: ``block1_conv1/block1_conv1/kernel:0``."""
    _write_listed(path, layers, "{0}/kernel:0", "{0}/bias:0")


def write_keras_model(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """As ``save`` of a whole model by Keras 3."""
    _write_listed(path, layers, "{0}/kernel", "{0}/bias", group="model_weights")
    with h5py.File(path, "a") as file:
        file.attrs["model_config"] = "{}"
        file.create_dataset("optimizer_weights/adam/learning_rate", data=np.float32(1e-3))


def _write_listed(
    path: Path,
    layers: dict[str, tuple[np.ndarray, np.ndarray]],
    kernel_name: str,
    bias_name: str,
    group: str = "/",
) -> None:
    with h5py.File(path, "w") as file:
        root = file.require_group(group)
        root.attrs["layer_names"] = np.array(["input_1", *layers], dtype="S")
        root.create_group("input_1").attrs["weight_names"] = np.array([], dtype="S1")
        for layer, tensors in layers.items():
            names = [name.format(layer) for name in (kernel_name, bias_name)]
            root.create_group(layer).attrs["weight_names"] = np.array(names, dtype="S")
            for name, tensor in zip(names, tensors, strict=True):
                root[layer].create_dataset(name, data=tensor)


def write_keras_3(path: Path, layers: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """As ``save_weights`` of Keras 3: ``layers/conv2d_1/vars/0``, the name as an attribute."""
    with h5py.File(path, "w") as file:
        counts = {"conv2d": 0, "dense": 0}
        for layer, tensors in layers.items():
            kind = "conv2d" if tensors[0].ndim == 4 else "dense"
            number = f"_{counts[kind]}" if counts[kind] else ""
            counts[kind] += 1
            variables = file.create_group(f"layers/{kind}{number}/vars")
            variables.attrs["name"] = layer
            for index, tensor in enumerate(tensors):
                variables.create_dataset(str(index), data=tensor)
        file.create_group("layers/flatten/vars").attrs["name"] = "flatten"
        file.create_dataset("optimizer/vars/0", data=np.int64(3))


class Graph:
    """An ONNX graph under construction: a chain of nodes and its weights."""

    def __init__(self, input_name: str, shape: list[int | str]):
        self.inputs = [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, shape)]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.last = input_name

    def add(self, kind: str, output: str, *weights: tuple[str, np.ndarray], **attributes) -> None:
        self.initializers += [numpy_helper.from_array(tensor, name) for name, tensor in weights]
        inputs = [self.last, *(name for name, _ in weights)]
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        self.last = output

    def save(self, path: Path) -> None:
        output = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, ["batch", CLASSES])
        graph = helper.make_graph(self.nodes, "graph", self.inputs, [output], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def torch_graph(weights: Weights, *, named: bool = True) -> Graph:
    """As PyTorch exports torchvision's VGG; with batch norm folded, weights lose their names."""
    graph = Graph("input.1", ["batch", 3, 16, 16])
    for stage, names in enumerate(STAGES):
        for name in names:
            index = FEATURES[name]
            conv = weights[f"conv{name}"]
            graph.add(
                "Conv",
                f"/features/features.{index}/Conv_output_0",
                *(
                    (f"features.{index}.{key}" if named else f"onnx::Conv_{index}{key[0]}", tensor)
                    for key, tensor in conv.items()
                ),
                dilations=[1, 1],
                group=1,
                kernel_shape=[3, 3],
                pads=[1, 1, 1, 1],
                strides=[1, 1],
            )
            graph.add("Relu", f"/features/features.{index + 1}/Relu_output_0")
        graph.add(
            "MaxPool",
            f"/features/pool{stage}/MaxPool_output_0",
            ceil_mode=0,
            dilations=[1, 1],
            kernel_shape=[2, 2],
            pads=[0, 0, 0, 0],
            strides=[2, 2],
        )
    graph.add("AveragePool", "/avgpool/AveragePool_output_0", kernel_shape=[1, 1], strides=[1, 1])
    graph.add("Flatten", "/Flatten_output_0", axis=1)
    for index, name in zip((0, 3, 6), DENSE, strict=True):
        tensors = [(f"classifier.{index}.{key}", tensor) for key, tensor in weights[name].items()]
        output = f"/classifier/classifier.{index}/Gemm_output_0"
        graph.add("Gemm", output, *tensors, alpha=1.0, beta=1.0, transB=1)
        if name != DENSE[-1]:
            graph.add("Relu", f"/classifier/classifier.{index + 1}/Relu_output_0")
    return graph


def keras_graph(weights: Weights, *, named: bool = True) -> Graph:
    """As tf2onnx exports a Keras VGG: images and flattening in (height, width, channel) order."""
    graph = Graph("input", ["batch", 16, 16, 3])
    graph.add("Transpose", "f/block1_conv1_1/BiasAdd__6:0", perm=[0, 3, 1, 2])
    for name in NAMES:
        stage, place = name.split("_")
        layer = f"f/block{stage}_conv{place}_1" if named else f"f/conv2d_{NAMES.index(name)}"
        conv = weights[f"conv{name}"]
        graph.add(
            "Conv",
            f"{layer}/BiasAdd:0",
            (f"{layer}/convolution/ReadVariableOp:0", conv["weight"]),
            (f"{layer}/Squeeze:0", conv["bias"]),
            auto_pad="SAME_UPPER",
            kernel_shape=[3, 3],
        )
        graph.add("Relu", f"{layer}/Relu:0")
        if name in ("1_2", "2_2", "3_3"):
            graph.add(
                "MaxPool",
                f"f/block{stage}_pool_1/MaxPool2d:0",
                kernel_shape=[2, 2],
                strides=[2, 2],
            )
    graph.add("Transpose", "Transpose__90:0", perm=[0, 2, 3, 1])
    graph.add("Reshape", "f/flatten_1/Reshape:0", ("shape", np.array([-1, 1024], np.int64)))
    for name, layer in zip(DENSE, ("dense_1", "dense_1_2", "dense_2_1"), strict=True):
        kernel = np.ascontiguousarray(channels_last(weights, name))
        graph.add("MatMul", f"f/{layer}/MatMul:0", (f"f/{layer}/Cast/ReadVariableOp:0", kernel))
        bias = (f"f/{layer}/BiasAdd/ReadVariableOp:0", weights[name]["bias"])
        graph.add("Add", f"f/{layer}/BiasAdd:0", bias)
        if name != DENSE[-1]:
            graph.add("Relu", f"f/{layer}/Relu:0")
    graph.add("Softmax", "dense_2")
    return graph
