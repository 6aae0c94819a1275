"""Measures what networks lose whose plans ``measure_latency_budget.py`` has timed.

    python scripts/measure_plan_errors.py CONFIG FILE.json --out ERRORS.json [--FIELD VALUE ...]

Of each batch size and type in FILE.json: the plan of 4× fewer MACs, and the plan by time that is
as fast as it. Their chains are fitted to the experiment's calibration images, from one calibration,
and evaluated by its metrics.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.files import write_whole
from accel.latency_budget import MACS
from accel.measurements import measure_sensitivity
from accel.network_reconstruction import reconstruct
from accel.plan import AccelerationPlan
from accel.progress import LineProgress
from accel.report.environment import command_line, device_name, versions


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        experiment: Network, weights and images.
        out: The file to write; must not exist. The table of it goes beside it. What there is so far
            is in ``out`` with ``.partial`` at its end.
    """

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path


def main() -> int:
    if len(sys.argv) < 3:
        raise SystemExit("two files are needed: CONFIG, and FILE.json with timed plans")
    config, timed = map(Path, sys.argv[1:3])
    asked = tyro.cli(
        Measurement,
        args=sys.argv[3:],
        default=Measurement(load_config(config, Experiment), Path("plan_errors.json")),
    )
    for file in (asked.out, asked.out.with_suffix(".md")):
        if file.exists():
            raise FileExistsError(f"{file} exists already; nothing is overwritten")
    plans = timed_plans(json.loads(timed.read_text()))
    experiment, progress = asked.experiment, LineProgress()
    original = experiment.load_model()
    reference = experiment.reference(original, progress)
    images = experiment.limited(experiment.calibration)
    calibration = experiment.calibrate(original, images, progress)
    sensitivity = measure_sensitivity(calibration, progress=progress)
    rows: list[dict[str, Any]] = []
    found = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "images": len(calibration.source),
        "rows": rows,
    }
    partial = asked.out.with_name(f"{asked.out.name}.partial")
    fitted: dict[str, dict[str, dict[str, float]]] = {}
    for row, plan in plans:
        key = plan.to_json()
        if key not in fitted:
            progress.say(f"fitting: {row['plan']} at batch {row['batch']}")
            result = reconstruct(calibration, plan, sensitivity=sensitivity, progress=progress)
            fitted[key] = experiment.evaluate(reference, result.model, progress)
        rows.append({**row, "metrics": fitted[key]})
        write_whole(partial, json.dumps(found, indent=2) + "\n")
    write_whole(asked.out.with_suffix(".md"), markdown(found))
    partial.replace(asked.out)
    print(markdown(found))
    return 0


def timed_plans(timed: Mapping[str, Any]) -> list[tuple[dict[str, Any], AccelerationPlan]]:
    """The plans to compare of each batch size and type, with what was measured of them.

    Raises:
        ValueError: If it is no such measurement, or was stopped before it had both.
    """
    if "batches" not in timed:
        raise ValueError(f"no measured budgets: expected batches, found {', '.join(timed)}")
    plans = []
    for batch, measured in timed["batches"].items():
        if "as_fast_as_by_macs" not in measured:
            raise ValueError(f"batch {batch}: the measurement was stopped before its end")
        as_fast = measured["as_fast_as_by_macs"]
        by_macs = ", a plan of the fewest MACs" if as_fast.get("found_by") == MACS else ""
        rows = {
            "4× by MACs": measured["mac_plans_4x"]["by MACs"],
            f"by time, as fast{by_macs}": as_fast,
        }
        for name, row in rows.items():
            if "plan" in row:
                figures = {key: row[key] for key in ("speedup", "mac_speedup")}
                plan = AccelerationPlan.from_json(json.dumps(row["plan"]))
                plans.append(({"batch": batch, "plan": name, **figures}, plan))
    return plans


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was found."""
    text = ["| batch | plan | measured | MACs | metric | value |", "|--:|---|--:|--:|---|--:|"]
    text += [
        f"| {row['batch']} | {row['plan']} | {row['speedup']:.2f}× | {row['mac_speedup']:.2f}×"
        f" | {metric} | {values['accelerated']:.4f} |"
        for row in found["rows"]
        for metric, values in row["metrics"].items()
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
