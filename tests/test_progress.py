"""How runs tell what they do: bars on a terminal, lines in a log."""

import io
import sys

import pytest

from accel.progress import ConsoleProgress, LineProgress, reported


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("accel.progress.time.monotonic", lambda: now[0])
    return now


def test_lines_tell_now_and_then_how_long_is_left(clock, capsys):
    progress = LineProgress(interval=60)
    progress.begin("distilling", 100)
    for seconds, amount in ((30, 5), (29, 5), (1, 10), (59, 10), (1, 10), (600, 58), (600, 2)):
        clock[0] += seconds
        progress.advance(amount)
    assert capsys.readouterr().out.splitlines() == [
        "distilling: 20 of 100, about 4 min left",
        "distilling: 40 of 100, about 3 min left",
        "distilling: 98 of 100, about 15 s left",
    ]


def test_many_short_pieces_are_told_as_well(clock, capsys):
    progress = LineProgress(interval=60)
    for piece in range(9):
        progress.begin(f"piece {piece}", 2)
        for part in range(2):
            clock[0] += 10
            progress.describe(f"piece {piece}, part {part}")
            progress.advance(1)
    assert capsys.readouterr().out.splitlines() == [
        f"piece {piece}, part 0: 1 of 2, about 10 s left" for piece in (3, 6)
    ]


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with reported() as progress:
        assert isinstance(progress, LineProgress)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with reported() as progress:
        assert isinstance(progress, ConsoleProgress)
