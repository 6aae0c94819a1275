"""How many principal components hold how much of the energy of each layer's responses.

The eigenvalues of the covariance of a layer's responses (``response_spectrum``), on the calibration
images that are used for fitting: that they fall fast is what low-rank reconstruction lives on, and
how fast differs from layer to layer, which is what rank selection lives on. Zhang et al.,
arXiv:1505.06798, figure 2 and section 3.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import ClassVar, final

import numpy as np
from flax import nnx
from jaxtyping import Float

from accel.calibration import Calibration
from accel.data import PixelSource
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import rank_macs
from accel.program import LayerCall
from accel.progress import Progress
from accel.solvers import response_spectrum
from accel.tables.grid import Cell, Line, Table
from accel.tables.pivot import Entry, pivot, seeds_text

# Digits of the eigenvalues that are recorded: more than a float32 response has.
DIGITS = 7


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerEnergies(Table):
    """What is measured (see the module's docstring).

    Attributes:
        energies: Shares of a layer's energy that are asked for, above 0 and up to 1.
    """

    AXES: ClassVar = ("seeds",)
    KEY: ClassVar = ("seed",)
    EVALUATES: ClassVar = False

    energies: tuple[float, ...] = (0.9, 0.95, 0.99, 0.999)

    def smoke(self) -> LayerEnergies:
        return dataclasses.replace(self, experiment=self.experiment.smoke(), seeds=self.seeds[:1])

    def cells(self) -> list[Cell]:
        return [(seed,) for seed in self.seeds]

    def check(self, original: nnx.Module, images: PixelSource) -> None:
        if not self.energies or not all(0 < energy <= 1 for energy in self.energies):
            raise ValueError(f"energies are shares above 0 and up to 1, found {self.energies}")

    def measure(
        self,
        original: nnx.Module,
        images: PixelSource,
        wanted: Sequence[Cell],
        unfinished: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        for (seed,) in wanted:
            calibration = self.calibrate(original, images, "channel", seed, progress)
            yield {
                "seed": seed,
                "layers": [self._layer(calibration, call) for call in calibration.calls],
                "macs": sum(calibration.macs.values()),
                "seconds": {"calibrate": calibration.seconds},
            }

    def _layer(self, calibration: Calibration, call: LayerCall) -> Line:
        targets = calibration.targets[call.path][calibration.fitting]
        spectrum = np.asarray(response_spectrum(targets.reshape(-1, targets.shape[-1])), np.float64)
        # A layer that would cost more at a rank than it does stays as it is.
        macs = np.minimum(rank_macs(call, DECOMPOSITIONS["channel"]), calibration.macs[call.path])
        components = {f"{energy:g}": components_of(spectrum, energy) for energy in self.energies}
        return {
            "path": call.path,
            "rows": targets.shape[0] * targets.shape[1],
            "width": len(spectrum),
            "components": components,
            "macs": calibration.macs[call.path],
            "channel_macs": {energy: int(macs[n - 1]) for energy, n in components.items()},
            "spectrum": [float(f"{value:.{DIGITS}g}") for value in spectrum],
        }

    def markdown(self, lines: Sequence[Line], devices: Sequence[str]) -> str:
        names = [layer["path"] for layer in lines[0]["layers"]]
        widths = {layer["path"]: layer["width"] for layer in lines[0]["layers"]}
        whole, network = sum(widths.values()), []
        components, shares = [], []
        for line in lines:
            for name in names:
                layer = next(layer for layer in line["layers"] if layer["path"] == name)
                row = (name, str(widths[name]))
                for energy, count in layer["components"].items():
                    place = (row, float(energy), line["seed"])
                    components.append(Entry(*place, count))
                    shares.append(Entry(*place, 100 * count / widths[name]))
        for energy in lines[0]["layers"][0]["components"]:
            counts = [sum(layer["components"][energy] for layer in x["layers"]) for x in lines]
            speedups = [
                line["macs"]
                / (
                    line["macs"]
                    - sum(x["macs"] - x["channel_macs"][energy] for x in line["layers"])
                )
                for line in lines
            ]
            network.append(
                f"| {100 * float(energy):g} % | {mean(counts):.0f} of {whole}"
                f" | {100 * mean(counts) / whole:.0f} % | {mean(speedups):.2f}× |"
            )
        seeds, columns = seeds_text(lines), lambda energy: f"{100 * energy:g} %"
        heads = ("layer", "channels")
        return "\n".join(
            [
                f"**Principal components that hold this share of the energy**, {seeds}\n",
                pivot(heads, components, columns, ".0f"),
                f"**The same in percent of the channels**, {seeds}\n",
                pivot(heads, shares, columns, ".0f"),
                "**The whole network, every layer at this share of its energy**\n",
                "| energy | components | of all channels | fewer MACs by channel |",
                "|--:|--:|--:|--:|",
                *network,
                "",
            ]
        )


def components_of(spectrum: Float[np.ndarray, " d"], energy: float) -> int:
    """The least number of leading eigenvalues, one or more, that hold this share of their sum."""
    cumulated = np.cumsum(spectrum)
    return min(int(np.searchsorted(cumulated, energy * cumulated[-1])) + 1, len(spectrum))
