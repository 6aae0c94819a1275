"""The rank selection problem of a whole network.

maximise    Π_l  E_l(d'_l) / E_l(d_l),    E_l(r) = Σ_{a≤r} σ_{l,a}
subject to  Σ_l  min(m_l(d'_l), D_l)  ≤  budget - other

with σ_{l,a} the eigenvalues of layer l's response covariance in descending order, m_l(d') the MACs
of the decomposed layer at rank d' and D_l those of the original. A layer whose m_l(d'_l) is not
below D_l stays dense, at no loss of energy. Zhang et al., arXiv:1505.06798, on rank selection for
the whole model; there the cost of d' is (d'/d) D, here it is what the decomposed layer costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

Ranks = dict[str, int | None]

# Rounding leaves eigenvalues of a covariance slightly below zero. In float32 their size is about
# 1e-7 of the largest times the number of channels; anything beyond this is no covariance.
NEGATIVE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class LayerChoices:
    """The ranks a layer can have, what each keeps and what it costs.

    Attributes:
        path: Path of the layer in the module tree.
        spectrum: Energies in descending order, one for each rank up to the largest, d: for a chain
            that ends in a 1×1 factor the eigenvalues of the covariance of the layer's responses.
            Those that rounding made negative become zero.
        dense_macs: MACs per image of the layer as it is.
        rank_macs: MACs per image of the decomposed layer at the ranks 1 … d, strictly ascending.
        fixed: What a rule demands: None (free), ``"dense"``, or a rank between 1 and d. A rank that
            costs as much as the layer itself leaves it dense.

    Raises:
        ValueError: If any of these is not as said.
    """

    path: str
    spectrum: Float64[np.ndarray, " d"]
    dense_macs: int
    rank_macs: Int64[np.ndarray, " d"]
    fixed: Literal["dense"] | int | None = None

    def __post_init__(self):
        spectrum = np.asarray(self.spectrum, np.float64)
        if spectrum.ndim != 1 or not spectrum.size:
            raise ValueError(
                f"{self.path}: the spectrum must be one row of eigenvalues, found shape"
                f" {spectrum.shape}"
            )
        if not np.isfinite(spectrum).all():
            raise ValueError(f"{self.path}: the spectrum has NaN or infinite eigenvalues")
        if spectrum.min() < -NEGATIVE_TOLERANCE * max(spectrum[0], 0.0):
            raise ValueError(
                f"{self.path}: the spectrum has a negative eigenvalue, {spectrum.min():.3g} beside"
                f" a largest of {spectrum[0]:.3g}"
            )
        if (np.diff(spectrum) > 0).any():
            raise ValueError(f"{self.path}: the eigenvalues must be in descending order")
        macs = np.asarray(self.rank_macs, np.int64)
        if macs.shape != spectrum.shape or (np.diff(macs) <= 0).any():
            raise ValueError(
                f"{self.path}: MACs must be given for each of {spectrum.size} ranks and"
                f" ascend, found {macs}"
            )
        for name, least in (("dense", self.dense_macs), ("rank 1", int(macs[0]))):
            if least < 1:
                raise ValueError(f"{self.path}: MACs ({name}) must be at least 1, found {least}")
        if isinstance(self.fixed, int) and not 1 <= self.fixed <= spectrum.size:
            raise ValueError(
                f"{self.path}: a fixed rank must be between 1 and the layer's width"
                f" {spectrum.size}, found {self.fixed}"
            )
        object.__setattr__(self, "spectrum", np.maximum(spectrum, 0.0))
        object.__setattr__(self, "rank_macs", macs)

    @property
    def width(self) -> int:
        """The largest rank d."""
        return self.spectrum.size

    @property
    def largest_rank(self) -> int:
        """The largest rank that costs less than the layer as it is; 0 if there is none."""
        return int(np.searchsorted(self.rank_macs, self.dense_macs))

    @cached_property
    def energies(self) -> Float64[np.ndarray, " d"]:
        """E(r) for r = 1…d in units of the largest eigenvalue (so that nothing overflows)."""
        return np.cumsum(self.spectrum / (self.spectrum[0] or 1.0))

    @cached_property
    def log_energies(self) -> Float64[np.ndarray, " d"]:
        """log(E(r)/E(d)) for r = 1…d, from -log d up to 0; zeros for a layer without energy."""
        if not self.spectrum[0]:
            return np.zeros(self.width)
        # From the sum of what is left out: a difference of cumulated sums would lose the tail.
        tail = np.cumsum(self.spectrum[:0:-1] / self.spectrum[0])[::-1]
        return np.log1p(-np.append(tail, 0.0) / self.energies[-1])

    def choice(self, rank: int | None) -> int | None:
        """The rank, or None (dense) where the decomposed layer would not cost less."""
        return rank if rank is not None and rank <= self.largest_rank else None

    def macs(self, rank: int | None) -> int:
        """MACs per image at a rank (None: dense), never more than those of the dense layer."""
        chosen = self.choice(rank)
        return self.dense_macs if chosen is None else int(self.rank_macs[chosen - 1])

    def log_energy(self, rank: int | None) -> float:
        """log(E(rank)/E(d)); 0 for None (dense)."""
        chosen = self.choice(rank)
        return 0.0 if chosen is None else float(self.log_energies[chosen - 1])


@dataclasses.dataclass(frozen=True, eq=False)
class RankProblem:
    """Layers, and the budget they share (see the module's docstring).

    Attributes:
        layers: The layers that can be decomposed, each path once.
        other_macs: MACs per image of the convolutions that never are, conv1_1 for example.
        budget_macs: MACs per image that all convolutions together may cost.

    Raises:
        ValueError: If a path stands twice, or the budget cannot be met with rank 1 in every free
            layer; the message says the largest reachable speedup.
    """

    layers: tuple[LayerChoices, ...]
    other_macs: int
    budget_macs: int

    def __post_init__(self):
        paths = [layer.path for layer in self.layers]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"each layer must stand once, found twice: {', '.join(repeated)}")
        least = self.macs(self.complete({layer.path: 1 for layer in self.free}))
        if least > self.budget_macs:
            original = self.macs(dict.fromkeys(paths))
            # Rounded down, so that the speedup named here can really be asked for.
            reachable = math.floor(1000 * original / least) / 1000
            raise ValueError(
                f"a budget of {self.budget_macs:,} MACs per image"
                f" ({original / max(self.budget_macs, 1):.3f}× of {original:,}) cannot be met: with"
                f" rank 1 in every free layer, {least:,} are left; the largest reachable speedup is"
                f" {reachable:.3f}×"
            )

    @cached_property
    def free(self) -> tuple[LayerChoices, ...]:
        """The layers that no rule fixes, sorted by path: results do not hang on the given order."""
        free = (layer for layer in self.layers if layer.fixed is None)
        return tuple(sorted(free, key=lambda layer: layer.path))

    def complete(self, ranks: Mapping[str, int | None]) -> Ranks:
        """Ranks of all layers in the given order, from those of the free layers.

        A rank that does not make its layer cheaper becomes None (dense).
        """
        return {
            layer.path: layer.choice(
                ranks[layer.path]
                if layer.fixed is None
                else None
                if layer.fixed == "dense"
                else layer.fixed
            )
            for layer in self.layers
        }

    def macs(self, ranks: Mapping[str, int | None]) -> int:
        """MACs per image of all convolutions at the given ranks (None: dense)."""
        return self.other_macs + sum(layer.macs(ranks[layer.path]) for layer in self.layers)

    def log_energy(self, ranks: Mapping[str, int | None]) -> float:
        """Logarithm of the objective, Σ_l log(E_l(r_l)/E_l(d_l)): at most 0, more is better."""
        return math.fsum(layer.log_energy(ranks[layer.path]) for layer in self.layers)


def budget_from_speedup(total_original_macs: int, speedup: float) -> int:
    """The MACs per image that a speedup leaves of all the original layers' MACs.

    Raises:
        ValueError: If the speedup is not a finite number above 1.
    """
    check_speedup("speedup", speedup)
    return math.floor(total_original_macs / speedup)


def check_speedup(name: str, speedup: float) -> None:
    """Raises ValueError, with the name, if a speedup is not a finite number above 1."""
    if not (speedup > 1 and math.isfinite(speedup)):
        raise ValueError(f"a {name} must be a finite number above 1, found {speedup}")
