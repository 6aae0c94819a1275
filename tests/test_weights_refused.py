"""Files that do not fit end in one WeightError that names file, tensor, expected and found."""

from __future__ import annotations

import os
import pickle
import sys

import h5py
import numpy as np
import onnx
import pytest
import vgg_files
from onnx import helper, numpy_helper
from safetensors.numpy import save_file
from vgg_files import BODY_SPEC, SPEC, Weights

from accel import weights
from accel.weights import WeightError


@pytest.fixture(scope="module")
def plain() -> Weights:
    return vgg_files.random_weights()


def _without(name):
    def change(tensors):
        del tensors[name]

    return change


def _with(name, value):
    return lambda tensors: tensors.update({name: value})


def _with_value(name, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = value

    return change


FAULTS = {
    "missing": (
        _without("features.5.weight"),
        ["missing features.5.weight", "conv2_1.kernel", "(128, 64, 3, 3)"],
    ),
    "superfluous": (
        _with("features.20.weight", np.zeros((2, 5), np.float32)),
        ["found besides: features.20.weight (shape (2, 5))"],
    ),
    "superfluous in the classifier": (
        _with("classifier.9.bias", np.zeros(5, np.float32)),
        ["found besides: classifier.9.bias (shape (5,))"],
    ),
    "shape": (
        _with("features.2.weight", np.zeros((64, 64, 5, 5), np.float32)),
        ["features.2.weight (conv1_2.kernel)", "shape (64, 64, 3, 3)", "found (64, 64, 5, 5)"],
    ),
    "transposed": (
        _with("classifier.0.weight", np.zeros((1024, 12), np.float32)),
        ["classifier.0.weight (fc6.kernel)", "shape (12, 1024)", "found (1024, 12)"],
    ),
    "dtype": (
        _with("features.2.bias", np.zeros(64, np.int32)),
        ["features.2.bias (conv1_2.bias)", "expected a floating type", "found int32"],
    ),
    "NaN": (
        _with_value("features.7.weight", np.nan),
        ["features.7.weight (conv2_2.kernel)", "expected finite", "found 1 of 147456"],
    ),
    "infinity": (
        _with_value("classifier.3.bias", np.inf),
        ["classifier.3.bias (fc7.bias)", "expected finite", "found 1 of 12"],
    ),
    "beyond float32": (
        _with("classifier.3.bias", np.full(12, 1e300)),
        ["classifier.3.bias (fc7.bias)", "expected finite", "found 12 of 12"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit(fault, plain, tmp_path):
    change, expected = FAULTS[fault]
    tensors = vgg_files.torchvision(plain)
    change(tensors)
    path = tmp_path / "vgg.safetensors"
    save_file(tensors, path)
    with pytest.raises(WeightError) as error:
        weights.load(path, SPEC)
    for part in [str(path), *expected]:
        assert part in str(error.value)


def test_a_body_ignores_the_classifier_and_nothing_else(plain, tmp_path):
    tensors = vgg_files.torchvision(plain) | {"features.20.weight": np.zeros(2, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(WeightError, match=r"found besides: features\.20\.weight \(shape \(2,\)\)$"):
        weights.load(tmp_path / "a.safetensors", BODY_SPEC)


def test_network_of_another_depth(plain, tmp_path):
    layers = vgg_files.keras_layers(plain)
    names = list(layers)
    names.insert(names.index("block3_conv3") + 1, "block3_conv4")
    deeper = {name: layers.get(name, layers["block3_conv3"]) for name in names}
    vgg_files.write_keras_2(tmp_path / "deep.h5", deeper)
    with pytest.raises(WeightError, match=r"found besides: block3_conv4/kernel"):
        weights.load(tmp_path / "deep.h5", BODY_SPEC)
    del layers["block2_conv1"]
    vgg_files.write_keras_3(tmp_path / "shallow.h5", layers)
    with pytest.raises(WeightError, match=r"missing block2_conv1/bias .*block2_conv1/kernel"):
        weights.load(tmp_path / "shallow.h5", BODY_SPEC)
    unnamed = {f"layer_{index}": tensors for index, tensors in enumerate(layers.values())}
    vgg_files.write_keras_2(tmp_path / "shallow.h5", unnamed)
    with pytest.raises(WeightError, match=r"missing convolution 7/bias \(conv3_3\.bias"):
        weights.load(tmp_path / "shallow.h5", BODY_SPEC)


def test_keras_batch_norm_between_convolutions_is_not_passed_over(plain, tmp_path):
    vgg_files.write_keras_3(tmp_path / "a.h5", vgg_files.keras_layers(plain))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.create_dataset("layers/batch_normalization/vars/0", data=np.ones(64, np.float32))
    with pytest.raises(WeightError, match=r"found besides: batch_normalization/0 \(shape \(64,\)"):
        weights.load(tmp_path / "a.h5", BODY_SPEC)


def test_names_of_no_vgg(tmp_path):
    save_file({"layer1.0.weight": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(
        WeightError, match=r"such as features\.0\.weight\), found layer1\.0\.weight"
    ):
        weights.load(tmp_path / "a.safetensors", SPEC)


def _write(suffix, values, path):
    if suffix == ".safetensors":
        save_file(vgg_files.torchvision(values), path)
    elif suffix == ".h5":
        vgg_files.write_keras_2(path, vgg_files.keras_layers(values))
    elif suffix == ".onnx":
        vgg_files.torch_graph(values).save(path)
    else:
        torch = pytest.importorskip("torch")
        torch.save({k: torch.tensor(v) for k, v in vgg_files.torchvision(values).items()}, path)


SUFFIXES = (".safetensors", ".h5", ".onnx", ".pth")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [1, 8, 0.1, 0.5, 0.9, -1])
def test_truncated_file(suffix, kept, plain, tmp_path):
    path = tmp_path / f"vgg{suffix}"
    _write(suffix, plain, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(WeightError, match=str(path)):
        weights.load(path, SPEC)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_content_of_another_kind(suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"vgg{suffix}"
    for content in (b"<html>404 Not Found</html>", np.random.default_rng(0).bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(WeightError, match=str(path)):
            weights.read(path)


def test_hdf5_that_is_not_of_keras(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("measurements", data=np.zeros(3))
    with pytest.raises(WeightError, match=r"not a weight file of Keras: expected .*'layer_names'"):
        weights.read(tmp_path / "a.h5")


def test_no_file_empty_file_and_unknown_suffix(tmp_path):
    for name, message in {
        "none.h5": "no such file",
        "none": "no such file",
        "folder.h5": "expected a file, found a folder",
        "empty.onnx": "the file is empty",
        "vgg.caffemodel": r"unknown suffix '\.caffemodel'.*\.safetensors, \.pth",
    }.items():
        if name.startswith("folder"):
            (tmp_path / name).mkdir()
        elif not name.startswith("none"):
            (tmp_path / name).touch()
        with pytest.raises(WeightError, match=f"{tmp_path / name}: {message}"):
            weights.read(tmp_path / name)


@pytest.mark.parametrize(
    ("suffix", "package"), [(".pth", "torch"), (".h5", "h5py"), (".onnx", "onnx")]
)
def test_a_missing_package_is_named(suffix, package, tmp_path, monkeypatch):
    (tmp_path / f"a{suffix}").write_bytes(b"something")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(WeightError, match=f"needs the package {package}: pip install {package}"):
        weights.read(tmp_path / f"a{suffix}")


# ONNX graphs that have a VGG's weights and compute something else.


def _set(kind, name, value):
    def change(graph):
        node = next(node for node in graph.nodes if node.op_type == kind)
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


def _rename_kind(old, new):
    def change(graph):
        next(node for node in graph.nodes if node.op_type == old).op_type = new

    return change


def _normalise_images(graph):
    graph.initializers.append(numpy_helper.from_array(np.float32(127), "mean"))
    graph.nodes.insert(0, helper.make_node("Sub", ["input.1", "mean"], ["centred"]))
    graph.nodes[1].input[0] = "centred"


def _branch(graph):
    graph.nodes[2].input[0] = graph.nodes[0].output[0]


def _quantised_weight(graph):
    weight = graph.nodes[0].input[1]
    (stored,) = [tensor for tensor in graph.initializers if tensor.name == weight]
    stored.CopyFrom(numpy_helper.from_array(np.zeros((64, 3, 3, 3), np.int8), "quantised"))
    graph.initializers.append(numpy_helper.from_array(np.float32(0.1), "scale"))
    node = helper.make_node("DequantizeLinear", ["quantised", "scale"], [weight])
    graph.nodes.insert(0, node)


def _weights_left_out(graph):
    (weight,) = [t for t in graph.initializers if t.name == "features.2.weight"]
    graph.initializers.remove(weight)
    graph.inputs.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))


def _batch_norm(graph):
    tensors = [
        numpy_helper.from_array(np.ones(64, np.float32), name) for name in ("g", "b", "mean", "var")
    ]
    graph.initializers += tensors
    inputs = [graph.nodes[0].output[0], *(tensor.name for tensor in tensors)]
    graph.nodes.insert(1, helper.make_node("BatchNormalization", inputs, ["normalised"]))
    graph.nodes[2].input[0] = "normalised"


def _linear(graph):
    (relu,) = [node for node in graph.nodes if node.input[0] == graph.nodes[0].output[0]]
    graph.nodes.remove(relu)
    graph.nodes[1].input[0] = graph.nodes[0].output[0]


GRAPH_FAULTS = {
    "no activation": (_linear, "expected a Relu between it and the convolution before"),
    "stride": (_set("Conv", "strides", [2, 2]), r"expected strides \[1, 1\], found \[2, 2\]"),
    "padding": (_set("Conv", "pads", [0] * 4), r"expected pads \[1, 1, 1, 1\], found \[0, 0"),
    "dilation": (_set("Conv", "dilations", [2, 2]), r"expected dilations \[1, 1\]"),
    "pooling window": (_set("MaxPool", "kernel_shape", [3, 3]), r"expected kernel_shape \[2, 2\]"),
    "pooling rounded up": (_set("MaxPool", "ceil_mode", 1), "expected ceil_mode 0, found 1"),
    "activation": (_rename_kind("Relu", "LeakyRelu"), "expected one of .*Relu.*found LeakyRelu"),
    "normalised images": (_normalise_images, "expected one of Conv.*found Sub"),
    "batch norm": (_batch_norm, "expected one of Conv.*found BatchNormalization"),
    "branch": (_branch, "expected a chain"),
    "quantised": (_quantised_weight, "expected one of Conv.*found DequantizeLinear"),
    "weights left out": (_weights_left_out, r"expected its kernel 'features\.2\.weight'"),
}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_onnx_graph_that_computes_something_else(fault, plain, tmp_path):
    change, message = GRAPH_FAULTS[fault]
    graph = vgg_files.torch_graph(plain)
    change(graph)
    graph.save(tmp_path / "a.onnx")
    with pytest.raises(WeightError, match=message):
        weights.load(tmp_path / "a.onnx", BODY_SPEC)


def test_onnx_graph_without_convolutions(tmp_path):
    graph = vgg_files.Graph("input", [1, 4])
    graph.add("Gemm", "output", ("weight", np.zeros((4, 2), np.float32)))
    graph.save(tmp_path / "a.onnx")
    with pytest.raises(WeightError, match="expected a graph with convolutions, found no Conv"):
        weights.read(tmp_path / "a.onnx")


def test_onnx_weight_in_the_classifier_that_a_vgg_has_not(plain, tmp_path):
    """A scaling in the classifier is in the way of the whole network, not of the body."""
    graph = vgg_files.torch_graph(plain)
    graph.add("Mul", "scaled", ("scale", np.ones(3, np.float32)))
    graph.save(tmp_path / "a.onnx")
    with pytest.raises(WeightError, match=r"found besides: scale \(shape \(3,\)\)"):
        weights.load(tmp_path / "a.onnx", SPEC)
    weights.load(tmp_path / "a.onnx", BODY_SPEC)


def test_onnx_without_its_external_data(plain, tmp_path):
    vgg_files.torch_graph(plain).save(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data")
    weights.load(tmp_path / "b.onnx", SPEC)
    os.remove(tmp_path / "b.data")
    with pytest.raises(WeightError, match=r"b\.onnx.*b\.data"):
        weights.load(tmp_path / "b.onnx", SPEC)


class RunsCode:
    """Its pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickle_that_runs_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    folder = str(tmp_path / "made")
    torch.save({"features.0.weight": RunsCode(folder)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(RunsCode(folder), protocol=2))
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightError, match=f"{name}: .*its pickle would run code"):
            weights.load(tmp_path / name, SPEC)
    assert not os.path.exists(folder)
    # The file would have run it.
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert os.path.isdir(folder)
