"""The second sweep: it finds the least squares solution where there is one, and never does harm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from stopping import StopsIn

import accel
from accel.repair import refit

IMAGES = np.asarray(networks.images(60))
BATCH = 20


def relative_error(original: nnx.Module, accelerated: nnx.Module, images) -> float:
    wanted, found = (np.asarray(m(images), np.float64) for m in (original, accelerated))
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def accelerated(name: str, speedup: float = 1.6):
    model = networks.network(name)
    model.eval()
    # Quickly: how good the layers are by themselves is not the point here.
    result = accel.accelerate(
        model,
        IMAGES,
        speedup,
        decompositions="spatial",
        reconstruction="responses",
        solver="reduced_rank_regression",
        rank_selection="exact_energy",
    )
    return model, result.model


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_it_brings_the_outputs_closer_on_images_it_never_saw(name):
    model, given = accelerated(name)
    before = jax.tree.map(np.array, nnx.state(given, nnx.Param))
    found = refit(model, given, IMAGES, iterations=10, batch_size=BATCH)
    assert found.history[0] > found.history[1] > 0
    assert (np.diff(found.history) < 0).all()
    assert len(found.steps) == len(found.history) - 1 >= 1
    other = networks.images(40, seed=5)
    before_error, after_error = (relative_error(model, m, other) for m in (given, found.model))
    assert after_error < before_error
    # What it was given is as it was.
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(given, nnx.Param))


class Linear(nnx.Module):
    """One convolution: the refit of its chain is least squares, and exact at full rank."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), padding="VALID", rngs=rngs)

    def __call__(self, x):
        return self.conv(x)


def test_a_chain_of_full_rank_that_was_spoilt_is_restored():
    model = Linear(nnx.Rngs(0))
    calibration = accel.calibrate(model, IMAGES, decompositions=("channel",))
    plan = accel.AccelerationPlan((accel.LayerPlan("conv", "channel", (8,)),))
    spoilt = accel.reconstruct(calibration, plan).model
    random = np.random.default_rng(0)
    for factor in spoilt.conv.factors:
        factor.kernel[...] += 0.1 * random.standard_normal(factor.kernel.shape)
    spoilt.conv.factors[-1].bias[...] += 0.3
    found = refit(model, spoilt, IMAGES, iterations=30, batch_size=BATCH)
    assert found.history[0] > 0.05
    assert found.error_after < 1e-3 * found.error_before
    assert relative_error(model, found.model, networks.images(20, seed=9)) < 1e-3


def test_the_same_seed_gives_the_same_network():
    model, given = accelerated("chain")
    found = [refit(model, given, IMAGES, iterations=2, batch_size=BATCH) for _ in range(2)]
    assert found[0].history == found[1].history
    outputs = [np.asarray(f.model(jnp.asarray(IMAGES[:3]))) for f in found]
    np.testing.assert_array_equal(*outputs)


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path):
    model, given = accelerated("chain")
    options = {"iterations": 3, "batch_size": BATCH}
    whole = refit(model, given, IMAGES, **options)
    assert len(whole.steps) == 3
    with pytest.raises(KeyboardInterrupt):
        refit(model, given, IMAGES, **options, resume=tmp_path, progress=StopsIn("sweep 3/3"))
    # What was done before is not done again.
    stop = StopsIn("sweep 1/3")
    resumed = refit(model, given, IMAGES, **options, resume=tmp_path, progress=stop)
    assert (resumed.history, resumed.steps) == (whole.history, whole.steps)
    outputs = [np.asarray(f.model(jnp.asarray(IMAGES[:3]))) for f in (resumed, whole)]
    np.testing.assert_array_equal(*outputs)
    # Nor is anything that has ended.
    stop = StopsIn("what the outputs hang on")
    again = refit(model, given, IMAGES, **options, resume=tmp_path, progress=stop)
    assert again.history == whole.history
    fitting = np.arange(len(IMAGES)) < 40
    for change in ({"seed": 1}, {"fitting": fitting}, {"iterations": 2}):
        with pytest.raises(ValueError, match="another problem"):
            refit(model, given, IMAGES, **{**options, **change}, resume=tmp_path)
    (state,) = tmp_path.iterdir()
    for damaged in (b"", b"\x01", state.read_bytes()[:-9]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged; remove it"):
            refit(model, given, IMAGES, **options, resume=tmp_path)


def test_a_sweep_that_no_step_helps_ends_as_it_was_and_is_not_tried_again(tmp_path):
    """A network that is its own original has nothing to gain."""
    model = Linear(nnx.Rngs(0))
    calibration = accel.calibrate(model, IMAGES, decompositions=("channel",))
    plan = accel.AccelerationPlan((accel.LayerPlan("conv", "channel", (8,)),))
    given = accel.reconstruct(calibration, plan).model
    found = refit(given, given, IMAGES, batch_size=BATCH, resume=tmp_path)
    assert found.history == (0.0,)
    assert found.steps == ()
    stop = StopsIn("what the outputs hang on")
    assert refit(given, given, IMAGES, batch_size=BATCH, resume=tmp_path, progress=stop).steps == ()


def test_what_does_not_fit_is_refused():
    model, given = accelerated("chain")
    with pytest.raises(ValueError, match="Chain has no chain to refit"):
        refit(model, model, IMAGES)
    with pytest.raises(ValueError, match=r"outputs of one shape, found \(50, 5\)"):
        refit(networks.network("residual"), given, IMAGES)
    with pytest.raises(ValueError, match="no image to measure on"):
        refit(model, given, IMAGES, fitting=np.ones(len(IMAGES), bool))
    with pytest.raises(ValueError, match="1 or more, found 0 and 50"):
        refit(model, given, IMAGES, iterations=0)


class Classifier(nnx.Module):
    """A convolution and two dense layers, in a type of the user's choice."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(3, 12, (3, 3), **options)
        self.hidden = nnx.Linear(12, 24, **options)
        self.last = nnx.Linear(24, 10, **options)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).mean((1, 2))
        return self.last(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_layers_and_reduced_precision_take_part(dtype, tmp_path):
    model = Classifier(nnx.Rngs(0), dtype)
    given = accel.accelerate(
        model, IMAGES, 1.5, decompositions="channel", dense_speedup=1.5, batch_size=BATCH
    ).model
    spoilt = given.hidden.factors[0].kernel
    spoilt[...] *= 1.5
    found = refit(model, given, IMAGES, iterations=5, batch_size=BATCH, resume=tmp_path)
    assert found.error_after < 0.7 * found.error_before
    assert found.model.hidden.factors[0].kernel.dtype == spoilt.dtype == dtype
