"""Experiments: everything from a network and images to a folder of results, as one piece of data.

An experiment is a frozen dataclass, so that it can be written in a file, changed field by field
from the command line, and recorded beside what it gave. ``run`` carries it out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from flax import nnx

from accel.accelerate import accelerate
from accel.calibration import ALL_KINDS, Calibration, calibrate
from accel.checkpoint import load_model, save_model, saved_spec
from accel.data import PixelSource
from accel.data.settings import Images
from accel.evaluation import accuracy, compare_outputs
from accel.evaluation.accuracy import check_labelled, output_classes
from accel.evaluation.answers import KEPT_BYTES, Answers
from accel.evaluation.forward import check_dtype, forward_function, in_dtype, output_shape
from accel.files import unfinished_folder
from accel.models import ModelSpec
from accel.network_reconstruction import Result
from accel.progress import Progress
from accel.rank_selection import Rules
from accel.repair import Distillation, distill, refit
from accel.selection import MEASURED_ERROR
from accel.timing_rounds import REPEATS, check_measurement, latency
from accel.weights import load

BUNDLED = "bundled"
# In the folder of an unfinished run, the states of repairs that were begun.
REPAIRS = "repairs"
# Fields that no solved layer hangs on.
AFTER_SOLVING = (
    *("second_sweep", "distillation"),
    *("evaluation", "metrics", "latency_batches", "latency_seconds"),
)


class Reference(NamedTuple):
    """The original network on the evaluation images.

    Attributes:
        answers: Its outputs.
        accuracy: Its accuracies; none where they are not asked for.
    """

    answers: Answers
    accuracy: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        model: The network: a name of ``accel.models`` and its options.
        weights: A weight file, a model folder, or ``bundled``.
        calibration: Images to fit to; labels are not looked at.
        evaluation: Images to measure on; with labels for ``accuracy``.
        metrics: ``accuracy`` (top-1 and, for networks of ten classes or more, top-5) and
            ``outputs`` (relative squared error and cosine against the original's outputs).
        speedup: See ``accel.accelerate``, as for all fields up to ``seed``.
        decompositions: Names of the chains that may replace a convolution.
        reconstruction: Name of the reconstruction.
        solver: Name of the solver.
        asymmetric: Whether layers are fitted to the accelerated network's inputs.
        rank_selection: Name of the rank selection.
        rank_multiple: Ranks that it chooses are multiples of this.
        rules: Layers by path pattern: ``dense``, or a rank.
        dense_speedup: Speedup of the dense layers, in their own MACs; None leaves them alone.
        latency_speedup, latency_ms, latency_batch, parameter_ratio: Other budgets, in place of
            ``speedup``; of these and the next, one at most.
        allowed_error, allowed_disagreement: The loss that is allowed, on calibration images that
            are held back from fitting, in place of ``speedup``.
        positions_per_image: Sampled output positions per image and layer.
        batch_size: Images per batch in calibration and evaluation.
        seed: Seed of all that is drawn.
        second_sweep: Iterations of the second sweep, which refits all chains to the outputs, on the
            calibration images without labels (``accel.repair.refit``); 0 for none.
        distillation: How the accelerated network is then distilled from the original, on the same
            images (``accel.repair.distill``); None for not at all.
        inference_dtype: What the accelerated network computes in when it is evaluated, and both
            networks when they are timed, for a budget in time as well, such as ``bfloat16``; None
            for the types that they have.
        latency_batches: Batch sizes to time; none for no timing.
        latency_seconds: Time for timing.
        image_limit: How many images to use of each kind at most, spread over all; None for all.
    """

    model: ModelSpec
    weights: str | Path | None
    calibration: Images
    evaluation: Images
    metrics: tuple[Literal["accuracy", "outputs"], ...] = ("outputs",)
    speedup: float = 4.0
    decompositions: tuple[str, ...] = ALL_KINDS
    reconstruction: str = "joint"
    solver: str = "alternating"
    asymmetric: bool = True
    rank_selection: str = MEASURED_ERROR
    rank_multiple: int = 1
    rules: Rules = dataclasses.field(default_factory=dict)
    dense_speedup: float | None = None
    latency_speedup: float | None = None
    latency_ms: float | None = None
    latency_batch: int = 1
    parameter_ratio: float | None = None
    allowed_error: float | None = None
    allowed_disagreement: float | None = None
    positions_per_image: int = 10
    batch_size: int = 16
    seed: int = 0
    second_sweep: int = 0
    distillation: Distillation | None = None
    inference_dtype: str | None = None
    latency_batches: tuple[int, ...] = (1, 8)
    latency_seconds: float = 20.0
    image_limit: int | None = None

    def smoke(self) -> Experiment:
        """The same experiment, cut down to well under a minute: its figures mean nothing.

        One kind of chain, its ranks chosen by energies where errors would be measured, by
        ``speedup`` whatever the budget: so little time says nothing of times, nor so few images of
        errors.
        """
        by_errors = self.rank_selection == MEASURED_ERROR
        return dataclasses.replace(
            self,
            image_limit=24,
            positions_per_image=4,
            decompositions=self.decompositions[:1],
            rank_selection="exact_energy" if by_errors else self.rank_selection,
            rank_multiple=1,
            second_sweep=min(1, self.second_sweep),
            distillation=self.distillation and dataclasses.replace(self.distillation, epochs=1),
            latency_seconds=2.0,
            latency_batches=(1,),
            latency_speedup=None,
            latency_ms=None,
            parameter_ratio=None,
            allowed_error=None,
            allowed_disagreement=None,
        )

    def check(self, original: nnx.Module) -> None:
        """Raises ValueError, before the long work, where what comes after it would not fit."""
        if self.second_sweep < 0:
            raise ValueError(f"second_sweep is 0 or more, found {self.second_sweep}")
        if self.inference_dtype is not None:
            in_dtype(original, self.inference_dtype)  # Values beyond its range show now.
        if self.latency_batches:
            check_measurement("latency", self.latency_batches, REPEATS, self.latency_seconds)
        evaluation = self.limited(self.evaluation)
        if not self.metrics:
            return
        batch = jax.ShapeDtypeStruct((1, *evaluation.image_shape), "float32")
        shape = output_shape(*forward_function(original), batch, "original network")
        if "accuracy" in self.metrics:
            output_classes(shape, "original network", evaluation)
            check_labelled(evaluation, "evaluation images")

    def load_model(self) -> nnx.Module:
        """The original network.

        Raises:
            ValueError: If no weights are given, or they do not fit.
        """
        if self.weights is None:
            raise ValueError("no weights given (--weights FILE)")
        if str(self.weights) == BUNDLED:
            file = resources.files("accel.bundled").joinpath("fashion_vgg.safetensors")
            with resources.as_file(file) as path:
                return load(path, self.model)
        path = Path(self.weights)
        if not path.is_dir():
            return load(path, self.model)
        if (spec := saved_spec(path)) != self.model:
            raise ValueError(f"{path} holds {spec}, the experiment is about {self.model}")
        if (path / "plan.json").exists():
            raise ValueError(f"{path} holds a network that was folded or accelerated already")
        return load_model(path, self.model.build)

    def accelerate(
        self,
        original: nnx.Module,
        images: PixelSource,
        progress: Progress,
        resume: Path | None = None,
    ) -> Result:
        """``accel.accelerate`` as the experiment says."""
        return accelerate(
            original,
            images,
            self.speedup,
            decompositions=self.decompositions,
            reconstruction=self.reconstruction,
            solver=self.solver,
            asymmetric=self.asymmetric,
            rank_selection=self.rank_selection,
            rank_multiple=self.rank_multiple,
            rules=self.rules,
            dense_speedup=self.dense_speedup,
            latency_speedup=self.latency_speedup,
            latency_ms=self.latency_ms,
            latency_batch=self.latency_batch,
            latency_dtype=self.inference_dtype,
            parameter_ratio=self.parameter_ratio,
            allowed_error=self.allowed_error,
            allowed_disagreement=self.allowed_disagreement,
            positions_per_image=self.positions_per_image,
            batch_size=self.batch_size,
            seed=self.seed,
            resume=resume,
            progress=progress,
        )

    def calibrate(
        self, original: nnx.Module, images: PixelSource, progress: Progress
    ) -> Calibration:
        """``accel.calibrate`` as the experiment says."""
        return calibrate(
            original,
            images,
            decompositions=self.decompositions,
            positions_per_image=self.positions_per_image,
            batch_size=self.batch_size,
            seed=self.seed,
            rules=self.rules,
            progress=progress,
        )

    def reference(self, original: nnx.Module, progress: Progress) -> Reference:
        """What networks are held against: the original's answers, and its accuracies."""
        answers = Answers(original, "original network")
        return Reference(answers, self._accuracy(answers, progress))

    def evaluate(
        self, reference: Reference, accelerated: nnx.Module, progress: Progress
    ) -> dict[str, dict[str, float]]:
        """The metrics of both networks on the evaluation images.

        Args:
            reference: Of the original network.
            accelerated: The accelerated network.
            progress: Receives what is being done.
        """
        # Kept where they are looked at twice.
        kept_bytes = KEPT_BYTES if len(self.metrics) > 1 else 0
        answers = Answers(accelerated, "accelerated network", self.inference_dtype, kept_bytes)
        before, after = reference.accuracy, self._accuracy(answers, progress)
        found = {k: {"original": before[k], "accelerated": after[k]} for k in before}
        if "outputs" in self.metrics:
            compared = compare_outputs(
                reference.answers,
                answers,
                self.limited(self.evaluation),
                batch_size=self.batch_size,
                progress=progress,
            )
            found |= {name: {"accelerated": value} for name, value in compared.items()}
        return found

    def _accuracy(self, answers: Answers, progress: Progress) -> dict[str, float]:
        """Accuracies on the evaluation images; none where they were not asked for."""
        if "accuracy" not in self.metrics:
            return {}
        images = self.limited(self.evaluation)
        return accuracy(answers, images, batch_size=self.batch_size, progress=progress)

    def limited(self, images: Images) -> PixelSource:
        """The images, no more than ``image_limit`` of them."""
        source = images.open()
        return source if self.image_limit is None else source.spread(self.image_limit)


def to_json(experiment: Experiment) -> str:
    """The experiment as JSON text."""
    return json.dumps(dataclasses.asdict(experiment), indent=2, default=str) + "\n"


def run(experiment: Experiment, name: str, out: Path, progress: Progress) -> Result:
    """Carries out an experiment and writes its folder: report, model, log.

    Everything is written to ``OUT.partial``, which is renamed when it is complete. Where that
    folder is left of the same experiment, stopped before it was done, its solved layers are taken
    over; repairs and what is measured may have been set otherwise (``AFTER_SOLVING``). The
    accelerated network is in it, as ``model``, before anything of it is measured.

    Args:
        experiment: What to do.
        name: Name of the network in the report.
        out: The folder to write; must not exist yet.
        progress: Receives what the run is doing.

    Raises:
        FileExistsError: If ``out`` exists, or ``OUT.partial`` is of another experiment or in use.
        ValueError: If something of the experiment does not fit; before long work where possible.
    """
    start = time.perf_counter()
    if out.exists():
        raise FileExistsError(f"{out} exists already; nothing is overwritten")
    check_dtype(experiment.inference_dtype)
    original = experiment.load_model()
    images = experiment.limited(experiment.calibration)
    experiment.check(original)
    with unfinished_folder(to_json(experiment), out, free=AFTER_SOLVING) as partial:
        progress.say(f"writing to {out}; if stopped, it goes on when called again with --out {out}")
        result = experiment.accelerate(original, images, progress, resume=partial / "layers")
        if experiment.second_sweep:
            result = _refitted(experiment, original, images, result, partial, progress)
        if experiment.distillation is not None:
            result = _distilled(experiment, original, images, result, partial, progress)
        # Whatever becomes of measuring it, the network is there.
        shutil.rmtree(partial / "model", ignore_errors=True)
        save_model(partial / "model", result.model, experiment.model, result.plan)
        evaluation_start = time.perf_counter()
        progress.say("evaluating")
        reference = experiment.reference(original, progress)
        metrics = experiment.evaluate(reference, result.model, progress)
        times = {}
        if experiment.latency_batches:
            progress.say("timing")
            times = latency(
                original,
                result.model,
                images.image_shape,
                batch_sizes=experiment.latency_batches,
                seconds=experiment.latency_seconds,
                dtype=experiment.inference_dtype,
            )
        end = time.perf_counter()
        seconds = {
            **result.report.seconds,
            "evaluate": end - evaluation_start,
            "total": end - start,
        }
        report = dataclasses.replace(
            result.report,
            model=name,
            settings={
                **result.report.settings,
                "image_shape": images.image_shape,
                "inference_dtype": experiment.inference_dtype,
            },
            latency=times,
            metrics=metrics,
            seconds=seconds,
        )
        (partial / "report.json").write_text(report.to_json())
        # The last two are where earlier versions kept repairs.
        for solved in ("layers", REPAIRS, "second_sweep", "distillation"):
            shutil.rmtree(partial / solved, ignore_errors=True)
        partial.rename(out)
    return dataclasses.replace(result, report=report)


def _refitted(
    experiment: Experiment,
    original: nnx.Module,
    images: PixelSource,
    result: Result,
    folder: Path,
    progress: Progress,
) -> Result:
    """The result after a second sweep, and what that gained and took in its report."""
    found = refit(
        original,
        result.model,
        images,
        iterations=experiment.second_sweep,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        resume=_state_folder(folder, "second sweep", (experiment.second_sweep,), progress),
        progress=progress,
    )
    told = {
        "error_before": found.error_before,
        "error_after": found.error_after,
        "errors": list(found.history),
        "steps": list(found.steps),
    }
    return _repaired(result, found.model, "second_sweep", told, found.seconds)


def _state_folder(
    folder: Path, name: str, settings: tuple[object, ...], progress: Progress
) -> Path:
    """Where a repair keeps its state: what was begun with other settings is not in the way."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    states = folder / REPAIRS / name.replace(" ", "_")
    if states.exists() and not (states / digest).exists():
        progress.say(f"the {name} that was begun had other settings; it begins anew with these")
    return states / digest


def _repaired(result: Result, model: nnx.Module, name: str, told: dict, seconds: float) -> Result:
    report = dataclasses.replace(
        result.report,
        repair={**result.report.repair, name: told},
        seconds={**result.report.seconds, name: seconds},
    )
    return dataclasses.replace(result, model=model, report=report)


def _distilled(
    experiment: Experiment,
    original: nnx.Module,
    images: PixelSource,
    result: Result,
    folder: Path,
    progress: Progress,
) -> Result:
    """The result with its network distilled, and what that gained and took in its report."""
    found = distill(
        original,
        result.model,
        images,
        settings=experiment.distillation,
        seed=experiment.seed,
        resume=_state_folder(
            folder, "distillation", (experiment.second_sweep, experiment.distillation), progress
        ),
        progress=progress,
    )
    told = {
        "error_before": found.error_before,
        "error_after": found.error_after,
        "best_epoch": found.best,
        "epochs": [dataclasses.asdict(epoch) for epoch in found.history],
    }
    return _repaired(result, found.model, "distillation", told, found.seconds)
