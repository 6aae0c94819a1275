"""Lines of measurements as tables in Markdown: one figure a place, summed up over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from accel.tables.times import Line


class Entry(NamedTuple):
    """A figure, and where in a table it belongs.

    Attributes:
        row: What stands at the head of its row.
        column: Columns are sorted by it.
        seed: Entries of one place that differ in their seed only are summed up.
    """

    row: tuple[str, ...]
    column: float
    seed: int
    value: float


def pivot(
    names: Sequence[str],
    entries: Sequence[Entry],
    column_name: Callable[[float], str],
    form: str = ".4f",
) -> str:
    """Entries as a Markdown table, rows in the order of their first entry.

    In each place the mean over seeds and, where there are several, their standard deviation; a
    place with fewer seeds than others says so, one without any is empty.
    """
    values: dict[tuple[tuple[str, ...], float], dict[int, float]] = {}
    for entry in entries:
        values.setdefault((entry.row, entry.column), {})[entry.seed] = entry.value
    columns = sorted({entry.column for entry in entries})
    seeds = {entry.seed for entry in entries}

    def place(row: tuple[str, ...], column: float) -> str:
        found = values.get((row, column), {})
        if not found:
            return ""
        text = f"{mean(found.values()):{form}}"
        if len(found) > 1:
            text += f" ± {stdev(found.values()):{form}}"
        return text + (f" ({len(found)} of {len(seeds)} seeds)" if len(found) < len(seeds) else "")

    header = [*names, *(column_name(column) for column in columns)]
    text = [_row(header), "|" + "---|" * len(names) + "--:|" * len(columns)]
    for row in dict.fromkeys(entry.row for entry in entries):
        text.append(_row([*row, *(place(row, column) for column in columns)]))
    return "\n".join(text) + "\n"


def seeds_text(lines: Sequence[Line]) -> str:
    """Over which seeds the means of a table are taken, in words."""
    seeds = sorted({line["seed"] for line in lines})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}"


def metric_tables(
    lines: Sequence[Line], names: Sequence[str], row_of: Callable[[Line], tuple[str, ...]]
) -> list[str]:
    """For every metric a table with a column a speedup.

    Args:
        lines: With ``seed``, ``speedup`` and ``metrics``, in the order of rows.
        names: Names of what stands at the head of a row.
        row_of: The head of a line's row.
    """
    text = []
    for metric in dict.fromkeys(metric for line in lines for metric in line["metrics"]):
        having = [line for line in lines if metric in line["metrics"]]
        entries = [
            Entry(
                row_of(line),
                line["speedup"],
                line["seed"],
                line["metrics"][metric]["accelerated"],
            )
            for line in having
        ]
        before = having[0]["metrics"][metric].get("original")
        heading = f"**{metric}**, {seeds_text(having)}"
        heading += f"; original {before:.4f}" if before is not None else ""
        text += [heading + "\n", pivot(names, entries, lambda speedup: f"{speedup:g}×")]
    return text


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
