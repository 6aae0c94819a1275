"""The chains that could stand in one place of a network, some of which are timed.

Of each kind a few ranks are timed, those that fill vectors and others apart; between them times are
interpolated over MACs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float64

from accel.chain_filters import fills_vectors
from accel.compiler import compile_together
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import in_dtype
from accel.rank_selection import Candidate
from accel.rewrite import chain_for
from accel.time_cache import Place, TimeCache
from accel.timing_loops import Loop, Timer, compile_loop, proportions

# Which chains are timed, as places among those of one kind by ascending MACs, from first to last.
SHARES = (0.0, 0.08, 0.25, 0.6, 1.0)
# One of two times that are further apart than this is no measure of the chain.
DOUBTFUL = 1.25


class TimedChains:
    """The chains that could stand in one place, of which some are timed.

    Args:
        place: The layer that stands there, and what it is given.
        curves: The error curves of all layers of that shape: the chains.
        dtype: What the chains compute in; None for the type that they have.
        known: Where times are kept.

    Attributes:
        measured: Of each chain that is timed, what it took in proportion to the layer that stands
            there, each time.
    """

    def __init__(
        self, place: Place, curves: Sequence[ErrorCurve], dtype: str | None, known: TimeCache
    ):
        self._place, self._dtype, self._options = place, dtype, known.options
        self._timers: dict[Candidate | None, Timer] = {}
        self._macs = {
            chain: int(cost)
            for curve in curves
            for chain, cost in zip(curve.candidates, curve.macs, strict=True)
        }
        kinds: dict[tuple[str, bool], list[Candidate]] = {}
        for chain in sorted(self._macs, key=lambda chain: self._macs[chain]):
            kinds.setdefault((chain.decomposition, fills_vectors(chain)), []).append(chain)
        # The timed ones of the same kind that are next to a chain, itself if it is timed.
        self._next: dict[Candidate, tuple[Candidate, Candidate]] = {}
        self.measured: dict[Candidate, list[float]] = {}
        for chains in kinds.values():
            timed = sorted({round(share * (len(chains) - 1)) for share in SHARES})
            for index, chain in enumerate(chains):
                after = bisect.bisect_left(timed, index)
                before = after if timed[after] == index else after - 1
                self._next[chain] = (chains[timed[before]], chains[timed[after]])
            for chain in (chains[index] for index in timed):
                self.measured[chain] = known.measured(place, self._module(chain))

    def time(self, chains: Iterable[Candidate], enough: int) -> int:
        """Times chains once more, but for those that were timed ``enough`` times already.

        Args:
            chains: Some of those in ``measured``, to which what is found is added.
            enough: How many times are enough.

        Returns:
            How many were timed.
        """
        wanted = [chain for chain in chains if len(self.measured[chain]) < enough]
        if not wanted:
            return 0
        new = [chain for chain in (None, *wanted) if chain not in self._timers]
        for chain, loop in zip(new, compile_together(self._loop, new), strict=True):
            self._timers[chain] = Timer(loop)
        # Every other time from the last to the first.
        backwards = len(self.measured[wanted[0]]) % 2 == 1
        timers = [self._timers[chain] for chain in wanted]
        found = proportions(self._timers[None], timers, backwards=backwards)
        for chain, proportion in zip(wanted, found.others, strict=True):
            self.measured[chain].append(proportion)
        return len(wanted)

    def release(self, but: Iterable[Candidate]) -> None:
        """Frees the memory of all compiled chains but these; others are compiled when needed."""
        kept = {None, *but}
        self._timers = {chain: timer for chain, timer in self._timers.items() if chain in kept}

    def timed_beside(self, chains: Iterable[Candidate]) -> list[Candidate]:
        """The timed chains between which the times of these are interpolated."""
        return list(dict.fromkeys(timed for chain in chains for timed in self._next[chain]))

    def doubtful(self) -> list[Candidate]:
        """The timed chains of which two times differ by more than ``DOUBTFUL``."""
        return [c for c, found in self.measured.items() if max(found) > DOUBTFUL * min(found)]

    def proportions(self, chains: Sequence[Candidate]) -> Float64[np.ndarray, " k"]:
        """What chains take in proportion to the layer that stands there.

        Of chains that are timed, the median; of others, interpolated over MACs. All that are timed
        have been timed once or more.
        """
        medians = {chain: float(np.median(found)) for chain, found in self.measured.items()}
        beside = [self._next[chain] for chain in chains]
        macs = np.array([self._macs[chain] for chain in chains], np.float64)

        def ends(of: Mapping[Candidate, float]) -> Float64[np.ndarray, "k 2"]:
            return np.array([[of[chain] for chain in both] for both in beside]).reshape(-1, 2)

        (least, most), (low, high) = ends(self._macs).T, ends(medians).T
        share = (macs - least) / np.maximum(most - least, 1)
        return low + share * (high - low)

    def _loop(self, chain: Candidate | None) -> Loop:
        layer = self._place.layer if chain is None else self._module(chain)
        return compile_loop(**self._place._replace(layer=layer)._asdict(), options=self._options)

    def _module(self, chain: Candidate) -> nnx.Module:
        layer: Any = self._place.layer
        factors = DECOMPOSITIONS[chain.decomposition].factors(layer, *chain.ranks)
        module = chain_for(layer, factors)
        return module if self._dtype is None else in_dtype(module, self._dtype)
