"""The gradient by kernels that training on CPU uses, against XLA's own."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from accel.kernel_gradient import convolve, with_fast_kernel_gradients
from accel.program import trace

CONVOLUTIONS = {
    "same": {"kernel_size": (3, 3)},
    "valid": {"kernel_size": (3, 3), "padding": "VALID"},
    "explicit": {"kernel_size": (3, 3), "padding": ((0, 2), (3, 1))},
    "cropping": {"kernel_size": (3, 3), "padding": ((-1, 0), (0, -2))},
    "circular": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    "1x1": {"kernel_size": (1, 1)},
    "even": {"kernel_size": (2, 4)},
    "separable": {"kernel_size": (3, 1)},
    "strided": {"kernel_size": (3, 3), "strides": 2},
    "strided 1x1": {"kernel_size": (1, 1), "strides": (3, 2)},
    "strides that leave a rest": {"kernel_size": (2, 3), "strides": (4, 3), "padding": "VALID"},
    "dilated": {"kernel_size": (3, 2), "kernel_dilation": (2, 3)},
    "one axis": {"kernel_size": (3,), "strides": 2},
    "three axes": {"kernel_size": (2, 3, 1)},
    "no bias": {"kernel_size": (3, 3), "use_bias": False},
    "masked": {"kernel_size": (3, 3), "mask": np.float32(np.arange(216) % 2).reshape(3, 3, 4, 6)},
    "grouped": {"kernel_size": (3, 3), "feature_group_count": 2},
    "of a dilated input": {"kernel_size": (3, 3), "input_dilation": 2, "padding": ((1, 1), (2, 0))},
    "typed": {"kernel_size": (3, 3), "preferred_element_type": jnp.float32},
}


def gradients(conv, images, target):
    graphdef, state = nnx.split(conv)

    def loss(state, images):
        return jnp.sum((nnx.merge(graphdef, state)(images) - target) ** 2)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, images)


@pytest.mark.parametrize(
    ("settings", "batch"),
    [*((settings, 6) for settings in CONVOLUTIONS.values()), ({"kernel_size": (3, 3)}, 1)],
    ids=[*CONVOLUTIONS, "one image"],
)
def test_gradients_are_those_of_xla(settings, batch):
    conv = nnx.Conv(4, 6, rngs=nnx.Rngs(0), **settings)
    axes = len(settings["kernel_size"])
    random = np.random.default_rng(1)
    images = random.standard_normal((batch, *(23, 23, 5)[:axes], 4), np.float32)
    outputs = nnx.eval_shape(lambda conv, images: conv(images), conv, images)
    target = random.standard_normal(outputs.shape, np.float32)
    fast = with_fast_kernel_gradients(conv)
    assert fast.conv_general_dilated is convolve
    expected, found = gradients(conv, images, target), gradients(fast, images, target)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5 * float(jnp.abs(one).max()))
    assert conv.conv_general_dilated is jax.lax.conv_general_dilated


def test_sums_of_reduced_precision_are_taken_in_float32():
    """8,192 products of one each: in bfloat16 such a sum would stop at 256."""
    conv = nnx.Conv(1, 1, (1, 1), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(with_fast_kernel_gradients(conv))
    images = jnp.ones((8, 32, 32, 1), jnp.bfloat16)
    found = jax.grad(lambda s: nnx.merge(graphdef, s)(images).astype(jnp.float32).sum())(state)
    assert found.kernel[...].dtype == jnp.bfloat16
    assert found.kernel[...].item() == 8192


def test_own_convolutions_are_left_alone():
    def own(*args, **kwargs):
        return 2 * jax.lax.conv_general_dilated(*args, **kwargs)

    conv = nnx.Conv(2, 2, (1, 1), conv_general_dilated=own, rngs=nnx.Rngs(0))
    assert with_fast_kernel_gradients(conv).conv_general_dilated is own


@pytest.mark.optimized
def test_the_gradient_is_faster_than_that_of_xla():
    conv = nnx.Conv(256, 256, (3, 3), rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (8, 28, 28, 256))
    gradients = {}
    for name, network in (("xla", conv), ("fast", with_fast_kernel_gradients(conv))):
        graphdef, state = nnx.split(network)

        def loss(state, images, graphdef=graphdef):
            return (nnx.merge(graphdef, state)(images) ** 2).sum()

        gradients[name] = jax.jit(jax.grad(loss))
        jax.block_until_ready(gradients[name](state, images))
    taken = dict.fromkeys(gradients, math.inf)
    for _ in range(7):  # In turns: other tests run beside this one.
        for name, gradient in gradients.items():
            start = time.perf_counter()
            jax.block_until_ready(gradient(state, images))
            taken[name] = min(taken[name], time.perf_counter() - start)
    assert 1.5 * taken["fast"] < taken["xla"], taken


def test_a_traced_network_keeps_the_gradient():
    """Distillation runs programs that were traced and written out."""
    network = nnx.Sequential(nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    images = jnp.ones((2, 8, 8, 2))
    program = trace(with_fast_kernel_gradients(network), images)
    run = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(program.jaxpr, ()))

    def text(differentiated):
        return str(jax.make_jaxpr(jax.grad(differentiated))(program.parameters))

    assert "scan" in text(lambda given: run(*given, images)[0].sum())
    plain = trace(network, images)
    run_plain = jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(plain.jaxpr, ()))
    assert "scan" not in text(lambda given: run_plain(*given, images)[0].sum())
