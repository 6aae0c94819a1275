import gzip
import struct

import numpy as np
import pytest

from accel.data import idx_images
from accel.experiment import IdxImages

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


WHOLE = idx(PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(LABELS), "with 3 dimensions, which begins with 00000803, found 00000801"),
        (b"", "found $"),
        (WHOLE[:11], "breaks off within its header"),
        (WHOLE[:-1], r"says \(7, 5, 4\), 140 bytes; found 139"),
        (WHOLE + b"x", r"says \(7, 5, 4\), 140 bytes; found 141"),
        (gzip.compress(WHOLE)[:-20], "cannot be read"),
        (gzip.compress(WHOLE)[:20] + bytes(60), "cannot be read"),
        (idx(PIXELS[1:]), "holds 6 images, .* 7 labels"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(folder, content, message):
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        idx_images(file, folder / "train-labels-idx1-ubyte", "unchanged")
    assert str(file) in str(caught.value)
