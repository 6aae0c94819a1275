"""What holds for every decomposition of the table."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from accel.cost import count_macs
from accel.decompositions import DECOMPOSITIONS, composed
from accel.decompositions.base import kernel_size
from accel.decompositions.split import Cutter, split
from accel.reconstruction import RECONSTRUCTIONS, LayerProblem
from accel.rewrite import chain_for
from accel.solvers import Alternating, ReducedRankRegression
from accel.solvers.kernel_regression import fit_kernel

CONVS = {
    "same": {"padding": "SAME"},
    "valid": {"padding": "VALID"},
    "strided": {"strides": (2, 1), "padding": ((2, 1), (0, 1))},
    "strided same": {"strides": 2},
    "one number": {"padding": 2},
    "dilated": {"kernel_dilation": 2},
    "no bias": {"use_bias": False},
    "circular": {"padding": "CIRCULAR"},
    "pointwise": {"kernel_size": (1, 1)},
    "even": {"kernel_size": (2, 4)},
    "row": {"kernel_size": (1, 5)},
    "one axis": {"kernel_size": (5,)},
    "three axes": {"kernel_size": (3, 2, 3)},
    "dense": {"dense": True},
    "dense, no bias": {"dense": True, "use_bias": False},
}
RNGS = nnx.Rngs(0)
DECOMPOSITION = pytest.mark.parametrize("name", DECOMPOSITIONS)


def convolution(arguments=None, channels=(3, 8), seed=0) -> nnx.Conv | nnx.Linear:
    """A convolution, or with ``dense`` a dense layer."""
    arguments = {"dense": False, **(arguments or {})}
    if arguments.pop("dense"):
        conv = nnx.Linear(*channels, rngs=nnx.Rngs(seed), **arguments)
    else:
        conv = nnx.Conv(*channels, rngs=nnx.Rngs(seed), **{"kernel_size": (3, 3), **arguments})
    if conv.bias is not None:
        conv.bias[...] = jax.random.normal(jax.random.key(seed + 1), conv.bias.shape)
    return conv


def suited(name: str) -> nnx.Conv | nnx.Linear:
    """A layer of 6 input and 10 output channels for a decomposition."""
    return convolution({"dense": DECOMPOSITIONS[name].dense}, channels=(6, 10))


def patches_of(conv: nnx.Conv | nnx.Linear, rows: int, seed: int = 0) -> np.ndarray:
    """Smooth patches, whose values are far from independent of each other."""
    random = np.random.default_rng(seed)
    patch = int(np.prod(conv.kernel.shape[:-1]))
    mixing = np.random.default_rng(99).standard_normal((patch, patch)) * np.arange(1, patch + 1)
    mixed = random.standard_normal((rows, patch)) / np.arange(1, patch + 1) @ (mixing / patch)
    return mixed.astype(np.float32) + np.float32(0.3)


def problem(name, ranks, conv=None, rows=600, noise=0.0, solver=None) -> LayerProblem:
    conv = suited(name) if conv is None else conv
    original = patches_of(conv, rows)
    kernel = np.asarray(conv.kernel[...]).reshape(-1, conv.out_features)
    random = np.random.default_rng(5)
    seen = original + noise * original.std() * random.standard_normal(original.shape)
    return LayerProblem(
        conv=conv,
        decomposition=DECOMPOSITIONS[name],
        ranks=ranks,
        patches=seen.astype(np.float32),
        targets=original @ kernel + np.asarray(conv.bias[...]),
        tuning=np.arange(rows) % 5 == 0,
        activation="relu",
        solver=solver or Alternating(),
    )


def error(found, problem) -> float:
    given = found(problem.structure, problem.patches)
    return float(np.sum((np.maximum(given, 0) - np.maximum(problem.targets, 0)) ** 2))


@pytest.mark.parametrize("name", ["spatial", "spatial_swapped"])
def test_a_convolution_along_one_axis_has_nothing_to_separate(name):
    """channel_input would be the same chain."""
    reason = DECOMPOSITIONS[name].unsuitable(convolution(CONVS["one axis"]))
    assert reason is not None
    assert "nothing to separate" in reason


@DECOMPOSITION
@pytest.mark.parametrize("case", CONVS)
def test_at_full_rank_the_chain_is_the_convolution(name, case):
    conv, decomposition = convolution(CONVS[case]), DECOMPOSITIONS[name]
    if (reason := decomposition.unsuitable(conv)) is not None:
        if decomposition.dense or case.startswith("dense"):
            assert reason.startswith("a convolution" if decomposition.dense else "a dense layer")
            assert decomposition.dense != case.startswith("dense")
            return
        # Only where one factor would be the convolution itself.
        assert "nothing to separate" in reason or "1×1" in reason
        assert case in ("pointwise", "row", "one axis")
        return
    ranks = decomposition.ranks(conv, decomposition.largest_rank(conv))
    images = jax.random.normal(jax.random.key(2), (2, *(7,) * len(kernel_size(conv)), 3))
    kernel = np.asarray(conv.kernel[...], np.float64)
    found, _ = split(
        decomposition.structure(conv), jnp.asarray(kernel.reshape(-1, 8), jnp.float32), ranks
    )
    bias = np.zeros(8, np.float32) if conv.bias is None else np.asarray(conv.bias[...])
    weights = decomposition.weights(conv, ranks, found._replace(bias=bias))
    np.testing.assert_allclose(composed(weights), kernel, atol=1e-4)
    chain = chain_for(conv, decomposition.factors(conv, *ranks), weights)
    np.testing.assert_allclose(chain(images), conv(images), rtol=1e-4, atol=1e-4)


@DECOMPOSITION
@pytest.mark.parametrize("case", CONVS)
def test_macs_are_those_of_an_independent_count(name, case):
    conv, decomposition = convolution(CONVS[case]), DECOMPOSITIONS[name]
    if decomposition.unsuitable(conv) is not None:
        return
    images = jax.ShapeDtypeStruct((1, *(9,) * len(kernel_size(conv)), 3), jnp.float32)
    output = jax.eval_shape(conv, images)
    for rank in (1, 2, 3):
        ranks = decomposition.ranks(conv, rank)
        chain = chain_for(conv, decomposition.factors(conv, *ranks))
        counted = sum(count_macs(chain, images).values())
        assert counted == decomposition.macs(conv, ranks, images.shape[1:-1], output.shape[1:-1])


def test_the_published_configuration_of_vgg16_is_four_times_cheaper():
    """DESIGN: ranks conv1_2 … conv5_3 of the 3d variant, d'' = d', conv1_1 dense: 3.835 GMAC."""
    ranks = (17, 37, 47, 83, 89, 106, 175, 192, 227, 398, 390, 379)
    shapes = [(64, 64, 224), (64, 128, 112), (128, 128, 112), (128, 256, 56), *[(256, 256, 56)] * 2]
    shapes += [(256, 512, 28), *[(512, 512, 28)] * 2, *[(512, 512, 14)] * 3]
    first = 224 * 224 * 9 * 3 * 64
    original = first + sum(side * side * 9 * c * d for c, d, side in shapes)
    accelerated = first
    for (c, d, side), rank in zip(shapes, ranks, strict=True):
        conv = nnx.eval_shape(lambda c=c, d=d: nnx.Conv(c, d, (3, 3), rngs=nnx.Rngs(0)))
        accelerated += DECOMPOSITIONS["channel_spatial"].macs(
            conv, (rank, rank), (side, side), (side, side)
        )
    assert original == 15_346_630_656
    assert accelerated == pytest.approx(3.835e9, rel=1e-3)
    assert original / accelerated == pytest.approx(4.00, abs=0.005)


@DECOMPOSITION
def test_data_free_splits_are_the_singular_value_decompositions(name):
    """Against NumPy in float64; the chains with two ranks against bounds of HOSVD."""
    conv = suited(name)
    structure = DECOMPOSITIONS[name].structure(conv)
    with jax.enable_x64(True):
        kernel = np.asarray(conv.kernel[...], np.float64)
        W = jnp.asarray(kernel.reshape(-1, 10))
        by_output = np.linalg.svd(kernel.reshape(-1, 10), compute_uv=False)
        by_input = np.linalg.svd(np.moveaxis(kernel, -2, 0).reshape(6, -1), compute_uv=False)
        column = kernel if kernel.ndim == 2 else kernel.transpose(0, 2, 1, 3).reshape(18, 30)
        by_column = np.linalg.svd(column, compute_uv=False)
        row = kernel if kernel.ndim == 2 else kernel.transpose(1, 2, 0, 3).reshape(18, 30)
        by_row = np.linalg.svd(row, compute_uv=False)
        tail = lambda values, rank: float((values[rank:] ** 2).sum())  # noqa: E731
        wanted = {
            "channel": (tail(by_output, 4),) * 2,
            "svd": (tail(by_output, 4),) * 2,
            "channel_input": (tail(by_input, 4),) * 2,
            "spatial": (tail(by_column, 4),) * 2,
            "spatial_swapped": (tail(by_row, 4),) * 2,
            "channel_spatial": (
                max(tail(by_column, 4), tail(by_output, 4)),
                tail(by_column, 4) + tail(by_output, 4),
            ),
            "tucker2": (
                max(tail(by_input, 4), tail(by_output, 4)),
                tail(by_input, 4) + tail(by_output, 4),
            ),
        }[name]
        ranks = (4,) if len(DECOMPOSITIONS[name].ranks(conv, 1)) == 1 else (4, 4)
        found, objective = split(structure, W, ranks)
        weights = DECOMPOSITIONS[name].weights(conv, ranks, found)
        reached = float(((composed(weights) - kernel) ** 2).sum())
    assert reached == pytest.approx(objective, rel=1e-6)
    assert wanted[0] * (1 - 1e-6) <= reached <= wanted[1] * (1 + 1e-6)


@DECOMPOSITION
def test_sweeps_lower_the_objective_and_the_metric_counts(name):
    conv = suited(name)
    decomposition = DECOMPOSITIONS[name]
    structure = decomposition.structure(conv)
    ranks = decomposition.ranks(conv, 4)
    patches = patches_of(conv, 900)
    with jax.enable_x64(True):
        covariance = jnp.asarray(
            np.cov(patches.T.astype(np.float64)) + 1e-6 * np.eye(len(patches.T))
        )
        W = jnp.asarray(np.asarray(conv.kernel[...], np.float64).reshape(-1, 10))

        def in_metric(found) -> float:
            kernel = composed(decomposition.weights(conv, ranks, found)).reshape(-1, 10)
            np.testing.assert_allclose(found.kernel(structure), kernel, atol=1e-6)
            return float(np.trace((kernel - W).T @ covariance @ (kernel - W)))

        free, _ = split(structure, W, ranks)
        found = [split(structure, W, ranks, covariance, sweeps) for sweeps in (0, 1, 4)]
        cut = Cutter(structure, W, ranks[0] + 2, covariance).composed(structure, ranks)
        plain = composed(decomposition.weights(conv, ranks, found[0][0])).reshape(-1, 10)
        measured = [in_metric(factors) for factors, _ in (*found, (free, 0.0))]
    errors = [objective for _, objective in found]
    np.testing.assert_allclose(measured[:3], errors, rtol=1e-5)
    assert errors[2] <= errors[1] * (1 + 1e-9)
    assert errors[1] <= errors[0] * (1 + 1e-9)
    if structure.first_axes is not None:
        assert errors[2] < 0.999 * errors[0]
    assert errors[2] < measured[3]
    np.testing.assert_allclose(cut, plain, atol=1e-6 * np.abs(plain).max())


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
@DECOMPOSITION
def test_errors_fall_with_the_rank_to_nothing(name, reconstruction):
    decomposition, conv = DECOMPOSITIONS[name], suited(name)
    largest = decomposition.largest_rank(conv)
    errors = []
    for rank in (1, 3, 6, largest):
        given = problem(name, decomposition.ranks(conv, min(rank, largest)), conv)
        errors.append(error(RECONSTRUCTIONS[reconstruction](given), given))
    energy = float(np.sum(np.maximum(given.targets, 0) ** 2))
    assert errors[0] > 1e-2 * energy
    assert all(later <= before * 1.02 for before, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-6 * energy


@DECOMPOSITION
def test_responses_beat_weights_and_joint_beats_responses(name):
    """On rows of their own, with inputs that differ from the original network's."""
    decomposition, conv = DECOMPOSITIONS[name], suited(name)
    ranks = decomposition.ranks(conv, 3)
    for solver in (ReducedRankRegression(), Alternating()):
        given = problem(name, ranks, conv, rows=2000, noise=0.2, solver=solver)
        errors = {
            reconstruction: error(RECONSTRUCTIONS[reconstruction](given), given)
            for reconstruction in RECONSTRUCTIONS
        }
        assert errors["responses"] < errors["weights"]
        assert errors["joint"] < 1.02 * errors["responses"]


def test_the_kernel_fit_is_the_optimum_of_its_objective():
    """Against the normal equations by NumPy in float64, at both ends of the ridge."""
    given = problem("channel", (3,), rows=800, noise=0.3)
    x, y = (rows.astype(np.float64) for rows in (given.patches, given.targets))
    x, y = x - x.mean(0), y - y.mean(0)
    prior = given.kernel.astype(np.float64)
    with jax.enable_x64(True):
        for ridge in (1e-3, 1.0):
            found = fit_kernel(
                given.patches, given.targets, given.kernel, given.tuning, ridges=(ridge,)
            )
            penalty = ridge * np.diag((x**2).mean(0))
            expected = np.linalg.solve(
                x.T @ x / len(x) + penalty, x.T @ y / len(x) + penalty @ prior
            )
            np.testing.assert_allclose(found.kernel, expected, atol=2e-5 * np.abs(expected).max())
        stays = fit_kernel(given.patches, given.targets, given.kernel, given.tuning, (1e6,))
        np.testing.assert_allclose(stays.kernel, prior, atol=1e-5)


def test_fewer_rows_lead_to_a_stronger_prior():
    ridges = []
    for rows in (60, 20_000):
        given = problem("channel", (3,), rows=rows, noise=0.5)
        with jax.enable_x64(True):
            fit = fit_kernel(given.patches, given.targets, given.kernel, given.tuning)
        ridges.append(fit.ridge)
    assert ridges[0] > ridges[1]


def test_without_rows_to_set_aside_the_prior_is_strong():
    given = problem("channel", (3,), rows=40)
    for tuning in (np.zeros(40, bool), np.ones(40, bool)):
        with jax.enable_x64(True):
            fit = fit_kernel(given.patches, given.targets, given.kernel, tuning)
        assert fit.ridge == 1.0
        assert np.isfinite(fit.kernel).all()


@DECOMPOSITION
def test_what_does_not_fit_is_refused(name):
    decomposition = DECOMPOSITIONS[name]
    grouped = nnx.Conv(6, 12, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0))
    transposed = nnx.Conv(6, 12, (3, 3), input_dilation=2, rngs=nnx.Rngs(0))
    if decomposition.dense:
        own = nnx.Linear(6, 12, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=RNGS)
        assert "a product of its own" in str(decomposition.unsuitable(own))
        assert decomposition.unsuitable(grouped) == "a convolution"
    else:
        assert "grouped convolution (3 groups)" in str(decomposition.unsuitable(grouped))
        assert "dilated input" in str(decomposition.unsuitable(transposed))
    conv = suited(name)
    count = len(decomposition.ranks(conv, 1))
    for ranks in ((1,) * (count + 1), (0,) * count):
        with pytest.raises(ValueError, match=f"{name} takes {count} ranks of 1 or more"):
            decomposition.factors(conv, *ranks)
