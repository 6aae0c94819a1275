"""Errors at the outputs with other weights in one layer: against networks with these weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel import calibrate, error_curves, measure_errors
from accel.images import ArraySource
from accel.output_errors import OtherWeights, OutputErrors
from accel.program import trace
from accel.runs import AcceleratedRun

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
    place = program.calls.index(call)
    run = AcceleratedRun(program, program.calls, ArraySource(images), BATCH, cache_bytes=10**6)
    for _ in range(place):
        run.keep()
    batches = list(run.values(-(-count // BATCH)))
    found = OutputErrors(program, program.calls, BATCH)(place, batches, count, others)
    assert found[0] == 0
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_errors_of_a_kind_are_scaled_by_what_the_outputs_lost(monkeypatch):
    """Planted: of every chain that is tried the network loses so many times what was predicted."""
    calibration = calibrate(
        networks.network("chain"), networks.images(40), decompositions=("channel", "spatial")
    )

    def curves(planted):
        class Planted(OutputErrors):
            def __call__(self, layer, batches, images, others):
                real = super().__call__(layer, batches, images, others)
                assert (real > 0).all()
                return planted(real)

        monkeypatch.setattr(error_curves, "OutputErrors", Planted)
        return measure_errors(calibration)

    really = curves(lambda real: real)
    for path, curve in curves(lambda real: 4 * real).items():
        scale = 4**error_curves.EFFECT
        np.testing.assert_allclose(curve.errors, scale * really[path].errors, rtol=1e-6)
    # No effect at all tells nothing: the errors are those that were predicted.
    predicted = curves(lambda real: 0 * real)
    most = error_curves.MOST**error_curves.EFFECT
    for path, curve in curves(lambda real: np.full_like(real, np.nan)).items():
        np.testing.assert_allclose(curve.errors, most * predicted[path].errors, rtol=1e-6)
    for path, curve in really.items():
        scales = curve.errors / predicted[path].errors
        assert ((scales > 1 / most) & (scales < most)).all()
        assert len(np.unique(scales.round(6))) == len({c.decomposition for c in curve.candidates})


def test_what_is_tried_is_the_kernel_of_a_chain_with_the_bias_that_keeps_the_mean(monkeypatch):
    calibration = calibrate(
        networks.network("chain"), networks.images(40), decompositions=("channel", "spatial")
    )
    seen = []

    class Seen(OutputErrors):
        def __call__(self, layer, batches, images, others):
            seen.append((self.calls[layer], batches, others))
            return super().__call__(layer, batches, images, others)

    monkeypatch.setattr(error_curves, "OutputErrors", Seen)
    measure_errors(calibration)
    lower = 0
    for call, batches, others in seen:
        own = np.asarray(call.layer.kernel[...], np.float64)
        for weights in others:
            kernel = weights.kernel.astype(np.float64).reshape(own.shape)
            assert np.abs(kernel - own).max() > 1e-3
            by_output = kernel.reshape(-1, own.shape[-1])
            by_column = kernel.swapaxes(1, 2).reshape(own.shape[0] * own.shape[2], -1)
            # Of full rank as a matrix, one way or the other, it would be no chain of these kinds.
            ranks = [np.linalg.matrix_rank(m, tol=1e-4) for m in (by_output, by_column)]
            full = [min(m.shape) for m in (by_output, by_column)]
            assert any(rank < most for rank, most in zip(ranks, full, strict=True))
            lower += 1
            # Over all patches, of other images too: the mean response hardly changes.
            inputs = np.concatenate([np.asarray(values[0]) for values in batches])
            layer = nnx.clone(call.layer)
            before = np.asarray(layer(jnp.asarray(inputs)), np.float64)
            layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
            change = np.asarray(layer(jnp.asarray(inputs)), np.float64) - before
            drift = np.abs((change + weights.shift).mean((0, 1, 2)))
            assert drift.max() < 0.35 * np.sqrt((change**2).mean())
    assert lower >= 8
