"""MAC counts against explicit loops, published figures and XLA's own count."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.cost import ConvShape, count_conv_macs, count_macs
from accel.models import build
from accel.models.vgg import STAGES

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
CONV = 8 * 8 * 9 * 4 * 4  # of a 3×3 convolution of 4 to 4 channels over IMAGES


def conv3x3() -> nnx.Conv:
    return nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))


def abstract(name, **options) -> nnx.Module:
    return nnx.eval_shape(lambda: build(name, **options))


def xla_macs(model, images) -> float:
    """XLA counts two operations a MAC, and no taps on padding or between dilated inputs."""
    graphdef, state = nnx.split(model)
    lowered = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images)).lower(state, images)
    analysis = lowered.cost_analysis()
    if analysis is None and jax.default_backend() != "cpu":
        pytest.skip("XLA counts nothing here")
    assert analysis is not None
    return analysis["flops"] / 2 / images.shape[0]


class TestConvShape:
    def test_counts_the_loops(self):
        shape = ConvShape((3, 2), in_channels=4, out_channels=6, output_positions=7, groups=2)
        macs = 0
        for _position in range(7):
            for group in range(2):
                for _out in range(group * 3, group * 3 + 3):
                    for _in in range(group * 2, group * 2 + 2):
                        macs += 3 * 2
        assert shape.macs == macs

    @pytest.mark.parametrize("sizes", [(0, 4, 4, 9, 1), (3, 4, 4, 0, 1), (3, 4, 4, 9, 0)])
    def test_refuses_empty_sizes(self, sizes):
        kernel, *others = sizes
        with pytest.raises(ValueError, match="at least 1"):
            ConvShape((3, kernel), *others)

    def test_refuses_groups_that_do_not_divide(self):
        with pytest.raises(ValueError, match="groups"):
            ConvShape((3, 3), 4, 6, 9, groups=4)


class TestVGG:
    @pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16", "vgg19"])
    @pytest.mark.parametrize("batch_norm", [False, True])
    def test_every_convolution(self, name, batch_norm):
        expected, channels, side = {}, 3, 224
        for stage, widths in enumerate(STAGES[name], start=1):
            for index, width in enumerate(widths, start=1):
                expected[f"conv{stage}_{index}"] = side * side * 3 * 3 * channels * width
                channels = width
            side //= 2
        model = abstract(f"{name}_body", batch_norm=batch_norm)
        counted = count_conv_macs(model, jax.ShapeDtypeStruct((5, 224, 224, 3), jnp.float32))
        assert list(counted.items()) == list(expected.items())

    # Billions of MACs as torchvision's documentation gives them, fully connected layers included.
    @pytest.mark.parametrize(
        ("name", "published"),
        [("vgg11", 7.609), ("vgg13", 11.308), ("vgg16", 15.470), ("vgg19", 19.632)],
    )
    def test_published_totals(self, name, published):
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        counted = count_macs(abstract(name), images)
        assert sum(counted.values()) == pytest.approx(published * 1e9, abs=0.5e6)
        dense = {path: macs for path, macs in counted.items() if path.startswith("fc")}
        assert dense == {"fc6": 512 * 49 * 4096, "fc7": 4096**2, "fc8": 4096 * 1000}

    def test_vgg16_body_at_224(self):
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        assert sum(count_conv_macs(abstract("vgg16"), images).values()) == 15_346_630_656


class TestConvolutions:
    @settings(max_examples=20, deadline=None)
    @given(
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
        groups=st.integers(1, 3),
        channels=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    )
    def test_equals_xla_without_padding(self, kernel, strides, dilation, groups, channels):
        c, d = (groups * factor for factor in channels)
        model = nnx.eval_shape(
            lambda: nnx.Conv(
                c,
                d,
                kernel,
                strides,
                padding="VALID",
                kernel_dilation=dilation,
                feature_group_count=groups,
                use_bias=False,
                rngs=nnx.Rngs(0),
            )
        )
        images = jax.ShapeDtypeStruct((2, 8, 9, c), jnp.float32)
        counted = count_conv_macs(model, images)
        assert counted == {"": xla_macs(model, images)}
        assert count_macs(model, images) == counted

    @pytest.mark.parametrize("kernel", [(1, 1), (3, 2), (4, 5)])
    @pytest.mark.parametrize("strides", [(2, 2), (3, 2)])
    def test_transposed_equals_xla_without_padding(self, kernel, strides):
        model = nnx.eval_shape(
            lambda: nnx.ConvTranspose(
                4, 6, kernel, strides, padding="VALID", use_bias=False, rngs=nnx.Rngs(0)
            )
        )
        assert count_conv_macs(model, IMAGES) == {"": xla_macs(model, IMAGES)}

    @pytest.mark.parametrize("padding", ["SAME", "CIRCULAR", [(1, 1), (1, 1)]])
    def test_taps_on_padding_count(self, padding):
        model = nnx.eval_shape(lambda: nnx.Conv(4, 6, (3, 3), padding=padding, rngs=nnx.Rngs(0)))
        assert count_conv_macs(model, IMAGES) == {"": 8 * 8 * 3 * 3 * 4 * 6}

    def test_transposed_with_padding_counts_its_input_positions(self):
        model = nnx.eval_shape(
            lambda: nnx.ConvTranspose(4, 6, (3, 3), (2, 2), padding="SAME", rngs=nnx.Rngs(0))
        )
        assert count_conv_macs(model, IMAGES) == {"": 8 * 8 * 3 * 3 * 4 * 6}

    @pytest.mark.parametrize("axes", [1, 3])
    def test_other_dimensions(self, axes):
        model = nnx.eval_shape(lambda: nnx.Conv(4, 6, (3,) * axes, rngs=nnx.Rngs(0)))
        images = jax.ShapeDtypeStruct((2, *(5,) * axes, 4), jnp.float32)
        assert count_conv_macs(model, images) == {"": 5**axes * 3**axes * 4 * 6}


class Block(nnx.Module):
    def __init__(self):
        self.conv1, self.conv2 = conv3x3(), conv3x3()

    def __call__(self, x):
        return x + self.conv2(nnx.relu(self.conv1(x)))


class Residual(nnx.Module):
    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x).mean((1, 2)))


class Applied(nnx.Module):
    """One convolution, applied in a way that the test gives."""

    def __init__(self, apply):
        self.conv = conv3x3()
        self.apply = apply

    def __call__(self, x):
        return self.apply(self.conv, x)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def through_stack(layer, x):
    return layer(x)


class Stack(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0).split(5)
        self.layers = nnx.vmap(lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs))(rngs)

    def __call__(self, x):
        return through_stack(self.layers, x)


@jax.jit
def shared_product(x, kernel):
    return x @ kernel


class Product(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        return shared_product(x, self.kernel[...])


class TwiceInTraining(nnx.Module):
    def __init__(self):
        self.conv = conv3x3()
        self.deterministic = False

    def __call__(self, x):
        return self.conv(x) if self.deterministic else self.conv(self.conv(x))


class Unregistered(nnx.Module, pytree=False):
    def __init__(self):
        self.layers = [conv3x3(), conv3x3()]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TestAnyNetwork:
    def test_paths_and_dense_layers(self):
        convs = {f"blocks/{i}/conv{j}": CONV for i in (0, 1) for j in (1, 2)}
        model = Residual()
        assert count_conv_macs(model, IMAGES) == convs
        assert count_macs(model, IMAGES) == convs | {"head": 4 * 3}

    def test_leaves_the_network_as_it_is(self):
        model = Residual()
        before = [(path, type(node), vars(node).keys()) for path, node in nnx.iter_modules(model)]
        count_macs(model, IMAGES)
        after = [(path, type(node), vars(node).keys()) for path, node in nnx.iter_modules(model)]
        assert before == after
        assert not model.dropout.deterministic

    def test_counts_evaluation_and_not_training(self):
        assert count_macs(TwiceInTraining(), IMAGES) == {"conv": CONV}

    def test_abstract_and_real_networks_alike(self):
        assert count_macs(nnx.eval_shape(Residual), IMAGES) == count_macs(Residual(), IMAGES)

    @pytest.mark.parametrize(
        ("apply", "times"),
        [
            (lambda conv, x: conv(conv(x)), 2),
            (lambda conv, x: jax.lax.scan(lambda x, _: (conv(x), None), x, length=3)[0], 3),
            (lambda conv, x: jax.lax.fori_loop(0, 4, lambda _, x: conv(x), x), 4),
            (lambda conv, x: jax.lax.cond(x.sum() > 0, lambda x: conv(conv(x)), conv, x), 2),
            (lambda conv, x: jax.checkpoint(conv)(x), 1),
            (lambda conv, x: jax.jit(conv)(x), 1),
            (lambda conv, x: nnx.jit(lambda conv, x: conv(x))(conv, x), 1),
            (lambda conv, x: jax.vmap(conv)(x), 1),
            (lambda conv, x: jax.vmap(conv, in_axes=3)(jnp.stack([x] * 5, axis=3)), 5),
        ],
        ids=["twice", "scan", "fori_loop", "cond", "remat", "jit", "nnx_jit", "vmap", "vmap_5"],
    )
    def test_control_flow_and_calls(self, apply, times):
        assert count_macs(Applied(apply), IMAGES) == {"conv": times * CONV}

    def test_scanned_stack_of_layers(self):
        assert count_macs(Stack(), IMAGES) == {"layers": 5 * CONV}

    def test_unknown_number_of_passes_is_an_error(self):
        def apply(conv, x):
            return jax.lax.while_loop(lambda x: x.sum() > 0, conv, x)

        with pytest.raises(ValueError, match=r"'conv'.*while_loop"):
            count_macs(Applied(apply), IMAGES)

    def test_while_loop_without_macs_is_none(self):
        def apply(conv, x):
            return conv(jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, x))

        assert count_macs(Applied(apply), IMAGES) == {"conv": CONV}

    def test_one_compiled_function_of_two_layers(self):
        model = nnx.Sequential(Product(), Product())
        macs = 8 * 8 * 4 * 4
        assert count_macs(model, IMAGES) == {"layers/0": macs, "layers/1": macs}

    def test_attention(self):
        model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
        tokens = jax.ShapeDtypeStruct((3, 7, 4), jnp.float32)
        projection = 7 * 4 * 4
        assert count_macs(model, tokens) == {
            **dict.fromkeys(("query", "key", "value", "out"), projection),
            "": 2 * 7 * 7 * 4,  # queries times keys, and weights times values
        }
        assert count_conv_macs(model, tokens) == {}

    def test_module_that_is_no_pytree(self):
        assert count_macs(Unregistered(), IMAGES) == {"layers/0": CONV, "layers/1": CONV}

    def test_images_that_do_not_fit(self):
        images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
        with pytest.raises(ValueError, match=r"Residual.*\(1, 8, 8, 3\)"):
            count_macs(Residual(), images)
