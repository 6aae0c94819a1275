"""Distillation: the accelerated network learns from the original, end to end, without labels.

    min_θ  E_outputs(θ) + w · mean_f E_f(θ),    E_f(θ) = Σ‖f(x) - f_θ(x)‖² / Σ‖f(x)‖²

θ are the parameters of the accelerated network, sums go over unlabelled images x and random views
of them, f are outputs and chosen activations of the original network, f_θ those of the accelerated
one. Reconstruction fits one layer after the other and cannot undo in an early layer what hurts a
late one; this can. Hinton, Vinyals, Dean, arXiv:1503.02531, with the squared error on features of
Romero et al., arXiv:1412.6550; why both networks must see the same random views: Beyer et al.,
arXiv:2106.05237.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from accel.images import ArraySource, ImageSource, checked_fitting, full_batches, padded
from accel.interpreter import specification
from accel.program import Program, trace
from accel.progress import Progress
from accel.repair.augmentation import augment
from accel.repair.descent import descent
from accel.repair.features import compared_layers
from accel.repair.state import load_state, problem_digest, save_state
from accel.rewrite import FactorizedConv, FactorizedLinear

Parameters = list[jax.Array]

OUTPUTS = "outputs"
# What enters one of these layers can be compared: it is after the activation, the pooling and the
# addition of a residual block, and it is the same whether batch normalisation was folded or not.
LAYERS = (nnx.Conv, nnx.Linear, FactorizedConv, FactorizedLinear)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How a network is distilled.

    Attributes:
        epochs: How often every fitting image is seen.
        learning_rate: The size of the highest step, as a share of that of each parameter array
            (root mean squares; see ``accel.repair.descent``). It rises over the first tenth and
            falls as a cosine. While it is high the error may be above that of the start; what
            counts is the end.
        batch_size: Images per step.
        features: Layers by path pattern (``fnmatch``); what enters them is compared. None for what
            enters the layers at, or before, which the resolution falls to half or less: the last
            activations of each stage. ``()`` for the outputs alone.
        feature_weight: Weight w of the features.
        flip: Whether images are flipped left to right at random.
        shift: The most that images are moved at random, as a share of their size.
    """

    epochs: int = 20
    learning_rate: float = 5e-4
    batch_size: int = 50
    features: Sequence[str] | None = None
    feature_weight: float = 1.0
    flip: bool = True
    shift: float = 0.04

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is 1 or more, found {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is above 0, found {self.learning_rate}")
        if not self.feature_weight >= 0:
            raise ValueError(f"feature_weight is 0 or more, found {self.feature_weight}")
        if not 0 <= self.shift < 1:
            raise ValueError(f"shift is a share from 0 to below 1, found {self.shift}")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The state after one epoch.

    Attributes:
        epoch: Its number from 1; 0 is the network as it was given.
        loss: Mean of the training loss over the epoch's steps; None for epoch 0.
        held_out: E of the features by path and of ``"outputs"``, on the images that are not used
            for fitting, as they are.
    """

    epoch: int
    loss: float | None
    held_out: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A distilled network.

    Attributes:
        model: The accelerated network with the best parameters; shares nothing with the given one.
        history: All epochs, the state before the first included.
        best: Number of the epoch whose parameters were taken: the one with the least error of the
            outputs on held-out images. 0 where training only made it worse.
        seconds: Time it took, compilation included.
    """

    model: nnx.Module
    history: tuple[Epoch, ...]
    best: int
    seconds: float

    @property
    def error_before(self) -> float:
        """Relative squared error of the outputs on held-out images, before."""
        return self.history[0].held_out[OUTPUTS]

    @property
    def error_after(self) -> float:
        """The same, of ``model``. Never more, and a little flattered, being the least of many."""
        return self.history[self.best].held_out[OUTPUTS]


class TrainingDiverged(FloatingPointError):
    """Training ran into NaN or Inf.

    Attributes:
        distilled: What the epochs before it gave.
    """

    def __init__(self, message: str, distilled: Distilled):
        super().__init__(message)
        self.distilled = distilled


def distill(
    original: nnx.Module,
    accelerated: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    *,
    settings: Distillation | None = None,
    fitting: np.ndarray | None = None,
    seed: int = 0,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """Trains all parameters of ``accelerated`` to answer as ``original`` does.

    Both networks run in evaluation mode, in their own types: batch statistics stay as they are,
    nothing is dropped. Parameters of less than float32 are trained in float32, and are rounded in
    the network that is returned, and wherever it is run on the way.
    After every epoch the error is measured on images that are not used for fitting, and the best
    parameters are returned; they are those given where none are better.

    Args:
        original: The network to learn from, called as ``original(images)``.
        accelerated: The network to be trained; of the same input, outputs, and layer paths as far
            as features are to be compared. Neither network is changed.
        images: Images as the networks take them, without labels. All are held in host memory.
        settings: How it is done; the default settings where None.
        fitting: Which images to fit to, a boolean an image; the others are held out. By default
            those that ``accel.accelerate`` fits to when it is given the same images and seed.
        seed: Seed of all that is drawn. The same seed gives the same result.
        resume: A folder that keeps the state after every epoch, so that a run that was stopped goes
            on there when it is called again with the same arguments.
        progress: Receives what the run is doing.

    Raises:
        ValueError: If networks, images and settings do not fit together, or if images, or what is
            compared of one of the networks before training, hold NaN or Inf.
        TrainingDiverged: If training runs into NaN or Inf; it holds the best network until then.
    """
    start = time.perf_counter()
    settings = settings or Distillation()
    progress = progress or Progress()
    resume = None if resume is None else Path(resume)
    source = (
        ArraySource(np.asarray(images)) if isinstance(images, np.ndarray | jax.Array) else images
    )
    fitting = checked_fitting(source, fitting, seed)
    batch_size = min(settings.batch_size, int(fitting.sum()))
    loaded = np.concatenate(list(full_batches(source, batch_size)))[: len(source)]
    fitted, held_out = loaded[fitting], loaded[~fitting]
    batch = jax.ShapeDtypeStruct((batch_size, *loaded.shape[1:]), loaded.dtype)
    task = _Task(_Network(original, batch), _Network(accelerated, batch), settings, len(fitted))

    trained = task.student.trained
    state = _State(trained, task.optimizer.init(trained), trained, ())
    file = None if resume is None else resume / "distillation.msgpack"
    problem = "" if file is None else task.problem(seed, fitting, loaded)
    if file is not None and file.exists():
        state = _load(file, problem, state)
    if not state.history:
        before = task.errors(trained, held_out)
        for name, error in before.items():
            if not math.isfinite(error):
                raise ValueError(f"the accelerated network's {_described(name)} hold NaN or Inf")
        state = state._replace(history=(Epoch(0, None, before),))

    def distilled() -> Distilled:
        return Distilled(
            model=task.student.with_parameters(state.best),
            history=state.history,
            best=_best(state.history),
            seconds=time.perf_counter() - start,
        )

    def check_finite(what: str, value: float, epoch: int) -> None:
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"{what} became {value} in epoch {epoch}; a learning rate below"
                f" {settings.learning_rate} may help",
                distilled(),
            )

    # History begins with the state before the first epoch.
    left = settings.epochs + 1 - len(state.history)
    progress.begin("distilling", left * task.steps * batch_size)
    for epoch in range(len(state.history), settings.epochs + 1):
        order_key, view_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch))
        order = np.asarray(jax.random.permutation(order_key, len(fitted)))
        parameters, optimizer = state.trained, state.optimizer
        total = 0.0
        for index in range(task.steps):
            rows = fitted[order[index * batch_size : (index + 1) * batch_size]]
            key = jax.random.fold_in(view_key, index)
            parameters, optimizer, loss = task.step(parameters, optimizer, rows, key)
            total += float(loss)
            check_finite("the loss", total, epoch)
            progress.describe(
                f"distilling, epoch {epoch}/{settings.epochs}: loss {total / (index + 1):.5f},"
                f" held-out error {state.history[-1].held_out[OUTPUTS]:.5f}"
            )
            progress.advance(batch_size)
        after = task.errors(parameters, held_out)
        check_finite("the error on held-out images", sum(after.values()), epoch)
        history = (*state.history, Epoch(epoch, total / task.steps, after))
        best = parameters if _best(history) == epoch else state.best
        state = _State(parameters, optimizer, best, history)
        if file is not None:
            _save(file, problem, state)
    result = distilled()
    progress.say(
        f"distilled: relative squared error of the outputs on {len(held_out)} held-out images"
        f" {result.error_before:.5f} → {result.error_after:.5f}, epoch {result.best} is the best"
    )
    return result


def _best(history: Sequence[Epoch]) -> int:
    return min(range(len(history)), key=lambda epoch: history[epoch].held_out[OUTPUTS])


class _Network:
    """A network in evaluation mode as a function of its parameters and of images.

    Attributes:
        program: The network, traced.
        output_shape: Shape of its outputs for a batch.
        trained: Its floating-point ``nnx.Param``, in the order of the program's parameters; in
            float32 at least, since in less most steps would be rounded away.
    """

    def __init__(self, model: nnx.Module, images: jax.ShapeDtypeStruct):
        self.program = trace(model, images, LAYERS)
        outputs = self.program.jaxpr.outvars
        if len(outputs) != 1 or not isinstance(outputs[0], jex.Var):
            raise ValueError(
                f"{type(model).__name__}: expected one array of outputs that hangs on the images,"
                f" found {outputs}"
            )
        self.output_shape = specification(outputs[0]).shape
        self.graphdef, state = nnx.split(model)
        trainable = jax.tree.map(
            lambda variable: (
                isinstance(variable, nnx.Param)
                and jnp.issubdtype(variable[...].dtype, jnp.floating)
            ),
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        self.structure = jax.tree.structure(state)
        # Constants of the trace come first: they are no parameters of the model.
        self.constants = len(self.program.parameters) - self.structure.num_leaves
        flags = jax.tree.leaves(trainable)
        self.places = [self.constants + i for i, flag in enumerate(flags) if flag]
        self.trained = [_at_least_float32(self.program.parameters[place]) for place in self.places]

    def all_parameters(self, trained: Parameters, given: Sequence[jax.Array]) -> list[jax.Array]:
        """The program's parameters ``given``, but with these values of those that are trained."""
        values = list(given)
        for place, value in zip(self.places, trained, strict=True):
            values[place] = value.astype(values[place].dtype)
        return values

    @property
    def arrays(self) -> list[jax.Array]:
        """All that its answers hang on: not the keys of layers that draw, which none does here."""
        return [
            array
            for array in self.program.parameters
            if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        ]

    def with_parameters(self, trained: Parameters) -> nnx.Module:
        """A copy of the model with these values of the parameters that are trained."""
        leaves = self.all_parameters(trained, self.program.parameters)[self.constants :]
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.structure, leaves), copy=True)


class _Task:
    """What is minimised, and the two jitted functions that do the work.

    Attributes:
        compared: Names of what is compared, in order of execution; the outputs come last.
        steps: Steps an epoch.
    """

    def __init__(self, teacher: _Network, student: _Network, settings: Distillation, images: int):
        self.teacher, self.student, self.settings = teacher, student, settings
        batch_size = specification(teacher.program.images).shape[0]
        shapes = [network.output_shape for network in (teacher, student)]
        if shapes[0] != shapes[1] or shapes[0][:1] != (batch_size,):
            raise ValueError(
                f"expected outputs of one shape with a row for each of {batch_size} images, found"
                f" {shapes[0]} of the original network and {shapes[1]} of the accelerated one"
            )
        paths = compared_layers(teacher.program, student.program, settings.features)
        self.compared = (*paths, OUTPUTS)
        self.steps = images // batch_size
        self.optimizer = descent(settings.learning_rate, self.steps * settings.epochs)
        teach, learn = _answers(teacher.program, paths), _answers(student.program, paths)

        def squares(trained, given, taught, images):
            """‖f - f_θ‖² and ‖f‖² of everything compared, ``[2, compared, batch]``."""
            targets = map(_at_least_float32, teach(taught, images))
            answers = map(_at_least_float32, learn(student.all_parameters(trained, given), images))
            rows = [
                (_row_squares(target - answer), _row_squares(target))
                for target, answer in zip(targets, answers, strict=True)
            ]
            return jnp.stack([jnp.stack(values) for values in zip(*rows, strict=True)])

        weights = np.full(len(self.compared), settings.feature_weight / max(1, len(paths)))
        weights[-1] = 1.0

        def loss_of(trained, given, taught, views):
            error, energy = squares(trained, given, taught, views).sum(axis=2)
            # What is zero in the whole batch (dead channels) has no relative error.
            relative = error / jnp.where(energy > 0, energy, 1)
            return jnp.sum(weights.astype(error.dtype) * relative)

        jit = partial(jax.jit, compiler_options=student.program.options)

        @jit
        def step(trained, optimizer, given, taught, images, key):
            views = augment(images, key, flip=settings.flip, shift=settings.shift)
            loss, gradients = jax.value_and_grad(loss_of)(trained, given, taught, views)
            updates, optimizer = self.optimizer.update(gradients, optimizer, trained)
            return optax.apply_updates(trained, updates), optimizer, loss

        self._step, self._squares = step, jit(squares)
        self._given = (student.program.parameters, teacher.program.parameters)

    def problem(self, seed: int, fitting: np.ndarray, images: np.ndarray) -> str:
        """Tells the run from every other."""
        return problem_digest(
            (self.settings, seed),
            (self.teacher.program, self.student.program),
            (fitting, images, *self.student.arrays, *self.teacher.arrays),
        )

    def step(self, trained, optimizer, images: np.ndarray, key: jax.Array):
        """One step: the new parameters, the optimizer's new state and the loss before it."""
        return self._step(trained, optimizer, *self._given, images, key)

    def errors(self, trained: Parameters, images: np.ndarray) -> dict[str, float]:
        """E of everything compared on these images as they are; NaN where a network answers NaN."""
        batch_size = specification(self.teacher.program.images).shape[0]
        sums = np.zeros((2, len(self.compared)))
        for batch in ArraySource(images).batches(batch_size):
            squares = self._squares(trained, *self._given, padded(batch, batch_size))
            sums += np.asarray(squares, np.float64)[:, :, : len(batch)].sum(axis=2)
        error, energy = sums
        for name, value in zip(self.compared, energy, strict=True):
            if not math.isfinite(value):
                raise ValueError(f"the original network's {_described(name)} hold NaN or Inf")
        if energy[-1] == 0:
            raise ValueError("the original network's outputs are all zero on held-out images")
        relative = error / np.where(energy > 0, energy, 1)
        return dict(zip(self.compared, relative.tolist(), strict=True))


class _State(NamedTuple):
    """Where training stands after an epoch."""

    trained: Parameters
    optimizer: Any
    best: Parameters
    history: tuple[Epoch, ...]


def _at_least_float32(values: jax.Array) -> jax.Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _row_squares(values: jax.Array) -> jax.Array:
    return (values.reshape(len(values), -1) ** 2).sum(axis=1)


def _described(name: str) -> str:
    return OUTPUTS if name == OUTPUTS else f"inputs of {name}"


def _answers(program: Program, paths: Sequence[str]) -> Callable[[Any, Any], list[jax.Array]]:
    """A pure function ``(parameters, images) -> inputs of the layers at these paths, outputs``."""
    inputs = {call.path: call.input for call in program.calls}
    jaxpr = program.jaxpr.replace(
        constvars=[], outvars=[*(inputs[path] for path in paths), *program.jaxpr.outvars]
    )
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    return lambda parameters, images: run(*parameters, images)


def _save(file: Path, problem: str, state: _State) -> None:
    arrays = jax.tree.leaves((state.trained, state.optimizer, state.best))
    history = [dataclasses.asdict(epoch) for epoch in state.history]
    save_state(file, problem, arrays, {"history": history})


def _load(file: Path, problem: str, start: _State) -> _State:
    """The state in ``file``, of the structure of ``start``."""
    arrays, told = load_state(file, problem)
    structure = jax.tree.structure((start.trained, start.optimizer, start.best))
    trained, optimizer, best = jax.tree.unflatten(structure, map(jnp.asarray, arrays))
    return _State(trained, optimizer, best, tuple(Epoch(**epoch) for epoch in told["history"]))
