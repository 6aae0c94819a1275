import gzip
import struct

import numpy as np
import pytest

from accel.data import ArrayImages, ResizedImages, idx_images
from accel.data.settings import IdxImages

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 4), np.uint8)
LABELS = np.array([0, 1, 2, 3, 4, 9, 0], np.uint8)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS[::-1])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[::-1])))
    return tmp_path


def test_images_and_labels_are_those_of_the_files(folder):
    source = idx_images(
        folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte", "unchanged"
    )
    ((images, labels),) = source.labelled_batches(10)
    np.testing.assert_array_equal(images, PIXELS[..., None])
    np.testing.assert_array_equal(labels, LABELS)
    assert source.class_count is None


@pytest.mark.parametrize(
    ("split", "start", "stop", "expected"),
    [
        ("train", 0, None, PIXELS),
        ("train", 0, -2, PIXELS[:5]),
        ("train", -2, None, PIXELS[5:]),
        ("test", 1, 3, PIXELS[::-1][1:3]),
    ],
)
def test_an_experiment_takes_a_part_of_a_split(folder, split, start, stop, expected):
    source = IdxImages(folder, split, start, stop).open()
    pixels, labels = source.read(0, len(source))
    np.testing.assert_array_equal(pixels[..., 0], expected)
    assert labels is not None
    assert source.class_count == 10
    assert source.preprocessing == "fashion"


def test_an_empty_part_and_a_missing_folder_are_refused(folder):
    with pytest.raises(ValueError, match="no image from 7 to None of 7"):
        IdxImages(folder, start=7).open()
    with pytest.raises(ValueError, match="no folder of IDX files given"):
        IdxImages().open()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: cannot be read"):
        IdxImages(folder / "nothing").open()


def bilinear(image, size):
    """A grey image enlarged to ``[size, size]``, in floating point."""
    for axis, length in enumerate(image.shape):
        centres = (np.arange(size) + 0.5) * length / size - 0.5

        def along(values, centres=centres):
            return np.interp(centres, np.arange(len(values)), values)

        image = np.apply_along_axis(along, axis, image)
    return image


def test_images_for_networks_of_photographs_are_resized_and_in_three_channels(folder):
    source = IdxImages(folder, start=1, preprocessing="caffe", image_size=12).open()
    assert (len(source), source.image_shape, source.class_count) == (6, (12, 12, 3), 10)
    batches = list(source.labelled_batches(4))
    assert [len(images) for images, _ in batches] == [4, 2]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(labels, LABELS[1:])
    assert images.shape == (6, 12, 12, 3)
    assert images.dtype == np.float32
    means_of_blue_green_red = np.array([103.939, 116.779, 123.68])
    pixels = images + means_of_blue_green_red
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-4)
    expected = np.stack([bilinear(image, 12) for image in PIXELS[1:]])
    # Pillow rounds twice, after each direction.
    assert np.abs(pixels - expected[..., None]).max() <= 1
    # Sources that are cut or read in another order give the same.
    np.testing.assert_array_equal(next(source.spread(3).batches(9)), images[[0, 2, 5]])
    np.testing.assert_array_equal(next(source.loaded().batches(9)), images)
    taken, classes = source.take(np.array([5, 0]))
    np.testing.assert_array_equal(taken, source.read(0, 6)[0][[5, 0]])
    assert classes is not None
    np.testing.assert_array_equal(classes, LABELS[1:][[5, 0]])


def test_pixels_are_resized_when_they_are_read():
    rgb = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), np.uint8)
    groups = np.array([0, 0, 1, 2, 2])
    source = ResizedImages(ArrayImages(rgb, "torch", groups=groups), 1000, "unchanged")
    assert source.image_shape == (1000, 1000, 3)
    assert source.source.pixels.nbytes < 1000
    assert source.groups is groups
    same_size = ResizedImages(ArrayImages(rgb, "torch"), 6, "unchanged")
    np.testing.assert_array_equal(next(same_size.batches(5)), rgb)


@pytest.mark.parametrize(
    ("image_size", "preprocessing", "message"),
    [
        (8, "fashion", "'fashion' takes images of 1 channels, found 3"),
        (None, "caffe", "'caffe' takes images of 3 channels, found 1"),
        (0, "caffe", "image_size is 1 or more, found 0"),
    ],
)
def test_sizes_and_preprocessings_that_do_not_fit_are_refused(
    folder, image_size, preprocessing, message
):
    with pytest.raises(ValueError, match=message):
        IdxImages(folder, preprocessing=preprocessing, image_size=image_size).open()


def test_only_grey_and_rgb_images_are_resized():
    with pytest.raises(ValueError, match="1 or 3 channels are resized, found 2"):
        ResizedImages(ArrayImages(np.zeros((1, 2, 2, 2), np.uint8), "unchanged"), 4, "caffe")


WHOLE = idx(PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(LABELS), "with 3 dimensions, which begins with 00000803, found 00000801"),
        (b"", "found $"),
        (WHOLE[:11], "breaks off within its header"),
        (WHOLE[:-1], r"says \(7, 5, 4\), 140 bytes; found 139"),
        (WHOLE + b"x", r"says \(7, 5, 4\), 140 bytes; found 141"),
        (gzip.compress(WHOLE, mtime=0)[:-20], "cannot be read"),
        (gzip.compress(WHOLE, mtime=0)[:20] + bytes(60), "cannot be read"),
        (idx(PIXELS[1:]), "holds 6 images, .* 7 labels"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(folder, content, message):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        idx_images(file, folder / "train-labels-idx1-ubyte", "unchanged")
    assert str(file) in str(caught.value)
