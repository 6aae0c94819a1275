"""The frame of a table: cells that are measured one by one, and the folder that keeps them.

The folder holds

- ``experiment.json``: what the cells hang on, but for the axes that say which there are;
- ``environment.json``: the commands that measured something, each with device and versions;
- ``raw.jsonl``: a line a measured cell, with the number of its environment;
- ``table.md``: the table, generated from the lines.

A cell is recorded as soon as it is measured. When the same table is called again with the same
folder it goes on with the cells that are missing, with more speedups, seeds, … if wanted. A cell
that was stopped on the way counts as measured by the version that finished it. After the
cells, all lines of whole networks are given the times that they lack (``accel.tables.times``).
"""

from __future__ import annotations

import abc
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import jax
import tyro
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from accel.calibration import Calibration
from accel.data import PixelSource
from accel.experiment import Experiment
from accel.files import locked, write_whole
from accel.finetuning_experiment import Finetuning
from accel.progress import Progress
from accel.report.environment import device_name, versions
from accel.tables.times import Line, add_times, lacking_times
from accel.traits import traits_of_network

Cell = tuple[Any, ...]
TableKind = TypeVar("TableKind", bound="Table")

# What tables vary, or say themselves; the experiment's own values are not looked at.
VARIED = (
    *("speedup", "decompositions", "reconstruction", "solver", "asymmetric"),
    *("rank_selection", "rank_multiple", "dense_speedup"),
    *("latency_speedup", "latency_ms", "latency_batch"),
    *("parameter_ratio", "allowed_error", "allowed_disagreement"),
    *("seed", "second_sweep", "distillation"),
)
# What no cell hangs on: times are measured apart from cells, when and where they are asked for.
TIMING = ("latency_batches", "latency_seconds")
# What no cell hangs on of a table that evaluates no network.
EVALUATION = ("evaluation", "metrics")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(abc.ABC):
    """A table: what is varied, and the experiment that it is varied in.

    Attributes:
        experiment: Network, weights, images and metrics; what a table varies (``VARIED``) is not
            looked at.
        seeds: Seeds of all that is drawn.
        AXES: The fields that say which cells there are.
        KEY: The fields of a line that tell its cell from the others.
        TIMED: Whether a line is of one whole network, whose time can stand beside it.
        EVALUATES: Whether anything is measured on the experiment's evaluation images.
        EARLIER: Fields that earlier versions did not record, with what they had in their place.
    """

    AXES: ClassVar[tuple[str, ...]]
    KEY: ClassVar[tuple[str, ...]]
    TIMED: ClassVar[bool] = False
    EVALUATES: ClassVar[bool] = True
    EARLIER: ClassVar[Mapping[str, Any]] = {}

    experiment: Annotated[tyro.conf.AvoidSubcommands[Experiment], tyro.conf.arg(name="")]
    seeds: tuple[int, ...] = (0,)

    @abc.abstractmethod
    def smoke(self: TableKind) -> TableKind:
        """The same, cut down to well under a minute: its figures mean nothing."""

    @abc.abstractmethod
    def cells(self) -> list[Cell]:
        """All cells that are asked for, each the values of ``KEY``."""

    @abc.abstractmethod
    def check(self, original: nnx.Module, images: PixelSource) -> None:
        """Looks for mistakes before the long work.

        Raises:
            ValueError: If a name is unknown, or something does not fit the network.
        """

    @abc.abstractmethod
    def measure(
        self,
        original: nnx.Module,
        images: PixelSource,
        wanted: Sequence[Cell],
        unfinished: Path,
        progress: Progress,
    ) -> Iterator[Line]:
        """Measures cells; a line each, in any order.

        Args:
            original: The original network.
            images: The calibration images.
            wanted: The cells to measure.
            unfinished: A folder for what an interrupted run goes on from. What belongs to a cell is
                still needed when its line is handed out, and no more when the next is asked for.
            progress: Receives what the run is doing.
        """

    @abc.abstractmethod
    def markdown(self, lines: Sequence[Line], devices: Sequence[str]) -> str:
        """The table of these lines, one or more.

        Args:
            lines: What was measured.
            devices: The device and the compiler's version of each environment, by its number.
        """

    def with_config(self: TableKind, config: object) -> TableKind:
        """The same table of another experiment or with another training.

        Raises:
            ValueError: If the config is neither, or the table trains nothing.
        """
        name = {Experiment: "experiment", Finetuning: "training"}.get(type(config))
        if name is None or name not in {field.name for field in dataclasses.fields(self)}:
            raise ValueError(
                f"a config of the type {type(config).__name__} has no place in a"
                f" {type(self).__name__} table"
            )
        return dataclasses.replace(self, **{name: config})

    def calibrate(
        self,
        original: nnx.Module,
        images: PixelSource,
        decompositions: str | Sequence[str],
        seed: int,
        progress: Progress,
    ) -> Calibration:
        """A calibration as the experiment says, but for these kinds of chain and this seed."""
        kinds = (decompositions,) if isinstance(decompositions, str) else tuple(decompositions)
        experiment = dataclasses.replace(self.experiment, decompositions=kinds, seed=seed)
        return experiment.calibrate(original, images, progress)

    def unused(self) -> set[str]:
        """Fields of settings that no cell that is asked for hangs on."""
        return set()

    def bound(self, lines: Sequence[Line]) -> set[str]:
        """Fields of settings that lines hang on, these lines where they do not all."""
        return {field.name for field in dataclasses.fields(self)}

    def record(self) -> dict[str, Any]:
        """What the cells hang on besides the axes, as JSON data.

        Of files and folders only the names: paths tell of one machine.
        """
        named = _without_folders(self)
        weights = named.experiment.weights
        content = dataclasses.asdict(named)
        content["experiment"]["weights"] = None if weights is None else Path(weights).name
        for name in (*VARIED, *TIMING, *(() if self.EVALUATES else EVALUATION)):
            del content["experiment"][name]
        for name in {*self.AXES, *self.unused()}:
            del content[name]
        # As JSON gives it back, so that it can be compared: tuples are lists there.
        return json.loads(json.dumps({"table": type(self).__name__, **content}, default=str))


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError, with the known names listed, where one of the names is not known."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(map(repr, known))}")


def make_table(table: Table, out: Path, command: str, progress: Progress) -> str:
    """Measures what is missing of a table and writes its folder (see the module's docstring).

    Args:
        table: What to measure.
        out: The folder, new or left of the same table.
        command: The command that is running, for the record.
        progress: Receives what the run is doing.

    Returns:
        The table, as in ``table.md``.

    Raises:
        FileExistsError: If ``out`` holds something else, or another process is writing to it; it
            is left alone.
        ValueError: If what is asked for does not fit.
    """
    with ExitStack() as locks:
        existed = out.exists()
        if existed:
            locks.enter_context(locked(out))
        record = folder_record(table, out)
        lines = read_lines(out)
        done = {tuple(line[name] for name in table.KEY) for line in lines}
        cells = list(dict.fromkeys(table.cells()))
        wanted = [cell for cell in cells if cell not in done]
        if not cells:
            raise ValueError(f"nothing is asked for: one of {', '.join(table.AXES)} is empty")
        batch_sizes = table.experiment.latency_batches if table.TIMED else ()
        if wanted or lacking_times(lines, batch_sizes):
            original = table.experiment.load_model()
            images = table.experiment.limited(table.experiment.calibration)
            table.check(original, images)
            if wanted:
                _check_contents(table, original, images, record, out)
            # Where another process made it meanwhile, this one would write over its lines.
            out.mkdir(parents=True, exist_ok=existed)
            if not existed:
                locks.enter_context(locked(out))
            write_whole(out / "experiment.json", json.dumps(record, indent=2) + "\n")
            environment = _record_environment(out / "environment.json", command)
            progress.say(
                f"{len(cells) - len(wanted)} of {len(cells)} cells are there; writing to {out};"
                f" if stopped, it goes on when called again with --out {out}"
            )
            with _shared_compilations():
                if wanted:
                    unfinished = out / "unfinished"
                    began = time.monotonic()
                    measured = table.measure(original, images, wanted, unfinished, progress)
                    for finished, line in enumerate(measured, 1):
                        lines.append({**line, "environment": environment})
                        _write_lines(table, lines, out)
                        cell = ", ".join(str(line[name]) for name in table.KEY)
                        left = len(wanted) - finished
                        minutes = (time.monotonic() - began) / finished * left / 60
                        progress.say(
                            f"measured: {cell}; {left} cells left, about {minutes:.0f} min"
                        )
                    if unfinished.exists() and not any(unfinished.iterdir()):
                        unfinished.rmdir()
            for _ in add_times(
                lines,
                original,
                images.image_shape,
                batch_sizes=batch_sizes,
                seconds=table.experiment.latency_seconds,
                dtype=table.experiment.inference_dtype,
                environment=environment,
                progress=progress,
            ):
                _write_lines(table, lines, out)
        return _write_table(table, lines, out)


def folder_record(table: Table, out: Path) -> dict[str, Any]:
    """The record of a folder that can take the table: new, empty, or begun by the same table.

    Settings that only what is there, or only what is asked for, hangs on stay and are added: stages
    with settings of their own can be asked for later. Those that nothing which was measured hangs
    on can still be changed, after training that diverged, say. Earlier versions recorded
    ``TIMING``, too, and ``EVALUATION`` whatever the table, which are left out, and knew no
    ``inference_dtype``.

    Raises:
        FileExistsError: If it holds results of another experiment, or anything else.
    """
    recorded, asked = out / "experiment.json", table.record()
    if recorded.exists():
        found = json.loads(recorded.read_text())
        for name in (*TIMING, *(() if table.EVALUATES else EVALUATION)):
            found.get("experiment", {}).pop(name, None)
        found.get("experiment", {}).setdefault("inference_dtype", None)
        if found.get("table") == asked["table"]:
            found = {**table.EARLIER, **found}
        if {path.name for path in out.iterdir()} <= {recorded.name, "environment.json"}:
            # A start that was refused before anything was measured.
            return asked
        bound = found.keys() & asked.keys() & table.bound(read_lines(out))
        compared = {"table", "experiment", *bound}
        if any(found.get(name) != asked[name] for name in compared):
            raise FileExistsError(
                f"{out} holds results of another experiment (see {recorded}); choose another --out"
            )
        return {**found, **asked}
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(
            f"{out} is not empty and has no {recorded.name}; choose another --out"
        )
    return asked


def _check_contents(
    table: Table, original: nnx.Module, images: PixelSource, record: dict[str, Any], out: Path
) -> None:
    """Adds to the record what tells weights and images from others of the same name.

    Raises:
        FileExistsError: If the folder's are others.
    """
    contents = {
        "weights": traits_of_network(original)["weights"],
        # Pixels may come out of a file one step brighter with another version of its reader.
        "calibration images": len(images),
    }
    if table.EVALUATES:
        evaluation = table.experiment.limited(table.experiment.evaluation)
        contents["evaluation images"] = len(evaluation)
    # Earlier versions recorded names alone.
    before = record.setdefault("contents", contents)
    if others := [name for name in contents if before[name] != contents[name]]:
        raise FileExistsError(
            f"{out} holds results of other {others[0]} of that name; choose another --out"
        )


def read_lines(out: Path) -> list[Line]:
    """The lines that were measured so far."""
    raw = out / "raw.jsonl"
    return [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []


def _write_lines(table: Table, lines: Sequence[Line], out: Path) -> None:
    raw = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_whole(out / "raw.jsonl", raw)
    _write_table(table, lines, out)


def _write_table(table: Table, lines: Sequence[Line], out: Path) -> str:
    environments = json.loads((out / "environment.json").read_text())
    devices = [
        f"{found['device']} (jaxlib {found['versions']['jaxlib']})" for found in environments
    ]
    text = table.markdown(lines, devices)
    write_whole(out / "table.md", text)
    return text


@contextmanager
def _shared_compilations() -> Iterator[None]:
    """Keeps what is compiled in a folder: cells of one plan make the same functions anew.

    In the user's own, where JAX was told one.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        if before["jax_compilation_cache_dir"]:
            yield
            return
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


def _record_environment(file: Path, command: str) -> int:
    """Puts the environment at hand into the file, where it is new; returns its number."""
    environments = json.loads(file.read_text()) if file.exists() else []
    environment = {"command": command, "device": device_name(), "versions": versions()}
    if environment not in environments:
        environments.append(environment)
        write_whole(file, json.dumps(environments, indent=2) + "\n")
    return environments.index(environment)


def _without_folders(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(value.name)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: _without_folders(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dataclasses.replace(value, **fields)
