"""Measures what calibration costs against two plain forward passes over the same images.

    python scripts/measure_calibration_cost.py CONFIG --out FILE.json [--FIELD VALUE …]

In one run: accelerates the network of CONFIG, then times jitted passes of the original and of the
accelerated network over the calibration images, compilation included on both sides and the compiler
told the same. Calibration is
all of ``accelerate`` but solving and, where ranks are selected by errors, measuring these.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from accel.compiler import network_options
from accel.configuration import load_config
from accel.evaluation.forward import forward_function
from accel.experiment import Experiment
from accel.files import write_whole
from accel.images import full_batches
from accel.progress import reported
from accel.report.environment import command_line


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The experiment, and the file for the figures."""

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path


def forward_seconds(model, source, batch_size: int) -> float:
    """Seconds of a jitted pass over all images, without keeping the outputs."""
    start = time.perf_counter()
    forward, state = forward_function(model)
    jitted = jax.jit(forward, compiler_options=network_options(model))
    for batch in full_batches(source, batch_size):
        np.asarray(jitted(state, batch))
    return time.perf_counter() - start


def main() -> None:
    config, *arguments = sys.argv[1:]
    default = Measurement(load_config(Path(config), Experiment), tyro.MISSING)
    asked = tyro.cli(Measurement, args=arguments, default=default)
    if asked.out.exists():
        raise FileExistsError(f"{asked.out} exists already; nothing is overwritten")
    experiment = asked.experiment
    original = experiment.load_model()
    images = experiment.limited(experiment.calibration)
    with reported() as progress:
        result = experiment.accelerate(original, images, progress)
    passes = {
        "original": forward_seconds(original, images, experiment.batch_size),
        "accelerated": forward_seconds(result.model, images, experiment.batch_size),
    }
    report = result.report
    figures = {
        "command": command_line(),
        "device": report.device,
        "versions": dict(report.versions),
        "images": len(images),
        "calibrate_seconds": report.seconds["calibrate"],
        "select_seconds": report.seconds["select"],
        "solve_seconds": report.seconds["solve"],
        "forward_seconds": passes,
        "calibrate_over_two_passes": report.seconds["calibrate"] / sum(passes.values()),
        "memory": dict(report.memory),
    }
    write_whole(asked.out, json.dumps(figures, indent=2) + "\n")
    print(asked.out.read_text())


if __name__ == "__main__":
    main()
