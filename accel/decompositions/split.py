"""Splitting a kernel into the factors of a chain, as well as a given metric can tell.

minimise  tr (W - W')ᵀ G (W - W'),    W'_(s,u),d = Σ_r first_ur Σ_m middle_(s,r),m last_md

over the factors. W is a kernel as a matrix ``[patch, d]``. A patch is indexed by s, the taps of the
middle factor, and u, the taps of the first factor together with the input channels. G is a second
moment matrix of patches: then the objective is the squared error of the layer's responses. Without
G it is the identity and the splitting is data-free: a singular value decomposition (``channel``,
``spatial``, ``channel_input``) or a sequentially truncated higher-order one (``channel_spatial``,
``tucker2``; Vannieuwenhoven, Vandebril, Meerbergen, *A New Truncation Strategy for the Higher-Order
Singular Value Decomposition*, 2012).

Given the first factor, middle and last are reduced-rank regression with a closed form. The first
factor starts from the singular value decomposition of the kernel weighted by the mean second moment
over s, and is then improved by turns: least squares for it with the others held (preconditioned
conjugate gradients), closed form for the others. No turn can raise the objective.

Ranks are traced values within static widths; columns beyond them are zero.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from accel.decompositions.structure import Split, Structure
from accel.solvers.linear_algebra import contract

# Added to second moments of features, relative to their mean, so that features that repeat each
# other (a rank above that of the kernel) have a Cholesky factor; 1e-10 of the energy is lost.
JITTER = 1e-10
# The same in the preconditioner alone, where it costs nothing.
PRECONDITIONER_JITTER = 1e-6
CONJUGATE_GRADIENT_STEPS = 4


class Prepared(NamedTuple):
    """A first factor of full width, and what it takes to cut everything to any ranks.

    Feature (r, s), r the slower index, so that the features of a rank are the first ones.

    Attributes:
        first: ``[u, w]``: columns in the order of importance; the identity without a first factor.
        triangle: Lower Cholesky factor of the features' second moments.
        whitened: ``[q, d]``: what each feature, made orthonormal to those before, explains of W.
        energy: ``tr Wᵀ G W``.
    """

    first: Float[Array, "u w"]
    triangle: Float[Array, "q q"]
    whitened: Float[Array, "q d"]
    energy: Float[Array, ""]


class Metric(NamedTuple):
    """A metric for patches in the order (s, u): G, and G W; None stands for the identity."""

    matrix: Float[Array, "p p"] | None
    kernel: Float[Array, "p d"]
    times_kernel: Float[Array, "p d"]

    def times(self, columns: Float[Array, "p m"]) -> Float[Array, "p m"]:
        return columns if self.matrix is None else contract("pq,qm->pm", self.matrix, columns)


def _metric(
    structure: Structure, kernel: Float[Array, "p d"], matrix: Float[Array, "p p"] | None
) -> Metric:
    order = structure.order.reshape(-1)
    kernel = kernel[order]
    if matrix is None:
        return Metric(None, kernel, kernel)
    matrix = matrix[order][:, order]
    return Metric(matrix, kernel, contract("pq,qd->pd", matrix, kernel))


def _mean_over_taps(
    structure: Structure, matrix: Float[Array, "p p"] | None, u: int
) -> Float[Array, "u u"] | None:
    """The mean over s of the second moments of u: all that one factor for every s can look at."""
    if matrix is None:
        return None
    s = structure.middle_taps
    return jnp.mean(
        jnp.stack([matrix[i * u : (i + 1) * u, i * u : (i + 1) * u] for i in range(s)]), 0
    )


def _ordered_first(structure: Structure, metric: Metric, width: int) -> Float[Array, "u w"]:
    """Leading directions of the kernel's unfolding along u, in the metric's mean over s."""
    s = structure.middle_taps
    u = metric.kernel.shape[0] // s
    unfolded = metric.kernel.reshape(s, u, -1).transpose(1, 0, 2).reshape(u, -1)
    mean = _mean_over_taps(structure, metric.matrix, u)
    if mean is None:
        _, directions = jnp.linalg.eigh(contract("ux,vx->uv", unfolded, unfolded))
        return directions[:, ::-1][:, :width]
    triangle = jnp.linalg.cholesky(_jittered(mean, JITTER))
    weighted = contract("uv,ux->vx", triangle, unfolded)
    _, directions = jnp.linalg.eigh(contract("ux,vx->uv", weighted, weighted))
    return jax.scipy.linalg.solve_triangular(
        triangle, directions[:, ::-1][:, :width], lower=True, trans=1
    )


def _jittered(matrix: Float[Array, "n n"], relative: float) -> Float[Array, "n n"]:
    size = len(matrix)
    # In float32 what is added has to be above the rounding of the sum.
    relative = max(relative, 16 * float(jnp.finfo(matrix.dtype).eps))
    return matrix + relative * jnp.trace(matrix) / size * jnp.eye(size, dtype=matrix.dtype)


def _prepared(
    structure: Structure, metric: Metric, first: Float[Array, "u w"], used: Float[Array, " w"]
) -> Prepared:
    """Second moments of the features of ``first`` and what they explain; ``used`` masks columns."""
    s, (u, width) = structure.middle_taps, first.shape
    first = first * used
    d = metric.kernel.shape[1]
    if metric.matrix is None:
        gram = contract("ur,uv->rv", first, first)
        moments = contract("rv,st->rsvt", gram, jnp.eye(s, dtype=first.dtype))
    else:
        half = contract("xsu,ur->xrs", metric.matrix.reshape(-1, s, u), first)
        half = half.reshape(s, u, width * s)
        moments = contract("sux,ur->rsx", half, first).reshape(width, s, width, s)
    cross = contract("sud,ur->rsd", metric.times_kernel.reshape(s, u, d), first)
    moments = moments.reshape(width * s, width * s)
    scale = jnp.trace(moments) / jnp.maximum(s * used.sum(), 1)
    # Unused columns get moments of their own, so that the rest keeps its Cholesky factor.
    jitter = max(JITTER, 16 * float(jnp.finfo(first.dtype).eps))
    filler = jnp.repeat(jnp.where(used > 0, jitter * scale, scale), s)
    triangle = jnp.linalg.cholesky(moments + jnp.diag(filler))
    whitened = jax.scipy.linalg.solve_triangular(triangle, cross.reshape(width * s, d), lower=True)
    energy = jnp.sum(metric.kernel * metric.times_kernel)
    return Prepared(first, triangle, whitened, energy)


def _cut(
    structure: Structure, prepared: Prepared, ranks: Int[Array, " ranks"]
) -> tuple[Float[Array, "q m"], Float[Array, "m d"] | None, Float[Array, ""]]:
    """Middle and last factor at the ranks, and the objective. Features in the order (r, s)."""
    s = structure.middle_taps
    kept = jnp.arange(len(prepared.whitened)) < ranks[0] * s
    whitened = prepared.whitened * kept[:, None]
    # Of a lower triangle, the inverse's first rows and columns are those of its first ones.
    triangle = jnp.where(kept[:, None] & kept, prepared.triangle, jnp.eye(len(kept)))
    if not structure.has_last:
        middle = jax.scipy.linalg.solve_triangular(triangle, whitened, lower=True, trans=1)
        return middle, None, prepared.energy - jnp.sum(jnp.square(whitened))
    values, directions = jnp.linalg.eigh(contract("qd,qe->de", whitened, whitened))
    chosen = jnp.arange(len(values)) < ranks[-1]
    directions = directions[:, ::-1] * chosen
    middle = jax.scipy.linalg.solve_triangular(
        triangle, contract("qd,dm->qm", whitened, directions), lower=True, trans=1
    )
    return middle, directions.T, prepared.energy - jnp.sum(values[::-1] * chosen)


def _improved(
    structure: Structure,
    metric: Metric,
    first: Float[Array, "u w"],
    middle: Float[Array, "s w m"],
    last: Float[Array, "m d"] | None,
) -> Float[Array, "u w"]:
    """The first factor after some steps of conjugate gradients on its least squares problem.

    The preconditioner is the problem with the mean second moment over s in the place of G.
    """
    s, u = structure.middle_taps, len(first)
    wanted = metric.times_kernel
    # The rows of last are orthonormal: what is outside of them does not hang on the first factor.
    wanted = wanted if last is None else contract("pd,md->pm", wanted, last)

    def gradient(columns: Float[Array, "p m"]) -> Float[Array, "u w"]:
        return contract("sum,swm->uw", columns.reshape(s, u, -1), middle)

    def normal(candidate: Float[Array, "u w"]) -> Float[Array, "u w"]:
        kernel = contract("uw,swm->sum", candidate, middle)
        return gradient(metric.times(kernel.reshape(s * u, -1)))

    mean = _mean_over_taps(structure, metric.matrix, u)
    moments = contract("swm,svm->wv", middle, middle)
    right = jax.scipy.linalg.cho_factor(_jittered(moments, PRECONDITIONER_JITTER))
    left = (
        None
        if mean is None
        else jax.scipy.linalg.cho_factor(_jittered(mean, PRECONDITIONER_JITTER))
    )

    def preconditioned(residual: Float[Array, "u w"]) -> Float[Array, "u w"]:
        solved = jax.scipy.linalg.cho_solve(right, residual.T).T
        return solved if left is None else jax.scipy.linalg.cho_solve(left, solved)

    solution, _ = jax.scipy.sparse.linalg.cg(
        normal,
        gradient(wanted),
        x0=first,
        M=preconditioned,
        maxiter=CONJUGATE_GRADIENT_STEPS,
    )
    lengths = jnp.linalg.norm(solution, axis=0)
    return solution / jnp.where(lengths > 0, lengths, 1)


@partial(jax.jit, static_argnames=("structure", "width", "sweeps"))
def _split(
    structure: Structure,
    kernel: Float[Array, "p d"],
    matrix: Float[Array, "p p"] | None,
    ranks: Int[Array, " ranks"],
    width: int,
    sweeps: int,
) -> tuple[
    Float[Array, "u w"] | None, Float[Array, "q m"], Float[Array, "m d"] | None, Float[Array, ""]
]:
    metric = _metric(structure, kernel, matrix)
    if structure.first_axes is None:
        values, directions = jnp.linalg.eigh(
            contract("pd,pe->de", metric.kernel, metric.times_kernel)
        )
        last = directions[:, ::-1] * (jnp.arange(len(values)) < ranks[-1])
        error = jnp.sum(values) - jnp.sum(values[::-1] * (jnp.arange(len(values)) < ranks[-1]))
        return None, contract("pd,dm->pm", kernel, last), last.T, error
    s = structure.middle_taps
    used = (jnp.arange(width) < ranks[0]).astype(kernel.dtype)
    first = _ordered_first(structure, metric, width) * used
    middle, last, error = _cut(structure, _prepared(structure, metric, first, used), ranks)
    for _ in range(sweeps):
        by_tap = middle.reshape(width, s, -1).transpose(1, 0, 2)
        first = _improved(structure, metric, first, by_tap, last)
        middle, last, error = _cut(structure, _prepared(structure, metric, first, used), ranks)
    by_tap = middle.reshape(width, s, -1).transpose(1, 0, 2).reshape(s * width, -1)
    return first, by_tap, last, error


def split(
    structure: Structure,
    kernel: Float[Array, "p d"],
    ranks: tuple[int, ...],
    metric: Float[Array, "p p"] | None = None,
    sweeps: int = 0,
) -> tuple[Split, float]:
    """The factors at ``ranks`` and the objective they reach (see the module's docstring).

    Args:
        structure: Of the chain.
        kernel: W, the taps and input channels flattened in the order of the kernel's axes.
        ranks: One for each inner width of the chain.
        metric: G, symmetric positive definite; None for the identity.
        sweeps: How often the first factor is improved.

    Returns:
        The factors, with a bias of zeros, and ``tr (W - W')ᵀ G (W - W')``. In the dtype of
        ``kernel``.
    """
    width = _width(structure, ranks[0])
    first, middle, last, error = _split(
        structure, kernel, metric, np.asarray(ranks, np.int32), width, sweeps
    )
    # Cut on the host: jnp would compile once more for every rank.
    middle = np.asarray(middle)
    first, last = (None if p is None else np.asarray(p) for p in (first, last))
    if first is not None:
        first, middle = _at_rank(structure, first, middle, ranks[0])
    if last is not None:
        middle, last = middle[:, : ranks[-1]], last[: ranks[-1]]
    return Split(first, middle, last, np.zeros(structure.out_channels, middle.dtype)), float(error)


# First factors are computed this much wider at most, so that few ranks need code of their own.
WIDTH_STEP = 32


def _width(structure: Structure, rank: int) -> int:
    """The static width for a first factor of a rank."""
    if structure.first_axes is None:
        return 0
    return min(structure.order.shape[1], -(-rank // WIDTH_STEP) * WIDTH_STEP)


def _at_rank(
    structure: Structure,
    first: Float[np.ndarray, "u w"],
    middle: Float[np.ndarray, "q m"],
    rank: int,
) -> tuple[Float[np.ndarray, "u r"], Float[np.ndarray, "q m"]]:
    by_tap = middle.reshape(structure.middle_taps, first.shape[1], -1)[:, :rank]
    return first[:, :rank], by_tap.reshape(structure.middle_taps * rank, -1)


def split_first(
    structure: Structure,
    kernel: Float[Array, "p d"],
    ranks: tuple[int, ...],
    metric: Float[Array, "p p"],
    sweeps: int,
) -> Split:
    """The first factor of ``split``, and the best middle factor without a last one after it."""
    found, _ = split(structure, kernel, ranks, metric, sweeps)
    if found.first is None:
        return found._replace(middle=np.asarray(kernel), last=None)
    rank = found.first.shape[1]
    padding = _width(structure, rank) - rank
    first = np.pad(found.first, ((0, 0), (0, padding)))
    middle = np.asarray(_middle(structure, kernel, metric, jnp.asarray(first), np.int32(rank)))
    return found._replace(middle=_at_rank(structure, first, middle, rank)[1], last=None)


@partial(jax.jit, static_argnums=0)
def _middle(
    structure: Structure,
    kernel: Float[Array, "p d"],
    matrix: Float[Array, "p p"],
    first: Float[Array, "u w"],
    rank: Int[Array, ""],
) -> Float[Array, "q d"]:
    width = first.shape[1]
    used = (jnp.arange(width) < rank).astype(kernel.dtype)
    prepared = _prepared(structure, _metric(structure, kernel, matrix), first, used)
    whole = structure._replace(has_last=False)
    middle, _, _ = _cut(whole, prepared, rank[None])
    s = structure.middle_taps
    return middle.reshape(width, s, -1).transpose(1, 0, 2).reshape(s * width, -1)


class Cutter:
    """A kernel prepared once in a metric, to be cut to any number of ranks cheaply.

    Gives what ``split`` without sweeps gives, for all chains with the same first factor.

    Args:
        structure: Of any of these chains.
        kernel: As in ``split``.
        width: The largest first rank that will be asked for.
        metric: As in ``split``.
    """

    def __init__(
        self,
        structure: Structure,
        kernel: Float[Array, "p d"],
        width: int,
        metric: Float[Array, "p p"] | None = None,
    ):
        self.kernel = kernel
        self.metric = metric
        self.prepared = (
            None if structure.first_axes is None else _prepare_all(structure, kernel, metric, width)
        )

    def composed(self, structure: Structure, ranks: tuple[int, ...]) -> Float[Array, "p d"]:
        """The kernel W' that a chain computes at the ranks."""
        if self.prepared is None:
            factors, _ = split(structure, self.kernel, ranks, self.metric)
            assert factors.last is not None
            return jnp.asarray(factors.middle @ factors.last)
        return _composed(structure, self.prepared, np.asarray(ranks, np.int32))


@partial(jax.jit, static_argnames=("structure", "width"))
def _prepare_all(
    structure: Structure,
    kernel: Float[Array, "p d"],
    matrix: Float[Array, "p p"] | None,
    width: int,
) -> Prepared:
    metric = _metric(structure, kernel, matrix)
    first = _ordered_first(structure, metric, width)
    return _prepared(structure, metric, first, jnp.ones(width, kernel.dtype))


@partial(jax.jit, static_argnames="structure")
def _composed(
    structure: Structure, prepared: Prepared, ranks: Int[Array, " ranks"]
) -> Float[Array, "p d"]:
    middle, last, _ = _cut(structure, prepared, ranks)
    if last is not None:
        middle = contract("qm,md->qd", middle, last)
    s, width = structure.middle_taps, prepared.first.shape[1]
    kernel = contract("ur,rsd->sud", prepared.first, middle.reshape(width, s, -1))
    order = structure.order.reshape(-1)
    return (
        jnp.zeros_like(kernel.reshape(len(order), -1)).at[order].set(kernel.reshape(len(order), -1))
    )
