"""The solvers' optima, against NumPy and SciPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from solver_problems import make_problem, squared_error

from accel.solvers import (
    PCA,
    SOLVERS,
    Alternating,
    Gradient,
    ReducedRankRegression,
    Responses,
    objective,
    response_spectrum,
)
from accel.solvers.activations import relu_z_step

SEEDS = range(200)
# No map that is applied in float64 can be told from the optimum below this share of the energy.
FLOAT64_FLOOR = 1e-22


def energy(rows) -> float:
    return float((np.asarray(rows, np.float64) ** 2).sum())


def regression_optimum(responses: Responses, rank: int) -> float:
    """Least ``Σ‖y - (M ŷ + b)‖²`` at a rank: what ŷ cannot explain, and the fit's own tail.

    The inputs' column space comes from a QR with column pivoting of the scaled channels.
    """
    inputs, targets = (rows - rows.mean(0) for rows in responses)
    magnitude = np.abs(responses.inputs).max(0) * np.sqrt(len(inputs))
    live = np.linalg.norm(inputs, axis=0) > 1e-13 * magnitude
    scaled = inputs[:, live] / np.linalg.norm(inputs[:, live], axis=0)
    basis, triangle, _ = scipy.linalg.qr(scaled, mode="economic", pivoting=True)
    basis = basis[:, np.abs(np.diag(triangle)) > 1e-12]
    fit = basis @ (basis.T @ targets)
    tail = scipy.linalg.svd(fit, compute_uv=False)[rank:]
    return energy(targets - fit) + energy(tail)


@pytest.mark.parametrize("solver", [PCA(), ReducedRankRegression()], ids=["pca", "regression"])
def test_linear_solvers_reach_the_optimum(solver):
    for seed in SEEDS:
        name, responses, rank = make_problem(seed)
        if isinstance(solver, PCA):
            responses = Responses(responses.targets, responses.targets)
            centred = responses.targets - responses.targets.mean(0)
            optimum = energy(scipy.linalg.svd(centred, compute_uv=False)[rank:])
        else:
            optimum = regression_optimum(responses, rank)
        found = squared_error(responses, solver(responses, rank, "identity"), "identity")
        allowed = 1e-8 * optimum + FLOAT64_FLOOR * energy(responses.targets)
        assert abs(found - optimum) <= allowed, (seed, name, rank, found, optimum)


def test_regression_solves_the_generalized_eigenproblem_of_the_paper():
    """``Z Yᵀ (Y Yᵀ)⁻¹ Y Zᵀ`` has as leading eigenvalues the energy that the best maps explain."""
    random = np.random.default_rng(3)
    inputs = random.standard_normal((300, 10)) @ random.standard_normal((10, 10)) + 2
    targets = inputs @ random.standard_normal((10, 7)) + random.standard_normal((300, 7))
    Y, Z = (rows - rows.mean(0) for rows in (inputs, targets))
    # The generalized problem S_yz S_zy v = μ S_yy v has the same eigenvalues.
    explained = scipy.linalg.eigh(Y.T @ Z @ Z.T @ Y, Y.T @ Y, eigvals_only=True)[::-1]
    for rank in range(1, 8):
        factorization = ReducedRankRegression()(Responses(inputs, targets), rank, "identity")
        found = squared_error(Responses(inputs, targets), factorization, "identity")
        assert found == pytest.approx(energy(Z) - explained[:rank].sum(), rel=1e-8)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize(
    "solver", [ReducedRankRegression, lambda ridge: Alternating(ridge=ridge)], ids=["rrr", "alt"]
)
def test_ridge_reaches_the_optimum_of_the_penalized_problem(solver, ridge):
    """The penalty as rows of data: ``sqrt(ridge) * length_j`` for input channel j, target 0."""
    _, (inputs, targets), rank = make_problem(0)
    Y, Z = (rows - rows.mean(0) for rows in (inputs, targets))
    penalty = np.sqrt(ridge) * np.diag(np.linalg.norm(Y, axis=0))
    extended = np.vstack([Y, penalty])
    wanted = np.vstack([Z, np.zeros((Y.shape[1], Z.shape[1]))])
    fit = extended @ scipy.linalg.lstsq(extended, wanted)[0]
    optimum = energy(wanted - fit) + energy(scipy.linalg.svd(fit, compute_uv=False)[rank:])

    factorization = solver(ridge=ridge)(Responses(inputs, targets), rank, "identity")
    M = np.asarray(factorization.expand) @ np.asarray(factorization.reduce)
    error = squared_error(Responses(inputs, targets), factorization, "identity")
    assert error + energy(M @ penalty) == pytest.approx(optimum, rel=1e-8)


def test_the_alternating_solver_is_never_worse_than_the_linear_one():
    ratios = []
    for seed in SEEDS:
        name, responses, rank = make_problem(seed)
        alternating = Alternating()(responses, rank)
        linear = ReducedRankRegression()(responses, rank, "identity")
        errors = [squared_error(responses, found, "relu") for found in (alternating, linear)]
        # Both by NumPy, whose own rounding is all that is allowed for.
        floor = 1e-12 * errors[1] + FLOAT64_FLOOR * energy(responses.targets)
        assert errors[0] <= errors[1] + floor, (seed, name, rank, errors)
        info = alternating.info
        assert info.objective <= info.linear_objective
        assert info.objective == pytest.approx(errors[0], rel=1e-9, abs=floor)
        assert info.linear_objective == pytest.approx(errors[1], rel=1e-9, abs=floor)
        assert info.target_energy == pytest.approx(energy(np.maximum(responses.targets, 0)))
        ratios.append(info.objective / max(info.linear_objective, floor))
    assert np.median(ratios) < 0.95
    assert np.mean(np.array(ratios) < 0.999) > 0.6


def test_the_best_iterate_is_returned_not_the_last():
    """A λ far too small after a good one leads away from where the good one had come to."""
    for seed in (0, 2, 4):
        _, responses, rank = make_problem(seed)
        good, longer = (
            Alternating(schedule=schedule)(responses, rank).info
            for schedule in (((1.0, 20),), ((1.0, 20), (1e-6, 5)))
        )
        assert good.objective < 0.99 * good.linear_objective
        assert longer.objective <= good.objective * (1 + 1e-6)


# A descent that is not convex ends elsewhere after other roundings: it has a test of its own.
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "gradient"])
def test_float32_reaches_the_objective_of_float64(solver):
    """Within 1e-4 relative, down to 1e-10 of the targets' energy.

    There the errors of the float32 factors, of about 64 units in the last place, are themselves
    1e-10 of the energy (64² · 2⁻⁴⁶ = 6e-11); enough problems lie well above.
    """
    above = 0
    for seed in SEEDS:
        name, responses, rank = make_problem(seed, np.float32)
        if solver == "pca":
            responses = Responses(responses.targets, responses.targets)
        single, double = (
            squared_error(responses, SOLVERS[solver](dtype=dtype)(responses, rank), "relu")
            for dtype in ("float32", None)
        )
        floor = 1e-10 * energy(responses.targets)
        excess = max(0.0, single - double - floor) / max(double, floor)
        assert excess <= 1e-4, (seed, name, rank, single, double)
        above += double > 1e3 * floor
    assert above >= 50


def test_descents_in_float32_and_float64_end_alike_and_below_the_linear_solution():
    ratios = []
    for seed in range(0, 200, 4):
        name, responses, rank = make_problem(seed, np.float32)
        floor = 1e-10 * energy(responses.targets)
        single, double, linear = (
            squared_error(responses, solver(responses, rank), "relu")
            for solver in (Gradient(dtype="float32"), Gradient(), ReducedRankRegression())
        )
        # Factors of float32 responses are rounded to float32: what they may differ by, as above.
        assert max(single, double) <= (1 + 1e-4) * linear + floor, (seed, name, rank)
        ratios.append((single + floor) / (double + floor))
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.02)
    assert np.median(ratios) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("penalty", [0.01, 0.3, 1.0, 20.0])
def test_z_step_is_the_minimum_over_a_fine_grid(penalty):
    random = np.random.default_rng(0)
    linear = np.concatenate([random.normal(0, 2, 400), [0.0, 0.0, 1.0, -1.0]])
    activated = np.concatenate([np.maximum(random.normal(0, 2, 400), 0), [0.0, 1.0, 0.0, 0.0]])
    grid = np.linspace(-9, 9, 36001)[:, None]

    def cost(z):
        return (activated - np.maximum(z, 0)) ** 2 + penalty * (z - linear) ** 2

    found = np.asarray(
        relu_z_step(linear[None].astype(np.float32), activated[None].astype(np.float32), penalty),
        np.float64,
    )[0]
    least = cost(grid).min(0)
    assert (cost(found) <= least + 1e-5).all()
    # The grid is as fine as that the closed form must not be far below it either.
    assert (cost(found) >= least - 1e-4 * (1 + penalty)).all()
    assert (found < 0).sum() > 50
    assert (found > 0).sum() > 50


@pytest.mark.parametrize("name", SOLVERS)
def test_responses_of_low_rank_are_recovered(name):
    random = np.random.default_rng(5)
    planted = random.standard_normal((170, 4)) @ random.standard_normal((4, 20))
    targets = (planted + random.standard_normal(20)).astype(np.float32)
    held_out = targets[120:]
    fitted = Responses(targets[:120], targets[:120])
    error, total = objective(Responses(held_out, held_out), SOLVERS[name]()(fitted, 4))
    assert error < 1e-11 * total
    error, total = objective(Responses(held_out, held_out), SOLVERS[name]()(fitted, 3))
    assert error > 1e-3 * total


def test_a_planted_map_between_different_inputs_and_targets_is_recovered():
    random = np.random.default_rng(6)
    inputs = random.standard_normal((120, 9)) + 1
    M = random.standard_normal((14, 3)) @ random.standard_normal((3, 9))
    targets = inputs @ M.T + np.arange(14)
    for solver in (ReducedRankRegression(), Alternating()):
        found = solver(Responses(inputs, targets), 3)
        np.testing.assert_allclose(
            np.asarray(found.expand) @ np.asarray(found.reduce), M, atol=1e-12
        )
        np.testing.assert_allclose(np.asarray(found.bias), np.arange(14), atol=1e-12)


def test_a_low_rank_map_behind_a_relu_is_found_better_than_linearly():
    """Targets whose negative parts are anything: only a nonlinear solver can disregard them."""
    random = np.random.default_rng(7)
    planted = random.standard_normal((400, 3)) @ random.standard_normal((3, 16))
    noise = np.where(planted < 0, -3 * random.random((400, 16)), 0)
    responses = Responses(planted, planted + noise)
    info = Alternating(schedule=((0.01, 100), (1.0, 100)))(responses, 3).info
    assert info.objective < 0.2 * info.linear_objective


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_asymmetric_is_no_worse_than_the_symmetric_map_on_perturbed_inputs(activation):
    for seed in range(20):
        random = np.random.default_rng(seed)
        targets = random.standard_normal((120, 8)) @ random.standard_normal((8, 20)) + 0.3
        perturbed = targets @ (np.eye(20) + 0.1 * random.standard_normal((20, 20)))
        responses = Responses(perturbed + 0.2 * random.standard_normal((120, 20)), targets)
        symmetric = Responses(targets, targets)
        for solver in (ReducedRankRegression(), Alternating()):
            better, worse = (
                objective(responses, solver(fitted, 4, activation), activation).squared_error
                for fitted in (responses, symmetric)
            )
            assert better < worse


def test_constant_channels_take_no_part_even_after_rounding():
    """A constant that flickers in its last bit would become a channel of noise when scaled."""
    random = np.random.default_rng(8)
    targets = random.standard_normal((4000, 5)).astype(np.float32)
    flicker = 1 + 2.0**-23 * random.integers(-1, 2, (4000, 3))
    constant = np.full((4000, 3), 1234.567)
    inputs = np.concatenate([targets, constant, constant * flicker], axis=1).astype(np.float32)
    assert inputs.std(0)[8:].all()
    for dtype in ("float32", "float64"):
        found = ReducedRankRegression(dtype=dtype)(Responses(inputs, targets), 5)
        assert not np.asarray(found.reduce)[:, 5:].any()
        assert found.info.objective < 1e-10 * found.info.target_energy


def test_small_live_channels_keep_their_directions():
    """Targets that only a channel 1e12 times smaller than its neighbours explains."""
    random = np.random.default_rng(9)
    inputs = random.standard_normal((500, 6)).astype(np.float32) * np.float32([1e6] * 5 + [1e-6])
    targets = inputs[:, 5:] * np.float32(1e6) * np.ones(4, np.float32)
    for dtype in ("float32", "float64"):
        found = ReducedRankRegression(dtype=dtype)(Responses(inputs, targets), 1)
        assert found.info.objective < 1e-10 * found.info.target_energy


def test_copied_channels_do_not_blow_the_factors_up():
    """Copies that differ in rounding alone: factors that tell them apart would be about 1e7."""
    random = np.random.default_rng(10)
    channels = random.standard_normal((1000, 8)).astype(np.float32)
    copies = channels * (1 + 1e-7 * random.standard_normal((1000, 8))).astype(np.float32)
    inputs = np.concatenate([channels, copies], axis=1)
    targets = channels + random.standard_normal((1000, 8)).astype(np.float32)
    for dtype in ("float32", "float64"):
        found = ReducedRankRegression(dtype=dtype)(Responses(inputs, targets), 8)
        assert np.abs(np.asarray(found.reduce)).max() < 2


def test_responses_without_any_live_channel_give_the_mean():
    inputs, targets = np.zeros((12, 20), np.float32), np.full((12, 20), 2.5, np.float32)
    for name in SOLVERS:
        found = SOLVERS[name]()(Responses(inputs, targets), 2)
        np.testing.assert_allclose(np.asarray(found.bias), 2.5, rtol=1e-6)
        assert found.info.objective < 1e-10


@pytest.mark.parametrize("shape", [(200, 12), (9, 12)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_spectrum_holds_the_eigenvalues_of_the_covariance(shape, dtype):
    random = np.random.default_rng(11)
    targets = random.standard_normal(shape) * 10.0 ** -np.arange(shape[1]) + 3
    targets = targets.astype(dtype)
    found = np.asarray(response_spectrum(targets))
    assert found.shape == (shape[1],)
    assert found.dtype == dtype
    assert (found >= 0).all()
    assert (np.diff(found) <= 0).all()
    singular_values = scipy.linalg.svdvals(targets.astype(np.float64) - targets.mean(0, np.float64))
    wanted = np.pad(singular_values**2 / shape[0], (0, shape[1] - len(singular_values)))
    # Relative in the eigenvalues' square roots to the largest, as singular values are found.
    np.testing.assert_allclose(np.sqrt(found), np.sqrt(wanted), rtol=1e-6, atol=1e-14)


def test_objective_measures_any_rows():
    random = np.random.default_rng(12)
    targets = random.standard_normal((60, 8)).astype(np.float32)
    factorization = ReducedRankRegression()(Responses(targets, targets), 3)
    for activation in ("relu", "identity"):
        for rows in (targets[:1], 1e6 * targets):
            error, total = objective(Responses(rows, rows), factorization, activation)
            wanted = squared_error(Responses(rows, rows), factorization, activation)
            assert error == pytest.approx(wanted, rel=1e-12)
            assert total == pytest.approx(
                energy(np.maximum(rows, 0) if activation == "relu" else rows)
            )
