"""How far the outputs of an accelerated network are from the original's."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from accel.evaluation.forward import check_finite, forward_function, output_shape
from accel.images import ImageSource, padded
from accel.progress import Progress


def compare_outputs(
    original: nnx.Module,
    accelerated: nnx.Module,
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

    All sums are taken in float64; no outputs are kept.

    Args:
        original: The network that is the measure, called as ``original(images)``.
        accelerated: The other; neither is changed.
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
    networks = {
        "original network": forward_function(original),
        "accelerated network": forward_function(accelerated, dtype),
    }
    jitted = {name: jax.jit(forward) for name, (forward, _) in networks.items()}

    progress = progress or Progress()
    progress.begin("comparing outputs", images)
    error = energy = cosines = agreed = 0.0
    shapes = None
    first = 0
    for images_of_batch in source.batches(batch_size):
        batch = padded(np.asarray(images_of_batch), batch_size)
        if shapes is None:
            shapes = [output_shape(*network, batch, name) for name, network in networks.items()]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the original network's outputs have the shape {shapes[0]}, the accelerated"
                    f" network's {shapes[1]}"
                )
        # Both are started before either is waited for.
        outputs = [jitted[name](state, batch) for name, (_, state) in networks.items()]
        f, g = (
            np.asarray(output)[: len(images_of_batch)].reshape(len(images_of_batch), -1)
            for output in outputs
        )
        f, g = f.astype(np.float64), g.astype(np.float64)
        for name, values in zip(networks, (f, g), strict=True):
            check_finite(np.asarray(np.isfinite(values).all(axis=1)), first, name)
        first += len(images_of_batch)
        f_norm, g_norm = np.linalg.norm(f, axis=1), np.linalg.norm(g, axis=1)
        norms = f_norm * g_norm
        nonzero = norms > 0
        cosines += float(((f * g).sum(axis=1)[nonzero] / norms[nonzero]).sum())
        cosines += int(((f_norm == 0) & (g_norm == 0)).sum())
        error += float(((f - g) ** 2).sum())
        energy += float((f**2).sum())
        agreed += int((f.argmax(axis=1) == g.argmax(axis=1)).sum())
        progress.advance(len(images_of_batch))
    if first != images:
        raise ValueError(f"the image source has length {images} but gave {first} images")
    if energy == 0:
        raise ValueError("the original network's outputs are all zero")
    result = {"relative_squared_error": error / energy, "cosine": cosines / images}
    if shapes is not None and len(shapes[0]) == 2:
        result["agreement"] = agreed / images
    return result
