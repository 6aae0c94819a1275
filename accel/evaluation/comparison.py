"""How far the outputs of an accelerated network are from the original's."""

from __future__ import annotations

import numpy as np
from flax import nnx

from accel.evaluation.answers import Answers, answers_of, outputs
from accel.images import ImageSource, padded
from accel.progress import Progress


def compare_outputs(
    original: nnx.Module | Answers,
    accelerated: nnx.Module | Answers,
    source: ImageSource,
    *,
    batch_size: int = 16,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Compares the outputs f of one network with the outputs g of another on the same images.

    - ``relative_squared_error``: Σ‖f - g‖²/Σ‖f‖², sums over all images;
    - ``cosine``: the mean over images of ⟨f, g⟩/(‖f‖‖g‖), outputs flattened; of two zero vectors
      it is 1, of one it is 0;
    - ``agreement``, where outputs are ``[batch, classes]``: the share of images whose highest
      output is of the same class.

    All sums are taken in float64.

    Args:
        original: The network that is the measure, called as ``original(images)``; or its
            ``Answers`` to the same images.
        accelerated: The other, likewise; neither is changed.
        source: Images, without labels.
        batch_size: Images per batch.
        dtype: What the other network computes in, such as ``bfloat16``; None for the types that it
            has. The original, being the measure, keeps its own.
        progress: Receives how many images are done.

    Raises:
        ValueError: If outputs are NaN or Inf or of different shapes, or all of the original's are
            zero.
    """
    images = len(source)
    if not images:
        raise ValueError("comparing outputs needs one image or more, found none")
    batch_size = min(batch_size, images)
    networks = [
        answers_of(original, "original network"),
        answers_of(accelerated, "accelerated network", dtype),
    ]
    progress = progress or Progress()
    progress.begin("comparing outputs", images)
    error = energy = cosines = agreed = 0.0
    shapes = None
    first = 0
    for images_of_batch in source.batches(batch_size):
        batch = np.asarray(images_of_batch)
        if shapes is None:
            shapes = [network.shape(padded(batch, batch_size)) for network in networks]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the original network's outputs have the shape {shapes[0]}, the accelerated"
                    f" network's {shapes[1]}"
                )
        f, g = (
            output.reshape(len(batch), -1).astype(np.float64)
            for output in outputs(networks, first, batch, batch_size)
        )
        first += len(batch)
        f_norm, g_norm = np.linalg.norm(f, axis=1), np.linalg.norm(g, axis=1)
        norms = f_norm * g_norm
        nonzero = norms > 0
        cosines += float(((f * g).sum(axis=1)[nonzero] / norms[nonzero]).sum())
        cosines += int(((f_norm == 0) & (g_norm == 0)).sum())
        error += float(((f - g) ** 2).sum())
        energy += float((f**2).sum())
        agreed += int((f.argmax(axis=1) == g.argmax(axis=1)).sum())
        progress.advance(len(batch))
    if first != images:
        raise ValueError(f"the image source has length {images} but gave {first} images")
    if energy == 0:
        raise ValueError("the original network's outputs are all zero")
    result = {"relative_squared_error": error / energy, "cosine": cosines / images}
    if shapes is not None and len(shapes[0]) == 2:
        result["agreement"] = agreed / images
    return result
