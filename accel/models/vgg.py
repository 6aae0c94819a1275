"""VGG networks (Simonyan and Zisserman, arXiv:1409.1556) as Flax NNX modules in NHWC.

Layers carry the names of the papers: ``conv1_1`` … ``conv5_3``, ``norm1_1`` …, ``fc6``, ``fc7``,
``fc8``. A network is described by the widths of its stages; stages are separated by 2×2 maximum
pooling.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STAGES: dict[str, tuple[tuple[int, ...], ...]] = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
    "small_vgg": ((64, 64), (128, 128), (256,) * 3),
}

CONV_INITIALIZER = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
DENSE_INITIALIZER = nnx.initializers.normal(0.01)


def adaptive_average_pool(features: jax.Array, size: int) -> jax.Array:
    """Averages ``[batch, height, width, channels]`` to ``[batch, size, size, channels]``.

    Bin i of n covers rows floor(i·height/n) to ceil((i+1)·height/n), as in PyTorch's
    ``AdaptiveAvgPool2d``; the identity where height = width = size.
    """

    def weights(length: int) -> np.ndarray:
        start = np.arange(size) * length // size
        stop = -(-(np.arange(size) + 1) * length // size)
        inside = (np.arange(length) >= start[:, None]) & (np.arange(length) < stop[:, None])
        return (inside / (stop - start)[:, None]).astype(np.float32)

    _, height, width, _ = features.shape
    if height == width == size:
        return features
    rows, columns = weights(height), weights(width)
    return jnp.einsum(
        "ih,bhwc,jw->bijc",
        rows,
        features,
        columns,
        precision=jax.lax.Precision.HIGHEST,
    ).astype(features.dtype)


class VGG(nnx.Module):
    """A VGG network, ``[batch, height, width, channels] -> [batch, classes]``.

    With ``num_classes=None`` it is the convolutional body alone and returns the last activation
    (``relu5_3`` of VGG-16), before any last pooling.

    Args:
        stages: Output channels of each convolution, one inner sequence a stage.
        num_classes: Number of classes, or None for the body alone.
        in_channels: Channels of the images.
        batch_norm: Whether a batch normalisation follows each convolution.
        pool_last: Whether the classifier begins with one more 2×2 maximum pooling (``pool5``).
        pooled_size: Height and width that the features are averaged to before the classifier.
        hidden_features: Widths of the fully connected layers before the last.
        dropout_rate: Rate of the dropout after each hidden layer.
        rngs: Source of the initial parameters and of dropout.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        num_classes: int | None,
        in_channels: int = 3,
        batch_norm: bool = False,
        pool_last: bool = True,
        pooled_size: int = 7,
        hidden_features: Sequence[int] = (4096, 4096),
        dropout_rate: float = 0.5,
        rngs: nnx.Rngs,
    ):
        self.stages = tuple(
            tuple(f"{stage}_{index}" for index in range(1, len(widths) + 1))
            for stage, widths in enumerate(stages, start=1)
        )
        self.batch_norm = batch_norm
        self.pool_last = pool_last
        self.pooled_size = pooled_size
        for names, widths in zip(self.stages, stages, strict=True):
            for name, out_channels in zip(names, widths, strict=True):
                conv = nnx.Conv(
                    in_channels,
                    out_channels,
                    (3, 3),
                    kernel_init=CONV_INITIALIZER,
                    rngs=rngs,
                )
                setattr(self, f"conv{name}", conv)
                if batch_norm:
                    norm = nnx.BatchNorm(out_channels, momentum=0.9, epsilon=1e-5, rngs=rngs)
                    setattr(self, f"norm{name}", norm)
                in_channels = out_channels
        self.dense_names: tuple[str, ...] = ()
        if num_classes is None:
            return
        in_features = in_channels * pooled_size**2
        for index, out_features in enumerate((*hidden_features, num_classes), start=6):
            dense = nnx.Linear(in_features, out_features, kernel_init=DENSE_INITIALIZER, rngs=rngs)
            setattr(self, f"fc{index}", dense)
            self.dense_names += (f"fc{index}",)
            in_features = out_features
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """The last activation of the body, ``[batch, height, width, channels]``."""
        *_, last = self.activations(images).values()
        return last

    def activations(self, images: jax.Array) -> dict[str, jax.Array]:
        """Every activation of the body by name (``relu1_1`` …), in the order of computation."""
        outputs: dict[str, jax.Array] = {}
        x = images
        for stage, names in enumerate(self.stages):
            if stage > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for name in names:
                x = getattr(self, f"conv{name}")(x)
                if self.batch_norm:
                    x = getattr(self, f"norm{name}")(x)
                x = nnx.relu(x)
                outputs[f"relu{name}"] = x
        return outputs

    def pooled(self, images: jax.Array) -> jax.Array:
        """What the classifier is given: features pooled and flattened, ``[batch, features]``."""
        x = self.features(images)
        if self.pool_last:
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = adaptive_average_pool(x, self.pooled_size)
        return x.reshape(x.shape[0], -1)

    def __call__(self, images: jax.Array) -> jax.Array:
        if not self.dense_names:
            return self.features(images)
        x = self.pooled(images)
        *hidden, last = self.dense_names
        for name in hidden:
            x = self.dropout(nnx.relu(getattr(self, name)(x)))
        return getattr(self, last)(x)
