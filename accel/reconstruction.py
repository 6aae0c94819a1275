"""Reconstruction of one layer: from its kernel, patches and targets to the factors of its chain.

Three ways, from the cheapest to the best:

- ``weights``: the kernel alone is approximated; no image is looked at. The rivals of the method.
- ``responses``: the paper. The first factor is that of the kernel alone, everything after it is
  fitted by a solver to responses, through the nonlinearity. Zhang et al., arXiv:1505.06798,
  sections 3.1 to 3.3 and 3.5.
- ``joint``: all factors together. The best kernel for the patches that the layer now gets, with
  the original kernel as prior, is split in the metric of these patches; what its first factor lets
  through is then fitted to the targets by a solver, through the nonlinearity.

A dense layer has one row an image, where a convolution has many, and often more features than rows:
``joint`` lets the solver have the last word on it only where that proves better on rows that were
not fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from accel.decompositions import Decomposition, Split, Structure
from accel.decompositions.split import split, split_first
from accel.solvers import Activation, Responses, Solver
from accel.solvers.base import activate, arithmetic, widest_dtype
from accel.solvers.kernel_regression import KernelFit, fit_kernel

# How often the first factor of a joint fit is improved; what is gained after three is below 1 % of
# the error (measured on VGG-16 and on the bundled network).
SWEEPS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class LayerProblem:
    """One layer that is to be replaced by a chain.

    Attributes:
        conv: The convolution (a ``flax.nnx.Conv``).
        decomposition: The kind of chain.
        ranks: Its ranks.
        patches: What the layer sees at sampled positions, ``[n, p]``; p as in the kernel's axes.
        targets: The original network's responses there, ``[n, d]``.
        tuning: The rows that choose how strongly to regularise.
        activation: What follows the layer.
        solver: Fits the last factor.
    """

    conv: Any
    decomposition: Decomposition
    ranks: tuple[int, ...]
    patches: Float[np.ndarray, "n p"]
    targets: Float[np.ndarray, "n d"]
    tuning: Bool[np.ndarray, " n"]
    activation: Activation
    solver: Solver

    @property
    def structure(self) -> Structure:
        return self.decomposition.structure(self.conv)

    @property
    def kernel(self) -> Float[np.ndarray, "p d"]:
        """The original kernel as a matrix."""
        kernel = np.asarray(self.conv.kernel[...], np.float32)
        return kernel.reshape(-1, kernel.shape[-1])

    @property
    def bias(self) -> Float[np.ndarray, " d"]:
        if self.conv.bias is None:
            return np.zeros(self.conv.out_features, np.float32)
        return np.asarray(self.conv.bias[...], np.float32)


def from_weights(problem: LayerProblem) -> Split:
    """Factors that approximate the kernel; the bias is the original's."""
    return _data_free(problem)._replace(bias=problem.bias)


def from_responses(problem: LayerProblem) -> Split:
    """The first factor of the kernel, the others fitted to responses by the solver.

    Without a first factor the solver is given the responses of the original kernel, as in the
    paper.
    """
    structure, targets = problem.structure, problem.targets
    start = _data_free(problem)
    if start.first is None:
        fitted = problem.solver(
            Responses(problem.patches @ problem.kernel, targets),
            problem.ranks[-1],
            problem.activation,
        )
        reduce, expand, bias = (np.asarray(factor) for factor in fitted[:3])
        return Split(None, problem.kernel @ reduce.T, expand.T, bias)
    features = start.features(structure, problem.patches)
    rank = problem.ranks[-1] if structure.has_last else structure.out_channels
    fitted = problem.solver(Responses(features, targets), rank, problem.activation)
    reduce, expand, bias = (np.asarray(factor) for factor in fitted[:3])
    if structure.has_last:
        return Split(start.first, reduce.T, expand.T, bias)
    return Split(start.first, reduce.T @ expand.T, None, bias)


def joint(problem: LayerProblem) -> Split:
    """All factors fitted to the patches and targets together (see the module's docstring).

    The solver is given what the best kernel answers through the first factor at its rank: the best
    linear estimate of the targets, as wide as they are, in the place of the paper's responses of
    the original kernel.
    """
    if problem.decomposition.dense:
        return _joint_dense(problem)
    structure = problem.structure
    with arithmetic(widest_dtype()):
        best = fit_kernel(problem.patches, problem.targets, problem.kernel, problem.tuning)
        start = split_first(structure, best.kernel, problem.ranks, best.metric, SWEEPS).rounded()
    features = start.features(structure, problem.patches)
    rank = problem.ranks[-1] if structure.has_last else structure.out_channels
    fitted = problem.solver(
        Responses(features @ start.middle, problem.targets), rank, problem.activation
    )
    reduce, expand, bias = (np.asarray(factor) for factor in fitted[:3])
    middle = start.middle @ reduce.T
    if structure.has_last:
        return Split(start.first, middle, expand.T, bias)
    return Split(start.first, middle @ expand.T, None, bias)


RECONSTRUCTIONS: dict[str, Callable[[LayerProblem], Split]] = {
    "weights": from_weights,
    "responses": from_responses,
    "joint": joint,
}


def _data_free(problem: LayerProblem) -> Split:
    with arithmetic(widest_dtype()):
        dtype = jnp.dtype(widest_dtype())
        found, _ = split(problem.structure, jnp.asarray(problem.kernel, dtype), problem.ranks)
        return found.rounded()


def _joint_dense(problem: LayerProblem) -> Split:
    """``joint`` of a dense layer: cut in the metric, or also fitted by the solver.

    Both are tried on the rows that are not for tuning; the one whose activations are closer on the
    others is then fitted to all rows.
    """
    tuning = problem.tuning
    with arithmetic(widest_dtype()):
        best = fit_kernel(problem.patches, problem.targets, problem.kernel, tuning)
        if tuning.all() or not tuning.any():
            return _cut_in_metric(problem, best)
        part = dataclasses.replace(
            problem,
            patches=problem.patches[~tuning],
            targets=problem.targets[~tuning],
            tuning=tuning[~tuning],
        )
        fit = fit_kernel(part.patches, part.targets, part.kernel, part.tuning, (best.ridge,))
    wanted = activate(jnp.asarray(problem.targets[tuning]), problem.activation)

    def error(way: Callable[[LayerProblem, KernelFit], Split]) -> float:
        given = way(part, fit)(part.structure, problem.patches[tuning])
        return float(jnp.sum(jnp.square(activate(jnp.asarray(given), problem.activation) - wanted)))

    return min((_cut_in_metric, _fitted_by_solver), key=error)(problem, best)


def _cut_in_metric(problem: LayerProblem, fit: KernelFit) -> Split:
    """The best kernel at the rank, by reduced-rank regression with the kernel as prior."""
    with arithmetic(widest_dtype()):
        found, _ = split(problem.structure, fit.kernel, problem.ranks, fit.metric)
    mean = np.asarray(fit.patch_mean)
    inner = found(problem.structure, mean[None])[0]
    return found._replace(bias=np.asarray(fit.target_mean) - inner).rounded()


def _fitted_by_solver(problem: LayerProblem, fit: KernelFit) -> Split:
    """The solver's factors for the answers of the best kernel."""
    kernel = np.asarray(fit.kernel, np.float32)
    fitted = problem.solver(
        Responses(problem.patches @ kernel, problem.targets), problem.ranks[-1], problem.activation
    )
    reduce, expand, bias = (np.asarray(factor) for factor in fitted[:3])
    return Split(None, kernel @ reduce.T, expand.T, bias)
