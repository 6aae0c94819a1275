"""Compares the paper's solvers, inputs and rank selections for pairs of k×k and 1×1 at equal MACs.

    python scripts/compare_methods.py CONFIG --out results/NAME [--seeds 0 1 2] [--FIELD VALUE …]

Every combination runs from one calibration a seed. OUT gets ``raw.jsonl`` (a line a run, with its
layers), ``experiment.json`` (what is varied), ``environment.json`` (command, device, versions) and
``table.md``, which is generated from the first. A run that was stopped goes on where it was when
called again, with more speedups and seeds if wanted, but not in the folder of another experiment.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import jax
import tyro

from accel import calibrate, reconstruct, select_ranks
from accel.configuration import load_config
from accel.experiment import Experiment, to_json
from accel.report.environment import command_line, device_name, versions

SOLVERS = {"linear": "reduced_rank_regression", "nonlinear": "alternating"}
RANKS = {"uniform": "uniform", "greedy": "greedy_energy", "exact": "exact_energy"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        out: Folder of results.
        speedups: Original over accelerated MACs.
        seeds: Seeds of image split and positions.
    """

    out: Path
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0)
    seeds: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The grid, and the experiment that is varied."""

    grid: Annotated[Grid, tyro.conf.arg(name="")]
    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]


def record(experiment: Experiment) -> str:
    """The experiment as JSON text; of files and folders only the names, as paths tell of one
    machine."""
    named = _without_folders(experiment)
    if named.weights is not None:
        named = dataclasses.replace(named, weights=Path(named.weights).name)
    return to_json(named)


def _without_folders(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(value.name)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: _without_folders(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)


def begin(out: Path, experiment: Experiment) -> None:
    """Makes the folder of results, or makes sure that the one there is of the same experiment.

    Raises:
        FileExistsError: If ``out`` has results of another experiment, or does not tell of which.
    """
    recorded, raw = out / "experiment.json", out / "raw.jsonl"
    if recorded.exists():
        if recorded.read_text() != record(experiment):
            raise FileExistsError(
                f"{out} holds results of another experiment (see {recorded}); choose another --out"
            )
    elif raw.exists() and raw.read_text().strip():
        raise FileExistsError(
            f"{out} holds results without {recorded.name}, which may be of another experiment;"
            " choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    recorded.write_text(record(experiment))


def run_grid(grid: Grid, experiment: Experiment) -> None:
    raw = grid.out / "raw.jsonl"
    lines = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    done = {_key(line) for line in lines}
    combinations = list(itertools.product(grid.speedups, RANKS, SOLVERS, (False, True)))
    print(f"{len(done)} of {len(grid.seeds) * len(combinations)} runs are there", flush=True)
    original = experiment.load_model()
    images = experiment.limited(experiment.calibration)
    before = experiment.accuracy(original)
    for seed in grid.seeds:
        wanted = [c for c in combinations if (seed, *c) not in done]
        if not wanted:
            continue
        calibration = calibrate(
            original,
            images,
            decompositions="channel",
            positions_per_image=experiment.positions_per_image,
            batch_size=experiment.batch_size,
            seed=seed,
            rules=experiment.rules,
        )
        for speedup, ranks, solver, asymmetric in wanted:
            start = time.perf_counter()
            plan = select_ranks(
                calibration, speedup, rank_selection=RANKS[ranks], rules=experiment.rules
            )
            result = reconstruct(
                calibration,
                plan,
                reconstruction="responses",
                solver=SOLVERS[solver],
                asymmetric=asymmetric,
            )
            line = {
                "seed": seed,
                "speedup": speedup,
                "ranks": ranks,
                "solver": solver,
                "asymmetric": asymmetric,
                "macs": dict(result.report.macs),
                "metrics": experiment.evaluate(original, result.model, before),
                "layers": [dataclasses.asdict(layer) for layer in result.report.layers],
                "seconds": dict(result.report.seconds),
                "memory": dict(result.report.memory),
            }
            with raw.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            print(
                seed,
                speedup,
                ranks,
                solver,
                "asymmetric" if asymmetric else "symmetric",
                {k: round(v["accelerated"], 5) for k, v in line["metrics"].items()},
                f"solve {result.report.seconds['solve']:.0f} s,",
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


def table(lines: list[dict]) -> str:
    """The runs as Markdown: mean over seeds of every metric, a row a method, a column a speedup."""
    metrics = list(lines[0]["metrics"])
    seeds = sorted({line["seed"] for line in lines})
    speedups = sorted({line["speedup"] for line in lines})
    text = []
    for metric in metrics:
        values = defaultdict(list)
        for line in lines:
            method = (line["solver"], line["asymmetric"], line["ranks"])
            values[method, line["speedup"]].append(line["metrics"][metric]["accelerated"])
        before = lines[0]["metrics"][metric].get("original")
        heading = f"**{metric}**, mean over seeds {', '.join(map(str, seeds))}"
        text.append(heading + (f"; original {before:.4f}" if before is not None else "") + "\n")
        text.append("| solver | inputs | ranks | " + " | ".join(f"{s:g}×" for s in speedups) + " |")
        text.append("|---|---|---|" + "--:|" * len(speedups))
        for method in sorted({method for method, _ in values}):
            solver, asymmetric, ranks = method
            cells = [
                f"{mean(values[method, s]):.4f}" if values[method, s] else "" for s in speedups
            ]
            text.append(
                f"| {solver} | {'asymmetric' if asymmetric else 'symmetric'} | {ranks} | "
                + " | ".join(cells)
                + " |"
            )
        text.append("")
    return "\n".join(text) + "\n"


def _key(line: dict) -> tuple:
    return (line["seed"], line["speedup"], line["ranks"], line["solver"], line["asymmetric"])


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
    # Runs of one plan share their compiled segments, across solvers.
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    (out / "environment.json").write_text(
        json.dumps(
            {
                "command": command_line(),
                "device": device_name(),
                "versions": versions(),
            },
            indent=2,
        )
        + "\n"
    )
    run_grid(comparison.grid, comparison.experiment)
    lines = [json.loads(line) for line in (out / "raw.jsonl").read_text().splitlines()]
    (out / "table.md").write_text(table(lines))
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
