"""Measures what a second sweep gains on the network of a run that is done.

    python scripts/measure_second_sweep.py CONFIG RUN --out FILE.json [--iterations N] [--FIELD …]

The accelerated network in the folder RUN is refitted (``accel.refit``) to the outputs of CONFIG's
original on CONFIG's calibration images, and measured on its evaluation images before and after. A
run that is stopped goes on where it was, from ``FILE.resume``, when it is called again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import tyro

from accel.checkpoint import load_model
from accel.configuration import load_config
from accel.experiment import Experiment
from accel.files import write_whole
from accel.memory import peak_bytes
from accel.progress import reported
from accel.repair import refit
from accel.report.environment import command_line, device_name, versions


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The experiment, the number of iterations, and the file for the figures."""

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path
    iterations: int = 1


def main() -> None:
    config, run, *arguments = sys.argv[1:]
    default = Measurement(load_config(Path(config), Experiment), tyro.MISSING)
    asked = tyro.cli(Measurement, args=arguments, default=default)
    if asked.out.exists():
        raise SystemExit(f"{asked.out} exists already; nothing is overwritten")
    experiment = asked.experiment
    original = experiment.load_model()
    accelerated = load_model(Path(run) / "model", experiment.model.build)
    images = experiment.limited(experiment.calibration)
    resume = asked.out.with_suffix(".resume")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with reported() as progress:
        found = refit(
            original,
            accelerated,
            images,
            iterations=asked.iterations,
            batch_size=experiment.batch_size,
            seed=experiment.seed,
            resume=resume,
            progress=progress,
        )
        reference = experiment.reference(original, progress)
        metrics = {
            "before": experiment.evaluate(reference, accelerated, progress),
            "after": experiment.evaluate(reference, found.model, progress),
        }
    figures = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "images": len(images),
        "held_out_errors": list(found.history),
        "steps": list(found.steps),
        "seconds": found.seconds,
        "metrics": metrics,
        "measured_peak_bytes": peak_bytes(),
    }
    write_whole(asked.out, json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(resume, ignore_errors=True)
    print(asked.out.read_text())


if __name__ == "__main__":
    main()
