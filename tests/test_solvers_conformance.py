"""What holds for every solver of the table, and how each refuses what it cannot take."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from monitoring import compilations
from solver_problems import squared_error

from accel.solvers import (
    SOLVERS,
    Alternating,
    ReducedRankRegression,
    Responses,
    objective,
    response_spectrum,
)

WIDTH = 12
LINEAR = ("pca", "reduced_rank_regression")


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    random = np.random.default_rng(0)
    rows = random.standard_normal((150, WIDTH)) * np.arange(1, WIDTH + 1) ** -0.7
    return rows @ random.standard_normal((WIDTH, WIDTH)) + random.standard_normal(WIDTH) * 0.5


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("rows_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_shapes_and_dtypes(name, rows_dtype, dtype, targets):
    rows = targets.astype(rows_dtype)
    found = SOLVERS[name](dtype=dtype)(Responses(rows, rows), 5)
    assert found.reduce.shape == (5, WIDTH)
    assert found.expand.shape == (WIDTH, 5)
    assert found.bias.shape == (WIDTH,)
    expected = np.float64 if rows_dtype is np.float64 and dtype is None else np.float32
    assert {factor.dtype for factor in found[:3]} == {np.dtype(expected)}
    assert all(type(value) is float for value in found.info)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_is_float32_whatever_jaxs_mode_is(name, targets):
    rows = targets.astype(np.float32)
    solver = SOLVERS[name](dtype="float32")
    outside = solver(Responses(rows, rows), 5)
    with jax.enable_x64(True):
        inside = solver(Responses(rows, rows), 5)
    for ours, theirs in zip(inside[:3], outside[:3], strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_monotone_in_rank_and_exact_at_full_rank(name, activation, targets):
    solver, responses = SOLVERS[name](), Responses(targets, targets)
    errors = [
        squared_error(responses, solver(responses, rank, activation), activation)
        for rank in range(1, WIDTH + 1)
    ]
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 1e-24 * np.square(targets).sum()
    assert errors[0] > 0.05 * np.square(targets).sum()


@pytest.mark.parametrize("name", SOLVERS)
def test_the_rank_of_the_map_is_the_one_asked_for(name, targets):
    found = SOLVERS[name]()(Responses(targets, targets), 4)
    singular_values = np.linalg.svd(np.asarray(found.expand) @ np.asarray(found.reduce))[1]
    assert singular_values[3] > 0.1
    assert singular_values[4] < 1e-12


@pytest.mark.parametrize("name", SOLVERS)
def test_no_second_compilation_for_another_rank_or_layer_of_the_same_width(name, targets):
    # A shape of its own, so that the first compilation is here.
    rows = np.concatenate([targets, targets[:7]]).astype(np.float32)
    solver = SOLVERS[name]()
    with compilations() as first:
        solver(Responses(rows, rows), 3)
    with compilations() as later:
        solver(Responses(rows, rows), 3)
        solver(Responses(rows + 1, 2 * rows), 1)
        SOLVERS[name]()(Responses(rows, rows), WIDTH)
    assert first
    assert not later


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaled_responses_have_the_same_map_and_a_scaled_bias(name, scale, targets):
    found, scaled = (
        SOLVERS[name]()(Responses(rows, rows), 4) for rows in (targets, targets * scale)
    )
    # The nonlinear solver's passes over the rows are in float32.
    tolerance = 1e-9 if name in LINEAR else 1e-3
    M, M_scaled = (np.asarray(f.expand) @ np.asarray(f.reduce) for f in (found, scaled))
    np.testing.assert_allclose(M_scaled, M, atol=tolerance)
    np.testing.assert_allclose(
        np.asarray(scaled.bias) / scale, np.asarray(found.bias), atol=tolerance
    )


def test_inputs_in_other_units_give_the_same_outputs(targets):
    units = 10.0 ** np.linspace(-6, 6, WIDTH)
    for solver in (ReducedRankRegression(ridge=0.1), Alternating(ridge=0.1)):
        M, M_scaled = (
            np.asarray(f.expand) @ np.asarray(f.reduce)
            for f in (solver(Responses(rows, targets), 4) for rows in (targets, targets * units))
        )
        np.testing.assert_allclose(M_scaled * units, M, atol=1e-4)


def test_without_an_activation_the_nonlinear_solver_is_the_linear_one(targets):
    found, linear = (
        solver(Responses(targets + 1, targets), 4, "identity")
        for solver in (Alternating(), ReducedRankRegression())
    )
    for ours, theirs in zip(found[:3], linear[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_a_solver_is_a_value(targets):
    assert Alternating() == Alternating()
    with pytest.raises(AttributeError):
        Alternating().ridge = 1.0


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("which", ["inputs", "targets"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name, which, bad, targets):
    broken = targets.astype(np.float32)
    broken[[3, 9], [0, 1]] = bad
    responses = Responses(targets.astype(np.float32), targets.astype(np.float32))
    message = f"{which}: 2 of {targets.size} responses are NaN or infinite"
    with pytest.raises(ValueError, match=message):
        SOLVERS[name]()(responses._replace(**{which: broken}), 3)


def test_the_measures_refuse_values_that_are_not_finite(targets):
    factorization = ReducedRankRegression()(Responses(targets, targets), 3)
    broken = np.where(targets > 1, np.nan, targets)
    with pytest.raises(ValueError, match="inputs: "):
        objective(Responses(broken, targets), factorization)
    with pytest.raises(ValueError, match="targets: "):
        response_spectrum(broken)


@pytest.mark.parametrize("name", SOLVERS)
def test_what_does_not_fit_is_refused(name, targets):
    solver, responses = SOLVERS[name](), Responses(targets, targets)
    for rank in (0, -1, WIDTH + 1):
        with pytest.raises(ValueError, match=f"rank must be from 1 to {WIDTH}.*found {rank}"):
            solver(responses, rank)
    with pytest.raises(ValueError, match="at least 2 rows"):
        solver(Responses(targets[:1], targets[:1]), 1)
    with pytest.raises(ValueError, match="found 149 and 150 rows"):
        solver(Responses(targets[1:], targets), 1)
    with pytest.raises(ValueError, match=r"targets must be .* found float64\[150\]"):
        solver(Responses(targets, targets[:, 0]), 1)
    with pytest.raises(ValueError, match=r"inputs must be .* found int64\[150, 12\]"):
        solver(Responses(targets.astype(np.int64), targets), 1)
    with pytest.raises(ValueError, match="'cosine'"):
        solver(responses, 1, "cosine")


def test_settings_and_shapes_of_single_solvers_are_checked(targets):
    with pytest.raises(ValueError, match="found 11 and 12"):
        SOLVERS["pca"]()(Responses(targets[:, 1:], targets), 3)
    with pytest.raises(ValueError, match=r"ridge must be .* found -1"):
        ReducedRankRegression(ridge=-1.0)
    with pytest.raises(ValueError, match=r"ridge must be .* found nan"):
        Alternating(ridge=float("nan"))
    for pair in ((0.0, 5), (float("nan"), 5), (1.0, 0)):
        with pytest.raises(ValueError, match="schedule must be pairs"):
            Alternating(schedule=(pair,))
    factorization = ReducedRankRegression()(Responses(targets, targets), 3)
    with pytest.raises(ValueError, match="maps 12 channels to 12, the responses have 11 and 12"):
        objective(Responses(targets[:, 1:], targets), factorization)


def test_factors_out_of_the_range_of_float32_stop_the_run(targets):
    huge = Responses(1e-30 * targets, 1e30 * targets)
    with pytest.raises(FloatingPointError, match="float32 gave factors that are not finite"):
        ReducedRankRegression(dtype="float32")(huge, 3)
