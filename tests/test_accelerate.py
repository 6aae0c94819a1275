import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx

import accel
from accel import calibrate, measure_sensitivity, reconstruct, select_ranks
from accel.plan import AccelerationPlan, LayerPlan
from accel.rewrite import FactorizedConv
from accel.solvers import SOLVERS

IMAGES = networks.images(40)
# One kind of chain and ranks by energies: the steps are the same, with far less to compile.
PAIRS = {"decompositions": "channel", "rank_selection": "exact_energy"}


def evaluated(model):
    copy = nnx.clone(model)
    copy.eval()
    return copy


def arrays_of(model):
    """Copies of the model's parameters and statistics."""
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return jax.tree.map(np.array, state)


def relative_error(model, original, images):
    expected = evaluated(original)(images)
    return float(jnp.sum((model(images) - expected) ** 2) / jnp.sum(expected**2))


@pytest.fixture(scope="module")
def calibrations():
    """One calibration a network, used by all tests that plan for themselves."""
    return {
        name: calibrate(
            networks.network(name), IMAGES, decompositions="channel", positions_per_image=60
        )
        for name in networks.NETWORKS
    }


@pytest.mark.parametrize(
    ("name", "reconstruction", "solver"),
    [
        (name, *fit)
        for fit in [*(("responses", solver) for solver in SOLVERS), ("joint", "alternating")]
        # A descent takes long to compile for every width anew.
        for name in (("concatenating",) if fit[1] == "gradient" else networks.NETWORKS)
    ],
)
def test_at_full_rank_the_accelerated_network_is_the_original(
    calibrations, name, reconstruction, solver
):
    calibration = calibrations[name]
    plan = AccelerationPlan(
        tuple(
            LayerPlan(call.path, "channel", (call.output.aval.shape[-1],))
            for call in calibration.calls
        ),
        calibration.folded,
    )
    result = reconstruct(calibration, plan, reconstruction=reconstruction, solver=solver)
    images = networks.images(5, seed=99)
    expected = evaluated(networks.network(name))(images)
    np.testing.assert_allclose(result.model(images), expected, rtol=2e-4, atol=2e-4)


def test_a_users_residual_network_is_accelerated_and_stays_as_it_was():
    model = networks.network("residual")
    graph, before = nnx.graphdef(model), arrays_of(model)
    result = accel.accelerate(model, IMAGES, speedup=2.0, positions_per_image=60)

    assert nnx.graphdef(model) == graph
    jax.tree.map(np.testing.assert_array_equal, before, arrays_of(model))
    assert isinstance(result.model, networks.Residual)
    assert isinstance(result.model.blocks[0].conv1, FactorizedConv)
    assert result.report.macs["speedup"] >= 2.0
    assert relative_error(result.model, model, networks.images(20, seed=5)) < 0.05

    # Nothing is shared: what is done to the result is not done to the original.
    for _, variable in nnx.to_flat_state(nnx.state(result.model, nnx.Param)):
        variable[...] = jnp.zeros(variable.shape)
    jax.tree.map(np.testing.assert_array_equal, before, arrays_of(model))


def test_the_result_is_jittable_and_trainable():
    result = accel.accelerate(networks.network("residual"), IMAGES, speedup=1.5, **PAIRS)
    model = result.model
    jitted = nnx.jit(lambda model, images: model(images))
    np.testing.assert_allclose(jitted(model, IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)

    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    labels = jnp.arange(len(IMAGES)) % 5

    def loss_of(model):
        logits = model(IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    first = step(model, optimizer)
    for _ in range(15):
        last = step(model, optimizer)
    assert last < 0.9 * first


def test_more_speedup_costs_more_error_and_reaches_its_macs():
    model = networks.network("chain")
    errors = []
    for speedup in (1.2, 1.5, 2.0, 3.0):
        result = accel.accelerate(model, IMAGES, speedup=speedup, positions_per_image=60, **PAIRS)
        macs = result.report.macs
        assert macs["accelerated"] <= macs["original"] / speedup
        assert macs["speedup"] == macs["original"] / macs["accelerated"]
        errors.append(relative_error(result.model, model, networks.images(30, seed=11)))
    assert errors == sorted(errors)


def test_the_macs_of_the_report_add_up():
    report = accel.accelerate(networks.network("concatenating"), IMAGES, 1.5, **PAIRS).report
    assert report.macs["original"] == sum(layer.macs_original for layer in report.layers)
    assert report.macs["accelerated"] == sum(layer.macs_accelerated for layer in report.layers)
    # 14 × 14 positions; 3×3 and 5×5 kernels; 3 → 8, 3 → 12, 20 → 8 and 20 → 12 channels.
    assert report.macs["original"] == 196 * (9 * 3 * 8 + 25 * 3 * 12 + 9 * 20 * 8 + 25 * 20 * 12)
    assert json.loads(report.to_json())["macs"]["original"] == report.macs["original"]


def test_asymmetric_reconstruction_beats_symmetric_and_nonlinear_beats_linear(calibrations):
    """The orderings of the paper, on images that nothing was fitted to; averaged over speedups."""
    calibration = calibrations["chain"]
    errors = {}
    held_out = networks.images(60, seed=21)
    for solver in ("reduced_rank_regression", "alternating"):
        for asymmetric in (False, True):
            total = 0.0
            for speedup in (1.5, 2.0, 2.5):
                plan = select_ranks(calibration, speedup, rank_selection="exact_energy")
                result = reconstruct(calibration, plan, solver=solver, asymmetric=asymmetric)
                total += relative_error(result.model, calibration.model, held_out)
            errors[solver, asymmetric] = total
    assert errors["alternating", True] < errors["alternating", False]
    assert errors["reduced_rank_regression", True] < errors["reduced_rank_regression", False]
    assert errors["alternating", True] < errors["reduced_rank_regression", True]


def test_the_same_seed_gives_the_same_result_and_another_seed_another():
    model = networks.network("chain")
    first, again, other = (
        nnx.state(
            accel.accelerate(model, IMAGES, 1.5, positions_per_image=5, seed=seed, **PAIRS).model
        )
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(
        first["first"]["factors"][0]["kernel"][...], other["first"]["factors"][0]["kernel"][...]
    )


def test_rules_leave_layers_alone_or_fix_their_rank():
    rules = {"blocks/*": 3, "blocks/2/*": "dense"}
    plan = accel.accelerate(networks.network("residual"), IMAGES, 1.4, rules=rules, **PAIRS).plan
    ranks = {layer.path: layer.ranks for layer in plan.layers}
    assert ranks["blocks/0/conv1"] == ranks["blocks/1/conv2"] == (3,)
    assert ranks["blocks/2/conv1"] == ranks["blocks/2/conv2"] == ()


class Grouped(nnx.Module):
    def __init__(self, rngs):
        self.grouped = nnx.Conv(3, 12, (3, 3), feature_group_count=3, rngs=rngs)
        self.shared = nnx.Conv(12, 12, (3, 3), rngs=rngs)
        self.plain = nnx.Conv(12, 12, (3, 3), rngs=rngs)

    def __call__(self, x):
        return self.plain(self.shared(self.shared(self.grouped(x))))


def test_what_cannot_be_decomposed_stays_dense_with_the_reason_in_the_report():
    model = Grouped(nnx.Rngs(0))
    report = accel.accelerate(model, IMAGES, 1.1, **PAIRS).report
    reasons = {layer.path: layer.reason for layer in report.layers}
    assert reasons == {
        "grouped": "grouped convolution (3 groups)",
        "shared": "called 2 times with the same weights",
        "plain": "",
    }
    # A layer that is called twice costs twice.
    assert report.macs["original"] == 196 * (9 * 1 * 12 + 2 * 9 * 12 * 12 + 9 * 12 * 12)


class Typed(nnx.Module):
    def __init__(self, rngs, dtype):
        self.conv = nnx.Conv(3, 12, (3, 3), dtype=dtype, rngs=rngs)
        self.last = nnx.Conv(12, 8, (3, 3), dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.conv(x)))


def test_layers_of_reduced_precision_keep_it_and_lose_little_by_it():
    errors = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Typed(nnx.Rngs(0), dtype)
        # The same weights for both: random numbers of another type are other numbers.
        model.last.kernel[...] = Typed(nnx.Rngs(0), jnp.float32).last.kernel[...].astype(dtype)
        result = accel.accelerate(model, IMAGES, 1.5, **PAIRS)
        assert result.model(IMAGES).dtype == dtype
        assert result.model.last.factors[0].kernel.dtype == dtype
        errors[dtype] = relative_error(result.model, model, IMAGES)
    assert errors[jnp.bfloat16] < 1.1 * errors[jnp.float32]


def bad(**arguments):
    return lambda: accel.accelerate(
        arguments.pop("model", networks.network("chain")),
        arguments.pop("images", IMAGES),
        **({"speedup": 2.0} | PAIRS | arguments),
    )


def broken_network():
    model = networks.network("chain")
    model.even.kernel[0, 0, 0, 0] = np.nan
    return model


class NoConvolution(nnx.Module):
    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(speedup=0.5), "speedup must be a finite number above 1, found 0.5"),
        (bad(speedup=1000.0), "largest reachable speedup is"),
        (bad(solver="magic"), "unknown solver 'magic'; known: pca"),
        (bad(rank_selection="magic"), "unknown rank selection 'magic'"),
        (bad(rank_multiple=0), "rank_multiple is a whole number, 1 or more, found 0"),
        (
            bad(rank_multiple=8, **PAIRS),
            "rank_multiple needs measured_error, found exact_energy",
        ),
        (bad(decompositions="magic"), "unknown decomposition 'magic'; known: channel"),
        (bad(rules={"nothing*": "dense"}), r"rule 'nothing\*' matches no layer"),
        (bad(images=IMAGES[:1]), "needs 2 images or more, found 1"),
        (bad(images=IMAGES.at[3].set(jnp.nan)), "image 3 holds NaN or Inf"),
        (
            bad(images=IMAGES[..., :2]),
            r"Chain cannot be called with images of shape \(16,",
        ),
        (bad(positions_per_image=0), "1 or more, found 0"),
        (bad(model=broken_network()), "even/kernel: the parameter holds NaN or Inf"),
        (bad(model=NoConvolution()), "NoConvolution has no convolution to accelerate"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_speedup_that_makes_no_sense_shows_before_the_long_work(monkeypatch):
    def calibrated(*_, **__):
        raise AssertionError("the network was calibrated")

    monkeypatch.setattr(sys.modules["accel.accelerate"], "calibrate", calibrated)
    with pytest.raises(ValueError, match="speedup must be a finite number above 1"):
        accel.accelerate(networks.network("chain"), IMAGES, 0.5)


def test_memory_stays_under_what_was_stated():
    report = accel.accelerate(networks.network("chain"), IMAGES, 1.5, **PAIRS).report
    assert report.memory["measured_peak_bytes"] < report.memory["stated_peak_bytes"]


def test_a_run_that_was_stopped_goes_on_where_it_was(calibrations, tmp_path):
    calibration = calibrations["chain"]
    plan = select_ranks(calibration, 2.0, rank_selection="exact_energy")
    sensitivity = measure_sensitivity(calibration)
    whole = reconstruct(calibration, plan)

    class Stop(Exception):
        pass

    class StopsAtThirdLayer(accel.Progress):
        layers = 0

        def begin(self, description, total):
            self.layers += 1
            if self.layers == 3:
                raise Stop

    with pytest.raises(Stop):
        reconstruct(
            calibration,
            plan,
            sensitivity=sensitivity,
            progress=StopsAtThirdLayer(),
            resume=tmp_path,
        )
    assert len(list(tmp_path.iterdir())) == 2
    resumed = reconstruct(calibration, plan, resume=str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(whole.model), nnx.state(resumed.model))
    with pytest.raises(ValueError, match=r"first: .* holds the solution of another problem"):
        reconstruct(calibration, plan, solver="reduced_rank_regression", resume=tmp_path)
    strip = lambda report: [dataclasses.asdict(layer) for layer in report.layers]  # noqa: E731
    assert strip(whole.report) == strip(resumed.report)


def test_the_joint_fit_refuses_what_it_would_not_take_over(calibrations):
    calibration = calibrations["chain"]
    plan = select_ranks(calibration, 2.0, rank_selection="exact_energy")
    with pytest.raises(ValueError, match=r"reconstruction='joint' does not call PCA"):
        reconstruct(calibration, plan, solver="pca")
    with pytest.raises(ValueError, match=r"ridge=0.1.* settings that reconstruction='joint' does"):
        reconstruct(calibration, plan, solver=SOLVERS["alternating"](ridge=0.1))


class Crops(nnx.Module):
    """Convolves the quarters of each image, with an axis of their own or as a larger batch.

    A part of the second layer's input is cut off, besides: its padding is negative.
    """

    def __init__(self, rngs: nnx.Rngs, merged: bool):
        self.merged = merged
        self.first = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.second = nnx.Conv(12, 16, (3, 3), strides=2, padding=((-1, -1), (0, 0)), rngs=rngs)

    def __call__(self, x):
        size = x.shape[1] // 2
        quarters = x.reshape(-1, 2, size, 2, size, 3).transpose(0, 1, 3, 2, 4, 5)
        shape = (-1, size, size, 3) if self.merged else (-1, 4, size, size, 3)
        y = nnx.relu(self.second(nnx.relu(self.first(quarters.reshape(shape)))))
        return y.reshape(x.shape[0], 4, -1, 16).mean((1, 2))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("kind", ["channel", "spatial", "tucker2"])
def test_what_is_convolved_several_times_an_image_counts_as_often(kind, merged):
    model = Crops(nnx.Rngs(0), merged)
    result = accel.accelerate(
        model,
        IMAGES,
        1.5,
        decompositions=kind,
        reconstruction="responses",
        rank_selection="exact_energy",
    )
    macs = result.report.macs
    assert 1.5 <= macs["speedup"] < 1.7
    assert macs["original"] == 4 * (49 * 27 * 12 + 6 * 108 * 16)


@pytest.mark.parametrize("merged", [True, False])
def test_at_full_rank_what_is_convolved_several_times_an_image_is_as_it_was(merged):
    model = Crops(nnx.Rngs(0), merged)
    calibration = calibrate(model, IMAGES, decompositions="channel")
    plan = AccelerationPlan(
        (LayerPlan("first", "channel", (12,)), LayerPlan("second", "channel", (16,)))
    )
    result = reconstruct(calibration, plan, reconstruction="responses")
    assert all(layer.response_error < 1e-6 for layer in result.report.layers)
    np.testing.assert_allclose(result.model(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


def test_a_plan_that_replaces_nothing_gives_the_network_as_it_is(calibrations):
    calibration = calibrations["residual"]
    plan = AccelerationPlan(
        tuple(LayerPlan(call.path, None, ()) for call in calibration.calls), calibration.folded
    )
    result = reconstruct(calibration, plan, reconstruction="weights")
    assert result.report.macs["speedup"] == 1.0
    np.testing.assert_array_equal(result.model(IMAGES[:2]), calibration.model(IMAGES[:2]))
