"""Measures what networks lose whose plans ``measure_latency_budget.py`` has timed.

    python scripts/measure_plan_errors.py CONFIG FILE.json --out ERRORS.json [--FIELD VALUE ...]

Of each batch size and type in FILE.json: the plan of 4× fewer MACs, and the plan by time that is
as fast as it. Their chains are fitted to the experiment's calibration images, from one calibration,
and evaluated by its metrics. At last the fitted networks of a batch size and type are timed in
turns with each other and with the original; the device should have nothing else to do then.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from flax import nnx

from accel.configuration import load_config
from accel.experiment import Experiment
from accel.files import check_new, write_whole
from accel.inference import compile_inference
from accel.latency_budget import MACS
from accel.measurements import measure_sensitivity
from accel.memory import kept_memory, use_one_pool
from accel.network_reconstruction import reconstruct
from accel.plan import AccelerationPlan
from accel.progress import LineProgress
from accel.report.environment import command_line, device_name, versions
from accel.timing_rounds import speedup_in_rounds, time_rounds


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        experiment: Network, weights and images.
        out: The file to write; must not exist. The table of it goes beside it. What there is so far
            is in ``out`` with ``.partial`` at its end.
        seconds: Time for timing the networks of one batch size and type.
    """

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path
    seconds: float = 60.0


def main() -> int:
    use_one_pool()
    if len(sys.argv) < 3:
        raise SystemExit("two files are needed: CONFIG, and FILE.json with timed plans")
    config, timed = map(Path, sys.argv[1:3])
    asked = tyro.cli(
        Measurement,
        args=sys.argv[3:],
        default=Measurement(load_config(config, Experiment), Path("plan_errors.json")),
    )
    check_new(asked.out)
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
    models: dict[str, nnx.Module] = {}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    for row, plan in plans:
        key = plan.to_json()
        if key not in models:
            progress.say(f"fitting: {row['plan']} at batch {row['batch']}")
            result = reconstruct(calibration, plan, sensitivity=sensitivity, progress=progress)
            models[key] = result.model
            metrics[key] = experiment.evaluate(reference, result.model, progress)
        rows.append({**row, "metrics": metrics[key]})
        write_whole(partial, json.dumps(found, indent=2) + "\n")
    for batch in dict.fromkeys(row["batch"] for row in rows):
        progress.say(f"timing networks in turns at batch {batch}")
        # What is a plan of both is one network.
        networks = {
            plan.to_json(): models[plan.to_json()] for row, plan in plans if row["batch"] == batch
        }
        size, dtype = next(
            (row["batch_size"], row["dtype"]) for row in rows if row["batch"] == batch
        )
        shape = (size, *images.image_shape)
        milliseconds = times_in_turns(original, networks, shape, dtype, asked.seconds)
        for row, (_, plan) in zip(rows, plans, strict=True):
            if row["batch"] == batch:
                before, after = milliseconds["original"], milliseconds[plan.to_json()]
                row["original_ms"] = float(np.median(before))
                row["in_turns_ms"] = float(np.median(after))
                speedup, error = speedup_in_rounds(before, after)
                row |= {"in_turns_speedup": speedup, "in_turns_speedup_error": error}
        write_whole(partial, json.dumps(found, indent=2) + "\n")
    write_whole(asked.out.with_suffix(".md"), markdown(found))
    partial.replace(asked.out)
    print(markdown(found))
    return 0


def times_in_turns(
    original: nnx.Module,
    networks: Mapping[str, nnx.Module],
    shape: tuple[int, ...],
    dtype: str,
    seconds: float,
) -> dict[str, list[float]]:
    """Milliseconds of the original and of the networks for a batch, all in turns."""
    images = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))
    compiled = {
        name: compile_inference(network, shape, dtype)
        for name, network in {"original": original, **networks}.items()
    }
    with kept_memory():
        return time_rounds(
            {
                name: lambda network=network: jax.block_until_ready(network(images))
                for name, network in compiled.items()
            },
            repeats=1000,
            seconds=seconds,
        )


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
        if missing := {"batch_size", "dtype"} - measured.keys():
            raise ValueError(f"batch {batch}: expected its {' and '.join(sorted(missing))}")
        as_fast = measured["as_fast_as_by_macs"]
        by_macs = ", a plan of the fewest MACs" if as_fast.get("found_by") == MACS else ""
        rows = {
            "4× by MACs": measured["mac_plans_4x"]["by MACs"],
            f"by time, as fast{by_macs}": as_fast,
        }
        for name, row in rows.items():
            if "plan" in row:
                figures = {key: measured[key] for key in ("batch_size", "dtype")}
                figures |= {key: row[key] for key in ("speedup", "mac_speedup")}
                plan = AccelerationPlan.from_json(json.dumps(row["plan"]))
                plans.append(({"batch": batch, "plan": name, **figures}, plan))
    return plans


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was found."""
    text = [
        "| batch | plan | original | accelerated | measured | MACs | metric | value |",
        "|--:|---|--:|--:|--:|--:|---|--:|",
    ]
    text += [
        f"| {row['batch']} | {row['plan']} | {row['original_ms']:.1f} ms"
        f" | {row['in_turns_ms']:.1f} ms | {row['in_turns_speedup']:.2f}×"
        f" | {row['mac_speedup']:.2f}× | {metric} | {values['accelerated']:.4f} |"
        for row in found["rows"]
        for metric, values in row["metrics"].items()
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
