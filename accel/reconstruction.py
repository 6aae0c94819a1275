"""Reconstruction of one layer: from its kernel, patches and targets to the factors of its chain.

Three ways, from the cheapest to the best:

- ``weights``: the kernel alone is approximated; no image is looked at. The rivals of the method.
- ``responses``: the paper. The first factor is that of the kernel alone, everything after it is
  fitted by a solver to responses, through the nonlinearity. Zhang et al., arXiv:1505.06798,
  sections 3.1 to 3.3 and 3.5.
- ``joint``: all factors together. The best kernel for the patches that the layer now gets, with
  the original kernel as prior, is split in the metric of these patches and of the network's outputs
  (``accel.sensitivity``); what its first factor and the middle one, still as wide as the layer,
  make of a patch is then mapped to the targets, at the rank, through the nonlinearity, by turns as
  the solver says and with the same prior.
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
from accel.sensitivity import Sensitivity, whitening
from accel.solvers import Activation, Responses, Solver
from accel.solvers.base import arithmetic, widest_dtype
from accel.solvers.kernel_regression import fit_kernel
from accel.solvers.prior_alternating import Prior, fit_ending

# How often the first factor of a joint fit is improved; what is gained after three is below 1 % of
# the error (measured on VGG-16 and on the bundled network).
SWEEPS = 3
# How strong the prior of the fit through the nonlinearity is, as a share of the linear fit's, which
# has p/k times as many numbers to find.
PRIOR_SHARE = 0.1


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
        solver: Fits the last factor, or says how it is fitted.
        sensitivity: How errors of the responses count at the network's outputs; None where every
            direction counts alike.
    """

    conv: Any
    decomposition: Decomposition
    ranks: tuple[int, ...]
    patches: Float[np.ndarray, "n p"]
    targets: Float[np.ndarray, "n d"]
    tuning: Bool[np.ndarray, " n"]
    activation: Activation
    solver: Solver
    sensitivity: Sensitivity | None = None

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
    """All factors fitted to the patches and targets together (see the module's docstring)."""
    structure, sensitivity = problem.structure, problem.sensitivity
    width = structure.out_channels
    whiten, unwhiten = whitening(np.eye(width) if sensitivity is None else sensitivity.responses)
    with arithmetic(widest_dtype()):
        best = fit_kernel(problem.patches, problem.targets, problem.kernel, problem.tuning)
        whitened = jnp.asarray(best.kernel @ whiten)
        start = split_first(structure, whitened, problem.ranks, best.metric, SWEEPS)
        # Without a first factor, split_first returns the kernel as it was given.
        start = start._replace(middle=start.middle @ unwhiten)
        begun = start.kernel(structure)
        penalty = PRIOR_SHARE * np.asarray(best.penalty)[:, None]
        prior = Prior(begun.T @ (penalty * begun), begun.T @ (penalty * problem.kernel))
        start = start.rounded()
        inputs = start.features(structure, problem.patches) @ start.middle
        mean = inputs.mean(0, dtype=np.float64).astype(np.float32)
        ending = fit_ending(
            inputs - mean,
            problem.targets,
            prior,
            problem.ranks[-1] if structure.has_last else None,
            whiten,
            unwhiten,
            problem.solver.penalties,
            problem.activation,
        )
    bias = ending.bias - mean @ ending.matrix
    return Split(start.first, start.middle @ ending.left, ending.right, bias).rounded()


JOINT = "joint"
RECONSTRUCTIONS: dict[str, Callable[[LayerProblem], Split]] = {
    "weights": from_weights,
    "responses": from_responses,
    JOINT: joint,
}


def _data_free(problem: LayerProblem) -> Split:
    with arithmetic(widest_dtype()):
        dtype = jnp.dtype(widest_dtype())
        found, _ = split(problem.structure, jnp.asarray(problem.kernel, dtype), problem.ranks)
        return found.rounded()
