"""Weights of every format and naming give the network that they were written from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import vgg_files
from flax import nnx
from safetensors.numpy import save_file
from vgg_files import BATCH_NORM_SPEC, BODY_SPEC, SPEC, Weights

from accel import weights
from accel.models import ModelSpec
from accel.weights.naming import recognise


@pytest.fixture(scope="module")
def plain() -> Weights:
    return vgg_files.random_weights()


def _keras(write: Callable) -> Callable[[Path, Weights], None]:
    return lambda path, values: write(path, vgg_files.keras_layers(values))


WRITERS: dict[str, tuple[str, Callable[[Path, Weights], None]]] = {
    "native": ("a.safetensors", lambda path, w: save_file(vgg_files.native(w), path)),
    "torchvision": ("a.safetensors", lambda path, w: save_file(vgg_files.torchvision(w), path)),
    "timm": ("a.SafeTensors", lambda path, w: save_file(vgg_files.timm(w), path)),
    "keras.applications": ("a.h5", _keras(vgg_files.write_keras_applications)),
    "keras 2": ("a.h5", _keras(vgg_files.write_keras_2)),
    "keras model": ("a.hdf5", _keras(vgg_files.write_keras_model)),
    "keras 3": ("a.weights.h5", _keras(vgg_files.write_keras_3)),
    "onnx of torch": ("a.onnx", lambda path, w: vgg_files.torch_graph(w).save(path)),
    "onnx of torch, unnamed": (
        "a.onnx",
        lambda path, w: vgg_files.torch_graph(w, named=False).save(path),
    ),
    "onnx of keras": ("a.onnx", lambda path, w: vgg_files.keras_graph(w).save(path)),
    "onnx of keras, unnamed": (
        "a.onnx",
        lambda path, w: vgg_files.keras_graph(w, named=False).save(path),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_network_and_body_compute_what_numpy_computes(writer, plain, tmp_path):
    name, write = WRITERS[writer]
    write(tmp_path / name, plain)
    images = vgg_files.images()

    model = weights.load(tmp_path / name, SPEC)
    np.testing.assert_allclose(
        model(images), vgg_files.network_output(plain, images), rtol=1e-4, atol=1e-4
    )
    # The body alone comes from the same file, which has a classifier.
    body = weights.load(tmp_path / name, BODY_SPEC)
    features = vgg_files.body_output(plain, images).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(body(images), features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("naming", ["native", "torchvision", "timm"])
def test_batch_norm(naming, tmp_path):
    values = vgg_files.random_weights(batch_norm=True)
    save_file(getattr(vgg_files, naming)(values), tmp_path / "a.safetensors")
    images = vgg_files.images()
    model = weights.load(tmp_path / "a.safetensors", BATCH_NORM_SPEC)
    np.testing.assert_allclose(
        model(images), vgg_files.network_output(values, images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", ["torch_graph", "keras_graph"])
def test_onnx_agrees_with_onnxruntime(layout, plain, tmp_path):
    graph = getattr(vgg_files, layout)(plain)
    graph.save(tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    images = vgg_files.images()
    ours = weights.load(tmp_path / "a.onnx", SPEC)(images)
    if layout == "torch_graph":
        (theirs,) = session.run(None, {"input.1": images.transpose(0, 3, 1, 2)})
    else:
        (theirs,) = session.run(None, {"input": images})
        ours = jax.nn.softmax(ours)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_keras_file_without_top(plain, tmp_path):
    layers = vgg_files.keras_layers(plain)
    body = {name: tensors for name, tensors in layers.items() if name.startswith("block")}
    vgg_files.write_keras_applications(tmp_path / "notop.h5", body)
    model = weights.load(tmp_path / "notop.h5", BODY_SPEC)
    np.testing.assert_array_equal(model.conv3_3.kernel[...], body["block3_conv3"][0])
    with pytest.raises(weights.WeightError, match=r"missing fc1/bias \(fc6\.bias, shape \(12,\)\)"):
        weights.load(tmp_path / "notop.h5", SPEC)


def test_keras_layers_without_keras_names_go_by_their_order(plain, tmp_path):
    layers = vgg_files.keras_layers(plain)
    renamed = {f"my_layer_{index}": tensors for index, tensors in enumerate(layers.values())}
    vgg_files.write_keras_2(tmp_path / "a.h5", renamed)
    model = weights.load(tmp_path / "a.h5", SPEC)
    np.testing.assert_array_equal(model.conv2_2.bias[...], plain["conv2_2"]["bias"])
    np.testing.assert_array_equal(model.fc8.bias[...], plain["fc8"]["bias"])


def test_more_than_ten_numbered_keras_layers_stay_in_order(tmp_path):
    layers = {
        f"layer{index}": (np.full((3, 3, 1, 1), index, np.float32), np.zeros(1, np.float32))
        for index in range(12)
    }
    vgg_files.write_keras_3(tmp_path / "a.weights.h5", layers)
    kernels = [
        tensor.flat[0]
        for tensor in weights.read(tmp_path / "a.weights.h5").values()
        if tensor.ndim > 1
    ]
    assert kernels == list(range(12))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floating_types_become_float32(dtype, plain, tmp_path):
    tensors = {name: tensor.astype(dtype) for name, tensor in vgg_files.native(plain).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    model = weights.load(tmp_path / "a.safetensors", SPEC)
    assert model.conv1_1.kernel.dtype == np.float32
    np.testing.assert_array_equal(
        model.conv1_1.kernel[...], tensors["conv1_1.kernel"].astype(np.float32)
    )


def test_the_network_is_the_one_its_spec_builds(tmp_path):
    """The same structure and types as a built one in evaluation mode; dropout has real keys."""
    values = vgg_files.random_weights(batch_norm=True)
    save_file(vgg_files.native(values), tmp_path / "a.safetensors")
    loaded = weights.load(tmp_path / "a.safetensors", BATCH_NORM_SPEC)
    built = nnx.eval_shape(BATCH_NORM_SPEC.build)
    built.eval()
    assert nnx.graphdef(loaded) == nnx.graphdef(built)
    types = [
        [(path, type(v), v.shape, v.dtype) for path, v in nnx.to_flat_state(nnx.state(model))]
        for model in (loaded, built)
    ]
    assert types[0] == types[1]

    features = np.ones((1, 1000), np.float32)
    np.testing.assert_array_equal(loaded.dropout(features), features)
    loaded.train()
    assert 300 < np.count_nonzero(loaded.dropout(features)) < 700


# The places of the convolutions in torchvision's nn.Sequential of each network.
TORCHVISION = {
    ("vgg11", False): (0, 3, 6, 8, 11, 13, 16, 18),
    ("vgg11", True): (0, 4, 8, 11, 15, 18, 22, 25),
    ("vgg13", False): (0, 2, 5, 7, 10, 12, 15, 17, 20, 22),
    ("vgg13", True): (0, 3, 7, 10, 14, 17, 21, 24, 28, 31),
    ("vgg16", False): (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
    ("vgg16", True): (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40),
    ("vgg19", False): (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34),
    ("vgg19", True): (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49),
}


@pytest.mark.parametrize(("name", "batch_norm"), TORCHVISION)
def test_torchvision_names_of_the_full_networks(name, batch_norm):
    model = nnx.eval_shape(ModelSpec(name, {"batch_norm": batch_norm}).build)
    _, parameters, _ = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    shapes = {".".join(path): v.shape for path, v in nnx.to_flat_state(parameters)}
    places = TORCHVISION[name, batch_norm]
    tensors = {f"features.{place}.weight": np.zeros(()) for place in places}

    sources = recognise(model, shapes, tensors).sources
    assert sources.keys() == shapes.keys()
    convolutions = [f"conv{layer}.kernel" for stage in model.stages for layer in stage]
    assert [sources[layer].name for layer in convolutions] == list(tensors)
    if batch_norm:
        assert sources["norm1_1.var"].name == "features.1.running_var"
    assert sources["fc6.kernel"].name == "classifier.0.weight"
    assert sources["fc6.kernel"].shape == (4096, 25088)
    assert sources["fc8.kernel"].shape == (1000, 4096)
