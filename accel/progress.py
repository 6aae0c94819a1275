"""Telling the reader what a run is doing and how long is left."""

from __future__ import annotations

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
    """What is said, as plain lines: for runs of so many parts that bars would fill the console."""

    def say(self, text: str) -> None:
        print(text, flush=True)


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
