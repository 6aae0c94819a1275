import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel.decompositions import DECOMPOSITIONS, Weights
from accel.plan import AccelerationPlan, LayerPlan
from accel.rewrite import FactorizedConv, rewrite
from accel.solvers import Factorization, SolverInfo

CONVS = {
    "same": {"padding": "SAME"},
    "valid": {"padding": "VALID"},
    "strided": {"strides": (2, 1), "padding": ((2, 1), (0, 1))},
    "dilated": {"kernel_dilation": 2},
    "no bias": {"use_bias": False},
    "circular": {"padding": "CIRCULAR"},
    "pointwise": {"kernel_size": (1, 1)},
    "even": {"kernel_size": (2, 4)},
    "one axis": {"kernel_size": (5,)},
    "three axes": {"kernel_size": (3, 2, 3)},
}


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("name", CONVS)
def test_a_chain_computes_the_affine_map_of_the_convolutions_response(name, decomposition):
    arguments = {"kernel_size": (3, 3), **CONVS[name]}
    conv = nnx.Conv(3, 8, rngs=nnx.Rngs(0), **arguments)
    random = np.random.default_rng(0)
    if conv.bias is not None:
        conv.bias[...] = jnp.asarray(random.standard_normal(8), jnp.float32)
    reduce, expand, bias = (
        jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 8), (8, 5), 8)
    )
    factorization = Factorization(reduce, expand, bias, SolverInfo(0.0, 0.0, 0.0))
    chosen = DECOMPOSITIONS[decomposition]
    kernel_bias = None if conv.bias is None else conv.bias[...]
    chain = FactorizedConv(
        conv, chosen.factors(conv, 5), chosen.weights(conv.kernel[...], kernel_bias, factorization)
    )
    images = jnp.asarray(
        random.standard_normal((2, *(7,) * len(arguments["kernel_size"]), 3)), jnp.float32
    )
    expected = np.asarray(conv(images), np.float64) @ np.asarray(expand @ reduce).T + bias
    np.testing.assert_allclose(chain(images), expected, rtol=1e-4, atol=1e-4)


def test_the_copy_shares_nothing_with_the_model():
    model, images = networks.network("residual"), networks.images(2)
    model.eval()
    expected = np.asarray(model(images))
    copy = rewrite(model, AccelerationPlan((LayerPlan("stem", "channel", (4,)),)))
    for _, variable in nnx.to_flat_state(nnx.state(copy, nnx.Param)):
        variable[...] = jnp.zeros(variable.shape)
    np.testing.assert_array_equal(model(images), expected)
    assert type(model.stem) is nnx.Conv


def test_a_layer_that_the_network_does_not_have_is_refused():
    plan = AccelerationPlan((LayerPlan("steam", "channel", (4,)),))
    with pytest.raises(ValueError, match=r"'steam', which is no nnx\.Conv of Residual"):
        rewrite(networks.network("residual"), plan)


def test_weights_of_another_rank_are_refused():
    plan = AccelerationPlan((LayerPlan("stem", "channel", (4,)),))
    wrong = (Weights(jnp.zeros((3, 3, 3, 5)), None), Weights(jnp.zeros((1, 1, 5, 12)), None))
    with pytest.raises(ValueError, match=r"given \(3, 3, 3, 5\)"):
        rewrite(networks.network("residual"), plan, {"stem": wrong})


def test_a_plan_goes_through_json():
    plan = AccelerationPlan(
        (LayerPlan("a/0", "channel", (4,)), LayerPlan("b", reason="by rule")), {"norm": "a/0"}
    )
    assert AccelerationPlan.from_json(plan.to_json()) == plan
    for text in ("", "[]", "{}", '{"layers": [{"path": 1, "what": 2, "ranks": []}], "folded": {}}'):
        with pytest.raises(ValueError, match="not an acceleration plan"):
            AccelerationPlan.from_json(text)
