"""Solvers: a layer's responses and a rank in, a low-rank affine map of the responses out.

A solver is one file with one final ``Solver`` and one line in ``SOLVERS``. Solvers know arrays
only. Whether the reconstruction is symmetric or asymmetric is decided by what is fed to them as
``Responses.inputs``.
"""

from accel.solvers.activations import ACTIVATIONS, Activation
from accel.solvers.alternating import Alternating
from accel.solvers.base import (
    Factorization,
    ResponseError,
    Responses,
    Solver,
    SolverInfo,
    objective,
)
from accel.solvers.gradient import Gradient
from accel.solvers.pca import PCA
from accel.solvers.reduced_rank_regression import ReducedRankRegression
from accel.solvers.spectrum import response_spectrum

SOLVERS: dict[str, type[Solver]] = {
    "pca": PCA,
    "reduced_rank_regression": ReducedRankRegression,
    "alternating": Alternating,
    "gradient": Gradient,
}

__all__ = [
    "ACTIVATIONS",
    "PCA",
    "SOLVERS",
    "Activation",
    "Alternating",
    "Factorization",
    "Gradient",
    "ReducedRankRegression",
    "ResponseError",
    "Responses",
    "Solver",
    "SolverInfo",
    "objective",
    "response_spectrum",
]
