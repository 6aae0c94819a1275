"""Dense layers: `svd` on responses and data-free, with a budget apart from the convolutions'."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx

import accel
from accel import calibrate, reconstruct, select_ranks
from accel.decompositions import DECOMPOSITIONS
from accel.images import ArraySource
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import trace
from accel.reconstruction import RECONSTRUCTIONS, LayerProblem
from accel.report.console import summary
from accel.rewrite import FactorizedConv, FactorizedLinear
from accel.runs import AcceleratedRun, sample_positions
from accel.solvers import Alternating

IMAGES = networks.images(80)
PAIRS = {"decompositions": "channel", "rank_selection": "exact_energy"}


class Classifier(nnx.Module):
    """VGG in small: convolutions, a pooling, three dense layers, the last of them tiny."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(12, 12, (3, 3), rngs=rngs)
        self.fc6 = nnx.Linear(12 * 4, 64, rngs=rngs)
        self.fc7 = nnx.Linear(64, 40, rngs=rngs)
        self.fc8 = nnx.Linear(40, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (3, 3), (3, 3))
        x = nnx.relu(self.fc6(x.reshape(x.shape[0], -1)))
        return self.fc8(nnx.relu(self.fc7(x)))


class Tokens(nnx.Module):
    """Dense layers on [batch, tokens, features], across tokens, and on rows of no image's own."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 8, (2, 2), strides=2, rngs=rngs)
        self.across = nnx.Linear(49, 49, rngs=rngs)
        self.along = nnx.Linear(8, 24, rngs=rngs)
        self.merged = nnx.Linear(24, 24, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x)).reshape(x.shape[0], 49, 8)
        x = self.across(x.swapaxes(1, 2)).swapaxes(1, 2)
        x = nnx.relu(self.along(x))
        return self.merged(x.reshape(-1, 24)).reshape(x.shape)


def dense_problem(ranks, rows=400, rank_of_kernel=None, seed=0) -> LayerProblem:
    """A dense layer with correlated inputs; its kernel has full rank unless one is planted."""
    own, random = np.random.default_rng(11), np.random.default_rng(seed)
    layer = nnx.Linear(20, 16, rngs=nnx.Rngs(1))
    layer.bias[...] = jnp.asarray(own.standard_normal(16), jnp.float32)
    if rank_of_kernel is not None:
        left = own.standard_normal((20, rank_of_kernel))
        layer.kernel[...] = jnp.asarray(left @ own.standard_normal((rank_of_kernel, 16)))
    mixing = np.random.default_rng(7).standard_normal((20, 20)) * 0.6 ** np.arange(20)[:, None]
    given = random.standard_normal((rows, 20)) @ mixing
    targets = given @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
    return LayerProblem(
        conv=layer,
        decomposition=DECOMPOSITIONS["svd"],
        ranks=ranks,
        patches=given.astype(np.float32),
        targets=targets.astype(np.float32),
        tuning=np.arange(rows) % 5 == 0,
        activation="relu",
        solver=Alternating(),
    )


def held_out_error(split, problem) -> float:
    given = np.maximum(split(problem.structure, problem.patches), 0)
    wanted = np.maximum(problem.targets, 0)
    return float(np.sum((given - wanted) ** 2) / np.sum(wanted**2))


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_data_free_it_is_the_truncated_singular_value_decomposition(rank):
    problem = dense_problem((rank,))
    split = RECONSTRUCTIONS["weights"](problem)
    u, s, vt = np.linalg.svd(np.asarray(problem.conv.kernel[...], np.float64))
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(split.middle @ split.last, expected, atol=1e-5)
    np.testing.assert_array_equal(split.bias, problem.bias)


@pytest.mark.parametrize("rows", [12, 400])
def test_on_responses_it_beats_data_free_on_held_out_rows(rows):
    """Also where there are fewer rows than features: `joint` does not fit their noise."""
    fitted, held_out = dense_problem((4,), rows), dense_problem((4,), 500, seed=3)
    errors = {
        name: held_out_error(RECONSTRUCTIONS[name](fitted), held_out)
        for name in ("weights", "joint", *(("responses",) if rows == 400 else ()))
    }
    assert errors["joint"] < 0.6 * errors["weights"]
    assert errors.get("responses", 0.0) < 0.6 * errors["weights"]


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_planted_kernel_of_low_rank_is_recovered(reconstruction):
    problem = dense_problem((3,), rank_of_kernel=3)
    split = RECONSTRUCTIONS[reconstruction](problem)
    held_out = dense_problem((3,), 300, rank_of_kernel=3, seed=3)
    assert held_out_error(split, held_out) < 1e-6
    below = RECONSTRUCTIONS[reconstruction](dense_problem((2,), rank_of_kernel=3))
    assert held_out_error(below, held_out) > 1e-3


def test_patches_are_the_rows_of_the_input_at_the_sampled_positions():
    model = Tokens(nnx.Rngs(0))
    program = trace(model, IMAGES[:8], (nnx.Conv, nnx.Linear))
    assert [call.path for call in program.calls] == ["stem", "across", "along", "merged"]
    call = program.calls[2]
    assert call.activation == "relu"
    positions = sample_positions(jax.random.key(0), call, 8, 8, 5)
    run = AcceleratedRun(program, [call], ArraySource(np.asarray(IMAGES[:8])), 8, 10**9)
    x = nnx.relu(model.stem(IMAGES[:8])).reshape(8, 49, 8)
    x = np.asarray(model.across(x.swapaxes(1, 2)).swapaxes(1, 2))
    expected = np.take_along_axis(x, positions[:, :, None], axis=1)
    np.testing.assert_allclose(run.patches(positions), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def calibration():
    return calibrate(Classifier(nnx.Rngs(0)), IMAGES, decompositions="channel", dense_layers=True)


def test_at_full_rank_the_network_is_the_original(calibration):
    plan = AccelerationPlan(
        tuple(
            LayerPlan(path, kind, (calibration.widths[path],))
            for path, kind in {
                "conv1": "channel", "conv2": "channel", "fc6": "svd", "fc7": "svd", "fc8": "svd"
            }.items()
        )
    )  # fmt: skip
    for reconstruction in RECONSTRUCTIONS:
        model = reconstruct(calibration, plan, reconstruction=reconstruction).model
        expected = Classifier(nnx.Rngs(0))(networks.images(5, seed=99))
        found = model(networks.images(5, seed=99))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_convolutions_and_dense_layers_meet_budgets_of_their_own(tmp_path):
    model = Classifier(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    result = accel.accelerate(model, IMAGES, 1.5, decompositions="channel", dense_speedup=2.0)
    macs = result.report.macs
    dense = 48 * 64 + 64 * 40 + 40 * 2
    assert macs["original"] == 14 * 14 * 9 * 3 * 12 + 7 * 7 * 9 * 12 * 12
    assert macs["dense_original"] == dense
    assert macs["dense_speedup"] == dense / macs["dense_accelerated"] >= 2.0
    assert macs["speedup"] >= 1.5
    layers = {layer.path: layer for layer in result.report.layers}
    for path, (c, d) in {"fc6": (48, 64), "fc7": (64, 40)}.items():
        assert isinstance(getattr(result.model, path), FactorizedLinear)
        (rank,) = layers[path].ranks
        assert layers[path].layer_type == "Linear"
        assert layers[path].macs_accelerated == rank * (c + d)
        assert layers[path].response_error < 0.2
    assert isinstance(result.model.conv1, FactorizedConv)
    assert layers["fc8"].reason == "kept by the rank selection"
    assert sum(layers[f"fc{i}"].macs_accelerated for i in (6, 7, 8)) == macs["dense_accelerated"]
    assert json.loads(result.report.to_json())["macs"] == macs
    titles = [column.header for column in summary(result.report).renderables[0].columns]
    assert titles[0] == "layer"

    # From the same measurements the convolutions' plan is that which leaves dense layers alone.
    calibration = accel.calibrate(model, IMAGES, decompositions="channel", dense_layers=True)
    curves = accel.measure_errors(calibration)
    plan = accel.select_ranks(calibration, 1.5, curves=curves)
    alone = tuple(layer for layer in plan.layers if layer.path.startswith("conv"))
    assert alone == tuple(p for p in result.plan.layers if p.path.startswith("conv"))
    assert not any(layer.decomposition for layer in plan.layers if layer not in alone)
    counted = accel.reconstruct(calibration, plan, reconstruction="weights").report.macs
    for name in ("original", "accelerated", "speedup"):
        assert counted[name] == macs[name]
    without = accel.accelerate(model, IMAGES, 1.5, reconstruction="weights", **PAIRS).report.macs
    assert without.keys() == {"original", "accelerated", "speedup"}
    assert without["original"] == macs["original"]

    after = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    jitted = nnx.jit(lambda model, images: model(images))
    found = result.model(IMAGES)
    np.testing.assert_allclose(jitted(result.model, IMAGES), found, rtol=1e-4, atol=1e-4)

    accel.save_model(tmp_path / "model", result.model, plan=result.plan)
    again = accel.load_model(tmp_path / "model", lambda: Classifier(nnx.Rngs(5)))
    np.testing.assert_array_equal(again(IMAGES), found)

    optimizer = nnx.Optimizer(result.model, optax.sgd(1e-2), wrt=nnx.Param)
    frozen = np.array(result.model.fc6.factors[0].kernel[...])
    gradients = nnx.grad(lambda model: jnp.mean(model(IMAGES) ** 2))(result.model)
    optimizer.update(result.model, gradients)
    assert not np.array_equal(result.model.fc6.factors[0].kernel[...], frozen)


def test_rules_fix_a_dense_layers_rank_or_leave_it(calibration):
    plan = select_ranks(
        calibration,
        1.3,
        rank_selection="exact_energy",
        rules={"fc6": 7, "fc7": "dense"},
        dense_speedup=1.5,
    )
    layers = {layer.path: layer for layer in plan.layers}
    assert layers["fc6"] == LayerPlan("fc6", "svd", (7,))
    assert layers["fc7"] == LayerPlan("fc7", reason="by rule")
    with pytest.raises(ValueError, match=r"fc6: a rule fixes the rank at 49, above .* width 48"):
        select_ranks(
            calibration, 1.3, rank_selection="exact_energy", rules={"fc6": 49}, dense_speedup=1.5
        )


def test_a_plan_without_a_budget_for_dense_layers_leaves_them(calibration):
    plan = select_ranks(calibration, 1.3, rank_selection="exact_energy")
    reasons = {layer.path: layer.reason for layer in plan.layers}
    assert reasons["fc6"] == "no dense_speedup given"


def test_dense_layers_on_tokens_are_replaced_or_left_with_the_reason():
    model = Tokens(nnx.Rngs(0))
    calibration = calibrate(
        model, IMAGES, decompositions="channel_input", dense_layers=True, batch_size=16
    )
    assert calibration.left_out == {"merged": "its input has 784 rows for a batch of 16 images"}
    assert dict(calibration.dense_macs) == {
        "across": 8 * 49 * 49, "along": 49 * 8 * 24, "merged": 49 * 24 * 24
    }  # fmt: skip
    plan = AccelerationPlan(
        (LayerPlan("stem"), LayerPlan("across", "svd", (49,)), LayerPlan("along", "svd", (8,)))
    )
    report = reconstruct(calibration, plan).report
    assert [layer.macs_accelerated for layer in report.layers[1:]] == [
        8 * 49 * 98, 49 * 8 * 32
    ]  # fmt: skip
    assert max(layer.response_error for layer in report.layers[1:]) < 1e-3


def test_what_cannot_be_asked_for_is_named(calibration):
    with pytest.raises(ValueError, match="Chain has no dense layer to accelerate: none found"):
        accel.accelerate(networks.network("chain"), IMAGES, 2.0, dense_speedup=2.0, **PAIRS)
    model = Classifier(nnx.Rngs(0))
    with pytest.raises(ValueError, match="a dense_speedup must be a finite number above 1"):
        accel.accelerate(model, IMAGES, 2.0, dense_speedup=1.0, **PAIRS)
    with pytest.raises(ValueError, match="svd: for dense layers only"):
        accel.accelerate(model, IMAGES, 2.0, decompositions="svd")
    with pytest.raises(ValueError, match=r"dense_speedup: .* largest reachable speedup is"):
        select_ranks(calibration, 1.3, rank_selection="exact_energy", dense_speedup=500.0)
    plain = calibrate(model, IMAGES, decompositions="channel")
    with pytest.raises(ValueError, match="calibrated without dense layers"):
        select_ranks(plain, 1.3, rank_selection="exact_energy", dense_speedup=2.0)
