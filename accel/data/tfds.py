"""Images of a prepared TensorFlow Datasets data set, read without TensorFlow.

The data set has to be stored in a format of random access (``file_format="array_record"`` when it
is prepared, or by ``tfds convert_format``): its usual one, TFRecord, can be read by TensorFlow
only. Needs the package ``tensorflow-datasets``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow_datasets

from accel.data.encoded import EncodedImages, EncodedPicture
from accel.data.views import CentreView, Viewer


class _Records:
    """The records of a split as pictures, read one by one as they are asked for."""

    def __init__(self, records: Any, description: str):
        self.records = records
        self.description = description

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> EncodedPicture:
        # What iterates by index is told of the end by this error, not by that of the records.
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self.records[index]
        name = f"{self.description}, record {index}"
        if "file_name" in record:
            name += f" ({record['file_name'].decode()})"
        # Data sets mark what has no label, such as a test split, by -1.
        label = int(record.get("label", -1))
        return EncodedPicture(name, record["image"], label if label >= 0 else None)


def tfds_images(
    name: str,
    data_dir: Path,
    split: str,
    preprocessing: str,
    viewer: Viewer | None = None,
) -> EncodedImages:
    """A split of a prepared data set with the features ``image`` and, if labelled, ``label``.

    Args:
        name: The data set's name, with a version where not the newest is at hand: for ImageNet
            ``imagenet2012`` or ``imagenet2012:5.0.0``.
        data_dir: The folder that holds the prepared data sets.
        split: A split or a part of one, such as ``validation`` or ``train[:3000]`` (the records
            stand in a shuffled order).
        preprocessing: A name of ``PREPROCESSINGS`` for RGB images.
        viewer: Which part of a picture is an image; ``CentreView()`` if None.

    Raises:
        ValueError: If the data set or split is not there, cannot be read without TensorFlow, or has
            no images.
    """
    # TFDS would look at remote places and create folders for a directory that is not there.
    if not Path(data_dir).is_dir():
        raise ValueError(f"{data_dir}: not a folder")
    try:
        builder: Any = tensorflow_datasets.builder(name, data_dir=data_dir)
    # The latter where the data set is known, but not in the version that is asked for.
    except (tensorflow_datasets.core.DatasetNotFoundError, AssertionError) as error:
        raise ValueError(f"{data_dir}: no data set {name!r} in it") from error
    if not builder.info.splits:
        raise ValueError(f"{builder.data_path}: {name} is not prepared there")
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{name}: expected a feature 'image', found {', '.join(features)}")
    try:
        records = builder.as_data_source(
            split, decoders={"image": tensorflow_datasets.decode.SkipDecoding()}
        )
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.data_path}: {name} is stored as {builder.info.file_format}, which only"
            " TensorFlow reads; prepare it with file_format='array_record'"
        ) from error
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"{name}: no images in split {split!r}; splits: {known}") from error
    return EncodedImages(
        _Records(records, f"{name}, split {split}"),
        preprocessing,
        viewer or CentreView(),
        features["label"].num_classes if "label" in features else None,
    )
