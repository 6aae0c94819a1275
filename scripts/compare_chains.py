"""Compares chains at equal MACs: rivals that see no image, the paper's, the best of each layer.

    python scripts/compare_chains.py CONFIG --out results/NAME [--speedups 2 3 4 5] [--seeds 0]
        [--FIELD VALUE …]

OUT gets ``raw.jsonl`` (a line a run, with its layers), ``experiment.json`` (what is varied),
``environment.json`` (command, device, versions) and ``table.md``, which is generated from the
first. A run that was stopped goes on where it was when called again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated

import tyro
from compare_methods import begin

from accel import (
    calibrate,
    measure_errors,
    measure_sensitivity,
    reconstruct,
    select_ranks,
)
from accel.calibration import ALL_KINDS
from accel.configuration import load_config
from accel.experiment import Experiment
from accel.report.environment import command_line, device_name, versions
from accel.selection import MEASURED_ERROR


@dataclasses.dataclass(frozen=True)
class Method:
    """What replaces the layers, how it is fitted, and how ranks are chosen."""

    decompositions: tuple[str, ...]
    reconstruction: str
    rank_selection: str


METHODS: Mapping[str, Method] = {
    "weight SVD": Method(("channel",), "weights", "exact_energy"),
    "Tucker-2": Method(("tucker2",), "weights", "exact_energy"),
    "Jaderberg": Method(("spatial",), "weights", "exact_energy"),
    "Jaderberg, responses": Method(("spatial",), "responses", "exact_energy"),
    "paper, channel": Method(("channel",), "responses", "greedy_energy"),
    "paper, 3d": Method(("channel_spatial",), "responses", "greedy_energy"),
    "best of each layer": Method(ALL_KINDS, "joint", MEASURED_ERROR),
}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        out: Folder of results.
        speedups: Original over accelerated MACs.
        seeds: Seeds of image split and positions.
    """

    out: Path
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0)
    seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The grid, and the experiment that is varied."""

    grid: Annotated[Grid, tyro.conf.arg(name="")]
    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]


def run_grid(grid: Grid, experiment: Experiment) -> None:
    raw = grid.out / "raw.jsonl"
    lines = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    done = {(line["seed"], line["method"], line["speedup"]) for line in lines}
    original = experiment.load_model()
    images = experiment.limited(experiment.calibration)
    before = experiment.accuracy(original)
    for seed, (name, method) in itertools.product(grid.seeds, METHODS.items()):
        wanted = [s for s in grid.speedups if (seed, name, s) not in done]
        if not wanted:
            continue
        calibration = calibrate(
            original,
            images,
            decompositions=method.decompositions,
            positions_per_image=experiment.positions_per_image,
            batch_size=experiment.batch_size,
            seed=seed,
            rules=experiment.rules,
        )
        sensitivity, curves = None, None
        if method.rank_selection == MEASURED_ERROR:
            sensitivity = measure_sensitivity(calibration)
            curves = measure_errors(calibration, sensitivity)
        for speedup in wanted:
            start = time.perf_counter()
            plan = select_ranks(
                calibration,
                speedup,
                rank_selection=method.rank_selection,
                rules=experiment.rules,
                curves=curves,
            )
            result = reconstruct(
                calibration,
                plan,
                reconstruction=method.reconstruction,
                sensitivity=sensitivity,
            )
            line = {
                "seed": seed,
                "method": name,
                "speedup": speedup,
                **dataclasses.asdict(method),
                "macs": dict(result.report.macs),
                "metrics": experiment.evaluate(original, result.model, before),
                "layers": [dataclasses.asdict(layer) for layer in result.report.layers],
                "seconds": dict(result.report.seconds),
            }
            with raw.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            figures = {k: round(v["accelerated"], 5) for k, v in line["metrics"].items()}
            seconds = time.perf_counter() - start
            print(seed, name, speedup, figures, f"{seconds:.0f} s", flush=True)


def table(lines: list[dict]) -> str:
    """The runs as Markdown: mean over seeds of every metric, a row a method, a column a speedup."""
    speedups = sorted({line["speedup"] for line in lines})
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    text = []
    for metric in lines[0]["metrics"]:
        values = defaultdict(list)
        for line in lines:
            values[line["method"], line["speedup"]].append(line["metrics"][metric]["accelerated"])
        before = lines[0]["metrics"][metric].get("original")
        heading = f"**{metric}**, mean over seeds {seeds}"
        text.append(heading + (f"; original {before:.4f}" if before is not None else "") + "\n")
        text.append("| chains | " + " | ".join(f"{s:g}×" for s in speedups) + " |")
        text.append("|---|" + "--:|" * len(speedups))
        for name in METHODS:
            cells = [f"{mean(values[name, s]):.4f}" if values[name, s] else "" for s in speedups]
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text) + "\n"


def main() -> None:
    config, *arguments = sys.argv[1:]
    experiment = load_config(Path(config), Experiment)
    comparison = tyro.cli(
        Comparison, args=arguments, default=Comparison(Grid(tyro.MISSING), experiment)
    )
    out = comparison.grid.out
    try:
        begin(out, comparison.experiment)
    except FileExistsError as error:
        sys.exit(str(error))
    environment = {"command": command_line(), "device": device_name(), "versions": versions()}
    (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    run_grid(comparison.grid, comparison.experiment)
    lines = [json.loads(line) for line in (out / "raw.jsonl").read_text().splitlines()]
    (out / "table.md").write_text(table(lines))
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
