import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel.batch_norm import Identity, find_foldable, fold_batch_norm


def test_a_residual_network_is_folded_exactly_and_left_unchanged():
    model, images = networks.network("residual"), networks.images(2)
    model.eval()
    expected = model(images)
    graph = nnx.graphdef(model)
    pairs = find_foldable(model, images)
    assert pairs == {
        f"blocks/{block}/norm{i}": f"blocks/{block}/conv{i}" for block in range(3) for i in (1, 2)
    }
    folded = fold_batch_norm(model, pairs)
    assert isinstance(folded.blocks[1].norm2, Identity)
    np.testing.assert_allclose(folded(images), expected, rtol=1e-5, atol=1e-5)
    assert nnx.graphdef(model) == graph
    folded.blocks[0].conv1.kernel[...] = 0.0
    folded.stem.kernel[...] = 0.0
    np.testing.assert_array_equal(model(images), expected)


class Unfoldable(nnx.Module):
    """Batch norms that no convolution before them can take in."""

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(3, rngs=rngs)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.shared = nnx.BatchNorm(4, rngs=rngs)
        self.conv_before_relu = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.after_relu = nnx.BatchNorm(4, rngs=rngs)
        self.conv_own = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.own_statistics = nnx.BatchNorm(4, rngs=rngs)
        self.conv_rows = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.rows = nnx.BatchNorm(14, axis=1, rngs=rngs)

    def __call__(self, x):
        y = self.conv(self.first(x))
        x = self.shared(y) + y
        x = self.after_relu(nnx.relu(self.conv_before_relu(x)))
        x = self.own_statistics(self.conv_own(x), use_running_average=False)
        return self.rows(self.conv_rows(x))


def test_what_cannot_be_folded_exactly_is_left_alone():
    model = Unfoldable(nnx.Rngs(0))
    model.eval()
    assert find_foldable(model, networks.images(2)) == {}


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_norms_without_scale_or_bias_and_grouped_convolutions(use_scale, use_bias):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 6, (3, 3), feature_group_count=2, use_bias=use_bias, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_scale=use_scale, use_bias=use_bias, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x))

    model = Net(nnx.Rngs(0))
    model.norm.mean[...] = jnp.arange(6.0)
    model.norm.var[...] = jnp.arange(1.0, 7.0)
    model.eval()
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    folded = fold_batch_norm(model, find_foldable(model, images))
    assert isinstance(folded.norm, Identity)
    np.testing.assert_allclose(folded(images), model(images), rtol=1e-5, atol=1e-5)


def test_unknown_paths_are_refused():
    with pytest.raises(ValueError, match="'nothing' is no layer of Residual"):
        fold_batch_norm(networks.network("residual"), {"nothing": "stem"})


def standardised(inputs, kernel, *arguments, **options):
    """A convolution with its kernel standardised: what the layer holds is not what it uses."""
    centred = kernel - kernel.mean((0, 1, 2))
    return jax.lax.conv_general_dilated(inputs, centred, *arguments, **options)


def statistics_drawn(norm):
    """Statistics other than 0 and 1, so that it matters whether they are folded."""
    count = norm.mean.shape[-1]
    norm.mean[...] = jnp.linspace(-1, 1, count)
    norm.var[...] = jnp.linspace(1, 8, count)
    return norm


class Normalised(nnx.Module):
    """A convolution, whatever becomes of its kernel, and a batch norm."""

    def __init__(self, conv, **options):
        self.conv = conv
        self.norm = statistics_drawn(nnx.BatchNorm(6, rngs=nnx.Rngs(1), **options))

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


def conv(**options):
    return nnx.Conv(3, 6, (3, 3), rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
    ("layer", "folded"),
    [
        (lambda: conv(), True),
        (lambda: conv(mask=jnp.ones((3, 3, 3, 6)).at[0].set(0.0)), True),
        (lambda: nnx.WeightNorm(conv(), rngs=nnx.Rngs(0)), False),
        (lambda: nnx.SpectralNorm(conv(), rngs=nnx.Rngs(0)), False),
        (lambda: conv(conv_general_dilated=standardised), False),
        # The norm returns float32, which what is behind it may count on.
        (lambda: conv(dtype=jnp.bfloat16), False),
    ],
    ids=["plain", "masked", "weight norm", "spectral norm", "standardised", "mixed types"],
)
def test_folding_changes_nothing_whatever_becomes_of_the_kernel(layer, folded):
    model, images = Normalised(layer()), networks.images(2)
    model.eval()
    pairs = find_foldable(model, images)
    assert bool(pairs) == folded
    expected, found = model(images), fold_batch_norm(model, pairs)(images)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
