"""Errors at the outputs with other weights in one layer: against networks with these weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel import calibrate, error_curves, measure_errors
from accel.output_errors import OtherWeights, output_errors
from accel.program import trace

BATCH = 8


class TwoOutputs(nnx.Module):
    """One output of every position, one of every image, and a number that is of no image."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, images):
        maps = nnx.relu(self.conv(images))
        return maps, 10 * self.head(maps.mean((1, 2))), jnp.float32(3)


def layer_of(model: nnx.Module, path: str):
    for part in path.split("/"):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


# Of 21 images the last batch is filled up: what fills it up must not count.
@pytest.mark.parametrize("count", [16, 21])
@pytest.mark.parametrize(
    ("name", "path"),
    [("chain", "strided"), ("chain", "dilated"), ("residual", "blocks/1/conv2"), ("two", "head")],
)
def test_it_is_the_error_of_a_network_with_these_weights(name, path, count):
    model = TwoOutputs(nnx.Rngs(0)) if name == "two" else networks.network(name)
    model.eval()
    images = np.array(networks.images(count))
    images[: count // 2] *= 2
    specified = jax.ShapeDtypeStruct((BATCH, *images.shape[1:]), jnp.float32)
    program = trace(model, specified, (nnx.Conv, nnx.Linear))
    (call,) = (call for call in program.calls if call.path == path)
    kernel = np.asarray(layer_of(model, path).kernel[...])
    random = np.random.default_rng(0)
    others, wanted = [], []
    for size in (0.0, 0.1, 1.0):
        change = size * random.standard_normal(kernel.shape).astype(np.float32)
        shift = size * random.standard_normal(kernel.shape[-1]).astype(np.float32)
        others.append(OtherWeights((kernel - change).reshape(-1, kernel.shape[-1]), shift))
        changed = nnx.clone(model)
        layer = layer_of(changed, path)
        layer.kernel[...] = jnp.asarray(kernel - change)
        if layer.bias is None:
            # Where there is no bias, the batch norm behind it takes the shift off its mean.
            norm = layer_of(changed, path.replace("conv", "norm")) if name == "residual" else None
            if norm is None:
                layer.bias = nnx.Param(jnp.asarray(shift))
                layer.use_bias = True
            else:
                norm.mean[...] = norm.mean[...] - shift
        else:
            layer.bias[...] = layer.bias[...] + shift
        # Of the outputs, those that are of each image.
        pairs = zip(jax.tree.leaves(model(images)), jax.tree.leaves(changed(images)), strict=True)
        pairs = [(np.asarray(f, np.float64), np.asarray(g, np.float64)) for f, g in pairs]
        wanted.append(sum(((f - g) ** 2).sum() / (f**2).sum() for f, g in pairs if f.ndim))
    found = output_errors(program, call, images, BATCH, others)
    assert found[0] == 0
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_errors_of_a_kind_are_scaled_by_what_the_outputs_lost(monkeypatch):
    """Planted: of every chain that is tried the network loses four times as much, or nothing."""
    calibration = calibrate(
        networks.network("chain"), networks.images(40), decompositions=("channel", "spatial")
    )

    def curves(factor: float):
        def planted(*arguments):
            real = output_errors(*arguments)
            tried.append(real)
            return factor * real

        tried: list[np.ndarray] = []
        monkeypatch.setattr(error_curves, "output_errors", planted)
        return measure_errors(calibration), tried

    once, tried = curves(1.0)
    assert all((real > 0).all() for real in tried)
    # One of each kind of every layer.
    assert [len(real) for real in tried] == [
        len({candidate.decomposition for candidate in once[call.path].candidates})
        for call in calibration.calls
    ]
    four_times, _ = curves(4.0)
    never, _ = curves(0.0)
    for path, curve in once.items():
        scale = 4.0**error_curves.EFFECT
        np.testing.assert_allclose(four_times[path].errors, scale * curve.errors, rtol=1e-6)
        assert (never[path].errors < 1e-3 * curve.errors).all()
