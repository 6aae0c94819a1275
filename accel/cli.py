"""The command line: ``accel run``, ``finetune``, ``benchmark``, ``table`` and ``convert``."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, cast

import jax
import tyro
from rich.console import Console, RenderableType

from accel.batch_norm import find_foldable, fold_batch_norm
from accel.benchmark import BENCHMARK_FILE, benchmark
from accel.checkpoint import save_model
from accel.configuration import load_config
from accel.experiment import Experiment, run
from accel.finetuning_experiment import Finetuning, run_finetuning
from accel.memory import use_one_pool
from accel.models import ModelSpec
from accel.plan import AccelerationPlan
from accel.progress import LineProgress, reported
from accel.report.console import benchmark_summary, summary
from accel.report.environment import command_text
from accel.tables import Table, make_table
from accel.tables.grid import TIMING, VARIED, TableKind
from accel.weights import load

# In characters.
LOG_WIDTH = 100
USAGE = """\
usage: accel run CONFIG [--out DIR] [--smoke] [--FIELD VALUE ...]
       accel finetune FOLDER CONFIG [--out DIR] [--smoke] [--builder MODULE:FUNCTION]
                      [--FIELD VALUE ...]
       accel benchmark FOLDER [--out FILE] [--batch-sizes N ...] [--seconds S]
                       [--dtype TYPE] [--onnx FILE] [--torch MODULE:FUNCTION]
                       [--image-size HEIGHT WIDTH CHANNELS] [--builder MODULE:FUNCTION]
       accel table TABLE [CONFIG ...] [--out DIR] [--smoke] [--FIELD VALUE ...]
       accel convert FILE --model NAME --out DIR [--FIELD VALUE ...]

run       carries out the experiment of a config file and writes its folder:
          report.json, model/, log.txt
finetune  trains the network of such a folder on labelled images, as a config
          file says, and writes a new folder
benchmark times the network of such a folder, and each of its layers, against
          the original and writes benchmark.json into the folder; the original
          is built with fresh weights, on whose values times do not depend
table     measures a table of configs/paper/, of its own experiment (and
          training) or of those in the config files that follow, and writes
          or completes its folder: raw.jsonl, table.md
convert   makes a model folder of a weight file (.safetensors, .pth, .h5, .onnx)

accel run CONFIG --help, accel finetune FOLDER CONFIG --help, accel benchmark
--help, accel table TABLE --help and accel convert --help list the fields.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """An experiment, and where its results go.

    Attributes:
        experiment: What to do.
        out: The folder to write; by default a new one in runs/.
        smoke: Cut everything down to see whether it works; the figures mean nothing.
    """

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    out: Path | None = None
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Fine-tuning, and where its results go.

    Attributes:
        finetuning: What to do.
        out: The folder to write; by default a new one in runs/.
        smoke: Cut everything down to see whether it works; the figures mean nothing.
        builder: Where the builder of a network of your own is imported from, this folder included:
            package.module:function. A folder alone is not trusted to have code run.
    """

    finetuning: Annotated[tyro.conf.AvoidSubcommands[Finetuning], tyro.conf.arg(name="")]
    out: Path | None = None
    smoke: bool = False
    builder: str | None = None


@dataclasses.dataclass(frozen=True)
class MakeBenchmark:
    """Times an accelerated network, and each of its layers, against the original.

    The original network is built from what the folder says, with fresh weights: times do not depend
    on their values.

    Attributes:
        folder: What accel run wrote.
        out: The file to write; by default benchmark.json in the folder.
        batch_sizes: Images per batch; each is measured by itself.
        seconds: Time for all timed runs of the networks together; compilation and the single
            layers come on top.
        dtype: What both networks compute in: float32, bfloat16 or float16; by default what the run
            evaluated in, or float32.
        onnx: The original network as an ONNX file, to be timed beside both by ONNX Runtime.
        torch: Where a function that builds the original network in PyTorch is imported from, this
            folder included: package.module:function; timed beside both by PyTorch.
        image_size: Height, width and channels of the images; by default those of the run, which
            folders of earlier versions do not say.
        builder: Where the builder of a network of your own is imported from, this folder included:
            package.module:function. A folder alone is not trusted to have code run.
    """

    folder: tyro.conf.Positional[Path]
    out: Path | None = None
    batch_sizes: tuple[int, ...] = (1, 8)
    seconds: float = 30.0
    dtype: str | None = None
    onnx: Path | None = None
    torch: str | None = None
    image_size: tuple[int, ...] | None = None
    builder: str | None = None


@dataclasses.dataclass(frozen=True)
class MakeTable(Generic[TableKind]):
    """A table, and where its results go.

    Attributes:
        table: What to measure.
        out: The folder to write or to complete; by default one in results/ with today's date.
        smoke: Cut everything down to see whether it works; the figures mean nothing.
    """

    table: Annotated[tyro.conf.AvoidSubcommands[TableKind], tyro.conf.arg(name="")]
    out: Path | None = None
    smoke: bool = False


@dataclasses.dataclass(frozen=True)
class Convert:
    """A weight file, and the network that it is for.

    Attributes:
        file: The weight file.
        model: Name of the network, such as vgg16 or vgg16_body.
        out: The model folder to write.
        num_classes: Number of classes, where it is not the network's usual one.
        input_channels: Channels of the images, where they are not the network's usual ones.
        batch_norm: Whether the file is of a network with batch norm.
        fold: Whether to fold the batch norm into the convolutions, for fine-tuning without it:
            ``accel run`` takes the network as it is, and folds it itself.
    """

    file: tyro.conf.Positional[Path]
    model: str
    out: Path
    num_classes: int | None = None
    input_channels: int | None = None
    batch_norm: bool = False
    fold: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, or 1 where the input does not fit."""
    use_one_pool()
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    try:
        if command == "run" and rest and not rest[0].startswith("-"):
            return _run(Path(rest[0]), rest[1:])
        if command == "finetune" and len(rest) > 1 and not rest[1].startswith("-"):
            return _finetune(Path(rest[0]), Path(rest[1]), rest[2:])
        if command == "benchmark":
            return _benchmark(rest)
        if command == "table" and rest and not rest[0].startswith("-"):
            return _table(rest)
        if command == "convert":
            return _convert(tyro.cli(Convert, args=rest, prog="accel convert"))
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"accel: {error}", file=sys.stderr)
        return 1
    print(USAGE, end="")
    return 0 if command in ("-h", "--help") else 2


def _run(config: Path, arguments: Sequence[str]) -> int:
    asked = tyro.cli(
        Run,
        args=arguments,
        default=Run(load_config(config, Experiment)),
        prog=f"accel run {config}",
    )
    experiment = asked.experiment.smoke() if asked.smoke else asked.experiment
    out = asked.out or _new_folder(config)
    with reported() as progress:
        result = run(experiment, experiment.model.name, out, progress)
    text = summary(result.report)
    _show(text)
    with (out / "log.txt").open("w") as log:
        Console(file=log, width=LOG_WIDTH).print(text)
    print(f"results in {out}")
    return 0


def _show(text: RenderableType) -> None:
    """Prints it; where no terminal and no COLUMNS say how wide, with the width of a log."""
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if told else LOG_WIDTH).print(text)


def _finetune(folder: Path, config: Path, arguments: Sequence[str]) -> int:
    asked = tyro.cli(
        Finetune,
        args=arguments,
        default=Finetune(load_config(config, Finetuning)),
        prog=f"accel finetune {folder} {config}",
    )
    finetuning = asked.finetuning.smoke() if asked.smoke else asked.finetuning
    out = asked.out or _new_folder(config)
    _import_from_here(asked.builder)
    with reported() as progress:
        report = run_finetuning(finetuning, folder, out, progress, builder=asked.builder)
    print(report.text())
    print(f"results in {out}")
    return 0


def _benchmark(rest: Sequence[str]) -> int:
    asked = tyro.cli(MakeBenchmark, args=rest, prog="accel benchmark")
    out = asked.out or asked.folder / BENCHMARK_FILE
    _import_from_here(asked.torch, asked.builder)
    with reported() as progress:
        found = benchmark(
            asked.folder,
            out,
            command_text(["accel", "benchmark", *rest]),
            image_shape=asked.image_size,
            batch_sizes=asked.batch_sizes,
            seconds=asked.seconds,
            dtype=asked.dtype,
            onnx=asked.onnx,
            torch=asked.torch,
            builder=asked.builder,
            progress=progress,
        )
    _show(benchmark_summary(found))
    print(f"results in {out}")
    return 0


def _table(rest: Sequence[str]) -> int:
    files = [Path(name) for name in itertools.takewhile(lambda a: not a.startswith("-"), rest)]
    table = load_config(files[0], Table)
    for file in files[1:]:
        table = table.with_config(load_config(file, object))
    asked = tyro.cli(
        # One dataclass for every kind of table: the fields of the kind at hand are on the line.
        cast(Any, MakeTable)[type(table)],
        args=rest[len(files) :],
        default=MakeTable(table),
        prog=f"accel table {' '.join(map(str, files))}",
    )
    for name in VARIED:
        if getattr(asked.table.experiment, name) != getattr(table.experiment, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect: the table says it itself")
    for name in () if asked.table.TIMED else TIMING:
        if getattr(asked.table.experiment, name) != getattr(table.experiment, name):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect: a line of this table is not the time of"
                " one network"
            )
    name = "_".join(file.stem for file in files)
    dated = Path("results") / f"{time.strftime('%Y-%m-%d')}_{name}"
    made = asked.table.smoke() if asked.smoke else asked.table
    out = asked.out or (_new_folder(files[0]) if asked.smoke else dated)
    print(make_table(made, out, command_text(["accel", "table", *rest]), LineProgress()))
    print(f"results in {out}")
    return 0


def _import_from_here(*builders: str | None) -> None:
    """Lets the builders that were named be defined in a file of the current folder."""
    if any(builders) and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def _new_folder(config: Path) -> Path:
    return Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _convert(asked: Convert) -> int:
    options: dict[str, Any] = {
        "num_classes": asked.num_classes,
        "in_channels": asked.input_channels,
        "batch_norm": asked.batch_norm or None,
    }
    spec = ModelSpec(asked.model, {k: v for k, v in options.items() if v is not None})
    if asked.out.exists():
        raise FileExistsError(f"{asked.out} exists already; nothing is overwritten")
    model: Any = load(asked.file, spec)
    plan = None
    if asked.fold:
        channels = model.conv1_1.in_features
        pairs = find_foldable(model, jax.ShapeDtypeStruct((1, 224, 224, channels), "float32"))
        plan = AccelerationPlan((), pairs) if pairs else None
        model = fold_batch_norm(model, pairs)
    save_model(asked.out, model, spec, plan)
    print(f"{asked.file} → {asked.out} ({spec.name})")
    return 0
