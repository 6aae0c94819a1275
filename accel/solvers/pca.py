"""Principal component analysis: ``min_M Σ‖(y - ȳ) - M (y - ȳ)‖²``, rank M ≤ r.

M = U Uᵀ with U the r leading eigenvectors of the covariance of y. Zhang et al., arXiv:1505.06798,
section 3.1 (equation 3).
"""

from __future__ import annotations

import dataclasses
from typing import final

from jaxtyping import Array, Float, Int

from accel.solvers.activations import Activation
from accel.solvers.base import Factors, Solver
from accel.solvers.linear_algebra import centre, contract, leading_columns, principal_directions


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PCA(Solver):
    """Projects on the r principal directions of the targets: ``ŷ' = U Uᵀ (ŷ - mean ŷ) + ȳ``.

    Optimal among the linear solutions where inputs and targets are the same. It ignores the
    activation and how the inputs differ from the targets but for their means. At full rank it
    changes no response by more than the difference of the means, on whatever rows.

    Raises (when called):
        ValueError: If inputs and targets differ in their number of channels.
    """

    def candidates(
        self,
        inputs: Float[Array, "n d"],
        targets: Float[Array, "n d"],
        rank: Int[Array, ""],
        activation: Activation,
        rounding: float,
    ) -> tuple[Factors, ...]:
        del activation, rounding
        if inputs.shape != targets.shape:
            raise ValueError(
                "PCA projects responses within one layer: inputs and targets must have the same"
                f" channels, found {inputs.shape[1]} and {targets.shape[1]}"
            )
        centred, mean = centre(targets)
        U = leading_columns(principal_directions(centred), rank)
        _, input_mean = centre(inputs)
        bias = mean - contract("dr,er,e->d", U, U, input_mean)
        return (Factors(reduce=U.T, expand=U, bias=bias),)
