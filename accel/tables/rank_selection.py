"""Solvers, inputs and rank selections for one kind of chain at equal MACs.

Rank selection on (``greedy``, the paper's, ``exact``, and ``measured``, which goes by measured
errors instead of energies) and off (``uniform``: the same share of every layer's width), for linear
and nonlinear, symmetric and asymmetric reconstruction (Zhang et al., arXiv:1505.06798, sections 3.1
to 3.4), and for the joint fit of all factors. One calibration a seed serves all combinations.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, final

from flax import nnx

from accel.data import PixelSource
from accel.decompositions import DECOMPOSITIONS
from accel.measurements import measure_errors, measure_sensitivity
from accel.network_reconstruction import reconstruct
from accel.progress import Progress
from accel.rank_selection import check_speedup
from accel.reconstruction import JOINT
from accel.selection import MEASURED_ERROR, select_ranks
from accel.tables.grid import Cell, Line, Table, check_names
from accel.tables.pivot import metric_tables

# What is fitted to what, and by which solver.
SOLVERS = {
    "linear": ("responses", "reduced_rank_regression"),
    "nonlinear": ("responses", "alternating"),
    "joint": (JOINT, "alternating"),
}
PAPER_SOLVERS = ("linear", "nonlinear")
INPUTS = {"symmetric": False, "asymmetric": True}
RANKS = {
    "exact": "exact_energy",
    "greedy": "greedy_energy",
    "uniform": "uniform",
    "measured": MEASURED_ERROR,
}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSelection(Table):
    """What is compared (see the module's docstring).

    Attributes:
        decomposition: The kind of chain that replaces every layer (``DECOMPOSITIONS``).
        speedups: Original over accelerated MACs.
        solvers: Names of ``SOLVERS``.
        inputs: Names of ``INPUTS``: what a layer is fitted to.
        ranks: Names of ``RANKS``.
    """

    AXES: ClassVar = ("seeds", "speedups", "solvers", "inputs", "ranks")
    KEY: ClassVar = ("seed", "speedup", "ranks", "solver", "asymmetric")
    EARLIER: ClassVar = {"decomposition": "channel"}

    decomposition: str = "channel"
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0)
    solvers: tuple[str, ...] = PAPER_SOLVERS
    inputs: tuple[str, ...] = tuple(INPUTS)
    ranks: tuple[str, ...] = tuple(RANKS)

    def smoke(self) -> RankSelection:
        return dataclasses.replace(
            self,
            experiment=self.experiment.smoke(),
            seeds=self.seeds[:1],
            speedups=self.speedups[:1],
            solvers=self.solvers[:1],
            ranks=self.ranks[:1],
        )

    def cells(self) -> list[Cell]:
        asymmetric = [INPUTS.get(name, name) for name in self.inputs]
        axes = (self.seeds, self.speedups, self.ranks, self.solvers, asymmetric)
        return list(itertools.product(*axes))

    def check(self, original: nnx.Module, images: PixelSource) -> None:
        kinds = [name for name, kind in DECOMPOSITIONS.items() if not kind.dense]
        check_names("decomposition", (self.decomposition,), kinds)
        check_names("solver", self.solvers, SOLVERS)
        check_names("inputs", self.inputs, INPUTS)
        check_names("ranks", self.ranks, RANKS)
        for speedup in self.speedups:
            check_speedup("speedup", speedup)
        self.experiment.check(original)

    def measure(
        self,
        original: nnx.Module,
        images: PixelSource,
        wanted: Sequence[Cell],
        unfinished: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        experiment = self.experiment
        reference = experiment.reference(original, progress)
        for seed, cells in itertools.groupby(wanted, key=lambda cell: cell[0]):
            calibration = self.calibrate(original, images, self.decomposition, seed, progress)
            sensitivity = functools.cache(
                lambda c=calibration: measure_sensitivity(c, progress=progress)
            )
            curves = functools.cache(
                lambda c=calibration, s=sensitivity: measure_errors(c, s(), progress=progress)
            )
            for _, speedup, ranks, solver, asymmetric in cells:
                plan = select_ranks(
                    calibration,
                    speedup,
                    rank_selection=RANKS[ranks],
                    rules=experiment.rules,
                    curves=curves() if RANKS[ranks] == MEASURED_ERROR else None,
                )
                reconstruction, by = SOLVERS[solver]
                result = reconstruct(
                    calibration,
                    plan,
                    reconstruction=reconstruction,
                    solver=by,
                    asymmetric=asymmetric,
                    sensitivity=sensitivity() if reconstruction == JOINT else None,
                    progress=progress,
                )
                yield {
                    "seed": seed,
                    "speedup": speedup,
                    "ranks": ranks,
                    "solver": solver,
                    "asymmetric": asymmetric,
                    "macs": dict(result.report.macs),
                    "metrics": experiment.evaluate(reference, result.model, progress),
                    "layers": [dataclasses.asdict(layer) for layer in result.report.layers],
                    "seconds": dict(result.report.seconds),
                    "memory": dict(result.report.memory),
                }

    def markdown(self, lines: Sequence[Line], devices: Sequence[str]) -> str:
        def row(line: Line) -> tuple[str, ...]:
            inputs = "asymmetric" if line["asymmetric"] else "symmetric"
            return (line["solver"], inputs, line["ranks"])

        # Symmetric first; the same for lines in any order.
        solvers, ranks = list(SOLVERS), list(RANKS)
        ordered = sorted(
            lines,
            key=lambda line: (
                solvers.index(line["solver"]),
                line["asymmetric"],
                ranks.index(line["ranks"]),
            ),
        )
        return "\n".join(metric_tables(ordered, ("solver", "inputs", "ranks"), row))
