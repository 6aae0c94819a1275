"""The steps of distillation, against NumPy's singular value decomposition."""

import jax
import numpy as np
import optax
import pytest

from accel.repair import descent as module
from accel.repair.descent import descent

RATE, STEPS = 0.01, 40


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    return {
        "kernel": random.standard_normal((3, 1, 8, 6)).astype(np.float32) / 7,
        "dense": random.standard_normal((5, 9)).astype(np.float32) * 30,
        "bias": random.standard_normal(6).astype(np.float32),
    }


@pytest.fixture
def gradients(arrays):
    """Some directions of each are a hundred times as steep as others."""
    random = np.random.default_rng(1)
    drawn = {name: random.standard_normal(array.shape) for name, array in arrays.items()}
    for name in ("kernel", "dense"):
        drawn[name] *= np.geomspace(1, 100, arrays[name].shape[-1])
    return {name: gradient.astype(np.float32) for name, gradient in drawn.items()}


def first_step(arrays, gradients, rate=RATE):
    steps = descent(rate, STEPS)
    updates, _ = jax.jit(steps.update)(gradients, steps.init(arrays), arrays)
    return {name: np.asarray(update, np.float64) for name, update in updates.items()}


def size(array):
    return np.sqrt(np.mean(np.square(array)))


def cosine(a, b):
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def test_kernels_move_alike_in_all_directions_and_by_the_rates_share_of_their_size(
    arrays, gradients
):
    updates = first_step(arrays, gradients)
    for name in ("kernel", "dense"):
        gradient = gradients[name].astype(np.float64)
        matrix = gradient.reshape(-1, gradient.shape[-1])
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        assert values[0] > 20 * values[-1]
        wanted = -(left @ right).reshape(gradient.shape)
        # The iteration leaves singular values between 0.7 and 1.2.
        assert cosine(updates[name], wanted) > 0.97
        assert cosine(-gradient, wanted) < 0.75
    for name, update in updates.items():
        # The first of the four steps in which the rate rises.
        assert size(update) == pytest.approx(RATE / 4 * size(arrays[name]), rel=1e-4)


def test_steps_do_not_hang_on_the_size_of_gradients(arrays, gradients):
    large = first_step(arrays, {name: 1e4 * gradient for name, gradient in gradients.items()})
    for name, update in first_step(arrays, gradients).items():
        np.testing.assert_allclose(large[name], update, rtol=1e-3, atol=1e-4 * size(update))


def test_what_is_too_large_or_no_matrix_goes_by_adam(arrays, gradients, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 5)
    adam = optax.scale_by_adam()
    wanted, _ = adam.update(gradients, adam.init(arrays), arrays)
    for name, update in first_step(arrays, gradients).items():
        assert (cosine(update, -np.asarray(wanted[name])) > 0.9999) == (name != "dense")


def test_no_gradient_is_no_step(arrays):
    nothing = {name: np.zeros_like(array) for name, array in arrays.items()}
    for update in first_step(arrays, nothing).values():
        np.testing.assert_array_equal(update, 0)
