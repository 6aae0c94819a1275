"""Trains the bundled network: ``small_vgg`` on Fashion-MNIST, batch norm folded at the end.

    python scripts/train_fashion_vgg.py --data DIR --out fashion_vgg.safetensors

DIR holds the four IDX files of Fashion-MNIST (Debian: ``dpkg -L dataset-fashion-mnist``). Six
epochs of Nesterov SGD with a one-cycle schedule take about an hour on two CPU cores and a minute on
a GPU. The recipe is fixed beforehand; the last 3,000 training images are kept back to watch it,
and the test images are looked at once, at the end. A checkpoint is kept in OUT.partial after every
epoch, and a run that was stopped goes on from the last one with the same result.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from safetensors.numpy import save_file

from accel.data.idx import read_idx
from accel.files import unfinished_folder
from accel.models.vgg import STAGES, VGG

MEAN, STANDARD_DEVIATION = 0.2860, 0.3530
HELD_BACK = 3_000


@dataclasses.dataclass(frozen=True)
class Options:
    data: Path
    out: Path
    epochs: int = 6
    batch_size: int = 128
    peak_learning_rate: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0


def normalise(images: jax.Array) -> jax.Array:
    return (images.astype(jnp.float32)[..., None] / 255 - MEAN) / STANDARD_DEVIATION


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Flips each image with probability 1/2 and shifts it by up to one pixel."""
    flip_key, shift_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    shifts = jax.random.randint(shift_key, (images.shape[0], 2), 0, 3)
    return jax.vmap(lambda image, s: jax.lax.dynamic_slice(image, (s[0], s[1]), (28, 28)))(
        padded, shifts
    )


def folded_weights(model: VGG) -> dict[str, np.ndarray]:
    """The parameters with each batch normalisation folded into the convolution before it."""
    weights: dict[str, np.ndarray] = {}
    for names in model.stages:
        for name in names:
            conv, norm = getattr(model, f"conv{name}"), getattr(model, f"norm{name}")
            scale = norm.scale[...] / jnp.sqrt(norm.var[...] + norm.epsilon)
            weights[f"conv{name}.kernel"] = np.asarray(conv.kernel[...] * scale)
            weights[f"conv{name}.bias"] = np.asarray(
                (conv.bias[...] - norm.mean[...]) * scale + norm.bias[...]
            )
    for name in model.dense_names:
        dense = getattr(model, name)
        weights[f"{name}.kernel"] = np.asarray(dense.kernel[...])
        weights[f"{name}.bias"] = np.asarray(dense.bias[...])
    return weights


def main(options: Options) -> None:
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already; nothing is overwritten")
    images = read_idx(options.data / "train-images-idx3-ubyte.gz", 3)
    labels = read_idx(options.data / "train-labels-idx1-ubyte.gz", 1).astype(np.int32)
    kept_images, kept_labels = images[-HELD_BACK:], labels[-HELD_BACK:]
    images, labels = images[:-HELD_BACK], labels[:-HELD_BACK]
    test_images = read_idx(options.data / "t10k-images-idx3-ubyte.gz", 3)
    test_labels = read_idx(options.data / "t10k-labels-idx1-ubyte.gz", 1)

    model = VGG(
        STAGES["small_vgg"],
        num_classes=10,
        in_channels=1,
        batch_norm=True,
        pool_last=False,
        pooled_size=1,
        hidden_features=(),
        rngs=nnx.Rngs(options.seed),
    )
    graphdef, parameters, rest = nnx.split(model, nnx.Param, ...)
    steps_per_epoch = len(images) // options.batch_size
    schedule = optax.cosine_onecycle_schedule(
        options.epochs * steps_per_epoch, options.peak_learning_rate, pct_start=0.2
    )
    optimizer = optax.chain(
        optax.add_decayed_weights(
            options.weight_decay, lambda tree: jax.tree.map(_is_weight, tree)
        ),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )

    @jax.jit
    def train_step(parameters, rest, optimizer_state, images, labels, key):
        images = normalise(augment(images, key))

        def loss_of(parameters):
            model = nnx.merge(graphdef, parameters, rest, copy=True)
            model.train()
            logits = model(images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            _, _, new_rest = nnx.split(model, nnx.Param, ...)
            return loss, new_rest

        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        return optax.apply_updates(parameters, updates), rest, optimizer_state, loss

    @jax.jit
    def predict(parameters, rest, images):
        model = nnx.merge(graphdef, parameters, rest, copy=True)
        model.eval()
        return model(normalise(images)).argmax(-1)

    def accuracy(parameters, rest, images, labels) -> float:
        batches = range(0, len(images), 500)
        predictions = [predict(parameters, rest, images[i : i + 500]) for i in batches]
        return float(np.mean(np.concatenate(predictions) == labels))

    record = json.dumps(dataclasses.asdict(options), default=str)
    with unfinished_folder(record, options.out) as partial:
        state = (parameters, rest, optimizer.init(parameters))
        manager = ocp.CheckpointManager(
            (partial / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1),
        )
        done = manager.latest_step() or 0
        if done:
            leaves = manager.restore(done, args=ocp.args.StandardRestore(jax.tree.leaves(state)))
            state = jax.tree.unflatten(jax.tree.structure(state), leaves)
            print(f"going on after epoch {done}", flush=True)
        for epoch in range(done, options.epochs):
            order_key, augment_key = jax.random.split(
                jax.random.fold_in(jax.random.key(options.seed), epoch)
            )
            order = np.asarray(jax.random.permutation(order_key, len(images)))
            start = time.perf_counter()
            for step in range(steps_per_epoch):
                batch = order[step * options.batch_size : (step + 1) * options.batch_size]
                *state, loss = train_step(
                    *state, images[batch], labels[batch], jax.random.fold_in(augment_key, step)
                )
                if step % 50 == 49:
                    seconds = (time.perf_counter() - start) / (step + 1)
                    left = seconds * ((options.epochs - epoch) * steps_per_epoch - step - 1)
                    print(
                        f"epoch {epoch + 1}/{options.epochs} step {step + 1}/{steps_per_epoch}"
                        f" loss {float(loss):.4f}, {left / 60:.0f} min left",
                        flush=True,
                    )
            manager.save(epoch + 1, args=ocp.args.StandardSave(jax.tree.leaves(state)))
            manager.wait_until_finished()
            kept = accuracy(state[0], state[1], kept_images, kept_labels)
            print(
                f"epoch {epoch + 1}: accuracy on held-back training images {kept:.4f}", flush=True
            )

        test = accuracy(state[0], state[1], test_images, test_labels)
        print(f"test accuracy {test:.4f} on {len(test_images)} images", flush=True)
        trained = nnx.merge(graphdef, state[0], state[1])
        weights = partial / "weights.safetensors"
        save_file(folded_weights(trained), weights, metadata={"test_accuracy": f"{test:.4f}"})
        weights.rename(options.out)
        shutil.rmtree(partial)


def _is_weight(parameter: jax.Array) -> bool:
    """Weight decay is for kernels; scales and biases are left alone."""
    return parameter.ndim > 1


if __name__ == "__main__":
    main(tyro.cli(Options))
