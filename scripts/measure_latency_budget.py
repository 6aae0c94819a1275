"""Measures what a budget in time delivers: speedup asked for against speedup measured.

    python scripts/measure_latency_budget.py CONFIG --curves CURVES.json --out FILE.json [--FIELD …]

For each batch size and type: how long timing the layers takes; what the plans for 2×, 3× and 4×
deliver when they are timed once more, in turns with the original; what plans of 4× fewer MACs
deliver, with any ranks and with ranks in steps of 8; the plan by time that is as fast as the first
of these; and how well the corrected times of layers tell the time of random plans. The device
should have nothing else to do.

The errors by which plans are chosen are read from CURVES.json, or measured on the experiment's
images and written there. Where they are read, times hang neither on weights nor on images, so that
``--weights`` can be left out and a few images do: errors can be measured on one machine and times
on another. What the plans' networks lose is measured by ``measure_plan_errors.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from flax import nnx

from accel.calibration import Calibration
from accel.chain_filters import measured_multiple, with_promising_chains, with_rank_multiple
from accel.configuration import load_config
from accel.device_times import LayerTimes, measure_times
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import check_dtype
from accel.experiment import Experiment
from accel.files import check_new, write_whole
from accel.inference import Inference, compile_inference, with_any_weights
from accel.interpreter import specification
from accel.latency_budget import MACS, PRECISION, TOLERANCE, select_for_latency
from accel.measurements import measure_errors, measure_sensitivity
from accel.memory import kept_memory, use_one_pool
from accel.plan import AccelerationPlan
from accel.progress import LineProgress
from accel.rank_selection import Candidate, check_speedup
from accel.report.environment import command_line, device_name, versions
from accel.selection import (
    conv_macs_of,
    select_ranks,
)
from accel.time_correction import STAGES, correct_times, random_plans
from accel.timed_plan import TimedPlan, time_plan, time_plans
from accel.timing_rounds import REPEATS, check_measurement

# Plans of 4× fewer MACs, and what their ranks are multiples of.
MAC_PLANS = {"by MACs": 1, "by MACs, ranks in steps of 8": 8}
# How many images a network is traced with where errors were measured before.
FEW_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured (see the module's docstring).

    Attributes:
        experiment: Network, weights and images; plans by time have ranks that are multiples of its
            ``rank_multiple``.
        curves: File of the error curves; read where it exists, or else written.
        out: The file to write; must not exist. The table of it goes beside it. What there is so far
            is in ``out`` with ``.partial`` at its end.
        batch_sizes: Images per batch. Without any, errors are measured and nothing is timed.
        dtypes: What networks compute in.
        speedups: Asked for.
        random_plans: How many random plans test the times of layers, per batch size and type.
        seconds: Time for timing one plan; three times as long at most on a device whose speed
            changes.
    """

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    curves: Path
    out: Path
    batch_sizes: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("float32",)
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0)
    random_plans: int = 20
    seconds: float = 8.0


def main() -> int:
    use_one_pool()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} CONFIG --out FILE --curves FILE …")
    config = Path(sys.argv[1])
    asked = tyro.cli(
        Measurement,
        args=sys.argv[2:],
        default=Measurement(load_config(config, Experiment), tyro.MISSING, tyro.MISSING),
    )
    check_new(asked.out)
    if asked.batch_sizes:
        check_measurement("timing plans", asked.batch_sizes, REPEATS, asked.seconds)
    for dtype in asked.dtypes:
        check_dtype(dtype)
    for speedup in asked.speedups:
        check_speedup("speedups", speedup)
    progress = LineProgress()
    calibration, curves, original = _curves(asked, progress)
    if not asked.batch_sizes:
        progress.say(f"errors are in {asked.curves}; no batch sizes, so that nothing is timed")
        return 0
    found: dict[str, Any] = {
        "command": command_line(),
        "device": device_name(),
        "versions": versions(),
        "batches": {},
    }

    partial = asked.out.with_name(f"{asked.out.name}.partial")

    def write() -> None:
        write_whole(partial, json.dumps(found, indent=2) + "\n")

    for dtype, batch_size in itertools.product(asked.dtypes, asked.batch_sizes):
        row: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype}
        found["batches"][f"{batch_size}, {dtype}"] = row
        with kept_memory():
            _batch(asked, calibration, original, curves, row, progress, write)
    write_whole(asked.out.with_suffix(".md"), markdown(found))
    partial.replace(asked.out)
    print(markdown(found))
    return 0


Curves = Mapping[str, ErrorCurve]


def _curves(
    asked: Measurement, progress: LineProgress
) -> tuple[Calibration, Mapping[int, Curves], nnx.Module]:
    """The calibration, error curves by what ranks are rounded to, and the original network."""
    known, experiment = asked.curves.exists(), asked.experiment
    curves: Mapping[int, Curves] = {}
    of = {
        "model": dataclasses.asdict(experiment.model),
        "decompositions": list(experiment.decompositions),
        "rules": dict(experiment.rules),
        "multiples": sorted({*MAC_PLANS.values(), measured_multiple(experiment.rank_multiple)}),
    }
    if known:
        curves = from_json(asked.curves.read_text(), of, asked.curves.name)
        experiment = dataclasses.replace(
            experiment, image_limit=FEW_IMAGES, positions_per_image=1, batch_size=FEW_IMAGES
        )
    if known and experiment.weights is None:
        original = with_any_weights(experiment.model.build())
    else:
        original = experiment.load_model()
    images = experiment.limited(experiment.calibration)
    calibration = experiment.calibrate(original, images, progress)
    if not known:
        sensitivity = measure_sensitivity(calibration, progress=progress)
        curves = {
            multiple: measure_errors(
                calibration, sensitivity, rank_multiple=multiple, progress=progress
            )
            for multiple in of["multiples"]
        }
        write_whole(asked.curves, to_json(curves, of))
    return calibration, curves, original


def to_json(curves: Mapping[int, Curves], of: Mapping[str, Any]) -> str:
    """Error curves by what ranks were rounded to, as JSON text.

    Args:
        curves: The curves.
        of: What they are curves of.
    """
    content = {
        str(multiple): {
            path: {
                "chains": [[chain.decomposition, *chain.ranks] for chain in curve.candidates],
                "macs": curve.macs.tolist(),
                "errors": curve.errors.tolist(),
            }
            for path, curve in found.items()
        }
        for multiple, found in curves.items()
    }
    return json.dumps({"of": of, "curves": content}) + "\n"


def from_json(text: str, of: Mapping[str, Any], name: str) -> Mapping[int, Curves]:
    """The error curves that ``to_json`` wrote.

    Raises:
        ValueError: If the text, that of the file ``name``, holds no curves, or those of another
            network.
    """
    try:
        content = json.loads(text)
        found = content["of"]
        curves = {
            int(multiple): {
                path: ErrorCurve(
                    tuple(Candidate(kind, tuple(ranks)) for kind, *ranks in curve["chains"]),
                    np.array(curve["macs"], np.int64),
                    np.array(curve["errors"]),
                )
                for path, curve in by_path.items()
            }
            for multiple, by_path in content["curves"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} holds no error curves: {error!r}") from error
    if found != json.loads(json.dumps(of)):
        raise ValueError(f"{name} holds error curves of {found}; expected those of {dict(of)}")
    return curves


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
        for asked, row in measured.get("asked", {}).items():
            if "refused" in row:
                text.append(f"| {batch} | {asked}× by time | | | refused | | |")
            else:
                text.append(line(batch, f"{asked}× by time{found_by(row)}", row, float(asked)))
        for name, row in measured.get("mac_plans_4x", {}).items():
            if "refused" in row:
                text.append(f"| {batch} | 4× {name} | | | refused | | |")
            else:
                text.append(line(batch, f"4× {name}", row, 4.0))
    text += ["", "**prediction**", ""]
    text += [
        "| batch | timing the layers | times of random plans off, median | speedups off |",
        "|--:|--:|--:|--:|",
    ]
    for batch, measured in found["batches"].items():
        if not measured.get("random_plans", {}).get("plans"):
            continue
        times_off, speedups_off = _off(measured["random_plans"])
        text.append(
            f"| {batch} | {measured['timing_seconds']:.0f} s"
            f" | {100 * times_off:.1f} % | {100 * speedups_off:.1f} % |"
        )
    return "\n".join(text) + "\n"


def found_by(row: Mapping[str, Any]) -> str:
    """For a plan within a time that was chosen by MACs, this; earlier versions did not tell."""
    return ", a plan of the fewest MACs" if row.get("found_by") == MACS else ""


def _batch(
    asked: Measurement,
    calibration: Calibration,
    original: nnx.Module,
    curves: Mapping[int, Curves],
    row: dict[str, Any],
    progress: LineProgress,
    write: Callable[[], None],
) -> None:
    """All there is to measure for a batch size and type, put into the row as it is found."""
    rules, batch_size, dtype = asked.experiment.rules, row["batch_size"], row["dtype"]
    image_shape = specification(calibration.program.images).shape[1:]
    compiled = compile_inference(original, (batch_size, *image_shape), dtype)
    by_macs = {
        multiple: with_rank_multiple(calibration, curves[multiple], multiple, rules=rules)
        for multiple in MAC_PLANS.values()
    }
    # As for a budget in time.
    multiple = asked.experiment.rank_multiple
    by_time = with_promising_chains(
        calibration,
        with_rank_multiple(calibration, curves[measured_multiple(multiple)], multiple, rules=rules),
        rank_multiple=multiple,
        rules=rules,
    )

    def figures(timed: TimedPlan) -> dict[str, Any]:
        total = sum(calibration.macs.values())
        return {
            **timed.figures(),
            "mac_speedup": total / conv_macs_of(calibration, timed.plan),
            "plan": json.loads(timed.plan.to_json()),
        }

    start = time.perf_counter()
    # An empty cache, so that the time of timing is that of a first run.
    with tempfile.TemporaryDirectory() as cache:
        measured = measure_times(
            calibration.calls,
            by_time,
            batch_size,
            dtype=dtype,
            options=calibration.program.options,
            cache=Path(cache),
            progress=progress,
        )
    row["timing_layers_seconds"] = time.perf_counter() - start
    times = correct_times(
        calibration,
        compiled,
        measured,
        by_time,
        rules=rules,
        seconds=asked.seconds / 5,
        progress=progress,
    )
    row["timing_seconds"] = time.perf_counter() - start
    progress.say(
        f"batch {batch_size}, {dtype}: layers timed in {row['timing_layers_seconds']:.0f} s, with"
        f" networks {row['timing_seconds']:.0f} s"
    )
    write()

    def planned(speedup: float) -> TimedPlan:
        return select_for_latency(
            calibration,
            original,
            speedup,
            batch_size=batch_size,
            dtype=dtype,
            curves=by_time,
            times=times,
            rank_multiple=multiple,
            rules=rules,
            seconds=0.75 * asked.seconds,
            progress=progress,
        )

    def again(plan: AccelerationPlan) -> TimedPlan:
        return time_plan(calibration, compiled, plan, times, asked.seconds, PRECISION)

    row["asked"] = {}
    for speedup in asked.speedups:
        try:
            chosen = planned(speedup)
        except ValueError as error:
            row["asked"][f"{speedup:g}"] = {"refused": str(error)}
            progress.say(str(error))
            continue
        delivered = again(chosen.plan)
        row["asked"][f"{speedup:g}"] = {
            "planned_speedup": chosen.speedup,
            "delivered": delivered.speedup / speedup,
            **figures(dataclasses.replace(delivered, found_by=chosen.found_by)),
        }
        progress.say(f"asked {speedup:g}×, timed once more: {delivered.speedup:.2f}×")
        write()
    row["mac_plans_4x"] = {}
    for name, multiple in MAC_PLANS.items():
        try:
            plan = select_ranks(calibration, 4.0, curves=by_macs[multiple], rules=rules)
        except ValueError as error:
            row["mac_plans_4x"][name] = {"refused": str(error)}
            progress.say(f"4× fewer MACs, {name}: {error}")
            continue
        found = time_plan(calibration, compiled, plan, {}, asked.seconds, PRECISION)
        row["mac_plans_4x"][name] = {
            **figures(found),
            "measured_over_theoretical": found.speedup / 4.0,
        }
        progress.say(f"4× fewer MACs, {name}: {found.speedup:.2f}× measured")
    write()
    row["random_plans"] = _random_plans(asked, calibration, compiled, by_time, times)
    if row["random_plans"]["plans"]:
        times_off, speedups_off = _off(row["random_plans"])
        progress.say(
            f"random plans (medians): times {times_off:.3f} off, speedups {speedups_off:.3f} off"
        )
    write()
    fewest_macs = row["mac_plans_4x"]["by MACs"]
    try:
        if "refused" in fewest_macs:
            raise ValueError(fewest_macs["refused"])
        # So much faster that a plan within the tolerance is as fast.
        chosen = planned((1 + TOLERANCE) * fewest_macs["speedup"])
        delivered = dataclasses.replace(again(chosen.plan), found_by=chosen.found_by)
        row["as_fast_as_by_macs"] = figures(delivered)
    except ValueError as error:
        row["as_fast_as_by_macs"] = {"refused": str(error)}
    write()


def _random_plans(
    asked: Measurement,
    calibration: Calibration,
    compiled: Inference,
    curves: Curves,
    times: Mapping[str, LayerTimes],
) -> dict[str, Any]:
    """Times of random plans, not of those the times were corrected by, and their predictions.

    With them the prediction for the original: a machine whose clock has changed since then slows
    down both.
    """
    plans = random_plans(
        calibration, times, curves, asked.random_plans, seed=STAGES, rules=asked.experiment.rules
    )
    rows = [
        {
            "measured_ms": found.accelerated_ms,
            "predicted_ms": found.layers_ms,
            "original_ms": found.original_ms,
            "speedup": found.speedup,
        }
        for found in time_plans(calibration, compiled, plans, times, asked.seconds, PRECISION)
    ]
    return {"original_ms": 1000 * sum(layer.dense for layer in times.values()), "plans": rows}


def _off(random_plans: Mapping[str, Any]) -> tuple[float, float]:
    """Medians of how far the predicted times are off, and the predicted speedups, relative."""
    original = random_plans["original_ms"]
    off = [
        (
            abs(row["predicted_ms"] / row["measured_ms"] - 1),
            abs(original / row["predicted_ms"] / row["speedup"] - 1),
        )
        for row in random_plans["plans"]
    ]
    times, speedups = np.median(off, axis=0).tolist()
    return times, speedups


if __name__ == "__main__":
    sys.exit(main())
