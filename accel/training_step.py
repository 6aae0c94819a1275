"""One step of supervised training: what it minimises, and what becomes of the gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from accel.compiler import network_options
from accel.data.augmentation import Augmentation

Precision = Literal["float32", "bfloat16"]
Optimizer = Literal["sgd", "adamw"]

MOMENTUM = 0.9


class TrainingState(NamedTuple):
    """What a step changes.

    Attributes:
        parameters: What is trained (``nnx.Param``), in float32 or better.
        rest: What the network changes by itself, such as running statistics.
        optimizer: The optimizer's state.
    """

    parameters: nnx.State
    rest: nnx.State
    optimizer: Any


class Measured(NamedTuple):
    """What a step says of its batch, as it was before the step.

    Attributes:
        loss: Mean cross-entropy in nats.
        correct: Number of images whose highest output is that of their class.
        gradient_norm: Euclidean norm of the whole gradient, not clipped.
    """

    loss: jax.Array
    correct: jax.Array
    gradient_norm: jax.Array


Step = Callable[[TrainingState, jax.Array, Any, Any, Any], tuple[TrainingState, Measured]]


def gradient_rule(
    optimizer: Optimizer,
    learning_rate: float,
    weight_decay: float,
    clip_norm: float | None,
    warmup: float,
    steps: int,
) -> optax.GradientTransformation:
    """What becomes of a gradient: clipping, weight decay of kernels, momentum, learning rate.

    Of T steps the first w = ⌊warmup·T⌋ are warm-up. Step t, counted from 0, has the learning
    rate ``peak·(t + 1)/(w + 1)`` for t < w, and ``peak·(1 + cos(π(t - w)/(T - w)))/2`` from there.

    Args:
        optimizer, learning_rate, weight_decay, clip_norm, warmup: See ``finetune``.
        steps: Number of all steps.
    """
    warmup_steps = int(warmup * steps)
    # From a part of the peak, not from zero: a step at a learning rate of zero would be wasted.
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / (warmup_steps + 1), learning_rate, warmup_steps, steps
    )
    clipping = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    if optimizer == "adamw":
        descent = optax.adamw(schedule, weight_decay=weight_decay, mask=_kernels)
    elif optimizer == "sgd":
        descent = optax.chain(
            optax.add_decayed_weights(weight_decay, _kernels),
            optax.sgd(schedule, momentum=MOMENTUM, nesterov=True),
        )
    else:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: sgd, adamw")
    return optax.chain(clipping, descent)


def training_step(
    network: nnx.Module,
    rule: optax.GradientTransformation,
    augmentation: Augmentation | None,
    precision: Precision,
) -> Step:
    """One step as a jitted function ``(state, key, number, images, labels) -> state, measured``.

    All that is random in a step is drawn from the key and the step's number alone, so that a run
    that goes on from a checkpoint draws the same. The state's memory is reused for the next state.

    Args:
        network: What is trained; it is not changed.
        rule: See ``gradient_rule``.
        augmentation, precision: See ``finetune``.
    """
    training = nnx.clone(network)
    training.train()
    if precision == "bfloat16":
        for _, node in nnx.iter_graph(training):
            # None stands for the type of parameters and inputs. Layers cast their parameters, which
            # stay float32 themselves; normalisations take their statistics in float32.
            if hasattr(node, "param_dtype") and node.dtype is None:
                node.dtype = jnp.bfloat16
    elif precision != "float32":
        raise ValueError(f"unknown precision {precision!r}; known: float32, bfloat16")
    graphdef, _, random, _ = nnx.split(training, nnx.Param, nnx.RngState, ...)

    @partial(jax.jit, donate_argnums=0, compiler_options=network_options(network))
    def step(state, key, number, images, labels):
        augmentation_key, random_key = jax.random.split(jax.random.fold_in(key, number))
        if augmentation is not None:
            images = augmentation(augmentation_key, images)

        def loss_of(parameters):
            drawn = _reseeded(random, random_key)
            merged = nnx.merge(graphdef, parameters, drawn, state.rest, copy=True)
            logits = merged(images).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            *_, rest = nnx.split(merged, nnx.Param, nnx.RngState, ...)
            return losses.mean(), (rest, (logits.argmax(-1) == labels).sum())

        (loss, (rest, correct)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state.parameters
        )
        updates, optimizer = rule.update(gradient, state.optimizer, state.parameters)
        parameters: Any = optax.apply_updates(state.parameters, updates)
        measured = Measured(loss, correct, optax.tree.norm(gradient))
        return TrainingState(parameters, rest, optimizer), measured

    return step


def _reseeded(random: nnx.State, key: jax.Array) -> nnx.State:
    """The states of random generators as they would be after seeding with ``key``."""
    leaves, structure = jax.tree.flatten(random)
    fresh = [
        jax.random.split(jax.random.fold_in(key, index), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros_like(leaf)
        for index, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, fresh)


def _kernels(parameters: Any) -> Any:
    """Which parameters decay: kernels; biases, scales and whatever else do not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(part, "key", None) == "kernel" for part in path), parameters
    )
