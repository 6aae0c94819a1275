"""Data-free ``tucker2`` against tensorly's partial Tucker decomposition of the same kernel."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from accel.decompositions import DECOMPOSITIONS, composed
from accel.decompositions.split import split

with warnings.catch_warnings():
    # Of the library's own import alone: what it imports deprecated is not this project's code.
    warnings.simplefilter("ignore")
    import tensorly
    from tensorly.decomposition import partial_tucker

# The error of a higher-order singular value decomposition over N modes, sequentially truncated or
# not, is at most √N that of the optimum (Vannieuwenhoven et al., 2012, theorem 6.5): squared, N.
MODES = 2


def kernel_of(seed: int) -> np.ndarray:
    """A kernel whose singular values fall, along both channel axes, as those of trained ones do."""
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((3, 3, 12, 16))
    mix = [random.standard_normal((n, n)) * 0.75 ** np.arange(n) for n in (12, 16)]
    return np.einsum("ijcd,ec,fd->ijef", kernel, *mix)


def tensorly_errors(kernel: np.ndarray, ranks: tuple[int, int]) -> tuple[float, float]:
    """Squared errors of the truncated HOSVD and of HOOI (alternating least squares from there)."""
    found = []
    for iterations in (0, 200):
        (core, factors), _ = partial_tucker(
            tensorly.tensor(kernel), ranks, modes=[2, 3], n_iter_max=iterations, tol=1e-12,
            init="svd",
        )  # fmt: skip
        approximation = tensorly.tenalg.multi_mode_dot(core, factors, modes=[2, 3])
        found.append(float(np.sum((np.asarray(approximation) - kernel) ** 2)))
    return found[0], found[1]


@pytest.mark.parametrize("ranks", [(2, 3), (4, 4), (6, 10), (11, 15)])
@pytest.mark.parametrize("seed", range(3))
def test_tucker2_is_as_near_as_tensorlys(ranks, seed):
    kernel = kernel_of(seed)
    conv = nnx.Conv(12, 16, (3, 3), rngs=nnx.Rngs(0))
    decomposition = DECOMPOSITIONS["tucker2"]
    with jax.enable_x64(True):
        found, _ = split(decomposition.structure(conv), jnp.asarray(kernel.reshape(-1, 16)), ranks)
        ours = composed(decomposition.weights(conv, ranks, found))
    assert ours.dtype == np.float64
    error = float(np.sum((ours - kernel) ** 2))
    hosvd, optimum = tensorly_errors(kernel, ranks)
    tail = [
        float(np.sum(np.linalg.svd(unfolded, compute_uv=False)[rank:] ** 2))
        for unfolded, rank in (
            (kernel.transpose(2, 0, 1, 3).reshape(12, -1), ranks[0]),
            (kernel.reshape(-1, 16), ranks[1]),
        )
    ]
    rounding = 1e-9 * float(np.sum(kernel**2))
    # The same first factor, and then the best last one for what it lets through: never worse.
    assert error <= hosvd + rounding
    assert error == pytest.approx(hosvd, rel=0.02)
    # HOOI ends in a local optimum below where it started; nothing is below the larger tail.
    assert max(tail) - rounding <= optimum <= error + rounding
    assert error <= MODES * optimum + rounding
    assert error <= sum(tail) + rounding


def test_at_full_rank_both_are_the_kernel():
    hosvd, optimum = tensorly_errors(kernel_of(0), (12, 16))
    assert max(hosvd, optimum) < 1e-20 * np.sum(kernel_of(0) ** 2)
