"""Which activations of two networks distillation compares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from accel.interpreter import specification
from accel.program import LayerCall, Program


def compared_layers(
    teacher: Program, student: Program, patterns: Sequence[str] | None
) -> tuple[str, ...]:
    """The layers whose inputs are compared, in order of execution, no activation twice."""
    known = {call.path: call for call in student.calls}
    calls = [call for call in teacher.calls if call.path in known]
    if patterns is None:
        chosen = _stage_ends(calls)
    else:
        for pattern in patterns:
            if not any(fnmatchcase(call.path, pattern) for call in calls):
                raise ValueError(
                    f"feature {pattern!r} matches no layer; the layers are"
                    f" {', '.join(call.path for call in calls) or 'none'}"
                )
        chosen = [c for c in calls if any(fnmatchcase(c.path, p) for p in patterns)]
    paths: dict[Any, str] = {}
    for call in chosen:
        before, after = specification(call.input), specification(known[call.path].input)
        if before.shape != after.shape:
            raise ValueError(
                f"what enters {call.path} has the shape {before.shape} in the original network and"
                f" {after.shape} in the accelerated one"
            )
        if call.input is not teacher.images:
            paths.setdefault(call.input, call.path)
    return tuple(paths.values())


def _stage_ends(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """The layers at, or before, which the number of positions falls to half or less."""
    ends, least = [], math.inf
    for call in calls:
        before, after = (
            math.prod(specification(variable).shape[1:-1]) for variable in (call.input, call.output)
        )
        if 2 * before <= least < math.inf or 2 * after <= before:
            ends.append(call)
        least = min(least, before, after)
    return ends
