"""Telling the reader what a run is doing and how long is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Receives what a run reports of itself; this one keeps silent."""

    def say(self, text: str) -> None:
        """One line worth reading."""

    def begin(self, description: str, total: int) -> None:
        """A piece of work of ``total`` units begins."""

    def advance(self, amount: int) -> None:
        """``amount`` units of the work that was begun last are done."""

    def describe(self, description: str) -> None:
        """What the work that was begun last is at now."""


class LineProgress(Progress):
    """Plain lines: for logs, and for runs of so many parts that bars would fill the console.

    Beside what is said there is a line now and then on how far a long piece of work has come.

    Args:
        interval: Seconds between two such lines.
    """

    def __init__(self, interval: float = 60.0):
        self.interval = interval
        self.description, self.done, self.total = "", 0, 0
        self.started = self.told = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def begin(self, description: str, total: int) -> None:
        self.description, self.done, self.total = description, 0, total
        self.started = time.monotonic()

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.told < self.interval or not 0 < self.done < self.total:
            return
        self.told = now
        left = (now - self.started) * (self.total - self.done) / self.done
        text = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        self.say(f"{self.description}: {self.done} of {self.total}, about {text} left")

    def describe(self, description: str) -> None:
        self.description = description


class ConsoleProgress(Progress):
    """Progress bars on the console, used as a context manager."""

    def __init__(self, console: Console | None = None):
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console or Console(),
        )
        self.task: TaskID | None = None

    def __enter__(self) -> ConsoleProgress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False)

    def begin(self, description: str, total: int) -> None:
        self.task = self.bars.add_task(description, total=total)

    def advance(self, amount: int) -> None:
        if self.task is not None:
            self.bars.advance(self.task, amount)

    def describe(self, description: str) -> None:
        if self.task is not None:
            self.bars.update(self.task, description=description)


@contextmanager
def reported() -> Iterator[Progress]:
    """Bars where somebody looks at the console, lines where the output goes to a file or a pipe."""
    if sys.stdout.isatty():
        with ConsoleProgress() as progress:
            yield progress
    else:
        yield LineProgress()
