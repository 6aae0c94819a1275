import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from jax import lax

from accel import compile_inference
from accel.models.vgg import VGG
from accel.pooling import LARGEST_WINDOW, with_sliced_pooling

IMAGES = np.random.default_rng(0).standard_normal((2, 9, 11, 3)).astype(np.float32)


def average(images):
    return nnx.avg_pool(images, (2, 2), (2, 2))


def primitives(function, *arguments):
    return str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("padding", ["VALID", "SAME", [(1, 2), (0, 1)]])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("window", [(2, 2), (3, 3), (1, 4), (5, 5)])
def test_slices_give_the_same_numbers(window, strides, padding):
    def pooled(images):
        return nnx.relu(nnx.max_pool(images - 1, window, strides, padding)) - images.sum()

    sliced = with_sliced_pooling(pooled)
    assert "reduce_window_max" not in primitives(sliced, IMAGES)
    np.testing.assert_array_equal(jax.jit(sliced)(IMAGES), jax.jit(pooled)(IMAGES))


def test_what_is_no_number_stays_none():
    images = IMAGES.copy()
    images[0, 4, 4, 1] = np.nan
    images[1, 0, 0, 0] = -np.inf

    def pooled(images):
        return nnx.max_pool(images, (2, 2), (2, 2))

    sliced = with_sliced_pooling(pooled)(images)
    np.testing.assert_array_equal(sliced, pooled(images))
    assert np.isnan(sliced).sum() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_types_are_kept(dtype):
    images = jnp.asarray(IMAGES, dtype)
    sliced = with_sliced_pooling(lambda x: nnx.max_pool(x, (3, 3), (2, 2), "SAME"))
    assert sliced(images).dtype == dtype
    np.testing.assert_array_equal(sliced(images), nnx.max_pool(images, (3, 3), (2, 2), "SAME"))


def test_pooling_inside_calls_is_found():
    def pooled(images):
        inner = jax.jit(jax.checkpoint(lambda x: nnx.max_pool(x, (2, 2), (2, 2))))
        return {"pooled": inner(images), "first": images[0]}

    sliced = with_sliced_pooling(pooled)
    assert "reduce_window_max" not in primitives(sliced, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, sliced(IMAGES), pooled(IMAGES))


@pytest.mark.parametrize(
    "pooled",
    [
        lambda x: nnx.max_pool(x, x.shape[1:3], (1, 1)),
        average,
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)
        ),
        lambda x: lax.reduce_window(
            (10 * x).astype(np.int32),
            np.int32(np.iinfo(np.int32).min),
            lax.max,
            (1, 2, 2, 1),
            (1, 1, 1, 1),
            "VALID",
        ),
        lambda x: nnx.max_pool(x[:, :1, :1], (2, 2), (2, 2)),
        lambda x: lax.scan(lambda c, _: (c, nnx.max_pool(c, (2, 2))), x, None, length=2)[1],
    ],
    ids=["whole image", "average", "dilated", "integers", "nothing left", "in a loop"],
)
def test_other_pooling_is_left_as_it_is(pooled):
    assert np.prod(IMAGES.shape[1:3]) > LARGEST_WINDOW
    np.testing.assert_array_equal(with_sliced_pooling(pooled)(IMAGES), pooled(IMAGES))
    kind = "reduce_window_sum" if pooled is average else "reduce_window_max"
    assert kind in primitives(with_sliced_pooling(pooled), IMAGES)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measured on CPU alone")
def test_a_network_compiled_for_inference_pools_by_slices():
    model = VGG(((4, 4), (8,)), num_classes=None, rngs=nnx.Rngs(0))
    images = networks.images(2)
    compiled = compile_inference(model, images.shape)
    assert "reduce-window" not in compiled.program.as_text()
    np.testing.assert_allclose(compiled(images), model(images), rtol=1e-5, atol=1e-6)
