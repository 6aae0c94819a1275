"""The second sweep: every factor is refitted with all of its neighbours in place.

    min_W  R(W) = Σ‖f(x) - f_W(x)‖² / Σ‖f(x)‖²

f are the outputs of the original network, f_W those of the accelerated one, W all weights and
biases of its chains, sums go over unlabelled images. The first sweep fits a layer to what the
layers before feed it and to the original's responses; it knows nothing of the chains that come
after it, and repeating it would change nothing. This one fits to the outputs, where what all layers
do has its effect.

If the factors of one layer were changed by D, the outputs would change so that, to first order and
taking the positions of a map for independent,

    R(W + D) = R(W) - 2 tr(Dᵀ C) + tr(Dᵀ A D S),    C = -∇R / 2,

A the second moments of what the factor is given, S the sensitivity of the accelerated network's
outputs to what it answers (``accel.sensitivity``). So D = A⁻¹ C S⁻¹ is the refit. All factors are
refitted at once; that their effects overlap is made up for by the length of the step, which is
searched for, and by making each direction conjugate to the one before (Polak and Ribière's
nonlinear conjugate gradients, preconditioned). Gauss-Newton with Kronecker factors: Martens and
Grosse, arXiv:1503.05671.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.compiler import network_options
from accel.evaluation.forward import check_finite, forward_function, output_shape
from accel.images import ArraySource, ImageSource, checked_fitting, full_batches, padded
from accel.interpreter import specification
from accel.program import LayerCall, Program, named_layers, trace
from accel.progress import Progress
from accel.repair.kronecker import kronecker_preconditioner
from accel.repair.state import load_state, problem_digest, save_state
from accel.rewrite import FactorizedConv, FactorizedLinear

# Where a step that is this much shorter than the last one helps nothing, none does.
SHORTEST = 2.0**-12


@dataclasses.dataclass(frozen=True)
class Refitted:
    """A refitted network.

    Attributes:
        model: The accelerated network with the best weights; shares nothing with the given one.
        history: R on the images that are not used for fitting, before and after each iteration.
        steps: The length of each iteration's step, as a share of the refit of a layer by itself. It
            is far below 1 where errors of neighbouring positions go together, as they do where many
            see the same mistake.
        seconds: Time it took, compilation included.
    """

    model: nnx.Module
    history: tuple[float, ...]
    steps: tuple[float, ...]
    seconds: float

    @property
    def error_before(self) -> float:
        """R on held-out images, before."""
        return self.history[0]

    @property
    def error_after(self) -> float:
        """The same, of ``model``. Never more, and a little flattered: steps were chosen by it."""
        return self.history[-1]


def refit(
    original: nnx.Module,
    accelerated: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    *,
    iterations: int = 10,
    fitting: np.ndarray | None = None,
    batch_size: int = 50,
    seed: int = 0,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Refitted:
    """Refits all chains of ``accelerated`` at once to the outputs of ``original``.

    An iteration goes once through the images. It ends when no step makes the outputs better on
    images that are not used for fitting; so the result is never worse there than what was given.

    Args:
        original: The network to come close to, called as ``original(images)``.
        accelerated: From ``accelerate`` or of its kind. Neither network is changed.
        images: Images as the networks take them, without labels. They and the original's outputs
            for them are held in host memory.
        iterations: How many there are at most.
        fitting: Which images to fit to, a boolean an image; by default those that
            ``accel.accelerate`` fits to when it is given the same images and seed.
        batch_size: Images per batch.
        seed: Seed of all that is drawn.
        resume: A folder that keeps the state after every iteration, so that a run that was stopped
            goes on there when it is called again with the same arguments.
        progress: Receives what is being done.

    Raises:
        ValueError: If the networks and images do not fit together, there is no chain to refit, or
            ``resume`` holds the state of another run.
    """
    start = time.perf_counter()
    progress = progress or Progress()
    resume = None if resume is None else Path(resume)
    if iterations < 1 or batch_size < 1:
        raise ValueError(
            f"iterations and batch_size are 1 or more, found {iterations} and {batch_size}"
        )
    source = (
        ArraySource(np.asarray(images)) if isinstance(images, np.ndarray | jax.Array) else images
    )
    fitting = checked_fitting(source, fitting, seed)
    batch_size = min(batch_size, int(fitting.sum()))
    task = _Task(original, accelerated, source, fitting, batch_size, progress)

    file = None if resume is None else resume / "second_sweep.msgpack"
    problem = "" if file is None else task.problem((iterations, seed), fitting)
    if file is not None and file.exists():
        state = _load(file, problem, len(task.weights))
        start -= state.seconds
    else:
        # As if the errors of all positions of the largest map were one and the same.
        step = 1 / max(math.prod(specification(call.output).shape[1:-1]) for call in task.calls)
        state = _State(task.weights, None, step, (task.error(task.weights),), (), 0.0, False)
    weights, before, step, history, steps, _, ended = state
    if not math.isfinite(history[0]):
        raise ValueError("the accelerated network's outputs hold NaN or Inf")
    # Not needed where a run that was stopped later goes on.
    preconditioner = functools.cache(task.preconditioner)
    while not ended:
        precondition = preconditioner(seed, progress)
        progress.begin(
            f"second sweep {len(history)}/{iterations}: held-out error {history[-1]:.5f}",
            int(fitting.sum()),
        )
        downhill = task.downhill(weights, progress)
        refits = precondition(downhill)
        direction = refits if before is None else _conjugate(downhill, refits, before)
        found = task.search(weights, direction, history[-1], step)
        if found is None and before is not None:
            # Where directions no longer help each other, the refit by itself may still.
            direction = refits
            found = task.search(weights, direction, history[-1], step)
        if found is not None:
            step, weights, error = found
            steps, history = (*steps, step), (*history, error)
            before = (downhill, refits, direction)
        ended = found is None or len(steps) == iterations
        if file is not None:
            elapsed = time.perf_counter() - start
            _save(file, problem, _State(weights, before, step, history, steps, elapsed, ended))
    progress.say(
        f"second sweep: relative squared error of the outputs on {int((~fitting).sum())} held-out"
        f" images {history[0]:.5f} → {history[-1]:.5f}"
    )
    model = task.with_weights(weights)
    return Refitted(model, history, steps, time.perf_counter() - start)


LAYERS = (nnx.Conv, nnx.Linear)

Weights = list[jax.Array]


class _State(NamedTuple):
    """Where the sweep stands after an iteration.

    Attributes:
        weights: A matrix a factor.
        before: What the iteration found: the way downhill, the refits, and the direction it took.
        step: The length of the last step, or of the first to be tried.
        history: R on held-out images, before and after each iteration.
        steps: The length of each iteration's step.
        seconds: What all this took.
        ended: Whether there is nothing left to do.
    """

    weights: Weights
    before: tuple[Weights, Weights, Weights] | None
    step: float
    history: tuple[float, ...]
    steps: tuple[float, ...]
    seconds: float
    ended: bool


def _save(file: Path, problem: str, state: _State) -> None:
    told = {
        "step": state.step,
        "history": list(state.history),
        "steps": list(state.steps),
        "seconds": state.seconds,
        "ended": state.ended,
    }
    save_state(file, problem, jax.tree.leaves((state.weights, state.before)), told)


def _load(file: Path, problem: str, factors: int) -> _State:
    """The state in ``file``, of so many factors."""
    found, told = load_state(file, problem)
    arrays = [jnp.asarray(array) for array in found]
    weights, *before = (arrays[i : i + factors] for i in range(0, len(arrays), factors))
    return _State(
        weights,
        (before[0], before[1], before[2]) if before else None,
        told["step"],
        tuple(told["history"]),
        tuple(told["steps"]),
        told["seconds"],
        told["ended"],
    )


def _dot(a: Weights, b: Weights) -> float:
    return sum(float(jnp.sum(x * y)) for x, y in zip(a, b, strict=True))


def _conjugate(downhill: Weights, refits: Weights, before: tuple[Weights, Weights, Weights]):
    last_downhill, last_refits, last_direction = before
    change = [a - b for a, b in zip(downhill, last_downhill, strict=True)]
    share = max(0.0, _dot(change, refits) / _dot(last_downhill, last_refits))
    return [a + share * b for a, b in zip(refits, last_direction, strict=True)]


class _Task:
    """The networks, the images, and the jitted functions that do the work.

    Attributes:
        program: The accelerated network.
        weights: A matrix a factor, ``[p (+ 1 with a bias), d]``.
        taught: The original network's parameters.
    """

    def __init__(
        self,
        original: nnx.Module,
        accelerated: nnx.Module,
        source: ImageSource,
        fitting: np.ndarray,
        batch_size: int,
        progress: Progress,
    ):
        self.batch_size = batch_size
        images = np.concatenate(list(full_batches(source, batch_size)))[: len(source)]
        batch = jax.ShapeDtypeStruct((batch_size, *images.shape[1:]), images.dtype)
        shapes = [
            output_shape(*forward_function(model), batch, type(model).__name__)
            for model in (original, accelerated)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected outputs of one shape, found {shapes[0]} of the original network and"
                f" {shapes[1]} of the accelerated one"
            )
        chains = named_layers(accelerated, (FactorizedConv, FactorizedLinear))
        prefixes = tuple(f"{path}/" for path, _ in chains)
        self.program = trace(accelerated, batch, LAYERS)
        self.calls = [call for call in self.program.calls if call.path.startswith(prefixes)]
        if not prefixes or not self.calls:
            raise ValueError(f"{type(accelerated).__name__} has no chain to refit")
        evaluated = nnx.clone(accelerated)
        evaluated.eval()
        self.graphdef, self.state = nnx.split(evaluated)
        given = self.program.parameters
        self.places = _parameter_places(self.program, self.state, self.calls)
        self.weights = [
            _matrix(given[kernel], None if bias is None else given[bias])
            for kernel, bias in self.places
        ]
        self.fitted, self.held_out = images[fitting], images[~fitting]
        forward, state = forward_function(original)
        self.taught = jax.tree.leaves(state)
        jitted = jax.jit(forward, compiler_options=network_options(original))

        def answers(images: np.ndarray) -> np.ndarray:
            found = []
            for batch in full_batches(ArraySource(images), batch_size):
                found.append(np.asarray(jitted(state, batch), np.float32))
                progress.advance(batch_size)
            answered = np.concatenate(found)[: len(images)]
            finite = np.isfinite(answered).reshape(len(answered), -1)
            check_finite(np.asarray(finite.all(1)), 0, type(original).__name__)
            return answered

        progress.begin("the original's outputs", len(images))
        self.fitted_answers, self.held_out_answers = answers(self.fitted), answers(self.held_out)
        self.energy, self.held_out_energy = (
            float(np.sum(np.square(a), dtype=np.float64))
            for a in (self.fitted_answers, self.held_out_answers)
        )
        if not (self.energy > 0 and self.held_out_energy > 0):
            raise ValueError("the original network's outputs are all zero")
        run = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.program.jaxpr, ()))

        def squares(weights, parameters, images, wanted, mask):
            (found,) = run(*self._parameters(weights, parameters), images)
            errors = jnp.square(found.astype(jnp.float32) - wanted).reshape(batch_size, -1)
            return jnp.sum(errors * mask[:, None])

        jit = functools.partial(jax.jit, compiler_options=self.program.options)
        self._squares, self._gradient = jit(squares), jit(jax.grad(squares))

    def _parameters(self, weights: Weights, given: Sequence[Any]) -> list[Any]:
        """The program's parameters ``given``, but with these weights of the factors."""
        values = list(given)
        for matrix, (kernel, bias) in zip(weights, self.places, strict=True):
            shape, dtype = values[kernel].shape, values[kernel].dtype
            rows = math.prod(shape[:-1])
            values[kernel] = matrix[:rows].reshape(shape).astype(dtype)
            if bias is not None:
                values[bias] = matrix[rows].astype(values[bias].dtype)
        return values

    def with_weights(self, weights: Weights) -> nnx.Module:
        """A copy of the accelerated network with these weights of the factors."""
        parameters = self._parameters(weights, self.program.parameters)
        structure = jax.tree.structure(self.state)
        leaves = parameters[len(parameters) - structure.num_leaves :]
        return nnx.merge(self.graphdef, jax.tree.unflatten(structure, leaves), copy=True)

    def problem(self, settings: tuple[int, ...], fitting: np.ndarray) -> str:
        """Tells the run from every other."""
        parameters = [
            array
            for array in (*self.taught, *self.program.parameters)
            # Keys of layers that draw at random, which none does here.
            if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
        ]
        return problem_digest(
            (self.batch_size, *settings),
            (self.program,),
            (fitting, self.fitted, self.held_out, *parameters),
        )

    def _batches(self, images: np.ndarray, answers: np.ndarray):
        size = self.batch_size
        for first in range(0, len(images), size):
            rows = slice(first, first + size)
            mask = (np.arange(size) < len(images[rows])).astype(np.float32)
            yield padded(images[rows], size), padded(answers[rows], size), mask

    def preconditioner(self, seed: int, progress: Progress) -> Callable[[Weights], Weights]:
        """The function from C to the refits A⁻¹ C S⁻¹ of all factors."""
        return kronecker_preconditioner(
            self.program,
            self.calls,
            [bias is not None for _, bias in self.places],
            self.fitted,
            batch_size=self.batch_size,
            seed=seed,
            progress=progress,
        )

    def error(self, weights: Weights) -> float:
        """R on the images that are not used for fitting."""
        total = sum(
            float(self._squares(weights, self.program.parameters, *batch))
            for batch in self._batches(self.held_out, self.held_out_answers)
        )
        return total / self.held_out_energy

    def downhill(self, weights: Weights, progress: Progress) -> Weights:
        """C of each factor, on the images that are fitted to."""
        sums = [jnp.zeros_like(matrix) for matrix in weights]
        for batch in self._batches(self.fitted, self.fitted_answers):
            found = self._gradient(weights, self.program.parameters, *batch)
            sums = [a - b / (2 * self.energy) for a, b in zip(sums, found, strict=True)]
            progress.advance(int(batch[-1].sum()))
        return sums

    def search(
        self, weights: Weights, direction: Weights, error: float, step: float
    ) -> tuple[float, Weights, float] | None:
        """The length of the best step, the weights after it and their R; None if none is better.

        Doubled from ``step`` as long as that helps, or else halved until it does.
        """

        def after(step: float) -> tuple[float, Weights, float]:
            moved = [w + step * d for w, d in zip(weights, direction, strict=True)]
            return step, moved, self.error(moved)

        best, factor, shortest = after(step), 2.0, step * SHORTEST
        while not best[2] < error:
            if best[0] < shortest:
                return None
            best, factor = after(best[0] / 2), 0.5
        while (further := after(factor * best[0]))[2] < best[2]:
            best = further
        return best


def _matrix(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    # In float32 whatever the network's type is: small steps would be lost in bfloat16.
    matrix = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    return matrix if bias is None else jnp.concatenate([matrix, bias[None].astype(jnp.float32)])


def _parameter_places(
    program: Program, state: nnx.State, calls: Sequence[LayerCall]
) -> list[tuple[int, int | None]]:
    """Where kernel and bias of each layer stand among the program's parameters."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    first = len(program.parameters) - len(leaves)
    names = {
        "/".join(str(part.key) for part in path if hasattr(part, "key")): first + index
        for index, (path, _) in enumerate(leaves)
    }
    return [(names[f"{call.path}/kernel"], names.get(f"{call.path}/bias")) for call in calls]
