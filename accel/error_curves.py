"""Error against cost of every chain that could replace a layer, measured on images.

For each layer, kind of chain, balance of its two ranks where it has several, and a few ranks from
cheap to dear, the kernel is split in the metric of the patches that the layer sees in the original
network and of the outputs that hang on its responses (``accel.sensitivity``). On other images the
error of the activations, after the nonlinearity, is measured in the metric of the outputs: it is
the relative squared error that the chain would cause there, to first order, if errors at different
positions had nothing to do with each other. Between these ranks it is interpolated.

They have, in some layers more than in others: what a chain leaves out is missing wherever it would
be seen. So with one chain of each kind the network is run on (``accel.output_errors``), and the
errors of that kind are scaled by what the outputs really lost, over what was predicted, to the
power ``EFFECT``: layers behind are fitted to what they get, and make good a part of what hangs
together. The errors of all layers are in one unit, in which they are added up.

No chain is fitted to the accelerated network, so that one set of curves serves every budget: it
takes one walk through the original, which runs on from each layer over a few images for each kind.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from accel.decompositions import Decomposition, Structure
from accel.decompositions.base import kernel_size
from accel.decompositions.split import Cutter
from accel.images import ArraySource, spread
from accel.interpreter import specification
from accel.output_errors import OtherWeights, OutputErrors
from accel.plan import LayerPlan
from accel.program import LayerCall, Program
from accel.progress import Progress
from accel.rank_selection import Candidate
from accel.runs import AcceleratedRun, sample_positions
from accel.sensitivity import Sensitivity, whitening
from accel.solvers.activations import Activation, activate
from accel.solvers.base import arithmetic, widest_dtype
from accel.solvers.kernel_regression import fit_kernel
from accel.solvers.linear_algebra import contract

# Costs at which errors are measured, as shares of the layer's own; and at the ends.
SHARES = (0.04, 0.08, 0.14, 0.22, 0.33, 0.5, 0.7)
# The original kernel is the best one for its own patches; this only keeps directions that were not
# seen from being free.
RIDGE = 1e-2
# No layer has more patches than this taken; 4,608 of them already span those of 512 channels.
ROWS = 12_000
IMAGES = 256
LEAST_ERROR = 1e-12
# The chain that is tried in the network is the one whose predicted error is closest to this, about
# what a layer is left with in a network 3 to 5 times cheaper.
TRIED_ERROR = 0.002
TRIED_IMAGES = 16
# At 3×, on held-out calibration pictures of the real VGG-16, the error of the network was 0.0294
# with 0, 0.0260 with 0.5, 0.0279 with 1: in a trial with one scale a layer, not one for each kind.
EFFECT = 0.5
# No effect counts as more times what was predicted, or fewer: 23 was the most on the real VGG-16.
MOST = 100.0


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorCurve:
    """What one layer can be replaced by.

    Attributes:
        candidates: The chains, of every kind every rank that is cheaper than the layer, at each of
            its balances.
        macs: MACs per image of each.
        errors: Relative squared error at the network's outputs that each is counted with, on images
            that the split was not made from (see the module's docstring).
    """

    candidates: tuple[Candidate, ...]
    macs: np.ndarray
    errors: Float64[np.ndarray, " k"]

    def chosen(self, kept: Sequence[bool]) -> ErrorCurve:
        """The curve of some of the candidates: those whose place in ``kept`` is True."""
        return ErrorCurve(
            tuple(itertools.compress(self.candidates, kept)),
            self.macs[np.flatnonzero(kept)],
            self.errors[np.flatnonzero(kept)],
        )

    def of(self, layer: LayerPlan) -> float:
        """The error that a layer causes with what a plan makes of it: 0 where it stays as it is.

        Raises:
            ValueError: If the plan's chain is none of the candidates.
        """
        if layer.decomposition is None:
            return 0.0
        return float(
            self.errors[self.candidates.index(Candidate(layer.decomposition, layer.ranks))]
        )


def spatial_sizes(call: LayerCall) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spatial size of what a convolution is given and of what it returns.

    Of a dense layer, what is between the batch and the features.
    """
    axes = len(kernel_size(call.layer))
    first = -1 - axes if axes else 1
    return specification(call.input).shape[first:-1], specification(call.output).shape[first:-1]


def macs_of(call: LayerCall, decomposition: Decomposition, ranks: Sequence[int]) -> int:
    """MACs per image of a layer's chain."""
    axes = len(kernel_size(call.layer))
    # Axes between the batch and the spatial ones: the layer is applied to each of them.
    others = specification(call.output).shape[1 : -1 - axes] if axes else ()
    times = call.rows_per_image * math.prod(others)
    return times * decomposition.macs(call.layer, ranks, *spatial_sizes(call))


def rank_macs(call: LayerCall, decomposition: Decomposition) -> np.ndarray:
    """MACs per image of a layer's chain at the ranks 1 … largest."""
    return np.array(
        [
            macs_of(call, decomposition, decomposition.ranks(call.layer, rank))
            for rank in range(1, decomposition.largest_rank(call.layer) + 1)
        ],
        np.int64,
    )


def check_rank_multiple(rank_multiple: int) -> None:
    """Raises ValueError where that is not a whole number of 1 or more."""
    if not isinstance(rank_multiple, int) or rank_multiple < 1:
        raise ValueError(f"rank_multiple is a whole number, 1 or more, found {rank_multiple}")


def cheaper_chains(
    call: LayerCall, decomposition: Decomposition, dense_macs: int, multiple: int = 1
) -> Iterator[list[tuple[int, ...]]]:
    """Ranks of the chains of one kind that are cheaper than a layer: a list for each balance.

    Ranks are rounded to multiples of ``multiple``. In each list MACs ascend; there is none where no
    chain is cheaper.
    """
    conv = call.layer
    most = decomposition.ranks(conv, decomposition.largest_rank(conv))
    for balance in decomposition.balances:
        # The second rank over the first, both as far from those of the decomposition's own line.
        scales = (1.0,) if len(most) == 1 else (balance**-0.5, balance**0.5)
        lines = (
            tuple(
                min(max(1, round(scale * rank / multiple)), largest // multiple) * multiple
                for scale, rank, largest in zip(
                    scales, decomposition.ranks(conv, together), most, strict=True
                )
            )
            for together in range(1, decomposition.largest_rank(conv) + 1)
        )
        chains = [
            ranks
            for ranks in dict.fromkeys(lines)
            if min(ranks) > 0 and macs_of(call, decomposition, ranks) < dense_macs
        ]
        if chains:
            yield chains


def measure_error_curves(
    program: Program,
    calls: Sequence[LayerCall],
    decompositions: Sequence[Decomposition],
    images: np.ndarray,
    macs: Mapping[str, int],
    sensitivity: Mapping[str, Sensitivity],
    *,
    rank_multiple: int,
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
        sensitivity: From ``measure_sensitivity``, by path.
        rank_multiple: Chains with ranks rounded to multiples of this are measured, too.
        batch_size: The batch size that the program was traced for.
        cache_bytes: How much may be kept on the host between two layers.
        seed: Seed of the positions.
        progress: Receives what is being done.
    """
    key = jax.random.key(seed)
    per_image = math.ceil(ROWS / len(images))
    measured = np.arange(len(images)) % 5 == 0
    # Those that chains are tried on in front, where they fill batches of their own.
    tried_on = spread(np.flatnonzero(measured), max(TRIED_IMAGES, batch_size))
    order = np.append(tried_on, np.setdiff1d(np.arange(len(images)), tried_on))
    images, measured = images[order], measured[order]
    run = AcceleratedRun(program, calls, ArraySource(images), batch_size, cache_bytes)
    output_errors = OutputErrors(program, calls, batch_size)
    curves: dict[str, ErrorCurve] = {}
    for index, call in enumerate(calls):
        progress.begin(f"errors of {index + 1}/{len(calls)} {call.path}", len(images))
        positions = sample_positions(key, call, len(images), batch_size, per_image)
        patches = run.patches(positions, progress.advance)
        with arithmetic(widest_dtype()):
            lines, tries = _layer_lines(
                call,
                decompositions,
                patches[~measured].reshape(-1, patches.shape[-1]),
                patches[measured].reshape(-1, patches.shape[-1]),
                sensitivity[call.path],
                macs[call.path],
                rank_multiple,
            )
        scales: dict[str, float] = {}
        if tries:
            batches = list(run.values(math.ceil(len(tried_on) / batch_size)))
            others = [tried.weights for tried in tries.values()]
            effects = output_errors(index, batches, len(tried_on), others)
            for (kind, tried), effect in zip(tries.items(), effects.tolist(), strict=True):
                scales[kind] = _scale(effect, tried.error)
        run.keep()
        curves[call.path] = _curve(lines, scales)
    return curves


def _scale(effect: float, predicted: float) -> float:
    """What errors of a kind are scaled by, of which one was predicted and had that effect.

    As far as either is too small to tell anything, by 1. NaN or Inf at the outputs is the worst.
    """
    if predicted <= LEAST_ERROR or effect <= LEAST_ERROR:
        return 1.0
    ratio = effect / predicted if math.isfinite(effect) else math.inf
    return min(max(ratio, 1 / MOST), MOST) ** EFFECT


@dataclasses.dataclass(frozen=True, eq=False)
class _Line:
    """Chains of one kind whose ranks grow together, from the cheapest to the dearest.

    Attributes:
        decomposition: Their kind.
        chains: Their ranks.
        macs: MACs per image of each.
        places: Which of them were measured.
        errors: The errors of these, predicted.
    """

    decomposition: str
    chains: list[tuple[int, ...]]
    macs: list[int]
    places: list[int]
    errors: Float64[np.ndarray, " places"]


class _Try(NamedTuple):
    """What the network is run with: weights of a chain, and the error that is predicted of it."""

    weights: OtherWeights
    error: float


def _layer_lines(
    call: LayerCall,
    decompositions: Sequence[Decomposition],
    patches: Float[np.ndarray, "n p"],
    held_out: Float[np.ndarray, "m p"],
    sensitivity: Sensitivity,
    dense_macs: int,
    rank_multiple: int,
) -> tuple[list[_Line], dict[str, _Try]]:
    """The chains of a layer, measured, and one of each kind to be tried in the network.

    Both are empty where no chain is cheaper than the layer.
    """
    kernel = np.asarray(call.layer.kernel[...], np.float32)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    unchosen = np.zeros(len(patches), bool)
    fit = fit_kernel(patches, patches @ kernel, kernel, unchosen, ridges=(RIDGE,))
    whiten, unwhiten = whitening(sensitivity.responses)
    whitened, back = (jnp.asarray(m, fit.metric.dtype) for m in (kernel @ whiten, unwhiten))
    bias = 0 if call.layer.bias is None else np.asarray(call.layer.bias[...], np.float32)
    responses = held_out @ kernel + bias
    mean = np.asarray(fit.patch_mean, np.float32)
    held_out = held_out - mean
    cutters: dict[tuple[int, ...] | None, Cutter] = {}

    def change(structure: Structure, ranks: tuple[int, ...]) -> Float[Array, "p d"]:
        """What a chain takes away from the kernel."""
        axes = structure.first_axes
        if axes not in cutters:
            width = _widest_first(call, decompositions, structure, dense_macs)
            cutters[axes] = Cutter(structure, whitened, width, fit.metric)
        whitened_change = whitened - cutters[axes].composed(structure, ranks)
        return contract("pd,de->pe", whitened_change, back).astype(jnp.float32)

    def error(structure: Structure, ranks: tuple[int, ...]) -> float:
        taken, seen = change(structure, ranks), sensitivity.activations
        return float(_output_error(held_out, responses, taken, seen, call.activation))

    def weights(structure: Structure, ranks: tuple[int, ...]) -> OtherWeights:
        taken = np.asarray(change(structure, ranks))
        return OtherWeights(kernel - taken, mean @ taken)

    lines: list[_Line] = []
    tries: dict[str, _Try] = {}
    for decomposition in decompositions:
        if decomposition.unsuitable(call.layer) is not None:
            continue
        structure = decomposition.structure(call.layer)
        known: set[tuple[int, ...]] = set()
        for multiple in sorted({1, rank_multiple}):
            for chains in cheaper_chains(call, decomposition, dense_macs, multiple):
                if known.issuperset(chains):
                    continue
                known.update(chains)
                macs = [macs_of(call, decomposition, ranks) for ranks in chains]
                places = _measured_places(macs, dense_macs)
                found = np.array([error(structure, chains[place]) for place in places])
                # A dearer chain of the same kind can do all that a cheaper one can.
                found = np.maximum(np.minimum.accumulate(found), LEAST_ERROR)
                lines.append(_Line(decomposition.name, chains, macs, places, found))
                if decomposition.name not in tries:
                    at = int(np.argmin(np.abs(np.log(found / TRIED_ERROR))))
                    tried = weights(structure, chains[places[at]])
                    tries[decomposition.name] = _Try(tried, float(found[at]))
    return lines, tries


def _curve(lines: Sequence[_Line], scales: Mapping[str, float]) -> ErrorCurve:
    """The curve of a layer, from its lines and what the errors of each kind are scaled by."""
    errors: dict[Candidate, float] = {}
    costs: dict[Candidate, int] = {}
    for line in lines:
        found = np.log(scales[line.decomposition] * line.errors)
        every = np.exp(np.interp(range(len(line.chains)), line.places, found))
        for ranks, cost, loss in zip(line.chains, line.macs, every.tolist(), strict=True):
            candidate = Candidate(line.decomposition, ranks)
            # Those that are in several lists come from the first.
            errors.setdefault(candidate, loss)
            costs[candidate] = cost
    return ErrorCurve(
        tuple(errors), np.array(list(costs.values()), np.int64), np.array(list(errors.values()))
    )


def _measured_places(macs: Sequence[int], dense_macs: int) -> list[int]:
    """Which of some chains, by ascending MACs, are measured."""
    last = len(macs) - 1
    shares = (max(0, int(np.searchsorted(macs, share * dense_macs)) - 1) for share in SHARES)
    return sorted({0, last, *shares})


@partial(jax.jit, static_argnames="activation")
def _output_error(
    patches: Float[Array, "n p"],
    responses: Float[Array, "n d"],
    change: Float[Array, "p d"],
    sensitivity: Float[Array, "d d"],
    activation: Activation,
) -> Float[Array, ""]:
    """Mean of δᵀ S δ, δ the error of the activations. The bias of a chain keeps the mean response.

    Args:
        patches: ``x - x̄``.
        responses: y, of the layer as it is.
        change: What the chain takes away from the kernel.
        sensitivity: S.
        activation: What follows the layer.
    """
    found = responses - contract("np,pd->nd", patches, change)
    delta = activate(responses, activation) - activate(found, activation)
    moments = contract("nd,ne->de", delta, delta).astype(sensitivity.dtype)
    return jnp.sum(moments * sensitivity) / len(patches)


def _widest_first(
    call: LayerCall,
    decompositions: Sequence[Decomposition],
    structure: Structure,
    dense_macs: int,
) -> int:
    """The largest rank of a first factor in the chains that are cheaper than the layer."""
    return max(
        ranks[0]
        for decomposition in decompositions
        if decomposition.unsuitable(call.layer) is None
        and decomposition.structure(call.layer).first_axes == structure.first_axes
        for chains in cheaper_chains(call, decomposition, dense_macs)
        for ranks in chains
    )
