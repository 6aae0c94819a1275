"""Fine-tuning experiments: from a model folder and labelled images to a new folder of results.

The counterpart of ``accel.experiment`` for ``accel.finetune``: a frozen dataclass that a file in
``configs/`` defines, and ``run_finetuning``, which carries it out.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from accel.checkpoint import known_spec, load_model, save_model, saved_plan
from accel.data import FlipAndShift, PixelSource
from accel.data.settings import Images
from accel.evaluation import accuracy
from accel.evaluation.accuracy import check_labelled
from accel.files import unfinished_folder
from accel.finetune import Epoch, FinetuneResult, check_settings, finetune
from accel.progress import Progress
from accel.reinitialize import reinitialized
from accel.report.environment import device_name, versions
from accel.training_step import Optimizer, Precision


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """How to fine-tune the network of a model folder, whichever it is.

    Attributes:
        images: Labelled images to train on.
        held_back: Labelled images to measure accuracy on after every epoch, or None. Choices of
            epochs or learning rate are made by these.
        evaluation: Labelled images to measure accuracy on before and after, such as the test set;
            nothing is chosen by them.
        epochs: See ``accel.finetune``, as for all fields up to ``checkpoint_seconds``.
        learning_rate: The highest.
        batch_size: Images per step.
        optimizer: ``sgd`` or ``adamw``.
        weight_decay: Of kernels only.
        clip_norm: Largest norm of a gradient; None for no clipping.
        warmup: The share of steps in which the learning rate rises.
        flip: Whether half of the images are mirrored in training.
        shift: By how many pixels images are shifted in training at most.
        precision: ``float32`` or ``bfloat16``; None for what the device is made for.
        seed: Seed of all that is drawn.
        checkpoint_seconds: Time between checkpoints within an epoch.
        from_scratch: Whether to forget all weights first: the paper's control, the accelerated
            architecture trained without what the original network had learned.
        image_limit: How many images to use of each kind at most, spread over all; None for all.
    """

    images: Images
    held_back: Images | None
    evaluation: Images
    epochs: int = 5
    learning_rate: float = 1e-5
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    weight_decay: float = 5e-4
    clip_norm: float | None = 1.0
    warmup: float = 0.05
    flip: bool = True
    shift: int = 0
    precision: Precision | None = None
    seed: int = 0
    checkpoint_seconds: float = 300.0
    from_scratch: bool = False
    image_limit: int | None = None

    def smoke(self) -> Finetuning:
        """The same, cut down to well under a minute: its figures mean nothing."""
        return dataclasses.replace(self, image_limit=64, epochs=1, batch_size=16)

    def limited(self, images: Images) -> PixelSource:
        """The images, no more than ``image_limit`` of them."""
        source = images.open()
        return source if self.image_limit is None else source.spread(self.image_limit)

    def check(self) -> None:
        """Raises ValueError where a setting is not one that training can have."""
        check_settings(
            self.epochs,
            self.learning_rate,
            self.batch_size,
            self.weight_decay,
            self.clip_norm,
            self.warmup,
        )

    def train(self, model: nnx.Module, resume: Path, progress: Progress) -> FinetuneResult:
        """``accel.finetune`` as the settings say, from ``model`` as it is."""
        return finetune(
            model,
            self.limited(self.images),
            evaluation=self.held_back and self.limited(self.held_back),
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            warmup=self.warmup,
            augmentation=FlipAndShift(self.flip, self.shift),
            precision=self.precision,
            seed=self.seed,
            resume=resume,
            checkpoint_seconds=self.checkpoint_seconds,
            progress=progress,
        )


@dataclasses.dataclass(frozen=True)
class FinetuningReport:
    """What fine-tuning did and what it gave; see ``to_json`` for the file.

    Attributes:
        model: Name of the network.
        source: Name of the folder that it was taken from.
        device: Where it ran.
        versions: Versions of the packages that matter.
        settings: How it was asked for.
        history: Each epoch, in order.
        metrics: By name: the figure on the evaluation images before and after.
        seconds: Time spent by stage; of training in all, also where it was stopped in between.
    """

    model: str
    source: str
    device: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    history: tuple[Epoch, ...]
    metrics: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]

    def to_json(self) -> str:
        """The text of ``report.json``; of paths, which tell of one machine, only the names."""
        content = dataclasses.asdict(self)
        return json.dumps(content, indent=2, allow_nan=False, default=_name) + "\n"

    def text(self) -> str:
        """The report for a reader at a console."""
        return "\n".join(
            [
                f"{self.model} from {self.source}, fine-tuned on {self.device}",
                *(f"epoch {i}: {epoch.text()}" for i, epoch in enumerate(self.history, start=1)),
                *(
                    f"{name}: before {metric['before']:.4f}, after {metric['after']:.4f}"
                    for name, metric in self.metrics.items()
                ),
                "time: " + ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items()),
            ]
        )


def run_finetuning(
    finetuning: Finetuning,
    folder: Path,
    out: Path,
    progress: Progress,
    *,
    builder: str | None = None,
) -> FinetuningReport:
    """Carries out fine-tuning and writes its folder: ``report.json``, ``model/``, ``log.txt``.

    Everything is written to ``OUT.partial``, which is renamed when it is complete. Where that
    folder is left of the same fine-tuning, stopped before it was done, training goes on from its
    last checkpoint, to the same result.

    Args:
        finetuning: What to do.
        folder: What ``accel run`` or ``accel convert`` wrote.
        out: The folder to write; must not exist yet.
        progress: Receives what the run is doing.
        builder: Where the builder of a network of the user's own is to be imported from,
            ``package.module:function``, which a folder is not trusted to say alone.

    Raises:
        FileExistsError: If ``out`` exists, or ``OUT.partial`` is of another fine-tuning or in use.
        ValueError: If network, images and settings do not fit together.
        FloatingPointError: If training diverges.
    """
    start = time.perf_counter()
    if out.exists():
        raise FileExistsError(f"{out} exists already; nothing is overwritten")
    finetuning.check()
    model_folder = folder / "model" if (folder / "model").is_dir() else folder
    spec, plan = known_spec(model_folder, builder), saved_plan(model_folder)
    model = load_model(model_folder, spec.build)
    for asked_for in ("images", "held_back"):
        if (watched := getattr(finetuning, asked_for)) is not None:
            # What is wrong with it shows now.
            check_labelled(watched.open(), asked_for)
    evaluation = finetuning.limited(finetuning.evaluation)
    asked = dataclasses.asdict(finetuning)
    record = json.dumps({"model": str(folder), **asked}, indent=2, default=str) + "\n"
    with unfinished_folder(record, out) as partial:
        progress.say(f"writing to {out}; if stopped, it goes on when called again with --out {out}")
        before = _accuracy(model, evaluation, progress)
        trained_from = time.perf_counter()
        result = finetuning.train(
            reinitialized(model, finetuning.seed) if finetuning.from_scratch else model,
            partial / "training",
            progress,
        )
        trained = time.perf_counter()
        progress.say("evaluating")
        after = _accuracy(result.model, evaluation, progress)
        end = time.perf_counter()
        report = FinetuningReport(
            model=spec.name,
            source=folder.name,
            device=device_name(),
            versions=versions(),
            settings=asked,
            history=result.history,
            metrics={name: {"before": before[name], "after": after[name]} for name in before},
            seconds={
                "train": sum(epoch.seconds for epoch in result.history),
                "evaluate": trained_from - start + end - trained,
                "total": end - start,
            },
        )
        shutil.rmtree(partial / "model", ignore_errors=True)
        save_model(partial / "model", result.model, spec, plan)
        (partial / "report.json").write_text(report.to_json())
        (partial / "log.txt").write_text(report.text() + "\n")
        shutil.rmtree(partial / "training", ignore_errors=True)
        partial.rename(out)
    return report


def _accuracy(model: nnx.Module, images: PixelSource, progress: Progress) -> dict[str, float]:
    top = (1, 5) if (images.class_count or 0) >= 10 else (1,)
    return accuracy(model, images, top=top, progress=progress)


def _name(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)
