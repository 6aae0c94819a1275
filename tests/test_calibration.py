import jax
import networks
import numpy as np
import pytest
from flax import nnx

from accel.calibration import calibrate
from accel.data import ArrayImages
from accel.images import ArraySource, image_groups, split_images
from accel.program import trace
from accel.runs import AcceleratedRun, OriginalRun, sample_positions

IMAGES, BATCH, PER_IMAGE = 11, 4, 9


class CountingSource(ArraySource):
    """Counts how many batches were asked for."""

    asked = 0

    def batches(self, batch_size):
        for batch in super().batches(batch_size):
            type(self).asked += 1
            yield batch


def prepared(name):
    model = networks.network(name)
    model.eval()
    source = ArraySource(np.asarray(networks.images(IMAGES)))
    program = trace(model, source.images[:BATCH])
    key = jax.random.key(3)
    positions = {
        call.path: sample_positions(key, call, IMAGES, BATCH, PER_IMAGE) for call in program.calls
    }
    return model, source, program, positions


def responses_by_hand(model, path, source, positions):
    """The layer's outputs, recorded by an ordinary forward pass of the whole network."""
    recorded = []

    class Recorder(nnx.Conv):
        def __call__(self, inputs):
            recorded.append(super().__call__(inputs))
            return recorded[-1]

    copy = nnx.clone(model)
    for parts, node in nnx.iter_graph(copy):
        if "/".join(map(str, parts)) == path:
            object.__setattr__(node, "__class__", Recorder)
    # Without rematerialisation, under which nothing could be recorded.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnx, "remat", lambda function: function)
        copy(source.images)
    (output,) = recorded
    rows = np.asarray(output).reshape(len(source), -1, output.shape[-1])
    return np.take_along_axis(rows, positions[:, :, None], axis=1)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_original_runs_responses_are_those_of_an_ordinary_pass(name):
    model, source, program, positions = prepared(name)
    responses = OriginalRun(program, program.calls, source, BATCH, positions).responses()
    for call in program.calls:
        expected = responses_by_hand(model, call.path, source, positions[call.path])
        np.testing.assert_allclose(responses[call.path], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_bytes", [0, 30_000, 10**9])
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_kernel_on_the_accelerated_runs_patches_gives_the_responses_of_an_ordinary_pass(
    name, cache_bytes
):
    model, source, program, positions = prepared(name)
    changed = nnx.clone(model)
    run = AcceleratedRun(program, program.calls, source, BATCH, cache_bytes)
    for call in program.calls:
        kernel = np.asarray(call.layer.kernel[...])
        patches = run.patches(positions[call.path])
        responses = patches @ kernel.reshape(-1, kernel.shape[-1])
        if call.layer.bias is not None:
            responses += np.asarray(call.layer.bias[...])
        assert sum(place.bytes for place in run.places) <= cache_bytes
        expected = responses_by_hand(changed, call.path, source, positions[call.path])
        np.testing.assert_allclose(responses, expected, rtol=1e-4, atol=1e-4)
        # Something else in the layer's place, here and in the network that checks it.
        replacement = nnx.clone(call.layer)
        object.__setattr__(replacement, "__class__", nnx.Conv)
        replacement.kernel[...] = 1.1 * replacement.kernel[...] + 0.01
        run.replace(replacement)
        for parts, node in nnx.iter_graph(changed):
            if "/".join(map(str, parts)) == call.path:
                node.kernel[...] = replacement.kernel[...]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_segment_runs_once_for_each_batch_where_the_cache_suffices(name):
    _, source, program, positions = prepared(name)
    counting = CountingSource(source.images)
    CountingSource.asked = 0
    run = AcceleratedRun(program, program.calls, counting, BATCH, 10**9)
    for call in program.calls:
        run.patches(positions[call.path])
        run.replace(call.layer)
    batches = -(-IMAGES // BATCH)
    assert run.segments_run == batches * len(program.calls)
    assert CountingSource.asked == batches


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_layer_that_is_kept_changes_nothing(name):
    model, source, program, positions = prepared(name)
    run = AcceleratedRun(program, program.calls, source, BATCH, 10**9)
    for call in program.calls:
        patches = run.patches(positions[call.path])
        kernel = np.asarray(call.layer.kernel[...])
        bias = 0 if call.layer.bias is None else np.asarray(call.layer.bias[...])
        expected = responses_by_hand(model, call.path, source, positions[call.path])
        responses = patches @ kernel.reshape(-1, kernel.shape[-1]) + bias
        np.testing.assert_allclose(responses, expected, rtol=1e-4, atol=1e-4)
        run.keep()


def test_without_a_cache_segments_run_again_from_the_images():
    _, source, program, positions = prepared("chain")
    run = AcceleratedRun(program, program.calls, source, BATCH, 0)
    for call in program.calls:
        run.patches(positions[call.path])
        run.replace(call.layer)
    layers, batches = len(program.calls), -(-IMAGES // BATCH)
    assert run.segments_run == batches * layers * (layers + 1) // 2


def test_positions_are_spread_in_range_and_fixed_by_the_key():
    _, _, program, positions = prepared("chain")
    for call in program.calls:
        drawn = positions[call.path]
        available = int(np.prod(call.output.aval.shape[1:-1]))
        assert drawn.shape == (IMAGES, min(PER_IMAGE, available))
        assert drawn.min() >= 0
        assert drawn.max() < available
        again = sample_positions(jax.random.key(3), call, IMAGES, BATCH, PER_IMAGE)
        np.testing.assert_array_equal(drawn, again)
    call = program.calls[0]
    many = sample_positions(jax.random.key(0), call, 2_000, BATCH, 7).ravel()
    counts = np.bincount(many, minlength=14 * 14)
    # 14,000 draws over 196 positions: mean 71, standard deviation 8 at most.
    assert counts.min() > 71 - 5 * 8.5
    assert counts.max() < 71 + 5 * 8.5


def test_a_map_smaller_than_the_number_of_positions_is_taken_whole():
    _, _, program, _ = prepared("chain")
    call = program.calls[-1]
    available = int(np.prod(call.output.aval.shape[1:-1]))
    drawn = sample_positions(jax.random.key(0), call, IMAGES, BATCH, 10_000)
    np.testing.assert_array_equal(drawn, np.tile(np.arange(available), (IMAGES, 1)))


def test_not_a_number_stops_the_run_and_names_the_layer():
    model, source, clean, positions = prepared("chain")
    model.dilated.kernel[0, 0, 0, 0] = np.nan
    program = trace(model, source.images[:BATCH])
    run = OriginalRun(program, program.calls, source, BATCH, positions)
    with pytest.raises(ValueError, match="dilated: the original network's responses hold NaN"):
        run.responses()
    broken = source.images.copy()
    broken[6, 0, 0, 0] = np.inf
    run = OriginalRun(clean, clean.calls, ArraySource(broken), BATCH, positions)
    with pytest.raises(ValueError, match="calibration image 6 holds NaN or Inf"):
        run.responses()


@pytest.mark.parametrize(("images", "held_out"), [(2, 1), (9, 1), (24, 2), (365, 36)])
def test_images_that_stand_for_themselves_are_held_out_one_by_one(images, held_out):
    key = jax.random.key(4)
    fitting = split_images(key, image_groups(ArraySource(np.zeros((images, 2, 2, 1)))), 0.1)
    # The draw that published figures were measured with.
    order = np.asarray(jax.random.permutation(key, images))
    assert sorted(np.flatnonzero(~fitting)) == sorted(order[:held_out])


def test_groups_of_any_size_and_order_are_held_out_as_a_whole():
    groups = np.random.default_rng(1).choice([3, 7, -2, 40, 41, 100, 8, 9], 60)
    drawn = []
    for seed in range(20):
        fitting = split_images(jax.random.key(seed), groups, 0.25)
        fitted, measured = set(groups[fitting]), set(groups[~fitting])
        assert not fitted & measured
        assert len(measured) == 2
        drawn.append(frozenset(measured))
    assert len(set(drawn)) > 10


def test_a_single_group_cannot_be_split():
    with pytest.raises(ValueError, match=r"images of 2 pictures or more.* found 50 of 1"):
        split_images(jax.random.key(0), np.zeros(50, int), 0.1)


def test_calibration_holds_out_whole_pictures():
    pixels = np.asarray(networks.images(30))
    groups = np.arange(30) % 10
    source = ArrayImages(pixels, "unchanged", groups=groups)
    fitting = calibrate(networks.network("chain"), source, batch_size=10).fitting
    assert (~fitting).sum() == 3
    assert len(set(groups[~fitting])) == 1


def test_groups_that_do_not_fit_the_images_are_refused():
    source = ArraySource(np.zeros((5, 2, 2, 1)))
    object.__setattr__(source, "groups", np.zeros(4, int))
    with pytest.raises(ValueError, match=r"5 images and groups of the shape \(4,\)"):
        image_groups(source)
