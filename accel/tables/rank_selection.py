"""The paper's solvers, inputs and rank selections for pairs of k×k and 1×1 at equal MACs.

Rank selection on (``greedy``, the paper's, and ``exact``) and off (``uniform``: the same share of
every layer's width), for linear and nonlinear, symmetric and asymmetric reconstruction. Zhang et
al., arXiv:1505.06798, sections 3.1 to 3.4. One calibration a seed serves all combinations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, final

from flax import nnx

from accel.data import PixelSource
from accel.network_reconstruction import reconstruct
from accel.progress import Progress
from accel.rank_selection import check_speedup
from accel.selection import select_ranks
from accel.tables.grid import Cell, Line, Table, check_names
from accel.tables.pivot import metric_tables

SOLVERS = {"linear": "reduced_rank_regression", "nonlinear": "alternating"}
INPUTS = {"symmetric": False, "asymmetric": True}
RANKS = {"exact": "exact_energy", "greedy": "greedy_energy", "uniform": "uniform"}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankSelection(Table):
    """What is compared (see the module's docstring).

    Attributes:
        speedups: Original over accelerated MACs.
        solvers: Names of ``SOLVERS``.
        inputs: Names of ``INPUTS``: what a layer is fitted to.
        ranks: Names of ``RANKS``.
    """

    AXES: ClassVar = ("seeds", "speedups", "solvers", "inputs", "ranks")
    KEY: ClassVar = ("seed", "speedup", "ranks", "solver", "asymmetric")

    speedups: tuple[float, ...] = (2.0, 3.0, 4.0)
    solvers: tuple[str, ...] = tuple(SOLVERS)
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
            calibration = self.calibrate(original, images, "channel", seed, progress)
            for _, speedup, ranks, solver, asymmetric in cells:
                plan = select_ranks(
                    calibration, speedup, rank_selection=RANKS[ranks], rules=experiment.rules
                )
                result = reconstruct(
                    calibration,
                    plan,
                    reconstruction="responses",
                    solver=SOLVERS[solver],
                    asymmetric=asymmetric,
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

        # By name, symmetric first; the same for lines in any order.
        ordered = sorted(lines, key=lambda line: (line["solver"], line["asymmetric"], row(line)))
        return "\n".join(metric_tables(ordered, ("solver", "inputs", "ranks"), row))
