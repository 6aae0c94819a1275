"""Whole networks at equal MACs: rivals that see no image, the paper's chains, the best of all.

Each method accelerates the network at every speedup (``plain``); what it gave can then, without
labels, be refitted as a whole (``second sweep``) or distilled from the original (``repair``),
trained further on labelled images (``finetune``), and, as the paper's control, trained from fresh
parameters (``scratch``).

One calibration for each seed and set of decompositions, and one set of error curves, serve all
speedups. The plain network of a cell is kept in the folder as long as a stage has to start from it:
a run that was stopped in hours of training does not calibrate again, and all stages start from the
same file. Where it is gone, because stages were asked for later, it is made once more by its seed.
Of a network that was not finished, the layers that were solved are taken over.

Times follow the cells, at the experiment's ``latency_batches`` (see ``accel.tables.times``).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, final

import jax
from flax import nnx

from accel.calibration import ALL_KINDS, Calibration
from accel.checkpoint import load_model, save_model
from accel.data import PixelSource
from accel.error_curves import ErrorCurve
from accel.evaluation.accuracy import check_labelled, output_classes
from accel.evaluation.forward import forward_function, output_shape
from accel.experiment import Reference
from accel.files import write_whole
from accel.finetuning_experiment import Finetuning
from accel.measurements import measure_errors, measure_sensitivity
from accel.network_reconstruction import Result, reconstruct
from accel.progress import Progress
from accel.rank_selection import check_speedup
from accel.reconstruction import JOINT
from accel.reinitialize import reinitialized
from accel.repair import Distillation, distill, refit
from accel.selection import MEASURED_ERROR, select_ranks
from accel.sensitivity import Sensitivity
from accel.tables.grid import Cell, Line, Table, check_names
from accel.tables.pivot import Entry, metric_tables, pivot, seeds_text
from accel.tables.times import times_of


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
    "ours": Method(ALL_KINDS, "joint", MEASURED_ERROR),
}

PLAIN = "plain"
SWEEP = "second sweep"
STAGES = (PLAIN, SWEEP, "repair", "finetune", "scratch")
# Those that need labelled images.
TRAINED = ("finetune", "scratch")
# The fields that stages have settings of their own in.
SETTINGS = {"repair": "repair", **dict.fromkeys(TRAINED, "training")}


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeNetwork(Table):
    """What is compared (see the module's docstring).

    Attributes:
        training: How, and on which labelled images, networks are trained; its ``evaluation``,
            ``seed`` and ``from_scratch`` are not looked at, the table says them itself.
        repair: How networks are distilled, on the calibration images.
        methods: What is compared, by name; by default all that are known (``METHODS``).
        speedups: Original over accelerated MACs.
        stages: ``plain``, ``second sweep``, ``repair``, ``finetune``, ``scratch``; ``plain``, from
            which the others start, is always measured.
    """

    AXES: ClassVar = ("seeds", "methods", "speedups", "stages")
    KEY: ClassVar = ("seed", "method", "speedup", "stage")
    TIMED: ClassVar = True

    training: Finetuning
    repair: Distillation = dataclasses.field(default_factory=Distillation)
    methods: tuple[str, ...] = tuple(METHODS)
    speedups: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0)
    stages: tuple[str, ...] = (PLAIN,)

    def smoke(self) -> WholeNetwork:
        return dataclasses.replace(
            self,
            experiment=self.experiment.smoke(),
            training=self.training.smoke(),
            repair=dataclasses.replace(self.repair, epochs=1),
            seeds=self.seeds[:1],
            methods=self.methods[:1],
            speedups=self.speedups[:1],
        )

    def cells(self) -> list[Cell]:
        stages = dict.fromkeys((PLAIN, *self.stages))
        return list(itertools.product(self.seeds, self.methods, self.speedups, stages))

    def unused(self) -> set[str]:
        return {"training", "repair"} - {SETTINGS.get(stage) for stage in self.stages}

    def bound(self, lines: Sequence[Line]) -> set[str]:
        # Of stages that were begun, checkpoints tell their own settings apart.
        return {name for line in lines if (name := SETTINGS.get(line["stage"])) is not None}

    def check(self, original: nnx.Module, images: PixelSource) -> None:
        check_names("method", self.methods, METHODS)
        check_names("stage", self.stages, STAGES)
        for speedup in self.speedups:
            check_speedup("speedup", speedup)
        self.experiment.check(original)
        if not set(self.stages).intersection(TRAINED):
            return
        self.training.check()
        batch = jax.ShapeDtypeStruct((1, *images.image_shape), "float32")
        name = type(original).__name__
        shape = output_shape(*forward_function(original), batch, name)
        for asked_for in ("images", "held_back"):
            if (labelled := getattr(self.training, asked_for)) is not None:
                output_classes(shape, name, self.training.limited(labelled))
                check_labelled(self.training.limited(labelled), f"training.{asked_for}")

    def measure(
        self,
        original: nnx.Module,
        images: PixelSource,
        wanted: Sequence[Cell],
        unfinished: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        reference = self.experiment.reference(original, progress)
        # Methods with the same decompositions follow each other: one calibration at a time is held.
        order = {kinds: i for i, kinds in enumerate(METHODS[m].decompositions for m in METHODS)}
        ordered = sorted(wanted, key=lambda c: (c[0], order[METHODS[c[1]].decompositions]))
        for (seed, kinds), group in itertools.groupby(
            ordered, key=lambda c: (c[0], METHODS[c[1]].decompositions)
        ):
            # Only called where a network has to be made: those of a stopped run may all be there.
            calibration = functools.cache(
                functools.partial(self.calibrate, original, images, kinds, seed, progress)
            )
            sensitivity = functools.cache(
                lambda c=calibration: measure_sensitivity(c(), progress=progress)
            )
            curves = functools.cache(
                lambda c=calibration, s=sensitivity: measure_errors(c(), s(), progress=progress)
            )
            for (method, speedup), cells in itertools.groupby(group, key=lambda c: c[1:3]):
                missing = [stage for *_, stage in cells]
                folder = unfinished / _folder_name(seed, method, speedup)
                yield from self._measure_one(
                    _Start(original, images, reference, seed, method, speedup),
                    missing,
                    calibration,
                    sensitivity,
                    curves,
                    folder,
                    progress,
                )
                # Stages that were not asked for this time may have been stopped on the way.
                if not any((folder / stage).exists() for stage in STAGES):
                    shutil.rmtree(folder, ignore_errors=True)

    def _measure_one(
        self,
        start: _Start,
        missing: Sequence[str],
        calibration: Callable[[], Calibration],
        sensitivity: Callable[[], dict[str, Sensitivity]],
        curves: Callable[[], dict[str, ErrorCurve]],
        folder: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        """The stages that are missing of one network."""
        model_folder, line_file = folder / "model", folder / "plain.json"
        if not line_file.exists():
            plain, result = self._accelerated(
                start, calibration(), sensitivity, curves, folder / "layers", progress
            )
            if missing == [PLAIN]:
                yield self._evaluated(plain, start, result.model, progress)
                return
            shutil.rmtree(model_folder, ignore_errors=True)
            save_model(model_folder, result.model, self.experiment.model, result.plan)
            # Last: where the line is, the model is there.
            write_whole(line_file, json.dumps(plain))
        plain = json.loads(line_file.read_text())
        model = load_model(model_folder, self.experiment.model.build)
        for stage in missing:
            if stage == PLAIN:
                yield self._evaluated(plain, start, model, progress)
                continue
            checkpoints = folder / stage
            progress.say(f"{start.method}, {start.speedup:g}×, seed {start.seed}: {stage}")
            after, told = self._stage(stage, start, model, checkpoints, progress)
            line = {
                **start.line(stage),
                "macs": plain["macs"],
                # The errors of single layers are those of the plain network.
                "layers": [
                    {name: value for name, value in layer.items() if name != "response_error"}
                    for layer in plain["layers"]
                ],
                **told,
            }
            yield self._evaluated(line, start, after, progress)
            shutil.rmtree(checkpoints, ignore_errors=True)

    def _accelerated(
        self,
        start: _Start,
        calibration: Calibration,
        sensitivity: Callable[[], dict[str, Sensitivity]],
        curves: Callable[[], dict[str, ErrorCurve]],
        resume: Path,
        progress: Progress,
    ) -> tuple[Line, Result]:
        """The network as accelerated, and its line but for what is measured of it as a whole."""
        method = METHODS[start.method]
        measured = curves() if method.rank_selection == MEASURED_ERROR else None
        began = time.perf_counter()
        plan = select_ranks(
            calibration,
            start.speedup,
            rank_selection=method.rank_selection,
            rules=self.experiment.rules,
            curves=measured,
        )
        selected = time.perf_counter() - began
        result = reconstruct(
            calibration,
            plan,
            reconstruction=method.reconstruction,
            sensitivity=sensitivity() if method.reconstruction == JOINT else None,
            resume=resume,
            progress=progress,
        )
        line = {
            **start.line(PLAIN),
            "macs": dict(result.report.macs),
            "layers": [dataclasses.asdict(layer) for layer in result.report.layers],
            "seconds": {**result.report.seconds, "select": selected},
        }
        return line, result

    def _stage(
        self, stage: str, start: _Start, model: nnx.Module, checkpoints: Path, progress: Progress
    ) -> tuple[nnx.Module, Line]:
        """The network after a stage, and what there is to tell of it."""
        if stage == SWEEP:
            refitted = refit(
                start.original,
                model,
                start.images,
                batch_size=self.experiment.batch_size,
                seed=start.seed,
                resume=checkpoints,
                progress=progress,
            )
            told = {"history": list(refitted.history), "seconds": {stage: refitted.seconds}}
            return refitted.model, told
        if stage == "repair":
            distilled = distill(
                start.original,
                model,
                start.images,
                settings=self.repair,
                seed=start.seed,
                resume=checkpoints,
                progress=progress,
            )
            history = [dataclasses.asdict(epoch) for epoch in distilled.history]
            told = {"best_epoch": distilled.best, "seconds": {stage: distilled.seconds}}
            return distilled.model, {"history": history, **told}
        training = dataclasses.replace(self.training, seed=start.seed)
        trained = training.train(
            reinitialized(model, start.seed) if stage == "scratch" else model,
            checkpoints,
            progress,
        )
        seconds = sum(epoch.seconds for epoch in trained.history)
        history = [dataclasses.asdict(epoch) for epoch in trained.history]
        return trained.model, {"history": history, "seconds": {stage: seconds}}

    def _evaluated(self, line: Line, start: _Start, model: nnx.Module, progress: Progress) -> Line:
        """The line with the metrics."""
        began = time.perf_counter()
        metrics = self.experiment.evaluate(start.reference, model, progress)
        seconds = {**line["seconds"], "evaluate": time.perf_counter() - began}
        return {**line, "metrics": metrics, "seconds": seconds}

    def markdown(self, lines: Sequence[Line], devices: Sequence[str]) -> str:
        methods = list(METHODS)
        ordered = sorted(
            lines, key=lambda line: (methods.index(line["method"]), STAGES.index(line["stage"]))
        )
        several = len({line["stage"] for line in lines}) > 1
        names = ("method", "stage") if several else ("method",)
        text = metric_tables(ordered, names, lambda line: tuple(line[name] for name in names))
        # Stages leave the network's shape as it is.
        plain = [line for line in ordered if line["stage"] == PLAIN]
        return "\n".join([*text, *_time_tables(plain, devices)])


def _time_tables(lines: Sequence[Line], devices: Sequence[str]) -> list[str]:
    """For every batch size, and every device that it was timed on, a table of measured speedups."""
    timed: dict[tuple[int, str], list[tuple[Line, float]]] = {}
    for line in lines:
        for batch_size, row in times_of(line).items():
            place = int(batch_size), devices[int(row["environment"])]
            timed.setdefault(place, []).append((line, row["speedup"]))
    text = []
    for (batch_size, device), having in sorted(timed.items(), key=lambda item: item[0]):
        text += [
            f"**measured speedup at batch {batch_size}** (time of the original / time of the"
            f" accelerated network) on {device}, {seeds_text([line for line, _ in having])};"
            " columns: speedup in MACs\n",
            pivot(
                ("method",),
                [
                    Entry((line["method"],), line["speedup"], line["seed"], speedup)
                    for line, speedup in having
                ],
                lambda speedup: f"{speedup:g}×",
                ".2f",
            ),
        ]
    return text


@dataclasses.dataclass(frozen=True)
class _Start:
    """What the stages of one network have in common."""

    original: nnx.Module
    images: PixelSource
    reference: Reference
    seed: int
    method: str
    speedup: float

    def line(self, stage: str) -> Line:
        """What a line begins with."""
        return {
            "seed": self.seed,
            "method": self.method,
            "speedup": self.speedup,
            "stage": stage,
            **dataclasses.asdict(METHODS[self.method]),
        }


def _folder_name(seed: int, method: str, speedup: float) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '_', method.lower())}_{speedup:g}x_seed{seed}"
