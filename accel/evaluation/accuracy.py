"""Top-k accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import nnx

from accel.data.source import LabelledSource
from accel.evaluation.answers import Answers, answers_of, outputs
from accel.images import padded
from accel.progress import Progress

# From this many classes on, the class among the five highest outputs says something.
TOP_5_CLASSES = 10


def accuracy(
    model: nnx.Module | Answers,
    source: LabelledSource,
    *,
    top: Sequence[int] | None = None,
    batch_size: int = 100,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The share of images whose class is among the k highest outputs: ``{"top1": …, "top5": …}``.

    Ties are counted as if they were broken by lot: where g outputs are higher than that of the
    image's class and e are as high (itself included), the image counts
    ``min(max((k - g)/e, 0), 1)``. A network that answers the same to everything gets k/classes.

    Args:
        model: The network, called as ``model(images) -> [batch, classes]``; it is not changed. Or
            its ``Answers`` to the same images, whose type of outputs is settled.
        source: Images and labels.
        top: The k's; by default 1 and, from ten classes on, 5.
        batch_size: Images per batch.
        dtype: What the network computes in, such as ``bfloat16``; None for the types that it has.
        progress: Receives how many images are done.

    Raises:
        ValueError: If outputs are NaN or Inf, or labels, classes and outputs do not fit together.
    """
    images = len(source)
    if not images:
        raise ValueError("accuracy needs one image or more, found none")
    batch_size = min(batch_size, images)
    answers = answers_of(model, dtype=dtype)
    name = answers.name
    progress = progress or Progress()
    progress.begin("measuring accuracy", images)

    correct: dict[int, float] = {}
    classes = None
    first = 0
    for batch, labels in source.labelled_batches(batch_size):
        if classes is None:
            shape = answers.shape(padded(batch, batch_size))
            classes = output_classes(shape, name, source)
            if top is None:
                top = (1, 5) if classes >= TOP_5_CLASSES else (1,)
            if beyond := [k for k in top if not 1 <= k <= classes]:
                raise ValueError(f"top-{beyond[0]} of {classes} classes is not defined")
            correct = dict.fromkeys(top, 0.0)
        if (wrong := (labels < 0) | (labels >= classes)).any():
            image = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"label {labels[image]} of image {first + image} is none of {name}'s {classes}"
                " classes"
            )
        (logits,) = outputs([answers], first, batch, batch_size)
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        higher, equal = (logits > own).sum(axis=1), (logits == own).sum(axis=1)
        first += len(batch)
        for k in correct:
            correct[k] += float(np.clip((k - higher) / equal, 0, 1).sum())
        progress.advance(len(batch))
    if first != images:
        raise ValueError(f"the image source has length {images} but gave {first} images")
    return {f"top{k}": count / images for k, count in correct.items()}


def check_labelled(source: LabelledSource, name: str) -> None:
    """Looks at one image, so that images without labels show before long work.

    Args:
        source: The images.
        name: What they are called in the message.

    Raises:
        ValueError: If there is no image, it cannot be read or has no label.
    """
    try:
        batch = next(iter(source.labelled_batches(1)), None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if batch is None:
        raise ValueError(f"{name}: expected one image or more, found none")


def output_classes(shape: tuple[int, ...], name: str, source: LabelledSource) -> int:
    """How many classes a network tells apart.

    Args:
        shape: Shape of its outputs.
        name: Name of the network for messages.
        source: The images it is meant for.

    Raises:
        ValueError: If the outputs are not ``[batch, classes]``, or the images' classes are not as
            many.
    """
    if len(shape) != 2:
        raise ValueError(f"{name}: expected outputs [batch, classes], found the shape {shape}")
    if source.class_count is not None and source.class_count != shape[1]:
        raise ValueError(
            f"{name} tells {shape[1]} classes apart, the images have {source.class_count}"
        )
    return shape[1]
