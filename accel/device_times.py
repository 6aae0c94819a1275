"""Times of single layers and of the chains that could replace them, on the device at hand.

The layers as they are are timed in turns with each other, and the chains in proportion to them
(``accel.timing_loops``): a device that is slower for a while makes none look worth more than the
others. Of each kind a few ranks are timed, those that fill vectors and others apart; between them
times are interpolated over MACs.

Single times are noisy, and the chains that plans are made of are those that noise has made look
fast. So those ranks are timed twice only, in passes over the whole network, or a third time where
both times differ by much; and then again and again those that plans would be made of by what is
known so far, until these have been timed ``ENOUGH`` times. So plans are told less too fast. What
was timed is kept on disk (``accel.time_cache``).

Times of layers do not quite add up to that of a network, whose compiler fuses across them. So
``accel.time_correction`` corrects them, and ``accel.latency_budget`` times each plan as a whole.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from accel.compiler import Options
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import in_dtype
from accel.interpreter import specification
from accel.memory import kept_memory
from accel.plan import LayerPlan
from accel.program import LayerCall
from accel.progress import Progress
from accel.rank_selection import Candidate
from accel.time_cache import Place, TimeCache, default_cache, place_text
from accel.timed_chains import TimedChains

# How often all sampled chains are timed at least, and how often those that plans would be made of.
# On CPUs that others used as well, a single time of 20 ms was off by a tenth.
PASSES = 2
ENOUGH = 10
# What plans would be made of: each minimises Σ_l (e_l + price t_l), with e_l the error of what
# layer l is replaced by and t_l its time as a share of the original's, for one of these prices; and
# by the sum of these times, which are not corrected yet, is so many times faster or more.
PRICES = np.geomspace(1e-6, 1e3, 91)
FASTER = 1.1


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTimes:
    """Times of one layer for a batch.

    Attributes:
        dense: Seconds of the layer as it is.
        candidates: The chains of its error curve.
        chains: Seconds of each.
    """

    dense: float
    candidates: tuple[Candidate, ...]
    chains: Float64[np.ndarray, " k"]

    def of(self, layer: LayerPlan) -> float:
        """Seconds of what a plan makes of the layer.

        Raises:
            ValueError: If the chain is none of the candidates.
        """
        if layer.decomposition is None:
            return self.dense
        chain = Candidate(layer.decomposition, layer.ranks)
        if chain not in self.candidates:
            raise ValueError(f"{layer.path}: {chain} was not timed")
        return float(self.chains[self.candidates.index(chain)])


def measure_times(
    calls: Sequence[LayerCall],
    curves: Mapping[str, ErrorCurve],
    batch_size: int,
    *,
    dtype: str | None = None,
    options: Options | None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, LayerTimes]:
    """Times of all layers and of the chains of their error curves, by path.

    Layers of the same shape are timed once, for the chains of all of them.

    Args:
        calls: The layers that can be replaced.
        curves: From ``measure_errors``: the chains to choose from.
        batch_size: Images per batch.
        dtype: What the layers compute in, such as ``bfloat16``; None for the types that they have.
        options: What the compiler is told (``Program.options``).
        cache: A folder that keeps times; by default ``default_cache()``.
        progress: Receives what is being done.
    """
    progress = progress or Progress()
    known = TimeCache(cache or default_cache(), options)
    alike: dict[str, list[str]] = {}
    places: dict[str, Place] = {}
    for call in calls:
        place = _place(call, batch_size, dtype)
        alike.setdefault(place_text(place), []).append(call.path)
        places.setdefault(place_text(place), place)
    at_batch = f"at batch {batch_size}"
    with kept_memory():
        progress.begin(f"timing all layers in turns {at_batch}", 1)
        seconds = dict(zip(places, known.seconds(list(places.values())), strict=True))
        known.save()
        progress.advance(1)
        timed = {
            key: TimedChains(place, [curves[path] for path in alike[key]], dtype, known)
            for key, place in places.items()
        }
        for number in range(1, PASSES + 2):
            progress.begin(f"timing chains {at_batch}", len(places))
            for key, chains in timed.items():
                progress.describe(f"timing chains for {alike[key][0]} {at_batch}, pass {number}")
                if chains.time(chains.measured if number <= PASSES else chains.doubtful(), number):
                    known.save()
                progress.advance(1)

        def times() -> dict[str, LayerTimes]:
            found = {}
            for key, paths in alike.items():
                for path in paths:
                    candidates = curves[path].candidates
                    chains = seconds[key] * timed[key].proportions(candidates)
                    found[path] = LayerTimes(seconds[key], candidates, chains)
            return found

        passes = ENOUGH - PASSES
        progress.begin(f"timing chains that plans are made of {at_batch}", passes)
        for number in itertools.count():
            chosen = _chosen(times(), curves)
            taken = 0
            for key, chains in timed.items():
                of_place = itertools.chain.from_iterable(chosen[path] for path in alike[key])
                beside = chains.timed_beside(of_place)
                if number == 0:
                    chains.release(but=beside)
                taken += chains.time(beside, ENOUGH)
            if not taken:
                progress.advance(max(passes - number, 1))
                break
            known.save()
            # Mostly some more passes: what is timed again may let others look better.
            progress.advance(int(number < passes - 1))
    return times()


def _place(call: LayerCall, batch_size: int, dtype: str | None) -> Place:
    """The layer of a call, computed in a type."""
    given = specification(call.input)
    # What a layer is given has the images' axis in front, or the network could not be cut.
    shape = (batch_size * call.rows_per_image, *given.shape[1:])
    if dtype is None:
        return Place(call.layer, shape, given.dtype, call.activation)
    return Place(in_dtype(call.layer, dtype), shape, dtype, call.activation)


def _chosen(
    times: Mapping[str, LayerTimes], curves: Mapping[str, ErrorCurve]
) -> dict[str, list[Candidate]]:
    """The chains that plans would be made of, by path (see ``PRICES``)."""
    dense = sum(layer.dense for layer in times.values())
    chosen: dict[str, list[Candidate]] = {path: [] for path in times}
    for price in PRICES / dense:
        plan: dict[str, Candidate] = {}
        whole = dense
        for path, layer in times.items():
            longer = layer.chains - layer.dense
            costs = curves[path].errors + price * longer
            if costs.size and costs.min() < 0:
                best = int(costs.argmin())
                plan[path] = layer.candidates[best]
                whole += float(longer[best])
        if dense / whole >= FASTER:
            for path, chain in plan.items():
                chosen[path].append(chain)
    return chosen
