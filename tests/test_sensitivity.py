"""The metric of the outputs: against Jacobians written by hand, and against what really happens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

import accel
from accel import calibrate, measure_sensitivity, reconstruct
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import trace
from accel.progress import Progress
from accel.sensitivity import Sensitivity, sensitivity_matrices, whitening

IMAGES = np.asarray(networks.images(200))
BATCH = 40


def measured(model: nnx.Module, images: np.ndarray = IMAGES):
    program = trace(model, jax.ShapeDtypeStruct((BATCH, *images.shape[1:]), jnp.float32))
    found = sensitivity_matrices(
        program, program.calls, images, batch_size=BATCH, seed=0, progress=Progress()
    )
    return program, found


class Pointwise(nnx.Module):
    """A network whose Jacobian is a product of matrices at every position."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 6, (1, 1), rngs=rngs)
        self.second = nnx.Conv(6, 4, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


# 130 images leave a last batch that is filled up: what fills it up must not count.
@pytest.mark.parametrize("count", [200, 130])
def test_it_is_the_mean_square_of_the_jacobian(count):
    model = Pointwise(nnx.Rngs(0))
    images = IMAGES[:count].copy()
    images[: count // 2] *= 3
    _, found = measured(model, images)
    first, second = (
        np.asarray(c.kernel[...], np.float64)[0, 0] for c in (model.first, model.second)
    )
    x = images.reshape(-1, 3).astype(np.float64)
    mask = (x @ first + np.asarray(model.first.bias[...]) > 0).astype(np.float64)
    outputs = np.asarray(model(images), np.float64)
    # Energy of the outputs per image over positions per image is the mean square of an output row.
    energy = np.sum(outputs**2) / outputs[..., 0].size
    expected = (mask.T @ mask / len(mask)) * (second @ second.T) / energy
    scale = np.abs(expected).max()
    for matrix in found["second"]:  # No activation follows it.
        np.testing.assert_allclose(matrix, np.eye(4) / energy, atol=0.05 / energy)
    np.testing.assert_allclose(found["first"].responses, expected, atol=0.05 * scale)
    unmasked = second @ second.T / energy
    np.testing.assert_allclose(
        found["first"].activations, unmasked, atol=0.05 * np.abs(unmasked).max()
    )


@pytest.mark.parametrize("name", networks.NETWORKS)
@pytest.mark.parametrize("after_activation", [False, True])
def test_it_foretells_what_small_errors_do_to_the_outputs(name, after_activation):
    program, found = measured(networks.network(name))
    random = np.random.default_rng(0)
    batches = [jnp.asarray(part) for part in np.split(IMAGES, len(IMAGES) // BATCH)]
    for call in program.calls:
        variable = call.activated if after_activation else call.output
        run = jax.jit(program.with_added([variable]))
        shape = variable.aval.shape
        mixing = random.standard_normal((shape[-1], shape[-1]))
        seen, energy = 0.0, 0.0
        for batch in batches:
            delta = 1e-3 * random.standard_normal(shape) @ mixing
            (plain,) = run(program.parameters, batch, [jnp.zeros(shape)])
            (outputs,) = run(program.parameters, batch, [jnp.asarray(delta, jnp.float32)])
            seen += float(jnp.sum((outputs - plain) ** 2))
            energy += float(jnp.sum(plain**2))
        foretold = 1e-6 * np.trace(found[call.path][after_activation] @ mixing.T @ mixing)
        assert seen / energy == pytest.approx(foretold, rel=0.25)


def test_whitening_is_a_root_of_the_damped_metric():
    random = np.random.default_rng(0)
    factor = random.standard_normal((5, 3))
    sensitivity = factor @ factor.T
    whiten, unwhiten = whitening(sensitivity, 0.5)
    damped = sensitivity * 5 / np.trace(sensitivity) + 0.5 * np.eye(5)
    np.testing.assert_allclose(whiten @ whiten, damped / 1.5, atol=1e-12)
    np.testing.assert_allclose(whiten @ unwhiten, np.eye(5), atol=1e-12)
    for matrix in whitening(np.zeros((5, 5))):
        np.testing.assert_array_equal(matrix, np.eye(5))


class Narrow(nnx.Module):
    """Its second layer is as wide as the first, but the outputs hang on three directions of it."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.wide = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.head = nnx.Conv(16, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.head(self.wide(nnx.relu(self.body(x))))


def test_what_the_outputs_do_not_hang_on_is_what_is_given_up():
    model = Narrow(nnx.Rngs(0))
    calibration = calibrate(model, IMAGES, decompositions=("channel",))
    plan = AccelerationPlan(
        (LayerPlan("body"), LayerPlan("wide", "channel", (3,)), LayerPlan("head")), {}
    )
    blind = {"wide": Sensitivity(np.eye(16), np.eye(16))}
    errors = []
    for sensitivity in (measure_sensitivity(calibration), blind):
        result = reconstruct(
            calibration, plan, sensitivity=sensitivity, solver="reduced_rank_regression"
        )
        expected, found = (m(networks.images(50, seed=2)) for m in (model, result.model))
        errors.append(float(jnp.sum((found - expected) ** 2) / jnp.sum(expected**2)))
    assert errors[0] < 0.05 * errors[1]


class Undifferentiable(nnx.Module):
    """A root whose slope at zero is infinite."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return jnp.sqrt(nnx.relu(self.conv(x)))


class Choosing(nnx.Module):
    """Returns class numbers alone."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return jnp.argmax(self.conv(x), axis=-1)


class Rounding(nnx.Module):
    """Its outputs hang on the layer, but no gradient tells."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        return jnp.round(self.conv(x))


class Standardising(nnx.Module):
    """Divides by what it finds in an image; returns a scalar beside what belongs to images."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = x / jnp.std(x, axis=(1, 2, 3), keepdims=True)
        y = self.conv(x)
        return y, y.mean((1, 2)).reshape(-1), jnp.mean(y), jnp.argmax(y, -1)


def test_outputs_that_are_not_of_images_do_not_count_and_filled_up_batches_do_no_harm():
    _, whole = measured(Standardising(nnx.Rngs(0)), IMAGES[: 2 * BATCH])
    _, found = measured(Standardising(nnx.Rngs(0)), IMAGES[: 2 * BATCH - 1])
    for some, all_of_them in zip(found["conv"], whole["conv"], strict=True):
        assert np.trace(some) == pytest.approx(np.trace(all_of_them), rel=0.1)


def test_networks_without_usable_gradients_are_named():
    with pytest.raises(ValueError, match="conv: no gradient of the outputs reaches it"):
        measured(Rounding(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="conv: gradients of the outputs hold NaN or Inf"):
        measured(Undifferentiable(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="returns no floating-point numbers of each image"):
        measured(Choosing(nnx.Rngs(0)))


def test_the_paper_needs_no_gradients():
    """Its own reconstruction and ranks run on a network that cannot be differentiated."""
    result = accel.accelerate(
        Undifferentiable(nnx.Rngs(0)),
        IMAGES[:20],
        1.2,
        decompositions="channel",
        reconstruction="responses",
        rank_selection="exact_energy",
    )
    assert result.report.macs["speedup"] >= 1.2


class Silenced(nnx.Module):
    """A branch that is multiplied by zero, as residual branches are when training begins."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.branch = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.gate = nnx.Param(jnp.zeros(4))

    def __call__(self, x):
        x = self.conv(x)
        return x + self.gate[...] * self.branch(x)


def test_a_branch_that_is_multiplied_by_zero_is_not_felt():
    _, found = measured(Silenced(nnx.Rngs(0)), IMAGES[:BATCH])
    assert not found["branch"].responses.any()
    assert found["conv"].responses.any()
