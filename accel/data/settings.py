"""Which images, as settings: to be written in a config, changed on the command line, recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from accel.data.bundled import fashion_calibration_images, fashion_test_images
from accel.data.idx import idx_images
from accel.data.image_folder import image_folder
from accel.data.resized import ResizedImages
from accel.data.source import PixelSource
from accel.data.views import CentreView, RandomWindows

IDX_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class BundledImages:
    """Images of Fashion-MNIST that come with the package.

    Attributes:
        split: ``calibration``: 3,000 training images without labels; ``test``: the 10,000 test
            images with labels.
    """

    split: Literal["calibration", "test"]

    def open(self) -> PixelSource:
        """The images; preprocessed for the bundled network."""
        return fashion_test_images() if self.split == "test" else fashion_calibration_images()


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Pictures of any folder.

    Attributes:
        folder: Where they are, at any depth.
        preprocessing: ``caffe`` (weights of Keras and Caffe) or ``torch`` (torchvision, timm).
        labels: ``folders`` where each folder is a class, a text file of labels, or None.
        windows: How many random windows and flips are taken of each picture; None for its centre.
        shorter_side: What the shorter side of a picture is resized to.
        image_size: Height and width of the images cut out of it.
        pictures: How many pictures to take, drawn by the seed; None for all.
        seed: Seed of windows, flips and the draw.
    """

    folder: Path | None = None
    preprocessing: str = "caffe"
    labels: Literal["folders"] | Path | None = None
    windows: int | None = None
    shorter_side: int = 256
    image_size: int = 224
    pictures: int | None = None
    seed: int = 0

    def open(self) -> PixelSource:
        """The images.

        Raises:
            ValueError: If the folder was not given or does not fit.
        """
        if self.folder is None:
            raise ValueError(
                "no folder of images given (--calibration.folder, --evaluation.folder, … of all"
                " images that the command takes, see its --help)"
            )
        return image_folder(
            self.folder,
            self.preprocessing,
            _viewer(self.windows, self.seed, self.image_size, self.shorter_side),
            labels=self.labels,
            pictures=self.pictures,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """A split of a data set that TensorFlow Datasets has prepared (see ``accel.data.tfds``).

    Attributes:
        name: Name of the data set.
        split: A split or a part of one, such as ``train[:3000]``.
        data_dir: The folder that holds the prepared data sets.
        preprocessing, windows, shorter_side, image_size, seed: As in ``FolderImages``.
    """

    name: str = "imagenet2012"
    split: str = "validation"
    data_dir: Path | None = None
    preprocessing: str = "caffe"
    windows: int | None = None
    shorter_side: int = 256
    image_size: int = 224
    seed: int = 0

    def open(self) -> PixelSource:
        """The images.

        Raises:
            ValueError: If the folder was not given or does not fit.
        """
        if self.data_dir is None:
            raise ValueError(
                "no folder of data sets given (--calibration.data-dir, --evaluation.data-dir, … of"
                " all images that the command takes, see its --help)"
            )
        # The package is an extra: only who uses it needs it.
        try:
            from accel.data.tfds import tfds_images
        except ModuleNotFoundError as error:
            if error.name != "tensorflow_datasets":
                raise
            raise ValueError(
                f"data sets of TensorFlow Datasets ({self.name}) need the package"
                " tensorflow-datasets: pip install tensorflow-datasets"
            ) from error

        viewer = _viewer(self.windows, self.seed, self.image_size, self.shorter_side)
        return tfds_images(self.name, self.data_dir, self.split, self.preprocessing, viewer)


@dataclasses.dataclass(frozen=True)
class IdxImages:
    """Images of Fashion-MNIST's four IDX files, gzipped or not, or of MNIST's.

    Attributes:
        folder: The folder that holds the files.
        split: ``train`` or ``test``.
        start: The first image to take, counted from the end where it is negative.
        stop: The image to stop before, counted likewise; None for the end.
        preprocessing: Another than that of the bundled network.
        image_size: Height and width to resize the images to, in RGB, for networks that were trained
            on photographs (with ``caffe`` or ``torch``); None for grey images as they are.
    """

    folder: Path | None = None
    split: Literal["train", "test"] = "train"
    start: int = 0
    stop: int | None = None
    preprocessing: str = "fashion"
    image_size: int | None = None

    def open(self) -> PixelSource:
        """The images with their labels.

        Raises:
            ValueError: If the folder was not given, or its files or the range do not fit.
        """
        if self.folder is None:
            raise ValueError(
                "no folder of IDX files given (--calibration.folder, --images.folder, … of all"
                " images that the command takes, see its --help)"
            )
        prefix = "train" if self.split == "train" else "t10k"
        images = _plain_or_gzipped(self.folder / f"{prefix}-images-idx3-ubyte")
        labels = _plain_or_gzipped(self.folder / f"{prefix}-labels-idx1-ubyte")
        preprocessing = self.preprocessing if self.image_size is None else "unchanged"
        whole = idx_images(images, labels, preprocessing, class_count=IDX_CLASSES)
        taken = slice(self.start, self.stop)
        if not range(len(whole))[taken]:
            raise ValueError(f"{images}: no image from {self.start} to {self.stop} of {len(whole)}")
        pixels, classes = whole.read(*taken.indices(len(whole))[:2])
        part = dataclasses.replace(whole, pixels=pixels, labels=classes)
        if self.image_size is None:
            return part
        return ResizedImages(part, self.image_size, self.preprocessing)


Images = BundledImages | FolderImages | IdxImages | TfdsImages


def _plain_or_gzipped(file: Path) -> Path:
    gzipped = file.with_name(f"{file.name}.gz")
    return gzipped if gzipped.exists() else file


def _viewer(
    windows: int | None, seed: int, image_size: int, shorter_side: int
) -> CentreView | RandomWindows:
    if windows is None:
        return CentreView(image_size, shorter_side)
    return RandomWindows(windows, seed, image_size, shorter_side)
