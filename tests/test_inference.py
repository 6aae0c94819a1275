import re

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel import compile_inference, inference
from accel.evaluation import compare_outputs
from accel.evaluation.forward import forward_function, in_dtype
from accel.images import ArraySource
from accel.inference import with_any_weights

IMAGES = networks.images(6)


@pytest.mark.parametrize("kind", ["chain", "residual"])
def test_a_compiled_network_gives_what_the_network_gives(kind):
    model = networks.network(kind)
    compiled = compile_inference(model, IMAGES.shape)
    evaluated = nnx.clone(model)
    evaluated.eval()
    expected = np.asarray(evaluated(jnp.asarray(IMAGES)))
    np.testing.assert_allclose(compiled(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert compiled.seconds > 0


def test_on_cpu_weights_are_inside_the_program():
    """So they are packed once, and a change of the network afterwards makes no difference."""
    model = networks.network("chain")
    compiled = compile_inference(model, IMAGES.shape)
    before = np.asarray(compiled(IMAGES))
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        variable[...] = jnp.zeros_like(variable[...])
    np.testing.assert_array_equal(compiled(IMAGES), before)
    assert jax.default_backend() != "cpu" or compiled.arguments == ()


def test_reduced_precision_is_used_inside_and_float32_comes_out():
    model = networks.network("residual")
    exact = np.asarray(compile_inference(model, IMAGES.shape)(IMAGES))
    reduced = compile_inference(model, IMAGES.shape, "bfloat16")
    outputs = np.asarray(reduced(IMAGES))
    assert outputs.dtype == np.float32
    error = np.linalg.norm(outputs - exact) / np.linalg.norm(exact)
    # bfloat16 has 8 bits: one rounding is off by 2^-9 at most.
    assert 2**-12 < error < 2**-4
    found = compare_outputs(model, model, ArraySource(IMAGES), dtype="bfloat16")
    assert found["relative_squared_error"] == pytest.approx(error**2, rel=0.2)


def test_a_type_that_layers_name_is_replaced():
    layer = nnx.Conv(3, 4, (3, 3), dtype=jnp.float32, rngs=nnx.Rngs(0))
    cast = in_dtype(layer, "bfloat16")
    assert cast(jnp.ones((1, 8, 8, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert layer.kernel.dtype == layer.dtype == jnp.float32


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_all_of_a_network_is_computed_in_reduced_precision(name):
    forward, state = forward_function(networks.network(name), "bfloat16")
    convolutions = re.findall(
        r"stablehlo.convolution.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)",
        jax.jit(forward).lower(state, IMAGES).as_text(),
    )
    assert len(convolutions) > 2
    assert set(convolutions) == {("bf16", "bf16")}


def test_values_beyond_a_types_range_are_named():
    """Without a word they would become infinite, and a channel of batch norm nothing."""
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    norm.var[...] = jnp.array([1.0, 7e4, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"var: a value of 7e\+04 is beyond float16's range"):
        in_dtype(norm, "float16")
    assert in_dtype(norm, "bfloat16").var.dtype == jnp.bfloat16


def test_constants_that_are_not_finite_stay_what_they_are():
    """A mask of minus infinities is beyond no type's range, and was so before."""
    masked = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    masked.mask = nnx.Variable(jnp.array([0.0, -jnp.inf, jnp.nan]))
    for dtype in ("float32", "float16"):
        np.testing.assert_array_equal(in_dtype(masked, dtype).mask[...], [0, -np.inf, np.nan])


def test_types_that_are_no_floats_are_refused():
    model = networks.network("chain")
    with pytest.raises(ValueError, match="computed in float32, bfloat16, float16, found 'int8'"):
        compile_inference(model, IMAGES.shape, "int8")


def test_any_weights_leave_the_network_and_have_no_zeros():
    model = networks.network("chain")
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    drawn = with_any_weights(model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    for _, variable in nnx.to_flat_state(nnx.state(drawn, nnx.Param)):
        assert np.all(np.asarray(variable[...]) != 0)
    assert np.isfinite(np.asarray(drawn(jnp.asarray(IMAGES)))).all()


def test_any_weights_of_a_parameter_without_axes():
    model = networks.network("chain")
    model.scale = nnx.Param(jnp.array(2.0))
    assert with_any_weights(model).scale[...].shape == ()


@pytest.mark.parametrize("bound", [False, True])
def test_weights_too_large_for_the_program_are_given_to_it(monkeypatch, bound):
    """As on other devices than CPU: the program says how they lie in memory."""
    model = networks.network("residual")
    if bound:  # To a device, as those of a checkpoint are.
        here = jax.devices()[0]
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            variable.set_value(jax.device_put(variable[...], here))
    inside = compile_inference(model, IMAGES.shape)
    monkeypatch.setattr(inference, "CONSTANT_BYTES", 0)
    given = compile_inference(model, IMAGES.shape)
    count = len(jax.tree.leaves(nnx.state(model)))
    assert len(jax.tree.leaves(given.arguments)) == count
    np.testing.assert_allclose(given(IMAGES), inside(IMAGES), rtol=1e-5, atol=1e-6)
