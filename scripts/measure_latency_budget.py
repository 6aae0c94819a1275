"""Measures what a budget in time delivers: speedup asked for against speedup measured.

    python scripts/measure_latency_budget.py CONFIG --out FILE.json [--FIELD VALUE ...]

On the experiment's network and images, for each batch size: how long timing the layers takes; what
the plans for 2×, 3× and 4× deliver when they are timed once more, in turns with the original; what
plans of 4× fewer MACs deliver, with any ranks and with ranks in steps of 8; how well the corrected
times of layers tell the time of random plans; and the error on the evaluation images of the plans
by MACs and of a plan by time that was made to be as fast as the first of them was measured to be.
The device should have nothing else to do.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from accel.calibration import Calibration, calibrate
from accel.configuration import load_config
from accel.device_times import LayerTimes, measure_times
from accel.error_curves import ErrorCurve
from accel.experiment import Experiment
from accel.files import write_whole
from accel.inference import compile_inference
from accel.interpreter import specification
from accel.latency_budget import select_for_latency
from accel.measurements import measure_errors, measure_sensitivity
from accel.memory import kept_memory, use_one_pool
from accel.network_reconstruction import reconstruct
from accel.plan import AccelerationPlan
from accel.progress import LineProgress
from accel.report.environment import command_line, device_name, versions
from accel.selection import select_ranks, with_promising_chains, with_rank_multiple
from accel.time_correction import correct_times, random_plans
from accel.timed_plan import TimedPlan, time_plan

# Plans of 4× fewer MACs, and what their ranks are multiples of.
MAC_PLANS = {"by MACs": 1, "by MACs, ranks in steps of 8": 8}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        experiment: Network, weights and images.
        out: The file to write; must not exist.
        batch_sizes: Images per batch.
        speedups: Asked for.
        random_plans: How many random plans test the times of layers, per batch size.
        seconds: Time for timing one plan.
        errors: Batch sizes at which errors are measured: of the plans of 4× fewer MACs, and of the
            one by time that is as fast as the first of them.
    """

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path
    batch_sizes: tuple[int, ...] = (1, 8)
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0)
    random_plans: int = 20
    seconds: float = 8.0
    errors: tuple[int, ...] = (1,)


def main() -> int:
    use_one_pool()
    config = Path(sys.argv[1])
    asked = tyro.cli(
        Measurement,
        args=sys.argv[2:],
        default=Measurement(load_config(config, Experiment), Path("latency_budget.json")),
    )
    if asked.out.exists():
        raise FileExistsError(f"{asked.out} exists already; nothing is overwritten")
    experiment, progress = asked.experiment, LineProgress()
    original = experiment.load_model()
    calibration = calibrate(
        original,
        experiment.limited(experiment.calibration),
        decompositions=experiment.decompositions,
        positions_per_image=experiment.positions_per_image,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        rules=experiment.rules,
        progress=progress,
    )
    sensitivity = measure_sensitivity(calibration, progress=progress)
    curves = measure_errors(calibration, sensitivity, progress=progress)
    by_macs = {
        name: with_rank_multiple(
            calibration,
            measure_errors(calibration, sensitivity, rank_multiple=multiple, progress=progress)
            if multiple > 1
            else curves,
            multiple,
            rules=experiment.rules,
        )
        for name, multiple in MAC_PLANS.items()
    }
    # As for a budget in time.
    curves = with_promising_chains(calibration, curves, rules=experiment.rules)
    found: dict[str, Any] = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "images": len(calibration.source),
        "batches": {},
    }
    plans: dict[int, dict[str, AccelerationPlan]] = {}
    for batch_size in asked.batch_sizes:
        with kept_memory():
            row, plans[batch_size] = _batch(
                asked, calibration, original, curves, by_macs, batch_size, progress
            )
        found["batches"][str(batch_size)] = row
        _write(asked.out, found)
    reference = experiment.reference(original, progress)
    for batch_size in asked.errors:
        row = found["batches"][str(batch_size)]
        for name, plan in plans[batch_size].items():
            progress.say(f"fitting the {name} plan for batch {batch_size}")
            result = reconstruct(calibration, plan, sensitivity=sensitivity)
            metrics = experiment.evaluate(reference, result.model, progress)
            row["with_errors"][name]["metrics"] = metrics
            _write(asked.out, found)
    print(markdown(found))
    return 0


def _write(out: Path, found: Mapping[str, Any]) -> None:
    """All figures, and the table of the ones that matter beside them."""
    write_whole(out, json.dumps(found, indent=2) + "\n")
    write_whole(out.with_suffix(".md"), markdown(found))


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what was found."""
    head = "| batch | plan | original | accelerated | measured | of what was asked | MACs |"
    text = ["**budgets**", "", head, "|--:|---|--:|--:|--:|--:|--:|"]

    def line(batch: str, name: str, row: Mapping[str, Any], asked: float) -> str:
        return (
            f"| {batch} | {name} | {row['original_ms']:.1f} ms | {row['accelerated_ms']:.1f} ms"
            f" | {row['speedup']:.2f}× | {row['speedup'] / asked:.3f} | {row['mac_speedup']:.2f}× |"
        )

    for batch, measured in found["batches"].items():
        for asked, row in measured["asked"].items():
            if "refused" in row:
                text.append(f"| {batch} | {asked}× by time | | | refused | | |")
            else:
                text.append(line(batch, f"{asked}× by time", row, float(asked)))
        for name, row in measured["mac_plans_4x"].items():
            text.append(line(batch, f"4× {name}", row, 4.0))
    errors = [
        f"| {batch} | {name} | {row['speedup']:.2f}× | {row['mac_speedup']:.2f}×"
        f" | {metric} | {values['accelerated']:.4f} |"
        for batch, measured in found["batches"].items()
        for name, row in measured["with_errors"].items()
        for metric, values in row.get("metrics", {}).items()
    ]
    if errors:
        head = "| batch | plan | measured | MACs | metric | value |"
        text += ["", "**errors**", "", head, "|--:|---|--:|--:|---|--:|", *errors]
    text += ["", "**prediction**", ""]
    text += [
        "| batch | timing the layers | times of random plans off, median | speedups off |",
        "|--:|--:|--:|--:|",
    ]
    for batch, measured in found["batches"].items():
        times_off, speedups_off = _off(measured["random_plans"])
        text.append(
            f"| {batch} | {measured['timing_seconds']:.0f} s"
            f" | {100 * times_off:.1f} % | {100 * speedups_off:.1f} % |"
        )
    return "\n".join(text) + "\n"


def _batch(
    asked: Measurement,
    calibration: Calibration,
    original: Any,
    curves: Mapping[str, ErrorCurve],
    by_macs: Mapping[str, Mapping[str, ErrorCurve]],
    batch_size: int,
    progress: LineProgress,
) -> tuple[dict[str, Any], dict[str, AccelerationPlan]]:
    """All but the errors for one batch size, and the plans whose errors are measured."""
    rules = asked.experiment.rules
    image_shape = specification(calibration.program.images).shape[1:]
    compiled = compile_inference(original, (batch_size, *image_shape))

    def timed(plan: AccelerationPlan, seconds: float) -> TimedPlan:
        return time_plan(calibration, compiled, plan, times, seconds)

    def figures(timed: TimedPlan, curves: Mapping[str, ErrorCurve] = curves) -> dict[str, Any]:
        total = sum(calibration.macs.values())
        layers = [
            f"{layer.decomposition or 'dense'} {list(layer.ranks)}" for layer in timed.plan.layers
        ]
        macs = _macs(calibration, curves, timed.plan)
        return {**timed.figures(), "mac_speedup": total / macs, "layers": layers}

    start = time.perf_counter()
    # An empty cache, so that the time of timing is that of a first run.
    with tempfile.TemporaryDirectory() as cache:
        measured = measure_times(
            calibration.calls,
            curves,
            batch_size,
            options=calibration.program.options,
            cache=Path(cache),
        )
    times = correct_times(calibration, compiled, measured, curves, rules=rules, progress=progress)
    row: dict[str, Any] = {"timing_seconds": time.perf_counter() - start, "asked": {}}
    progress.say(f"batch {batch_size}: layers timed in {row['timing_seconds']:.0f} s")
    for speedup in asked.speedups:
        try:
            planned = select_for_latency(
                calibration,
                original,
                speedup,
                batch_size=batch_size,
                curves=curves,
                times=times,
                rules=rules,
                progress=progress,
            )
        except ValueError as error:
            row["asked"][f"{speedup:g}"] = {"refused": str(error)}
            progress.say(str(error))
            continue
        again = timed(planned.plan, asked.seconds)
        row["asked"][f"{speedup:g}"] = {
            "planned_speedup": planned.speedup,
            "delivered": again.speedup / speedup,
            **figures(again),
        }
        progress.say(f"asked {speedup:g}×, timed once more: {again.speedup:.2f}×")
    row["mac_plans_4x"], row["with_errors"] = {}, {}
    plans = {}
    for name, chains in by_macs.items():
        plan = select_ranks(calibration, 4.0, curves=chains, rules=rules)
        found = time_plan(calibration, compiled, plan, {}, asked.seconds)
        plans[name] = plan
        row["with_errors"][name] = figures(found, chains)
        row["mac_plans_4x"][name] = {
            **figures(found, chains),
            "measured_over_theoretical": found.speedup / 4.0,
        }
        progress.say(f"4× fewer MACs, {name}: {found.speedup:.2f}× measured")
    by_macs_speedup = row["mac_plans_4x"]["by MACs"]["speedup"]
    equal = select_for_latency(
        calibration,
        original,
        by_macs_speedup,
        batch_size=batch_size,
        curves=curves,
        times=times,
        rules=rules,
        progress=progress,
    )
    plans["by time"] = equal.plan
    row["with_errors"]["by time"] = figures(timed(equal.plan, asked.seconds))
    row["random_plans"] = _random_plans(asked, calibration, curves, times, timed)
    times_off, speedups_off = _off(row["random_plans"])
    progress.say(
        f"random plans (medians): times {times_off:.3f} off, speedups {speedups_off:.3f} off"
    )
    return row, plans


def _macs(
    calibration: Calibration, curves: Mapping[str, ErrorCurve], plan: AccelerationPlan
) -> int:
    """MACs per image of all convolutions."""
    total = sum(calibration.macs.values())
    for layer in plan.layers:
        if layer.decomposition is None:
            continue
        curve = curves[layer.path]
        (macs,) = (
            int(macs)
            for candidate, macs in zip(curve.candidates, curve.macs, strict=True)
            if (candidate.decomposition, candidate.ranks) == (layer.decomposition, layer.ranks)
        )
        total += macs - calibration.macs[layer.path]
    return total


def _random_plans(
    asked: Measurement,
    calibration: Calibration,
    curves: Mapping[str, ErrorCurve],
    times: Mapping[str, LayerTimes],
    timed: Callable[[AccelerationPlan, float], TimedPlan],
) -> dict[str, Any]:
    """Times of random plans, not of those the times were corrected by, and their predictions.

    With them the prediction for the original: a machine whose clock has changed since then slows
    down both.
    """
    plans = random_plans(
        calibration, times, curves, asked.random_plans, seed=1, rules=asked.experiment.rules
    )
    rows = []
    for plan in plans:
        found = timed(plan, asked.seconds / 2)
        rows.append(
            {
                "measured_ms": found.accelerated_ms,
                "predicted_ms": found.layers_ms,
                "original_ms": found.original_ms,
            }
        )
    return {"original_ms": 1000 * sum(layer.dense for layer in times.values()), "plans": rows}


def _off(random_plans: Mapping[str, Any]) -> tuple[float, float]:
    """Medians of how far the predicted times are off, and the predicted speedups, relative."""
    original = random_plans["original_ms"]
    off = [
        (
            abs(row["predicted_ms"] / row["measured_ms"] - 1),
            abs(original / row["predicted_ms"] * row["measured_ms"] / row["original_ms"] - 1),
        )
        for row in random_plans["plans"]
    ]
    times, speedups = np.median(off, axis=0).tolist()
    return times, speedups


if __name__ == "__main__":
    sys.exit(main())
