import io
import json
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from accel.data import CentreView, image_folder, preprocess
from accel.evaluation import accuracy

tensorflow_datasets = pytest.importorskip("tensorflow_datasets")
from tensorflow_datasets.core import registered  # noqa: E402

from accel.data.tfds import tfds_images  # noqa: E402

# Grey level of each picture, and its label among ImageNet's classes. A picture's level is 20 times
# the number of the class that it looks like; the last two are labelled as a class whose level is
# nearly as near, and as one that is far off.
PICTURES = {
    "v0": (0, 0),
    "v1": (20, 1),
    "v2": (40, 2),
    "v3": (60, 3),
    "v4": (80, 5),
    "v5": (100, 11),
}
LEVELS = 20.0 * np.arange(12)


def encoded(level, size=(300, 260)):
    file = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A tiny ``imagenet2012``, with the features of the real one, as TFDS itself writes it."""
    folder = tmp_path_factory.mktemp("tfds")
    imagenet = type(tensorflow_datasets.builder("imagenet2012", data_dir=folder))
    # The real data set keeps its name in the registry.
    with registered.skip_registration():

        class Tiny(imagenet):
            name = "imagenet2012"

            def _split_generators(self, dl_manager):
                return {"validation": self._generate_examples()}

            def _generate_examples(self):
                for name, (level, label) in PICTURES.items():
                    record = {"image": encoded(level), "label": label, "file_name": f"{name}.JPEG"}
                    yield name, record

    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def names_of(source):
    names = [source.pictures[index].name for index in range(len(source.pictures))]
    return [name.partition("(")[2].removesuffix(".JPEG)") for name in names]


def expected_images(source):
    levels = [PICTURES[name][0] for name in names_of(source)]
    return np.stack([np.full((224, 224, 3), level, np.uint8) for level in levels])


def test_images_and_labels_are_those_that_were_written(data_dir):
    source = tfds_images("imagenet2012", data_dir, "validation", "caffe")
    assert len(source) == 6
    assert source.class_count == 1000
    assert source.image_shape == (224, 224, 3)
    batches = list(source.labelled_batches(4))
    images = np.concatenate([batch for batch, _ in batches])
    np.testing.assert_array_equal(images, preprocess(expected_images(source), "caffe"))
    labels = np.concatenate([given for _, given in batches]).tolist()
    names = names_of(source)
    assert labels == [PICTURES[name][1] for name in names]
    assert sorted(names) == sorted(PICTURES)


def test_parts_of_a_split_and_versions_are_understood(data_dir):
    whole = tfds_images("imagenet2012", data_dir, "validation", "caffe").loaded()
    for name in ("imagenet2012", "imagenet2012:5.1.0"):
        part = tfds_images(name, data_dir, "validation[2:5]", "caffe").loaded()
        np.testing.assert_array_equal(part.pixels, whole.pixels[2:5])


def test_reading_needs_no_tensorflow(data_dir):
    program = f"""
import sys
from accel.data.tfds import tfds_images
print(len(tfds_images("imagenet2012", {str(data_dir)!r}, "validation", "torch").loaded()))
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "6\nFalse\n", done.stderr


class NearestLevel(nnx.Module):
    """A classifier that tells ImageNet's first classes by their grey level, as Caffe sees it."""

    def __init__(self, classes=1000):
        self.levels = nnx.Param(np.concatenate([LEVELS, np.full(classes - 12, 1e4)]))

    def __call__(self, images):
        blue = images[..., 0].mean(axis=(1, 2)) + 103.939
        return -((blue[:, None] - self.levels[...]) ** 2)


def test_imagenet_accuracy_through_tensorflow_datasets_and_through_a_folder(data_dir, tmp_path):
    expected = {"top1": 4 / 6, "top5": 5 / 6}
    source = tfds_images("imagenet2012", data_dir, "validation", "caffe")
    assert accuracy(NearestLevel(), source, batch_size=4) == pytest.approx(expected)

    # ImageNet as it is usually unpacked: a folder a class.
    for label in range(1000):
        (tmp_path / f"n{label:08}").mkdir()
    for name, (level, label) in PICTURES.items():
        (tmp_path / f"n{label:08}" / f"{name}.JPEG").write_bytes(encoded(level).read())
    folder = image_folder(tmp_path, "caffe", labels="folders")
    assert accuracy(NearestLevel(), folder, batch_size=4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("imagenet2012", "test", "no images in split 'test'; splits: validation"),
        ("imagenet2012", "validation[:0]", r"no images in split 'validation\[:0\]'"),
        ("imagenet2012:5.0.0", "validation", "not prepared there|no data set 'imagenet2012:5.0.0'"),
        ("imagenet2012:1.0.0", "validation", "no data set 'imagenet2012:1.0.0'"),
        ("no_such_data", "validation", "no data set 'no_such_data'"),
        ("imagenet_v2", "test", "imagenet_v2 is not prepared there"),
    ],
)
def test_what_is_not_there_is_named(data_dir, name, split, message):
    with pytest.raises(ValueError, match=message):
        tfds_images(name, data_dir, split, "caffe")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: not a folder"):
        tfds_images("imagenet2012", tmp_path / "nowhere", "validation", "caffe")
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_only_tensorflow_reads_is_refused(data_dir, tmp_path):
    version = tmp_path / "imagenet2012" / "5.1.0"
    version.mkdir(parents=True)
    for file in (data_dir / "imagenet2012" / "5.1.0").glob("*.[jt]*"):
        (version / file.name).write_bytes(file.read_bytes())
    information = json.loads((version / "dataset_info.json").read_text())
    (version / "dataset_info.json").write_text(
        json.dumps({**information, "fileFormat": "tfrecord"})
    )
    with pytest.raises(ValueError, match=r"which only TensorFlow reads; .*array_record"):
        tfds_images("imagenet2012", tmp_path, "validation", "caffe")


def test_a_picture_that_cannot_be_decoded_is_named_by_its_record(tmp_path):
    with registered.skip_registration():

        class Broken(tensorflow_datasets.core.GeneratorBasedBuilder):
            """One file that is no picture, without label or name."""

            VERSION = tensorflow_datasets.core.Version("1.0.0")

            def _info(self):
                features = {"image": tensorflow_datasets.features.Image(encoding_format="jpeg")}
                return tensorflow_datasets.core.DatasetInfo(
                    builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                yield "0", {"image": b"no picture"}

    Broken(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = tfds_images("broken", tmp_path, "train", "caffe", CentreView(8, 8))
    assert source.class_count is None
    with pytest.raises(ValueError, match="broken, split train, record 0: cannot be read"):
        next(source.batches(1))
