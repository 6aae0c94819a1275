"""Error against cost of every chain that could replace a layer, measured on images.

For each layer, kind of chain and a few ranks from cheap to dear, the kernel is split in the metric
of the patches that the layer sees in the original network, and the relative error of its
activations (after the nonlinearity) is measured on other images; between these ranks it is
interpolated. How much of such an error arrives at the network's output is measured too, once a
layer, by putting one chain in its place and running the rest of the network.

One walk through the original network over some images; no chain is fitted to the accelerated one,
so that one set of curves serves every budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from accel.decompositions import Decomposition, Structure
from accel.decompositions.split import Cutter, split
from accel.images import ArraySource
from accel.program import LayerCall, Program, specification
from accel.progress import Progress
from accel.rank_selection import Candidate
from accel.rewrite import Chain, chain_for
from accel.runs import AcceleratedRun, sample_positions
from accel.solvers.base import Activation, activate, arithmetic, widest_dtype
from accel.solvers.kernel_regression import fit_kernel

# Costs at which errors are measured, as shares of the layer's own.
SHARES = (0.04, 0.08, 0.14, 0.22, 0.33, 0.5, 0.7, 0.95)
# The share at which a chain stands in the network to see what arrives at the output.
PROBED_SHARE = 0.25
# The original kernel is the best one for its own patches; this only keeps directions that were not
# seen from being free.
RIDGE = 1e-2
# No layer has more patches than this taken; 4,608 of them already span those of 512 channels.
ROWS = 12_000
IMAGES = 256
PROBED_IMAGES = 32
LEAST_ERROR = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorCurve:
    """What one layer can be replaced by.

    Attributes:
        candidates: The chains, every rank of every kind that is cheaper than the layer.
        macs: MACs per image of each.
        errors: Σ‖r(y) - r(y')‖²/Σ‖r(y)‖² of each, on images that the split was not made from.
        weight: Relative squared error of the network's outputs over that of the layer.
    """

    candidates: tuple[Candidate, ...]
    macs: np.ndarray
    errors: Float64[np.ndarray, " k"]
    weight: float


def spatial_sizes(call: LayerCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial size of what a convolution is given and of what it returns."""
    return specification(call.input).shape[1:-1], specification(call.output).shape[1:-1]


def rank_macs(call: LayerCall, decomposition: Decomposition) -> np.ndarray:
    """MACs per image of a layer's chain at the ranks 1 … largest."""
    return np.array(
        [
            decomposition.macs(
                call.layer, decomposition.ranks(call.layer, rank), *spatial_sizes(call)
            )
            for rank in range(1, decomposition.largest_rank(call.layer) + 1)
        ],
        np.int64,
    )


def measure_error_curves(
    program: Program,
    calls: Sequence[LayerCall],
    decompositions: Sequence[Decomposition],
    images: np.ndarray,
    macs: Mapping[str, int],
    *,
    batch_size: int,
    cache_bytes: int,
    seed: int,
    progress: Progress,
) -> dict[str, ErrorCurve]:
    """The curves of all layers by path (see the module's docstring).

    Args:
        program: The original network.
        calls: Its layers that can be replaced, in order of execution.
        decompositions: The kinds of chain to choose from.
        images: Images to measure on, ``[images, …]``; a fifth of them only for measuring.
        macs: MACs per image of every layer as it is, by path.
        batch_size: The batch size that the program was traced for.
        cache_bytes: How much may be kept on the host between two layers.
        seed: Seed of the positions.
        progress: Receives what is being done.
    """
    key = jax.random.key(seed)
    per_image = math.ceil(ROWS / len(images))
    run = AcceleratedRun(program, calls, ArraySource(images), batch_size, cache_bytes)
    probed = max(1, PROBED_IMAGES // batch_size)
    measured = np.arange(len(images)) % 5 == 0
    curves: dict[str, ErrorCurve] = {}
    original: list[list[np.ndarray]] | None = None
    for index, call in enumerate(calls, start=1):
        progress.begin(f"errors of {index}/{len(calls)} {call.path}", len(images))
        positions = sample_positions(key, call, len(images), batch_size, per_image)
        patches = run.patches(positions, progress.advance)
        if original is None:
            original = run.outputs(call.layer, probed)
        with arithmetic(widest_dtype()):
            found = _layer_curves(call, decompositions, patches, measured, macs[call.path])
        if found is None:
            curves[call.path] = ErrorCurve((), np.zeros(0, np.int64), np.zeros(0), 0.0)
            run.keep()
            continue
        curve, module, error = found
        outputs = run.outputs(module, probed)
        run.keep()
        seen = _relative_error(outputs, original)
        curves[call.path] = dataclasses.replace(curve, weight=seen / max(error, LEAST_ERROR))
    return curves


def _layer_curves(
    call: LayerCall,
    decompositions: Sequence[Decomposition],
    patches: np.ndarray,
    measured: np.ndarray,
    dense_macs: int,
) -> tuple[ErrorCurve, Chain, float] | None:
    """The curve of a layer, still without weight, and a chain with its error for the probe.

    None where no chain is cheaper than the layer.
    """
    kernel = np.asarray(call.layer.kernel[...], np.float32)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    bias = np.zeros(len(kernel.T), np.float32) if call.layer.bias is None else call.layer.bias[...]
    rows = patches[~measured].reshape(-1, patches.shape[-1])
    fit = fit_kernel(rows, rows @ kernel, kernel, np.zeros(len(rows), bool), ridges=(RIDGE,))
    kernel64 = jnp.asarray(kernel, fit.metric.dtype)
    held = jnp.asarray(patches[measured].reshape(-1, patches.shape[-1]))
    mean = fit.patch_mean.astype(jnp.float32)
    candidates: list[Candidate] = []
    costs, errors = [], []
    probe: tuple[float, Decomposition, int] | None = None
    cutters: dict[tuple[int, ...] | None, Cutter] = {}
    for decomposition in decompositions:
        if decomposition.unsuitable(call.layer) is not None:
            continue
        structure = decomposition.structure(call.layer)
        macs = rank_macs(call, decomposition)
        largest = int(np.searchsorted(macs, dense_macs))
        if largest < 1:
            continue
        cutter = cutters.get(structure.first_axes)
        if cutter is None:
            width = _widest_first(call, decompositions, structure, dense_macs)
            cutter = Cutter(structure, kernel64, width, fit.metric)
            cutters[structure.first_axes] = cutter
        ranks = sorted(
            {
                min(max(1, int(np.searchsorted(macs, share * dense_macs))), largest)
                for share in SHARES
            }
        )
        found = [
            float(
                _error(
                    held, kernel, mean, jnp.asarray(bias),
                    cutter.composed(structure, decomposition.ranks(call.layer, rank)),
                    call.activation,
                )
            )
            for rank in ranks
        ]  # fmt: skip
        # A dearer chain of the same kind can do all that a cheaper one can.
        found = np.maximum(np.minimum.accumulate(found), LEAST_ERROR)
        every = np.arange(ranks[0], ranks[-1] + 1)
        candidates += [
            Candidate(decomposition.name, decomposition.ranks(call.layer, int(r))) for r in every
        ]
        costs.append(macs[every - 1])
        errors.append(np.exp(np.interp(every, ranks, np.log(found))))
        near = int(np.argmin(np.abs(macs[np.array(ranks) - 1] - PROBED_SHARE * dense_macs)))
        if probe is None or found[near] < probe[0]:
            probe = (float(found[near]), decomposition, ranks[near])
    if probe is None:
        return None
    error, decomposition, rank = probe
    ranks = decomposition.ranks(call.layer, rank)
    chain, _ = split(decomposition.structure(call.layer), kernel64, ranks, fit.metric)
    patch_mean = np.asarray(fit.patch_mean)
    inner = chain(decomposition.structure(call.layer), patch_mean[None])[0]
    chain = chain._replace(bias=patch_mean @ kernel + np.asarray(bias) - inner).rounded()
    module = chain_for(
        call.layer,
        decomposition.factors(call.layer, *ranks),
        decomposition.weights(call.layer, ranks, chain),
    )
    curve = ErrorCurve(tuple(candidates), np.concatenate(costs), np.concatenate(errors), 1.0)
    return curve, module, error


def _widest_first(
    call: LayerCall,
    decompositions: Sequence[Decomposition],
    structure: Structure,
    dense_macs: int,
) -> int:
    """The largest rank of a first factor in the chains that are cheaper than the layer."""
    widest = 1
    for decomposition in decompositions:
        if decomposition.structure(call.layer).first_axes != structure.first_axes:
            continue
        largest = int(np.searchsorted(rank_macs(call, decomposition), dense_macs))
        if largest:
            widest = max(widest, decomposition.ranks(call.layer, largest)[0])
    return widest


@jax.jit
def _activations(patches, kernel, bias):
    return patches @ kernel + bias


def _error(patches, kernel, mean, bias, composed, activation: Activation) -> float:
    """Relative error of activations; the bias of the chain keeps the mean response."""
    composed = composed.astype(jnp.float32)
    wanted = activate(_activations(patches, kernel, bias), activation)
    given = activate(_activations(patches, composed, bias + mean @ (kernel - composed)), activation)
    energy = float(jnp.sum(jnp.square(wanted)))
    return float(jnp.sum(jnp.square(wanted - given))) / energy if energy > 0 else 0.0


def _relative_error(found: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> float:
    pairs = [
        (a.astype(np.float64), b.astype(np.float64))
        for batch, other in zip(found, wanted, strict=True)
        for a, b in zip(batch, other, strict=True)
    ]
    energy = sum(float(np.sum(b * b)) for _, b in pairs)
    return sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / energy if energy > 0 else 0.0
