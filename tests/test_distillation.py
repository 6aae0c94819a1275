import dataclasses
import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

import accel
from accel.batch_norm import find_foldable, fold_batch_norm
from accel.evaluation.forward import in_dtype
from accel.images import ArraySource, fitting_images
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import named_layers
from accel.repair import Distillation, TrainingDiverged, distill
from accel.repair.augmentation import augment
from accel.rewrite import rewrite

IMAGES = networks.images(100, size=10)
FRESH = networks.images(60, size=10, seed=5)
SHORT = Distillation(epochs=3, learning_rate=3e-3, batch_size=15)


def arrays_of(model):
    """Copies of the model's parameters and statistics."""
    state = nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return jax.tree.map(np.array, state)


def assert_same_arrays(model, other):
    jax.tree.map(np.testing.assert_array_equal, arrays_of(model), arrays_of(other))


def error(model, original, images):
    networks_in_evaluation = [nnx.clone(model), nnx.clone(original)]
    for network in networks_in_evaluation:
        network.eval()
    answer, target = (network(images) for network in networks_in_evaluation)
    return float(((answer - target) ** 2).sum() / (target**2).sum())


def low_rank(original, share):
    """The network, its batch norm folded, with the SVD of each kernel cut to a share of its rank.

    Crude, but there is much to repair, and nothing has to be solved.
    """
    evaluated = nnx.clone(original)
    evaluated.eval()
    pairs = find_foldable(evaluated, IMAGES[:1])
    folded = fold_batch_norm(evaluated, pairs)
    layers, weights = [], {}
    for path, conv in named_layers(folded, (nnx.Conv,)):
        kernel = np.asarray(conv.kernel[...])
        rank = round(share * kernel.shape[-1])
        u, s, v = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]), full_matrices=False)
        reduce = (u * s)[:, :rank].reshape(*kernel.shape[:-1], rank)
        bias = jnp.zeros(kernel.shape[-1]) if conv.bias is None else conv.bias[...]
        layers.append(LayerPlan(path, "channel", (rank,)))
        weights[path] = [(jnp.asarray(reduce), None), (jnp.asarray(v[None, None, :rank]), bias)]
    return rewrite(folded, AccelerationPlan(tuple(layers), pairs), weights)


@pytest.fixture(scope="module")
def pairs():
    originals = {name: networks.network(name) for name in ("residual", "chain")}
    return {name: (original, low_rank(original, 0.5)) for name, original in originals.items()}


@pytest.fixture(scope="module")
def short(pairs):
    """The residual network after a short distillation."""
    return distill(*pairs["residual"], IMAGES, settings=SHORT)


class Interrupted(Exception):
    pass


class Counted(accel.Progress):
    """How much work was said to be there, and how much of it was done."""

    def begin(self, description, total):
        self.total, self.done = total, 0

    def advance(self, amount):
        self.done += amount


class StopAfter(accel.Progress):
    """Stops a run in the middle of an epoch."""

    def __init__(self, images):
        self.left = images

    def advance(self, amount):
        self.left -= amount
        if self.left < 0:
            raise Interrupted


@pytest.mark.parametrize(
    ("name", "features", "compared"),
    [
        ("residual", None, ["head", "outputs"]),
        ("chain", None, ["strided", "even", "outputs"]),
        ("chain", ("point*",), ["pointwise", "outputs"]),
    ],
)
def test_the_error_falls_on_images_that_were_never_seen(pairs, name, features, compared):
    original, accelerated = pairs[name]
    settings = Distillation(epochs=8, learning_rate=1e-2, batch_size=15, features=features)
    graphs, before = (
        [nnx.graphdef(model) for model in pairs[name]],
        [arrays_of(model) for model in pairs[name]],
    )
    result = distill(original, accelerated, IMAGES, settings=settings)

    assert list(result.history[0].held_out) == compared
    assert error(result.model, original, FRESH) < 0.8 * error(accelerated, original, FRESH)
    held_out = IMAGES[~fitting_images(ArraySource(np.asarray(IMAGES)), 0)]
    assert result.error_before == pytest.approx(error(accelerated, original, held_out), rel=1e-4)
    assert result.error_after == pytest.approx(error(result.model, original, held_out), rel=1e-4)
    assert result.error_after == min(epoch.held_out["outputs"] for epoch in result.history)

    # Neither network is changed, and nothing is shared with them.
    for _, variable in nnx.to_flat_state(nnx.state(result.model, nnx.Param)):
        variable[...] = jnp.zeros(variable.shape)
    for model, graph, arrays in zip(pairs[name], graphs, before, strict=True):
        assert nnx.graphdef(model) == graph
        jax.tree.map(np.testing.assert_array_equal, arrays, arrays_of(model))


def test_the_same_seed_gives_the_same_network(pairs, short):
    again = distill(*pairs["residual"], IMAGES, settings=SHORT)
    assert_same_arrays(short.model, again.model)
    assert short.history == again.history


def test_steps_of_reduced_precision_are_not_rounded_away(pairs):
    original, accelerated = (in_dtype(model, "bfloat16") for model in pairs["residual"])
    found = distill(original, accelerated, IMAGES, settings=SHORT)
    assert found.error_after < 0.8 * found.error_before
    before, after = (model.head.kernel[...] for model in (accelerated, found.model))
    assert after.dtype == jnp.bfloat16
    assert (before != after).mean() > 0.5


def test_a_network_that_only_gets_worse_is_returned_as_it_was(pairs):
    _, accelerated = pairs["residual"]
    absurd = dataclasses.replace(SHORT, learning_rate=3.0)
    result = distill(*pairs["residual"], IMAGES, settings=absurd)
    assert result.best == 0
    assert result.error_after == result.error_before < result.history[-1].held_out["outputs"]
    assert_same_arrays(result.model, accelerated)


def test_divergence_is_an_error_that_holds_the_best_network(pairs):
    _, accelerated = pairs["residual"]
    with pytest.raises(TrainingDiverged, match=r"epoch 1; a learning rate below 1e\+30") as caught:
        distill(*pairs["residual"], IMAGES, settings=dataclasses.replace(SHORT, learning_rate=1e30))
    assert_same_arrays(caught.value.distilled.model, accelerated)


def test_a_run_that_was_stopped_goes_on_to_the_same_result(pairs, short, tmp_path):
    with pytest.raises(Interrupted):
        distill(
            *pairs["residual"], IMAGES, settings=SHORT, resume=tmp_path, progress=StopAfter(200)
        )
    left, whole = Counted(), Counted()
    resumed = distill(*pairs["residual"], IMAGES, settings=SHORT, resume=tmp_path, progress=left)
    distill(*pairs["residual"], IMAGES, settings=SHORT, progress=whole)
    # What was done before took none of this run's time.
    assert left.done == left.total < whole.total == whole.done
    assert resumed.history == short.history
    assert_same_arrays(resumed.model, short.model)
    with pytest.raises(ValueError, match="another problem"):
        distill(*pairs["residual"], IMAGES, settings=SHORT, seed=1, resume=tmp_path)


def test_features_are_the_same_thing_in_both_networks(pairs):
    """At full rank they agree, though batch normalisation is folded in one network only."""
    original, _ = pairs["residual"]
    accelerated = low_rank(original, 1.0)
    once = dataclasses.replace(SHORT, epochs=1, learning_rate=1e-9)
    everything = distill(
        original, accelerated, IMAGES, settings=dataclasses.replace(once, features=("*",))
    )
    # The images themselves, which enter the stem, are left out.
    assert list(everything.history[0].held_out) == [
        *(f"blocks/{block}/conv{conv}" for block in range(3) for conv in (1, 2)),
        *("head", "outputs"),
    ]
    assert max(everything.history[0].held_out.values()) < 1e-6


def test_a_pattern_that_matches_no_layer_is_an_error(pairs):
    settings = dataclasses.replace(SHORT, features=("fc6",))
    with pytest.raises(ValueError, match="'fc6' matches no layer; the layers are first, strided"):
        distill(*pairs["chain"], IMAGES, settings=settings)


def test_outputs_alone_can_be_compared_and_it_can_be_said_what_is_held_out(pairs):
    fitting = np.arange(len(IMAGES)) < 70
    original, accelerated = pairs["chain"]
    settings = dataclasses.replace(SHORT, features=())
    result = distill(original, accelerated, IMAGES, settings=settings, fitting=fitting)
    assert list(result.history[0].held_out) == ["outputs"]
    assert result.error_after == pytest.approx(error(result.model, original, IMAGES[70:]), rel=1e-4)
    for wrong, message in (
        (fitting[:50], "each of 100 images"),
        (np.ones(100, bool), "no image to measure on"),
        (np.zeros(100, bool), "none to fit to"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(original, accelerated, IMAGES, fitting=wrong)


def test_networks_with_different_outputs_are_refused(pairs):
    with pytest.raises(ValueError, match=r"expected outputs of one shape .* found \(50, 5\)"):
        distill(pairs["residual"][0], pairs["chain"][1], IMAGES)


def test_what_is_not_finite_is_named(pairs):
    original, accelerated = pairs["residual"]
    for index, name in enumerate(("original", "accelerated")):
        broken = [nnx.clone(original), nnx.clone(accelerated)]
        head = broken[index].head
        head.bias[...] = head.bias[...].at[0].set(jnp.nan)
        with pytest.raises(ValueError, match=f"the {name} network's outputs hold NaN"):
            distill(*broken, IMAGES, settings=SHORT)
    with pytest.raises(ValueError, match="image 3 holds NaN"):
        distill(original, accelerated, IMAGES.at[3, 0, 0, 0].set(jnp.nan), settings=SHORT)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"feature_weight": -1.0},
        {"shift": 1.0},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Distillation(**wrong)


def test_views_are_flipped_and_moved_by_whole_pixels():
    rows, columns = np.meshgrid(np.arange(20), np.arange(10), indexing="ij")
    images = np.broadcast_to(np.stack([rows, columns], -1), (64, 20, 10, 2)).astype(np.float32)
    same = augment(images, jax.random.key(0), flip=False, shift=0.0)
    np.testing.assert_array_equal(same, images)

    found = set()
    for view in np.asarray(augment(images, jax.random.key(0), flip=True, shift=0.1)):
        flipped = view[0, 0, 1] > view[0, -1, 1]
        upright = view[:, ::-1] if flipped else view
        # In the middle of the image nothing is repeated: there the move can be read off.
        down, right = upright[10, 5] - [10, 5]
        expected = np.stack([np.clip(rows + down, 0, 19), np.clip(columns + right, 0, 9)], -1)
        np.testing.assert_array_equal(upright, expected)
        found.add((bool(flipped), int(down), int(right)))
    assert {move[0] for move in found} == {False, True}
    assert {move[1] for move in found} == {-2, -1, 0, 1, 2}
    assert {move[2] for move in found} == {-1, 0, 1}
