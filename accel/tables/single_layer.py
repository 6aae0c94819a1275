"""The error of single layers against rank: linear and nonlinear, symmetric and asymmetric.

One layer is replaced by a pair of k×k and 1×1 (``channel``), at ranks that are shares of its
width. Reported is ``Σ‖r(y) - r(y')‖²/Σ‖r(y)‖²`` on the images that are not used for fitting, y the
original network's responses. The layer is given, and measured on, what the original network feeds
it, or what a network feeds it whose earlier layers are accelerated: there, the symmetric solution
was fitted to the original's inputs, and the asymmetric one to those that it gets. The rival is the
singular value decomposition of the kernel, which looks at no image. Zhang et al.,
arXiv:1505.06798, sections 3.1 to 3.3.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from flax import nnx

from accel.calibration import Calibration
from accel.data import PixelSource
from accel.network_reconstruction import (
    held_out_error,
    layer_problem,
    reconstruct,
    solve_layer,
    solver_named,
)
from accel.plan import LayerPlan
from accel.program import LayerCall, named_layers
from accel.progress import Progress
from accel.rank_selection import budget_from_speedup
from accel.rewrite import FactorizedConv
from accel.runs import AcceleratedRun
from accel.selection import select_ranks
from accel.tables.grid import Cell, Line, Table, check_names
from accel.tables.pivot import Entry, pivot, seeds_text

# By name: how the layer is reconstructed, and by which solver.
FITS = {
    "weight SVD": ("weights", "reduced_rank_regression"),
    "linear": ("responses", "reduced_rank_regression"),
    "nonlinear": ("responses", "alternating"),
}
ORIGINAL, ACCELERATED = "original", "accelerated"


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class SingleLayer(Table):
    """What is measured (see the module's docstring).

    Attributes:
        layers: Paths of the layers.
        shares: Ranks as shares of a layer's width, above 0 and up to 1.
        earlier_speedup: How much cheaper the network is whose earlier layers feed the layer, by the
            paper's method.
    """

    AXES: ClassVar = ("seeds", "layers", "shares")
    KEY: ClassVar = ("seed", "layer", "share")
    EVALUATES: ClassVar = False

    layers: tuple[str, ...]
    shares: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)
    earlier_speedup: float = 4.0

    def smoke(self) -> SingleLayer:
        return dataclasses.replace(
            self,
            experiment=self.experiment.smoke(),
            seeds=self.seeds[:1],
            layers=self.layers[:2],
            shares=self.shares[:2],
        )

    def cells(self) -> list[Cell]:
        return list(itertools.product(self.seeds, self.layers, self.shares))

    def check(self, original: nnx.Module, images: PixelSource) -> None:
        check_names("layer", self.layers, (path for path, _ in named_layers(original, (nnx.Conv,))))
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"shares are above 0 and up to 1, found {self.shares}")
        # The number of MACs does not matter: whether there is such a speedup does.
        budget_from_speedup(1, self.earlier_speedup)

    def measure(
        self,
        original: nnx.Module,
        images: PixelSource,
        wanted: Sequence[Cell],
        unfinished: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        for seed, cells in itertools.groupby(wanted, key=lambda cell: cell[0]):
            shares = defaultdict(list)
            for _, layer, share in cells:
                shares[layer].append(share)
            calibration = self.calibrate(original, images, "channel", seed, progress)
            check_names("layer to replace", shares, (call.path for call in calibration.calls))
            plan = select_ranks(
                calibration,
                self.earlier_speedup,
                rank_selection="greedy_energy",
                rules=self.experiment.rules,
            )
            accelerated = reconstruct(
                calibration, plan, reconstruction="responses", progress=progress
            )
            replaced = dict(named_layers(accelerated.model, (FactorizedConv,)))
            walks = {
                which: AcceleratedRun(
                    calibration.program,
                    calibration.calls,
                    calibration.source,
                    calibration.batch_size,
                    calibration.cache_bytes // 2,
                )
                for which in (ORIGINAL, ACCELERATED)
            }
            for call in calibration.calls:
                if call.path in shares:
                    positions = calibration.positions[call.path]
                    patches = {which: walk.patches(positions) for which, walk in walks.items()}
                    for share in shares[call.path]:
                        yield {
                            "seed": seed,
                            "layer": call.path,
                            "share": share,
                            **self._measure_layer(calibration, call, share, patches),
                        }
                walks[ORIGINAL].keep()
                if call.path in replaced:
                    walks[ACCELERATED].replace(replaced[call.path])
                else:
                    walks[ACCELERATED].keep()

    def _measure_layer(
        self,
        calibration: Calibration,
        call: LayerCall,
        share: float,
        patches: dict[str, np.ndarray],
    ) -> Line:
        """The errors of a layer at one rank.

        Args:
            patches: What the layer sees of either network, ``[images, positions, p]``.
        """
        width = call.layer.out_features
        layer = LayerPlan(call.path, "channel", (max(1, round(share * width)),))
        errors = []
        began = time.perf_counter()
        for name, (reconstruction, solver) in FITS.items():
            for inputs in (ORIGINAL, ACCELERATED):
                if reconstruction == "weights" and inputs == ACCELERATED:
                    continue
                problem = layer_problem(
                    calibration, call, layer, patches[inputs], solver_named(solver)
                )
                split = solve_layer(problem, reconstruction, call.path)
                for fed in (ORIGINAL, ACCELERATED):
                    # Fitted to what no network feeds it: nobody would use it there.
                    if (inputs, fed) == (ACCELERATED, ORIGINAL):
                        continue
                    errors.append(
                        {
                            "solver": name,
                            "fitted_to": None if reconstruction == "weights" else inputs,
                            "fed_by": fed,
                            "error": held_out_error(calibration, call, layer, patches[fed], split),
                        }
                    )
        return {
            "rank": layer.ranks[0],
            "width": width,
            "errors": errors,
            "seconds": {"solve": time.perf_counter() - began},
        }

    def markdown(self, lines: Sequence[Line], devices: Sequence[str]) -> str:
        names = {ORIGINAL: "symmetric", ACCELERATED: "asymmetric", None: ""}
        fed_by = {ORIGINAL: "the original", ACCELERATED: "the accelerated"}
        text = []
        for layer in dict.fromkeys(line["layer"] for line in lines):
            having = [line for line in lines if line["layer"] == layer]
            width = having[0]["width"]
            entries = [
                Entry(
                    (fed_by[error["fed_by"]], error["solver"], names[error["fitted_to"]]),
                    line["rank"],
                    line["seed"],
                    error["error"],
                )
                for line in having
                for error in line["errors"]
            ]
            # Stable: within what feeds the layer, rows stay in the order they were measured in.
            entries.sort(key=lambda entry: entry.row[0] != fed_by[ORIGINAL])
            text += [
                f"**{layer}**, relative error of {width} channels by rank, {seeds_text(having)}\n",
                pivot(("fed by", "solver", "inputs"), entries, lambda rank: f"rank {rank:g}"),
            ]
        return "\n".join(text)
