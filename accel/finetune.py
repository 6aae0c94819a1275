"""Fine-tuning: supervised training of a network as it is, accelerated or not.

Minimises the mean cross-entropy of softmax outputs by stochastic gradient descent; an accelerated
network is trained end to end, each factor of each layer for itself. The paper (arXiv:1505.06798)
fine-tunes its accelerated networks for 5 epochs at a learning rate of 1e-5 in batches of 128.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.data.augmentation import Augmentation
from accel.data.preprocessing import preprocess
from accel.data.source import LabelledSource, PixelSource
from accel.evaluation import accuracy
from accel.evaluation.accuracy import check_labelled, output_classes
from accel.evaluation.forward import forward_function, output_shape
from accel.program import path_name
from accel.progress import Progress
from accel.training_checkpoint import TrainingCheckpoints
from accel.training_step import (
    Measured,
    Optimizer,
    Precision,
    TrainingState,
    gradient_rule,
    training_step,
)
from accel.traits import traits_of_images, traits_of_network


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training images.

    Attributes:
        loss: Mean cross-entropy of the training images in nats, as they came: augmented, with
            dropout, each before the step that was made with it.
        accuracy: The share of them that was right.
        evaluation: Top-1 accuracy on the evaluation images after the epoch, None without any.
        seconds: Time for training, without evaluation and checkpoints.
    """

    loss: float
    accuracy: float
    evaluation: float | None
    # Two runs with the same result do not take the same time.
    seconds: float = dataclasses.field(compare=False)

    def text(self) -> str:
        """The epoch in a line."""
        watched = "" if self.evaluation is None else f", on evaluation images {self.evaluation:.4f}"
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f}{watched}, {self.seconds:.1f} s"


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning gives back.

    Attributes:
        model: The network after the last step, in evaluation mode.
        history: Each epoch, in order.
    """

    model: nnx.Module
    history: tuple[Epoch, ...]


@dataclasses.dataclass
class Position:
    """Where a run is: all that a checkpoint holds besides arrays.

    Attributes:
        step: Number of steps done.
        loss: Sum of the losses of the steps of this epoch.
        correct: Number of images of this epoch that were right.
        seconds: Time for training in this epoch.
        history: The epochs that are done.
    """

    step: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    history: list[Epoch] = dataclasses.field(default_factory=list)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Position:
        """The position of which ``dataclasses.asdict`` is ``content``."""
        history = [Epoch(**epoch) for epoch in content["history"]]
        return Position(**{**content, "history": history})

    def account(self, measured: Measured) -> None:
        """Takes in a step.

        Raises:
            FloatingPointError: If its loss or gradient is NaN or Inf.
        """
        loss, norm = float(measured.loss), float(measured.gradient_norm)
        self.step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step} of epoch {len(self.history) + 1}: the loss is {loss}, the norm"
                f" of the gradient {norm}; try a lower learning rate"
            )
        self.loss += loss
        self.correct += int(measured.correct)

    def end_epoch(self, steps: int, images: int, evaluation: float | None) -> None:
        """Puts the epoch of that many steps and images into the history and begins the next."""
        epoch = Epoch(self.loss / steps, self.correct / images, evaluation, self.seconds)
        self.history.append(epoch)
        self.loss, self.correct, self.seconds = 0.0, 0, 0.0


def finetune(
    model: nnx.Module,
    images: PixelSource,
    *,
    evaluation: LabelledSource | None = None,
    epochs: int = 5,
    learning_rate: float = 1e-5,
    batch_size: int = 128,
    optimizer: Optimizer = "sgd",
    weight_decay: float = 5e-4,
    clip_norm: float | None = 1.0,
    warmup: float = 0.05,
    augmentation: Augmentation | None = None,
    precision: Precision | None = None,
    seed: int = 0,
    resume: Path | str | None = None,
    checkpoint_seconds: float = 300.0,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Trains a network further on labelled images.

    Every epoch goes through the images once in an order of its own, in whole batches; what is left
    over at the end of an epoch is not used in it. The network that is handed back is that of the
    last step: nothing is chosen by ``evaluation``.

    The result hangs on the arguments and ``seed`` alone, not on whether the run was stopped in
    between: bit by bit on a CPU, elsewhere as far as the device computes the same twice (on GPUs
    with ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``).

    Args:
        model: The network, called as ``model(images) -> [batch, classes]``, accelerated or not; it
            is not changed.
        images: What to train on, with labels. Read in random order: where decoding is slow and
            memory allows, give ``images.loaded()``.
        evaluation: Images to measure accuracy on after each epoch. Not the test set: who looks at
            this history to choose epochs or a learning rate chooses by these images.
        epochs: Passes over the images.
        learning_rate: The highest. It rises linearly to it, then falls along a cosine to zero.
        batch_size: Images per step, or all where there are fewer.
        optimizer: ``sgd``: with Nesterov momentum 0.9; ``adamw``.
        weight_decay: Of kernels only. ``sgd``: added to the gradient as weight_decay·kernel;
            ``adamw``: to the step as learning rate·weight_decay·kernel.
        clip_norm: A gradient of a larger Euclidean norm, all parameters together and without weight
            decay, is scaled down to it; None for no clipping.
        warmup: The share of all steps in which the learning rate rises.
        augmentation: A pure function ``(key, images) -> images`` on preprocessed batches, such as
            ``FlipAndShift``. A function that is no dataclass is recognised by its name alone when a
            run is resumed.
        precision: What layers compute in that do not name a type themselves: ``float32``, or
            ``bfloat16`` with parameters, optimizer and loss in float32. By default ``bfloat16`` on
            GPU and TPU, else ``float32``.
        seed: Seed of orders, augmentation and dropout.
        resume: A folder for checkpoints; a run that was stopped goes on from the last one when it
            is called again with the same arguments.
        checkpoint_seconds: A checkpoint is written after every epoch, and in it whenever this time
            has passed.
        progress: Receives what the run is doing.

    Raises:
        ValueError: If settings, images, labels and network do not fit together, or ``resume`` holds
            checkpoints of another run.
        FloatingPointError: If loss or gradient become NaN or Inf; the message names the step.
    """
    progress = progress or Progress()
    resume = None if resume is None else Path(resume)
    if not len(images):
        raise ValueError("fine-tuning needs one image or more, found none")
    batch_size = min(batch_size, len(images))
    precision = precision or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    check_settings(epochs, learning_rate, batch_size, weight_decay, clip_norm, warmup)
    network = nnx.clone(model)
    network.eval()
    graphdef, parameters, random, rest = nnx.split(network, nnx.Param, nnx.RngState, ...)
    _check_parameters(parameters)
    classes = _classes(network, images, evaluation)
    steps_per_epoch = len(images) // batch_size
    steps = epochs * steps_per_epoch
    rule = gradient_rule(optimizer, learning_rate, weight_decay, clip_norm, warmup, steps)
    train = training_step(network, rule, augmentation, precision)
    key = jax.random.key(seed)
    state = _own_copy(TrainingState(parameters, rest, rule.init(parameters)))

    def network_of(state: TrainingState) -> nnx.Module:
        return nnx.merge(graphdef, state.parameters, random, state.rest)

    position = Position()
    checkpoints = None
    if resume is not None:
        settings = {
            "epochs": epochs,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "warmup": warmup,
            "augmentation": _augmentation_name(augmentation),
            "precision": precision,
            "seed": seed,
            "images": traits_of_images(images),
            "evaluation_images": None if evaluation is None else len(evaluation),
            "network": traits_of_network(network),
        }
        checkpoints = TrainingCheckpoints(resume, settings)
    with checkpoints or nullcontext():
        if checkpoints is not None and (found := checkpoints.restore(state)) is not None:
            state, position = found[0], Position.from_json(found[1])
            progress.say(f"fine-tuning goes on after step {position.step} of {steps}")
        progress.begin("fine-tuning", steps - position.step)
        batches = _batches(images, classes, batch_size, seed, range(position.step, steps))
        batch = next(batches, None)
        last_checkpoint = started = time.perf_counter()
        while batch is not None:
            state, measured = train(state, key, np.uint32(position.step), *batch)
            # Read while the device computes.
            batch = next(batches, None)
            position.account(measured)
            position.seconds += time.perf_counter() - started
            done = position.step - len(position.history) * steps_per_epoch
            progress.describe(
                f"epoch {len(position.history) + 1}/{epochs}, loss {position.loss / done:.4f},"
                f" accuracy {position.correct / (done * batch_size):.4f}"
            )
            progress.advance(1)
            if done == steps_per_epoch:
                watched = None
                if evaluation is not None:
                    trained = network_of(state)
                    watched = accuracy(trained, evaluation, top=(1,), batch_size=batch_size)["top1"]
                position.end_epoch(done, done * batch_size, watched)
                progress.say(f"epoch {len(position.history)}: {position.history[-1].text()}")
            due = time.perf_counter() - last_checkpoint >= checkpoint_seconds
            if checkpoints is not None and (done == steps_per_epoch or due):
                checkpoints.save(position.step, state, dataclasses.asdict(position))
                last_checkpoint = time.perf_counter()
            started = time.perf_counter()
    return FinetuneResult(network_of(state), tuple(position.history))


def check_settings(
    epochs: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    clip_norm: float | None,
    warmup: float,
) -> None:
    """Raises ValueError where one of these settings of ``finetune`` is out of its range."""
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size are 1 or more, found {epochs} and {batch_size}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is a number above 0, found {learning_rate}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is a number from 0, found {weight_decay}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is above 0, or None, found {clip_norm}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share from 0 to below 1, found {warmup}")


def _batches(
    images: PixelSource, classes: int, batch_size: int, seed: int, steps: range
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The preprocessed images and the labels of each of these steps.

    Raises:
        ValueError: If an image cannot be read, has no label, or one beyond the network's classes.
    """
    steps_per_epoch = len(images) // batch_size
    order = np.empty(0, int)
    for step in steps:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or not order.size:
            order = np.random.default_rng((seed, epoch)).permutation(len(images))
        numbers = order[place * batch_size : (place + 1) * batch_size]
        pixels, labels = images.take(numbers)
        if labels is None:
            raise ValueError("fine-tuning needs labels, but some of the images have none")
        if (wrong := (labels < 0) | (labels >= classes)).any():
            raise ValueError(
                f"label {labels[wrong][0]} of image {numbers[wrong][0]} is none of the network's"
                f" {classes} classes"
            )
        yield preprocess(pixels, images.preprocessing), labels


def _classes(network: nnx.Module, images: PixelSource, evaluation: LabelledSource | None) -> int:
    forward, state = forward_function(network)
    name = type(network).__name__
    batch = jax.ShapeDtypeStruct((1, *images.image_shape), jnp.float32)
    shape = output_shape(forward, state, batch, name)
    for source, what in ((images, "images"), (evaluation, "evaluation images")):
        if source is not None:
            output_classes(shape, name, source)
            check_labelled(source, what)
    return shape[1]


def _check_parameters(parameters: nnx.State) -> None:
    for path, variable in nnx.to_flat_state(parameters):
        if variable.dtype not in (jnp.float32, jnp.float64):
            # Steps far smaller than a parameter would be lost in rounding.
            raise ValueError(
                f"{path_name(path)}: fine-tuning needs parameters in float32, found"
                f" {variable.dtype}"
            )
        # By NumPy, which compiles nothing.
        if not np.isfinite(np.asarray(variable[...])).all():
            raise ValueError(f"{path_name(path)}: the parameter holds NaN or Inf")


def _own_copy(state: TrainingState) -> TrainingState:
    """A copy of it, all on the device of its parameters where that is one.

    A step reuses the memory of the state that it is given: that must not be the model's own. And
    its result is committed to a device as a whole if any part of what it was given was, such as
    parameters read from a file: had the rest been left uncommitted, the second step would have been
    compiled once more.
    """
    places = {leaf.sharding for leaf in jax.tree.leaves(state.parameters)}
    place = places.pop() if len(places) == 1 else None
    return jax.device_put(state, place, may_alias=False)


def _augmentation_name(augmentation: Augmentation | None) -> str | None:
    if augmentation is None:
        return None
    if dataclasses.is_dataclass(augmentation):
        return repr(augmentation)
    return getattr(augmentation, "__qualname__", type(augmentation).__qualname__)
