"""Activations: found in networks, minimised through by turns, against NumPy, SciPy and grids."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import scipy.special
from flax import nnx

import accel
from accel.batch_norm import fold_batch_norm
from accel.plan import LayerPlan
from accel.program import trace
from accel.solvers import ACTIVATIONS, Alternating, ReducedRankRegression, Responses
from accel.solvers.activations import activate, z_step

ORACLES = {
    "identity": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1),
    "silu": lambda x: x * scipy.special.expit(x),
    "hard_silu": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "gelu": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "exact_gelu": lambda x: x * scipy.special.ndtr(x),
    "sigmoid": scipy.special.expit,
    "tanh": np.tanh,
}
CALLED = {
    "relu": nnx.relu,
    "relu6": nnx.relu6,
    "leaky_relu": nnx.leaky_relu,
    "elu": nnx.elu,
    "silu": nnx.swish,
    "hard_silu": nnx.hard_swish,
    "gelu": nnx.gelu,
    "exact_gelu": partial(nnx.gelu, approximate=False),
    "sigmoid": nnx.sigmoid,
    "tanh": nnx.tanh,
}


def activated(function, convolutions: int = 3) -> nnx.Module:
    """A chain of convolutions, the function behind each but the last."""

    class Activated(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            widths = [3, *(convolutions - 1) * [16], 8]
            self.layers = nnx.List(
                nnx.Conv(given, wanted, (3, 3), rngs=rngs)
                for given, wanted in itertools.pairwise(widths)
            )

        def __call__(self, images):
            for layer in self.layers[:-1]:
                images = function(layer(images))
            return self.layers[-1](images)

    return Activated(nnx.Rngs(0))


def test_each_has_an_oracle_and_is_called_below():
    assert set(ORACLES) == set(ACTIVATIONS) == {*CALLED, "identity"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_the_function_of_its_name(name):
    x = np.linspace(-9, 9, 2001).reshape(3, -1)
    with jax.enable_x64(True):
        found = np.asarray(activate(jnp.asarray(x), name))
    np.testing.assert_allclose(found, ORACLES[name](x), atol=1e-7)


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_that_calls_it_is_seen_to(name, dtype):
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.conv = nnx.Conv(3, 4, (3, 3), dtype=dtype, rngs=rngs)
            self.norm = nnx.BatchNorm(4, dtype=dtype, use_running_average=True, rngs=rngs)
            self.other = nnx.Conv(4, 4, (3, 3), dtype=dtype, rngs=rngs)
            self.last = nnx.Conv(4, 4, (1, 1), dtype=dtype, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(CALLED[name](self.norm(self.conv(x))), (2, 2))
            return self.last(x + CALLED[name](self.other(x)))

    folded = fold_batch_norm(Model(), {"norm": "conv"})
    program = trace(folded, networks.images(2))
    assert [call.activation for call in program.calls] == [name, name, "identity"]
    for call in program.calls[:2]:
        assert call.activated is not call.output
        assert call.activated.aval == call.output.aval


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + nnx.gelu(x),
        lambda x: nnx.gelu(x) * nnx.sigmoid(x),
        lambda x: nnx.leaky_relu(x, 0.2),
        lambda x: nnx.relu(x - 1),
        lambda x: jnp.cos(nnx.silu(jnp.sin(x))),
        lambda x: nnx.softmax(x),
        lambda x: x.mean(axis=(1, 2)),
    ],
)
def test_what_is_none_of_them_is_taken_for_none(function):
    class Model(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, images):
            return function(self.conv(images))

    (call,) = trace(Model(), networks.images(2)).calls
    assert call.activation == "identity"
    assert call.activated is call.output


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_z_is_as_good_as_the_best_of_a_fine_grid_between_both_ends(name, penalty):
    random = np.random.default_rng(0)
    linear, targets = random.normal(0, 2, (2, 30, 40))
    activated = ORACLES[name](targets)

    def cost(z):
        return (activated - ORACLES[name](z)) ** 2 + penalty * (z - linear) ** 2

    found = z_step(
        *(jnp.asarray(a, jnp.float32) for a in (linear, targets, activated)), penalty, name
    )
    found = cost(np.asarray(found, np.float64))
    share = np.linspace(0, 1, 1001)[:, None, None]
    best = cost(linear + share * (targets - linear)).min(0)
    assert (found <= cost(linear) + 1e-6).all()
    # Of 1,200 a few end in another valley; a turn lowers the sum.
    assert cost(linear).sum() - found.sum() >= 0.99 * (cost(linear).sum() - best.sum())
    assert cost(linear).sum() > 1.01 * best.sum()


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_constants_between_a_layer_and_its_activation_do_not_hide_it(name):
    class Model(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.conv(x)
            pooled = nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
            shortcut = pooled + jnp.ones(x.shape[1:]) * jnp.arange(3)
            return CALLED[name](y) + shortcut

    (call,) = trace(Model(), networks.images(2)).calls
    assert call.activation == name


@pytest.mark.parametrize("name", ["leaky_relu", "silu", "gelu", "tanh"])
def test_turns_go_below_the_linear_solution(name):
    random = np.random.default_rng(1)
    targets = random.standard_normal((300, 12)) @ random.standard_normal((12, 12))
    inputs = targets + 0.5 * random.standard_normal(targets.shape)
    found = Alternating()(Responses(inputs, targets), 4, name)
    reduce, expand, bias = (np.asarray(factor) for factor in found[:3])
    outputs = inputs @ reduce.T @ expand.T + bias
    error = ((ORACLES[name](targets) - ORACLES[name](outputs)) ** 2).sum()
    assert found.info.objective == pytest.approx(error, rel=1e-5)
    assert error < 0.97 * found.info.linear_objective


@pytest.mark.parametrize("name", ["silu", "exact_gelu"])
def test_a_network_is_fitted_through_it(name):
    model = activated(CALLED[name])
    images = networks.images(48)
    calibration = accel.calibrate(model, images, decompositions="channel", positions_per_image=60)
    # By hand: where a rank leaves hardly any error, there is little to gain.
    layers = (LayerPlan("layers/0"), LayerPlan("layers/1", "channel", (2,)), LayerPlan("layers/2"))
    plan = accel.AccelerationPlan(layers, calibration.folded)
    through, linear = (
        accel.reconstruct(calibration, plan, solver=solver).report.layers
        for solver in (Alternating(), ReducedRankRegression())
    )
    assert [layer.activation for layer in through] == [name, name, "identity"]
    gains = [
        ours.response_error / theirs.response_error
        for ours, theirs in zip(through, linear, strict=True)
        if ours.ranks and ours.activation == name
    ]
    # On images that nothing was fitted to.
    assert gains
    assert max(gains) < 0.97
