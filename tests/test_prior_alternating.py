"""The end of a chain fitted with a prior, against least squares by NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from accel.solvers.base import arithmetic
from accel.solvers.prior_alternating import Ending, Prior, fit_ending

ROWS, WIDTH, OUT = 300, 9, 7
PENALTIES = (0.01,) * 15 + (1.0,) * 15


class Problem:
    """Inputs of a network that went wrong a little, with a prior near the truth."""

    def __init__(self, rows: int = ROWS, seed: int = 0, strength: float = 0.05):
        random = np.random.default_rng(seed)
        truth = random.standard_normal((WIDTH, OUT))
        inputs = random.standard_normal((rows, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.5
        self.inputs = (inputs - inputs.mean(0)).astype(np.float32)
        noise = 0.5 * random.standard_normal((rows, OUT))
        self.targets = (self.inputs @ truth + noise - 0.5).astype(np.float32)
        believed = truth + 0.3 * random.standard_normal(truth.shape)
        penalty = strength * np.diag(self.inputs.var(0).astype(np.float64))
        self.penalty, self.believed = penalty, believed
        self.prior = Prior(penalty, penalty @ believed)
        factor = random.standard_normal((OUT, OUT))
        values, vectors = np.linalg.eigh(factor @ factor.T + 0.1 * np.eye(OUT))
        self.whiten = (vectors * np.sqrt(values)) @ vectors.T
        self.unwhiten = np.linalg.inv(self.whiten)

    def fit(self, rank: int | None, penalties=()) -> Ending:
        with arithmetic("float64"):
            return fit_ending(
                self.inputs,
                self.targets,
                self.prior,
                rank,
                self.whiten,
                self.unwhiten,
                penalties,
                "relu",
            )

    def linear_loss(self, matrix: np.ndarray) -> float:
        """``(1/n) Σ‖H (y - ȳ - Mᵀ u)‖²`` and the prior, in the same metric."""
        centred = self.targets - self.targets.mean(0, dtype=np.float64)
        errors = (centred - self.inputs @ matrix) @ self.whiten
        apart = (matrix - self.believed) @ self.whiten
        return (errors**2).sum() / len(errors) + np.trace(apart.T @ self.penalty @ apart)

    def loss(self, ending: Ending) -> float:
        """What is minimised, each channel weighed by the metric's diagonal."""
        weights = np.diag(self.whiten @ self.whiten)
        found = np.maximum(self.inputs @ ending.matrix.astype(np.float64) + ending.bias, 0)
        errors = ((np.maximum(self.targets, 0) - found) ** 2).mean(0)
        apart = ending.matrix - self.believed
        return float(weights @ (errors + np.einsum("kd,kl,ld->d", apart, self.penalty, apart)))


def test_without_turns_and_rank_it_is_ridge_regression():
    problem = Problem()
    found = problem.fit(None)
    u = problem.inputs.astype(np.float64)
    centred = problem.targets - problem.targets.mean(0, dtype=np.float64)
    expected = np.linalg.solve(
        u.T @ u / len(u) + problem.penalty,
        u.T @ centred / len(u) + problem.penalty @ problem.believed,
    )
    np.testing.assert_allclose(found.matrix, expected, atol=1e-5)
    np.testing.assert_allclose(found.bias, problem.targets.mean(0), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_units_of_the_inputs_do_not_matter(scale, dtype):
    problem = Problem()
    inputs = problem.inputs.copy()
    inputs[:, 3] *= np.float32(scale)
    units = np.ones(WIDTH)
    units[3] = scale
    prior = Prior(problem.penalty * np.outer(units, units), problem.prior.cross * units[:, None])

    def fitted(inputs, prior):
        with arithmetic(dtype):
            identity = np.eye(OUT, dtype=dtype)
            prior = Prior(*(part.astype(dtype) for part in prior))
            return fit_ending(
                inputs, problem.targets, prior, None, identity, identity, PENALTIES, "relu"
            ).matrix

    expected, found = fitted(problem.inputs, problem.prior), fitted(inputs, prior)
    np.testing.assert_allclose(found * units[:, None], expected, atol=1e-3 * abs(expected).max())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_rank_is_cut_where_the_metric_says(rank):
    problem = Problem()
    found = problem.fit(rank)
    assert found.left.shape == (WIDTH, rank)
    assert found.right is not None
    assert found.right.shape == (rank, OUT)
    full = problem.fit(None).matrix
    # The optimum by singular values: the loss of the full solution and what is cut off.
    u = problem.inputs.astype(np.float64)
    triangle = np.linalg.cholesky(u.T @ u / len(u) + problem.penalty)
    cut_off = np.linalg.svd(triangle.T @ full @ problem.whiten, compute_uv=False)[rank:]
    expected = problem.linear_loss(full) + (cut_off**2).sum()
    assert problem.linear_loss(found.matrix) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rank", [None, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_turns_through_the_activation_never_raise_the_loss(rank, seed):
    problem = Problem(seed=seed)
    linear, nonlinear = problem.fit(rank), problem.fit(rank, PENALTIES)
    assert problem.loss(nonlinear) < problem.loss(linear)


def test_with_few_rows_the_prior_keeps_it_from_fitting_noise():
    few, many = Problem(rows=14, strength=1.0), Problem(rows=2000)
    free = Problem(rows=14)
    free.prior = Prior(0 * free.penalty, 0 * free.prior.cross)

    def unseen(ending: Ending) -> float:
        found = np.maximum(many.inputs @ ending.matrix + ending.bias, 0)
        return float(((np.maximum(many.targets, 0) - found) ** 2).mean())

    assert unseen(few.fit(None, PENALTIES)) < 0.7 * unseen(free.fit(None, PENALTIES))


def test_inputs_that_repeat_each_other_or_never_vary_do_no_harm():
    problem = Problem()
    problem.inputs[:, 1] = problem.inputs[:, 0]
    problem.inputs[:, 2] = 0
    problem.prior = Prior(0 * problem.penalty, 0 * problem.prior.cross)
    found = problem.fit(3, PENALTIES)
    assert all(np.isfinite(part).all() for part in (found.left, found.right, found.bias))
    assert np.abs(found.matrix).max() < 10
