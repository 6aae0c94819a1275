"""The solver by autodiff against SciPy's own descent, and with another loss."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from test_activations import ORACLES

from accel.solvers import Alternating, Gradient, ReducedRankRegression, Responses

RANK = 3


@pytest.fixture(scope="module")
def responses() -> Responses:
    random = np.random.default_rng(3)
    targets = random.standard_normal((150, 12)) * np.arange(1, 13) ** -0.7
    targets = targets @ random.standard_normal((12, 12)) + random.standard_normal(12)
    return Responses(targets + 0.3 * random.standard_normal(targets.shape), targets)


@pytest.mark.parametrize("activation", ["relu", "exact_gelu", "tanh"])
def test_it_ends_as_low_as_another_descent_from_the_same_start(responses, activation):
    r = ORACLES[activation]
    inputs, targets = responses
    start = ReducedRankRegression()(responses, RANK, activation)
    shapes = [np.shape(factor) for factor in start[:3]]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def error(flat: np.ndarray) -> float:
        reduce, expand, bias = (
            part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)
        )
        return float(((r(targets) - r(inputs @ reduce.T @ expand.T + bias)) ** 2).sum())

    flat = np.concatenate([np.asarray(factor, np.float64).ravel() for factor in start[:3]])
    theirs = scipy.optimize.minimize(error, flat, method="L-BFGS-B", options={"maxfun": 100_000})
    ours = Gradient(iterations=200)(responses, RANK, activation)
    assert ours.info.linear_objective == pytest.approx(error(flat), rel=1e-9)
    assert theirs.fun < 0.97 * error(flat)
    # Neither is promised the global minimum.
    assert ours.info.objective < 1.01 * theirs.fun


@pytest.mark.parametrize("activation", ["relu", "silu", "sigmoid"])
def test_it_goes_down_at_least_as_far_as_by_turns(responses, activation):
    alternating, gradient = (
        solver(responses, RANK, activation).info.objective for solver in (Alternating(), Gradient())
    )
    assert gradient < 1.001 * alternating


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust(Gradient):
    """Large errors count linearly."""

    def loss(self, wanted, found):
        return jnp.sum(optax.losses.huber_loss(found, wanted, delta=0.1))


def test_another_loss_is_a_subclass(responses):
    random = np.random.default_rng(0)
    spoiled = responses.targets.copy()
    rows = random.choice(len(spoiled), 10, replace=False)
    spoiled[rows] += 30 * random.standard_normal((10, 12))
    robust, squared = (
        solver(Responses(responses.inputs, spoiled), RANK) for solver in (Robust(), Gradient())
    )

    def error(found) -> float:
        kept = np.delete(np.arange(len(spoiled)), rows)
        reduce, expand, bias = (np.asarray(factor) for factor in found[:3])
        outputs = responses.inputs[kept] @ reduce.T @ expand.T + bias
        return float(((np.maximum(responses.targets[kept], 0) - np.maximum(outputs, 0)) ** 2).sum())

    assert robust.info.objective < robust.info.linear_objective
    # Rows that are nonsense pull less.
    assert error(robust) < 0.7 * error(squared)


def test_iterations_are_checked():
    with pytest.raises(ValueError, match="iterations must be 1 or more, found 0"):
        Gradient(iterations=0)
