import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from accel import compiler
from accel.compiler import jit_network, network_options

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options are those for CPU")


@pytest.mark.optimized
def test_convolutions_are_left_to_eigen():
    """Fails where a version of XLA no longer knows the option, or means something else by it."""
    conv = nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(0))
    images = jnp.ones((8, 56, 56, 64))

    def text(jit):
        return jit(lambda images: nnx.relu(conv(images))).lower(images).compile().as_text()

    assert "ynn" in text(jax.jit)
    assert "ynn" not in text(jit_network)
    assert "convolution" in text(jit_network)


@pytest.fixture
def unknown_option(monkeypatch):
    monkeypatch.setattr(compiler, "_WITHOUT_YNNPACK", {"xla_cpu_an_option_of_no_version": ""})
    network_options.cache_clear()
    yield
    network_options.cache_clear()


@pytest.mark.usefixtures("unknown_option")
def test_an_option_that_the_compiler_does_not_know_is_left_out():
    assert network_options() is None
    np.testing.assert_array_equal(jit_network(lambda x: 2 * x)(jnp.ones(3)), 2)
