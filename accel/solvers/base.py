"""What all solvers share: their input, their output, and the measure they are judged by."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple, TypeVar, cast, final

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401  XLA calls this OpenBLAS; only a loaded one can be limited.
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from accel.solvers.activations import ACTIVATIONS, RELU, Activation, activate
from accel.solvers.linear_algebra import contract


class Responses(NamedTuple):
    """Responses (pre-activations) of one layer at the same n sampled positions.

    Attributes:
        inputs: What the factorized layer sees, ``ŷ``: the responses that the original weights give
            in the accelerated network (asymmetric) or the targets themselves (symmetric).
        targets: What it shall give, ``y``: the responses in the original network.
    """

    inputs: Float[Array, "n d_in"] | Float[np.ndarray, "n d_in"]
    targets: Float[Array, "n d"] | Float[np.ndarray, "n d"]


class SolverInfo(NamedTuple):
    """Sums over the rows and channels that were fitted, for the factors as returned.

    Attributes:
        objective: ``Σ‖r(y) - r(ŷ')‖²`` of the factorization, or its ``Solver.loss`` if that is
            another.
        linear_objective: The same of the linear solution, from which a nonlinear solver starts.
        target_energy: ``Σ‖r(y)‖²``.
    """

    objective: float
    linear_objective: float
    target_energy: float


class Factorization(NamedTuple):
    """The affine map of low rank ``ŷ ↦ expand @ (reduce @ ŷ) + bias``.

    The factors are float64 where targets of float64 were solved for in float64, else float32.
    """

    reduce: Float[Array, "r d_in"]
    expand: Float[Array, "d r"]
    bias: Float[Array, " d"]
    info: SolverInfo


class ResponseError(NamedTuple):
    """``squared_error`` is ``Σ‖r(y) - r(ŷ')‖²`` and ``target_energy`` is ``Σ‖r(y)‖²``."""

    squared_error: float
    target_energy: float


class Factors(NamedTuple):
    """Factors while they are traced: what lies beyond the rank is zero."""

    reduce: Float[Array, "d d_in"]
    expand: Float[Array, "d d"]
    bias: Float[Array, " d"]


Iterate = TypeVar("Iterate")


def lower(
    best: Iterate, least: Float[Array, ""], current: Iterate, error: Float[Array, ""]
) -> tuple[Iterate, Float[Array, ""]]:
    """The current iterate and its error where that is less (NaN never is), else the best so far."""
    better = error < least
    kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), current, best)
    return kept, jnp.where(better, error, least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver(abc.ABC):
    """Fits an affine map of a given rank from a layer's inputs to its targets.

    The rank is a traced value: all ranks of one shape of responses share one compilation.

    Attributes:
        dtype: The arithmetic of the solution; by default float64 wherever the backend has it
            (all but TPUs), whether or not JAX's x64 mode is on.
    """

    dtype: Literal["float32", "float64"] | None = None

    @property
    def penalties(self) -> tuple[float, ...]:
        """λ of each turn of a fit by turns through the activation; none for any other solver."""
        return ()

    @abc.abstractmethod
    def candidates(
        self,
        inputs: Float[Array, "n d_in"],
        targets: Float[Array, "n d"],
        rank: Int[Array, ""],
        activation: Activation,
        rounding: float,
    ) -> tuple[Factors, ...]:
        """The solutions to choose from, traced: the linear one, then what was made of it.

        Args:
            inputs: Finite rows in the solver's dtype.
            targets: Finite rows in the solver's dtype.
            rank: From 1 to d.
            activation: The layer's activation.
            rounding: Machine epsilon of the coarser of the inputs' own dtype and the solver's.
        """

    def loss(self, wanted: Float[Array, "n d"], found: Float[Array, "n d"]) -> Float[Array, ""]:
        """What candidates are compared by, of r(y) and r(ŷ'): the squared error."""
        return squared_error(wanted, found)

    @final
    def __call__(
        self, responses: Responses, rank: int, activation: Activation = RELU
    ) -> Factorization:
        """Solves for one layer and one rank.

        Of its candidates, a solver returns the one with the least ``loss``, measured on the factors
        after they have been rounded to the dtype they are returned in; so the result is never worse
        than the linear solution.

        Args:
            responses: At least two rows.
            rank: From 1 to d.
            activation: The activation r that follows the layer.

        Raises:
            ValueError: If the shapes do not fit, the rank is out of range, the activation is
                unknown, there are fewer than two rows, or responses are NaN or infinite.
            FloatingPointError: If finite responses lead to factors that are not, as where numbers
                leave the range of the solver's dtype.
        """
        dtype = self.dtype or widest_dtype()
        with arithmetic(dtype):
            responses = checked(responses, activation)
            if responses.targets.shape[0] < 2:
                raise ValueError("a solver needs at least 2 rows of responses, found 1")
            width = responses.targets.shape[1]
            if not 1 <= rank <= width:
                raise ValueError(f"rank must be from 1 to {width} for this layer, found {rank}")
            factors, info = _solve(self, responses, np.int32(rank), activation, dtype)
            # Cut on the host and sent by device_put: jnp would compile once more for every rank.
            reduce, expand, bias = (np.asarray(factor) for factor in factors)
            if not all(np.isfinite(factor).all() for factor in (reduce, expand, bias)):
                raise FloatingPointError(
                    f"{type(self).__name__} in {dtype} gave factors that are not finite at rank"
                    f" {rank}; the largest response is {largest_magnitude(responses):.3g}"
                )
            return Factorization(
                jax.device_put(reduce[:rank]),
                jax.device_put(expand[:, :rank]),
                jax.device_put(bias),
                SolverInfo(*(float(value) for value in info)),
            )


def objective(
    responses: Responses, factorization: Factorization, activation: Activation = RELU
) -> ResponseError:
    """``Σ‖r(y) - r(ŷ')‖²`` with ``ŷ' = expand @ (reduce @ ŷ) + bias``, and ``Σ‖r(y)‖²``.

    Computed in float64 wherever the backend has it; one row is enough.

    Raises:
        ValueError: If the shapes do not fit, the activation is unknown, or responses are NaN or
            infinite.
    """
    dtype = widest_dtype()
    with arithmetic(dtype):
        responses = checked(responses, activation)
        reduce, expand, bias = (np.asarray(factor) for factor in factorization[:3])
        reduces, expands = reduce.shape[1], expand.shape[0]
        if (reduces, expands) != (responses.inputs.shape[1], responses.targets.shape[1]):
            raise ValueError(
                f"the factorization maps {reduces} channels to {expands}, the responses have"
                f" {responses.inputs.shape[1]} and {responses.targets.shape[1]}"
            )
        # Filled up with zeros to the full rank, so that all ranks share one compilation.
        missing = max(0, expands - len(reduce))
        reduce = np.pad(reduce, ((0, missing), (0, 0)))
        expand = np.pad(expand, ((0, 0), (0, missing)))
        factors = Factors(*(jax.device_put(factor) for factor in (reduce, expand, bias)))
        error, energy = _objective(responses, factors, activation, dtype, squared_error)
        return ResponseError(float(error), float(energy))


def widest_dtype() -> Literal["float32", "float64"]:
    """float64, but float32 on TPUs, which only emulate it (and not in all of linear algebra)."""
    return "float32" if jax.default_backend() == "tpu" else "float64"


@contextmanager
def arithmetic(dtype: str) -> Iterator[None]:
    """A scope whose arrays are of ``dtype``, whatever JAX's x64 mode is outside.

    LAPACK has one thread in it (XLA's own matrix products keep theirs): OpenBLAS' threads wait for
    each other in busy loops, which makes it several times slower where another process has a core.
    """
    with jax.enable_x64(dtype == "float64"), threadpool_limits(1, user_api="blas"):
        yield


def checked(responses: Responses, activation: Activation) -> Responses:
    """The responses as JAX arrays, after everything about them that can be wrong was looked at."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    arrays = Responses(*(as_finite_rows(*item) for item in responses._asdict().items()))
    if arrays.inputs.shape[0] != arrays.targets.shape[0]:
        raise ValueError(
            "inputs and targets must be responses at the same positions, found"
            f" {arrays.inputs.shape[0]} and {arrays.targets.shape[0]} rows"
        )
    return arrays


def as_finite_rows(name: str, rows: Array | np.ndarray) -> Array:
    """``rows`` as a JAX array.

    Raises:
        ValueError: If it is not a non-empty matrix of finite real numbers; the message begins with
            ``name``.
    """
    if rows.ndim != 2 or 0 in rows.shape or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floating-point rows of shape [n, channels], found"
            f" {rows.dtype}{list(rows.shape)}"
        )
    array = jnp.asarray(rows)
    bad = int(_count_not_finite(array))
    if bad:
        raise ValueError(f"{name}: {bad} of {array.size} responses are NaN or infinite")
    return array


def largest_magnitude(responses: Responses) -> float:
    return max(float(np.abs(np.asarray(rows)).max()) for rows in responses)


@jax.jit
def _count_not_finite(rows: Float[Array, "n d"]) -> Int[Array, ""]:
    return jnp.sum(~jnp.isfinite(rows))


@partial(jax.jit, static_argnames=("solver", "activation", "dtype"))
def _solve(
    solver: Solver, responses: Responses, rank: Int[Array, ""], activation: Activation, dtype: str
) -> tuple[Factors, tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]]:
    own = cast(Array, responses.inputs).dtype
    inputs, targets = (rows.astype(dtype) for rows in cast(tuple[Array, Array], responses))
    # Factors are handed to layers that compute in the responses' dtype, at least float32.
    returned = jnp.promote_types(cast(Array, responses.targets).dtype, "float32")
    returned = min(returned, jnp.dtype(dtype), key=lambda candidate: candidate.itemsize)
    rounding = max(float(jnp.finfo(own).eps), float(jnp.finfo(dtype).eps))

    def measured(found: Factors) -> tuple[Factors, Float[Array, ""], Float[Array, ""]]:
        factors = jax.tree.map(lambda factor: factor.astype(returned), found)
        error, energy = _objective(
            Responses(inputs, targets), factors, activation, dtype, solver.loss
        )
        return factors, error, energy

    linear, *refined = solver.candidates(inputs, targets, rank, activation, rounding)
    best, linear_error, energy = measured(linear)
    least = linear_error
    for found in refined:
        factors, error, _ = measured(found)
        # Where the error is not less, or NaN, the earlier solution stays.
        best = jax.tree.map(partial(jnp.where, error < least), factors, best)
        least = jnp.fmin(error, least)
    return best, (least, linear_error, energy)


def squared_error(wanted: Float[Array, "n d"], found: Float[Array, "n d"]) -> Float[Array, ""]:
    """``Σ‖wanted - found‖²``."""
    return jnp.sum(jnp.square(wanted - found))


@partial(jax.jit, static_argnames=("activation", "dtype", "loss"))
def _objective(
    responses: Responses,
    factors: Factors,
    activation: Activation,
    dtype: str,
    loss: Callable[[Array, Array], Array],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    inputs, targets = (rows.astype(dtype) for rows in cast(tuple[Array, Array], responses))
    reduce, expand, bias = (factor.astype(dtype) for factor in factors)
    outputs = contract("nr,dr->nd", contract("ni,ri->nr", inputs, reduce), expand) + bias
    wanted = activate(targets, activation)
    return (
        loss(wanted, activate(outputs, activation)),
        jnp.sum(jnp.square(wanted)),
    )
