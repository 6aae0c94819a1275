"""Budgets other than MACs: in measured time, in parameters, in loss that is allowed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from accel.calibration import Calibration
from accel.compiler import network_options
from accel.error_curves import ErrorCurve
from accel.evaluation.forward import check_dtype, in_dtype
from accel.files import write_whole
from accel.latency_budget import select_for_latency
from accel.loss_budget import ALLOWED_DISAGREEMENT, ALLOWED_ERROR, AllowedLoss
from accel.plan import AccelerationPlan
from accel.progress import Progress
from accel.rank_selection import Rules, check_speedup
from accel.selection import MEASURED_ERROR, choice_digest, select_by_parameters
from accel.time_cache import TimeCache, default_cache


@dataclasses.dataclass(frozen=True)
class Budget:
    """What is asked for in place of a speedup in MACs: one of these at most.

    Attributes:
        latency_speedup: The original's time for a batch over that of the accelerated network.
        latency_ms: The accelerated network's time for a batch, in milliseconds.
        parameter_ratio: Parameters of all convolutions now over those wanted.
        allowed_error: The largest relative squared error of the outputs on held-back images.
        allowed_disagreement: The largest share of these images whose top-1 class changes.
        latency_batch: Images per batch where time is measured.
        latency_dtype: What networks compute in where time is measured; None for their own types.
    """

    latency_speedup: float | None = None
    latency_ms: float | None = None
    parameter_ratio: float | None = None
    allowed_error: float | None = None
    allowed_disagreement: float | None = None
    latency_batch: int = 1
    latency_dtype: str | None = None

    @property
    def given(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        named = dataclasses.asdict(self)
        del named["latency_batch"], named["latency_dtype"]
        return {name: value for name, value in named.items() if value is not None}

    @property
    def in_time(self) -> bool:
        """Whether it is one in measured time."""
        return self.latency_speedup is not None or self.latency_ms is not None

    @property
    def allowed_loss(self) -> AllowedLoss | None:
        """The budget that only a search keeps (``search_within_loss``), where it is one of these.

        ``select`` chooses the plan of all others.
        """
        if self.allowed_error is not None:
            return AllowedLoss(ALLOWED_ERROR, self.allowed_error)
        if self.allowed_disagreement is not None:
            return AllowedLoss(ALLOWED_DISAGREEMENT, self.allowed_disagreement)
        return None

    def check(self, model: nnx.Module, rank_selection: str, dense_speedup: float | None) -> None:
        """Raises ValueError where the budget is none or does not go with the rest."""
        if self.latency_batch < 1:
            raise ValueError(f"latency_batch is 1 or more, found {self.latency_batch}")
        check_dtype(self.latency_dtype)
        if not self.given:
            return
        if len(self.given) > 1:
            raise ValueError(f"one budget at most can be given, found {', '.join(self.given)}")
        ((name, value),) = self.given.items()
        if name in ("latency_speedup", "parameter_ratio"):
            check_speedup(name, value)
        elif name == ALLOWED_DISAGREEMENT:
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, found {value}")
        elif not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is a finite number above 0, found {value}")
        if rank_selection != MEASURED_ERROR:
            raise ValueError(f"{name} needs {MEASURED_ERROR}, found {rank_selection}")
        if dense_speedup is not None:
            raise ValueError(
                f"{name} is a budget of convolutions: dense_speedup cannot be given, too"
            )
        if self.in_time:
            # A cache that is damaged or cannot be written shows now, not after the long work.
            TimeCache(default_cache(), network_options(model)).save()
            if self.latency_dtype is not None:
                in_dtype(model, self.latency_dtype)  # Values beyond its range show now.

    def select(
        self,
        calibration: Calibration,
        original: nnx.Module,
        curves: Mapping[str, ErrorCurve],
        *,
        rank_multiple: int = 1,
        rules: Rules | None = None,
        resume: Path | None = None,
        progress: Progress | None = None,
    ) -> tuple[AccelerationPlan, dict[str, Any]]:
        """The plan that keeps a budget in time or parameters, and what was timed, if anything was.

        Args:
            calibration: From ``calibrate``.
            original: The network as it was given to ``calibrate``.
            curves: From ``measure_errors``.
            rank_multiple: As in ``accelerate``.
            rules: As in ``accelerate``.
            resume: A folder that keeps a timed plan: timed once more, another one would be chosen,
                and no solution of a run that was stopped would fit it.
            progress: Receives what is being done.

        Raises:
            ValueError: If the budget cannot be kept.
        """
        if self.parameter_ratio is not None:
            return select_by_parameters(calibration, self.parameter_ratio, curves, rules=rules), {}
        digest = choice_digest(self, curves, rules or {})
        kept = None if resume is None else resume / "timed_plan.json"
        if kept is not None and kept.exists():
            content = json.loads(kept.read_text())
            if content["digest"] == digest:
                return AccelerationPlan.from_json(content["plan"]), content["figures"]
        found = select_for_latency(
            calibration,
            original,
            self.latency_speedup,
            milliseconds=self.latency_ms,
            batch_size=self.latency_batch,
            dtype=self.latency_dtype,
            curves=curves,
            rank_multiple=rank_multiple,
            rules=rules,
            progress=progress,
        )
        if kept is not None:
            content = {"digest": digest, "figures": found.figures(), "plan": found.plan.to_json()}
            write_whole(kept, json.dumps(content))
        return found.plan, found.figures()
