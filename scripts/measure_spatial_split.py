"""Measures what it gains to split kernels into k×1 and 1×k by what layers see, not by weights.

    python scripts/measure_spatial_split.py CONFIG --out FILE.json [--share 0.25] [--FIELD VALUE …]

Each convolution of CONFIG's network by itself, with the inputs that it has in the original network,
at the largest rank of ``spatial`` that costs no more than a share of its MACs. The error of the
activations, Σ‖r(y) - r(y')‖²/Σ‖r(y)‖², on calibration images that nothing is fitted to, of four
ways to find the two factors:

- ``weights``: the singular value decomposition of the kernel (Jaderberg et al.);
- ``refitted``: its first factor, the second one fitted to the responses by least squares;
- ``weighted``: the decomposition weighted by the second moments of the inputs;
- ``improved``: both factors improved by turns in that metric, as the joint reconstruction does.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro

from accel.calibration import calibrate
from accel.configuration import load_config
from accel.decompositions import DECOMPOSITIONS
from accel.decompositions.split import split
from accel.error_curves import RIDGE, cheaper_chains, macs_of
from accel.experiment import Experiment
from accel.files import check_new, write_whole
from accel.program import LayerCall
from accel.progress import reported
from accel.reconstruction import SWEEPS
from accel.report.environment import command_line, device_name, versions
from accel.runs import AcceleratedRun
from accel.solvers.activations import activate
from accel.solvers.base import arithmetic, widest_dtype
from accel.solvers.kernel_regression import fit_kernel

WAYS = ("weights", "refitted", "weighted", "improved")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The experiment, the share of a layer's MACs, and the file for the figures."""

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path
    share: float = 0.25


def errors(
    call: LayerCall, rank: int, patches: np.ndarray, held_out: np.ndarray
) -> dict[str, float]:
    """The error of the layer's activations by each of ``WAYS``."""
    structure = DECOMPOSITIONS["spatial"].structure(call.layer)
    kernel = np.asarray(call.layer.kernel[...], np.float32)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    bias = 0 if call.layer.bias is None else np.asarray(call.layer.bias[...], np.float32)
    found = {}
    with arithmetic(widest_dtype()):
        targets = patches @ kernel
        unchosen = np.zeros(len(patches), bool)
        fit = fit_kernel(patches, targets, kernel, unchosen, ridges=(RIDGE,))
        wide = jnp.asarray(kernel, fit.metric.dtype)
        plain, _ = split(structure, wide, (rank,))
        found["weights"] = plain.kernel(structure)
        for way, sweeps in (("weighted", 0), ("improved", SWEEPS)):
            factors, _ = split(structure, wide, (rank,), fit.metric, sweeps)
            found[way] = factors.kernel(structure)
        features = plain.features(structure, patches - patches.mean(0))
        middle, *_ = np.linalg.lstsq(features, targets - targets.mean(0))
        found["refitted"] = plain._replace(middle=middle).kernel(structure)
        mean = np.asarray(fit.patch_mean)
    wanted = np.asarray(activate(jnp.asarray(held_out @ kernel + bias), call.activation))
    energy = np.sum(np.square(wanted, dtype=np.float64))
    result = {}
    for way in WAYS:
        changed = np.asarray(found[way], np.float32)
        # The mean response is kept, in each of the ways.
        responses = (held_out - mean) @ changed + mean @ kernel + bias
        given = np.asarray(activate(jnp.asarray(responses, jnp.float32), call.activation))
        result[way] = float(np.sum(np.square(given - wanted, dtype=np.float64)) / energy)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The errors as Markdown, a line a layer."""
    lines = [f"| layer | rank | {' | '.join(WAYS)} |", f"|---|--:|{'--:|' * len(WAYS)}"]
    for row in rows:
        figures = " | ".join(f"{row[way]:.4f}" for way in WAYS)
        lines.append(f"| {row['layer']} | {row['rank']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    config, *arguments = sys.argv[1:]
    default = Measurement(load_config(Path(config), Experiment), tyro.MISSING)
    asked = tyro.cli(Measurement, args=arguments, default=default)
    check_new(asked.out)
    experiment = asked.experiment
    rows = []
    with reported() as progress:
        calibration = calibrate(
            experiment.load_model(),
            experiment.limited(experiment.calibration),
            decompositions="spatial",
            positions_per_image=experiment.positions_per_image,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            rules=experiment.rules,
            progress=progress,
        )
        run = AcceleratedRun(
            calibration.program,
            calibration.calls,
            calibration.source,
            calibration.batch_size,
            calibration.cache_bytes,
        )
        for call in calibration.calls:
            progress.begin(call.path, len(calibration.source))
            patches = run.patches(calibration.positions[call.path], progress.advance)
            run.keep()
            dense, spatial = calibration.macs[call.path], DECOMPOSITIONS["spatial"]
            ranks = [
                ranks for (*_, ranks) in cheaper_chains(call, spatial, int(asked.share * dense))
            ]
            if not ranks:
                continue
            fitted, held_out = (
                patches[which].reshape(-1, patches.shape[-1])
                for which in (calibration.fitting, ~calibration.fitting)
            )
            ((rank,),) = ranks
            row = {
                "layer": call.path,
                "rank": rank,
                "share": macs_of(call, spatial, (rank,)) / dense,
            }
            rows.append(row | errors(call, rank, fitted, held_out))
    figures = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "images": len(calibration.source),
        "seed": experiment.seed,
        "layers": rows,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(asked.out, json.dumps(figures, indent=2) + "\n")
    write_whole(asked.out.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
