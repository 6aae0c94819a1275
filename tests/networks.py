"""Networks as a user would write them: nothing in them knows of accel."""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx


class Chain(nnx.Module):
    """Plain convolutions, one with stride and explicit padding, one dilated, one 1×1."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.strided = nnx.Conv(12, 16, (3, 3), strides=2, padding=((1, 1), (1, 0)), rngs=rngs)
        self.dilated = nnx.Conv(16, 16, (3, 3), kernel_dilation=2, use_bias=False, rngs=rngs)
        self.even = nnx.Conv(16, 12, (2, 4), padding="VALID", rngs=rngs)
        self.circular = nnx.Conv(12, 12, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.pointwise = nnx.Conv(12, 8, (1, 1), rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.first(images))
        x = nnx.relu(self.strided(x))
        x = nnx.relu(self.dilated(x))
        x = nnx.relu(self.even(x))
        x = nnx.relu(self.circular(x))
        return self.pointwise(x)


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(width, rngs=rngs)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        y = jax.nn.relu(self.norm1(self.conv1(x)))
        return jnp.maximum(x + self.norm2(self.conv2(y)), 0.0)


class Residual(nnx.Module):
    """A residual network with batch norm, a list of blocks, one of them under remat."""

    def __init__(self, rngs: nnx.Rngs, width: int = 12, classes: int = 5):
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(3)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem(images))
        for index, block in enumerate(self.blocks):
            x = nnx.remat(lambda block, x: block(x))(block, x) if index == 1 else block(x)
        return self.head(self.dropout(x.mean((1, 2))))


class Concatenating(nnx.Module):
    """Two branches side by side whose outputs are concatenated, twice, as in Inception."""

    def __init__(self, rngs: nnx.Rngs):
        self.left = nnx.Dict(
            {f"conv{i}": nnx.Conv(3 if i == 0 else 20, 8, (3, 3), rngs=rngs) for i in range(2)}
        )
        self.right = nnx.Dict(
            {f"conv{i}": nnx.Conv(3 if i == 0 else 20, 12, (5, 5), rngs=rngs) for i in range(2)}
        )

    def __call__(self, images):
        x = images
        for i in range(2):
            left = nnx.relu(self.left[f"conv{i}"](x))
            right = self.right[f"conv{i}"](x)
            x = jnp.concatenate([left, nnx.relu(right)], axis=-1)
        return x


NETWORKS = {"chain": Chain, "residual": Residual, "concatenating": Concatenating}


def network(name: str, seed: int = 0) -> nnx.Module:
    """A network with random parameters and, where it has any, lively batch statistics."""
    model = NETWORKS[name](nnx.Rngs(seed))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(repr(path).encode()) % 2**31)
        if path[-1] in ("bias", "mean"):
            variable[...] = 0.3 * jax.random.normal(key, variable.shape)
        elif path[-1] in ("scale", "var"):
            variable[...] = jax.random.uniform(key, variable.shape, minval=0.5, maxval=1.5)
    return model


def images(count: int, size: int = 14, seed: int = 7) -> jax.Array:
    """Smooth random images ``[count, size, size, 3]``, whose responses are far from white."""
    noise = jax.random.normal(jax.random.key(seed), (count, size, size, 3))
    return (
        noise + jnp.roll(noise, 1, 1) + jnp.roll(noise, 1, 2) + jnp.roll(noise, (1, 1), (1, 2))
    ) / 2
