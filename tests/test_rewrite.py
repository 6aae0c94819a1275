import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel.decompositions import Weights
from accel.plan import AccelerationPlan, LayerPlan
from accel.rewrite import rewrite


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
    with pytest.raises(
        ValueError, match=r"'steam', which is no nnx\.Conv or nnx\.Linear of Residual"
    ):
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
