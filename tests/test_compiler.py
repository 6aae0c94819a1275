import jax
import jax.numpy as jnp
import networks
import pytest
from flax import nnx

from accel import compile_inference, compiler
from accel.compiler import compile_together, matmul_precision, network_options
from accel.program import trace

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="options are those for CPU")

IMAGES = jnp.ones((8, 56, 56, 64))


def conv(groups=1):
    return nnx.Conv(64, 64, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))


@pytest.mark.optimized
def test_networks_are_compiled_without_ynnpack():
    """Fails where a version of XLA no longer knows the option, or means something else by it."""
    network = nnx.Sequential(conv(), nnx.relu)
    assert network_options(network) is not None
    text = compile_inference(network, IMAGES.shape).program.as_text()
    assert "ynn_fusion" not in text
    assert "convolution" in text
    assert "ynn_fusion" in jax.jit(network).lower(IMAGES).compile().as_text()


@pytest.mark.parametrize(("groups", "plain"), [(1, False), (8, False), (64, True)])
def test_only_depthwise_convolutions_keep_the_defaults(groups, plain):
    network = nnx.Sequential(conv(), conv(groups))
    assert (network_options(network) is None) == plain
    assert trace(network, IMAGES).options == network_options(network)


def test_one_channel_is_not_depthwise():
    assert network_options(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))) is not None


@pytest.fixture
def unknown_option(monkeypatch):
    monkeypatch.setattr(compiler, "_WITHOUT_YNNPACK", {"xla_cpu_an_option_of_no_version": ""})
    compiler._known.cache_clear()
    yield
    compiler._known.cache_clear()


@pytest.mark.usefixtures("unknown_option")
def test_an_option_that_the_compiler_does_not_know_is_left_out():
    assert network_options(networks.network("chain")) is None


def test_sums_of_reduced_precision_are_taken_in_float32():
    """8,192 products of one each: in bfloat16 such a sum would stop at 256."""
    layer = nnx.Conv(1, 1, (1, 1), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    images = jnp.ones((8, 32, 32, 1), jnp.bfloat16)

    def loss(state):
        return nnx.merge(graphdef, state)(images).astype(jnp.float32).sum()

    found = jax.jit(jax.grad(loss), compiler_options=network_options(layer))(state)
    assert found.kernel[...].item() == 8192


def test_programs_compiled_together_come_in_order_and_in_the_callers_precision():
    with jax.default_matmul_precision("highest"):
        found = list(compile_together(lambda number: (number, matmul_precision()), range(9)))
    assert found == [(number, "highest") for number in range(9)]
    assert {
        precision for _, precision in compile_together(lambda n: (n, matmul_precision()), [0])
    } == {None}
