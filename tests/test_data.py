import gzip
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from accel.data import (
    ArrayImages,
    CentreView,
    RandomWindows,
    fashion_calibration_images,
    fashion_test_images,
    preprocess,
)
from accel.data.settings import TfdsImages


def pixels(images=7, size=5, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (images, size, size, channels), np.uint8)


def test_preprocessings_follow_their_formulas():
    rgb = pixels()
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    caffe = np.stack([blue - 103.939, green - 116.779, red - 123.68], -1)
    torch = np.stack(
        [(red / 255 - 0.485) / 0.229, (green / 255 - 0.456) / 0.224, (blue / 255 - 0.406) / 0.225],
        -1,
    )
    for name, expected in {"caffe": caffe, "torch": torch, "unchanged": rgb}.items():
        images = preprocess(rgb, name)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)


def test_fashion_preprocessing_is_the_one_the_bundled_network_was_trained_with(script):
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    # By the host, as the other: a difference of numbers is rounded otherwise elsewhere.
    with jax.default_device(jax.devices("cpu")[0]):
        trained_on = script("train_fashion_vgg").normalise(jnp.asarray(grey))
    np.testing.assert_allclose(preprocess(grey[..., None], "fashion"), trained_on, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("caffe", 1, "'caffe' takes images of 3 channels, found 1"),
        ("fashion", 3, "'fashion' takes images of 1 channels, found 3"),
        ("vgg", 3, "unknown preprocessing 'vgg'; known: caffe, torch, fashion, unchanged"),
    ],
)
def test_preprocessing_that_does_not_fit_is_refused_when_the_source_is_made(
    name, channels, message
):
    with pytest.raises(ValueError, match=message):
        ArrayImages(pixels(channels=channels), name)


def test_batches_hold_every_image_once_in_order():
    labels = np.arange(7) % 3
    source = ArrayImages(pixels(), "caffe", labels, class_count=3)
    assert source.image_shape == (5, 5, 3)
    for _ in range(2):
        batches = list(source.labelled_batches(3))
        assert [len(images) for images, _ in batches] == [3, 3, 1]
        np.testing.assert_array_equal(
            np.concatenate([images for images, _ in batches]), preprocess(pixels(), "caffe")
        )
        np.testing.assert_array_equal(np.concatenate([given for _, given in batches]), labels)
    np.testing.assert_array_equal(
        np.concatenate(list(source.batches(2))), preprocess(pixels(), "caffe")
    )


def test_some_images_of_a_source_are_from_all_of_it():
    """As a folder of classes is ordered, its first images would be of one class."""
    source = ArrayImages(pixels(), "caffe", np.arange(7), class_count=7)
    some = source.spread(5)
    assert (len(some), some.image_shape, some.class_count) == (5, (5, 5, 3), 7)
    batches = list(some.labelled_batches(3))
    chosen = [0, 2, 3, 4, 6]
    assert np.concatenate([labels for _, labels in batches]).tolist() == chosen
    np.testing.assert_array_equal(
        np.concatenate([images for images, _ in batches]), preprocess(pixels()[chosen], "caffe")
    )
    taken, labels = some.take(np.array([4, 1]))
    np.testing.assert_array_equal(taken, pixels()[[6, 2]])
    assert labels.tolist() == [6, 2]
    assert len(source.spread(100)) == 7


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "accel.data.tfds", raising=False)
    with pytest.raises(ValueError, match="pip install tensorflow-datasets"):
        TfdsImages(data_dir=tmp_path).open()


def test_groups_of_images_are_kept():
    groups = np.array([5, 5, 1, 1, 5, 2, 2])
    source = ArrayImages(pixels(), "caffe", groups=groups)
    assert source.spread(3).groups.tolist() == [5, 1, 2]
    assert source.spread(3).loaded().groups.tolist() == [5, 1, 2]
    assert source.spread(3).spread(2).groups.tolist() == [5, 2]
    assert ArrayImages(pixels(), "caffe").spread(3).groups is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((pixels()[0], "caffe"), r"found the shape \(5, 5, 3\)"),
        ((pixels()[:0], "caffe"), "one image or more"),
        ((pixels(), "caffe", np.zeros(6, int)), "7 images need as many labels"),
        ((pixels(), "caffe", np.zeros(7)), "labels are integers, found float64"),
        (
            (pixels(), "caffe", np.array([0, 1, 2, 3, 0, 0, 0]), 3),
            "label 3 of image 3 .* 3 classes",
        ),
        ((pixels(), "caffe", np.array([0, -1, 0, 0, 0, 0, 0])), "label -1 of image 1"),
        ((pixels(), "caffe", None, None, np.zeros(6, int)), "7 images need as many groups"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ArrayImages(*arguments)


def test_batches_need_a_size_and_labelled_batches_need_labels():
    source = ArrayImages(pixels(), "caffe")
    with pytest.raises(ValueError, match="batch_size is 1 or more, found 0"):
        next(source.batches(0))
    with pytest.raises(ValueError, match="labels are needed"):
        next(source.labelled_batches(2))


def test_bundled_images():
    calibration, test = fashion_calibration_images(), fashion_test_images()
    assert (len(calibration), len(test)) == (3_000, 10_000)
    assert calibration.image_shape == test.image_shape == (28, 28, 1)
    assert calibration.labels is None
    assert test.labels is not None
    assert np.bincount(test.labels).tolist() == [1_000] * 10
    batch = next(calibration.batches(3_000))
    # The constants of the preprocessing are mean and deviation of the training set.
    assert abs(batch.mean()) < 0.02
    assert abs(batch.std() - 1) < 0.02
    seen = {image.tobytes() for image in calibration.pixels}
    assert len(seen) > 2_990
    assert not seen & {image.tobytes() for image in test.pixels}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def test_bundled_file_is_reproducible_and_leaves_out_the_held_back_images(script, tmp_path, capsys):
    training = np.zeros((6_200, 28, 28), np.uint8)
    training[:, 0, :2] = np.arange(6_200, dtype=">u2").view(np.uint8).reshape(-1, 2)
    test = pixels(20, 28, 1)[..., 0]
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", training)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", test)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(20, dtype=np.uint8) % 10)
    maker = script("make_bundled_fashion_mnist")
    outs = [tmp_path / "first" / "a.npz", tmp_path / "b.npz"]
    for out in outs:
        maker.main(maker.Options(tmp_path, out))
        assert "MB" in capsys.readouterr().out
    assert outs[0].read_bytes() == outs[1].read_bytes()
    with np.load(outs[0], allow_pickle=False) as made:
        assert set(made) == {"calibration_images", "test_images", "test_labels"}
        drawn = np.ascontiguousarray(made["calibration_images"][:, 0, :2]).view(">u2").ravel()
        np.testing.assert_array_equal(made["test_images"], test)
        np.testing.assert_array_equal(made["test_labels"], np.arange(20) % 10)
    assert len(set(drawn.tolist())) == 3_000
    assert drawn.max() < 6_200 - 3_000
    assert not list(tmp_path.glob("*.partial"))


def gradient(width, height):
    """A picture whose red rises from left to right and whose green rises from top to bottom."""
    red = np.broadcast_to(np.arange(width), (height, width))
    green = np.broadcast_to(np.arange(height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(250, 100), (100, 250), (120, 120), (20, 30)])
def test_centre_view_is_the_middle_of_the_resized_picture(width, height):
    view = CentreView(image_size=40, shorter_side=50).view(gradient(width, height), 0, 0)
    assert view.shape == (40, 40, 3)
    assert view.dtype == np.uint8
    # Pixel centres of the view in pixels of the picture.
    scale = min(width, height) / 50
    offsets = (np.arange(40) + 0.5 - 20) * scale
    # Half a pixel of the resized picture by which its middle may be off, and rounding.
    tolerance = 0.5 * scale + 1
    x, y = width / 2 - 0.5 + offsets, height / 2 - 0.5 + offsets
    assert np.abs(view[..., 0] - x).max() <= tolerance
    assert np.abs(view[..., 1] - y[:, None]).max() <= tolerance


def test_random_windows_are_windows_of_the_picture_and_half_are_mirrored():
    values = pixels(1, 24)[0]
    picture = Image.fromarray(values)
    viewer = RandomWindows(60, seed=1, image_size=20, shorter_side=24)
    places = {
        window.tobytes(): (top, left, mirrored)
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)
        for window in [values[top : top + 20, left : left + 20][:, :: -1 if mirrored else 1]]
    }
    found = [places[np.ascontiguousarray(viewer.view(picture, 0, i)).tobytes()] for i in range(60)]
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
    assert 15 < sum(mirrored for _, _, mirrored in found) < 45
    again = RandomWindows(60, seed=2, image_size=20, shorter_side=24)
    assert any((viewer.view(picture, 0, i) != again.view(picture, 0, i)).any() for i in range(60))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CentreView(image_size=300), "image_size is from 1 to shorter_side, found 300"),
        (lambda: CentreView(image_size=0), "found 0 and 256"),
        (lambda: RandomWindows(0), "per_picture is 1 or more, found 0"),
    ],
)
def test_views_of_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
