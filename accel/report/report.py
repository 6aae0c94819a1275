"""The report of an acceleration: every figure of ``report.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One convolution or dense layer of the network.

    Attributes:
        path: Path in the module tree.
        layer_type: ``Conv`` or ``Linear``.
        decomposition: Name of the decomposition, None where the layer was left as it was.
        ranks: Ranks of the decomposition.
        macs_original: Multiply-accumulates per image before.
        macs_accelerated: Multiply-accumulates per image after.
        response_error: Σ‖r(y)-r(ŷ)‖²/Σ‖r(y)‖² on rows of images that were not used for fitting: y
            the original network's response, ŷ the one of the accelerated network up to and with
            this layer, r the activation that follows. None where the layer was left as it was.
        activation: The activation r.
        reason: Why the layer was left as it was.
    """

    path: str
    layer_type: str
    decomposition: str | None
    ranks: tuple[int, ...]
    macs_original: int
    macs_accelerated: int
    response_error: float | None
    activation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What an acceleration did and what it gave; see ``to_json`` for the file.

    Attributes:
        model: Name of the network.
        device: Where it ran.
        versions: Versions of the packages that matter.
        settings: How it was asked for: speedup, solver, rank selection, seed, …; of an experiment
            also the shape of one image, ``image_shape``.
        macs: Multiply-accumulates of all convolutions per image: original, accelerated, speedup.
            Where dense layers had a budget, also theirs, apart: dense_original, dense_accelerated,
            dense_speedup.
        latency: By batch size: medians in milliseconds, and the speedup.
        metrics: By name: the original's and the accelerated network's figure.
        layers: Every convolution and, where they had a budget, every dense layer, in order of
            execution.
        seconds: Time spent by stage.
        memory: Stated and measured peak of host memory in bytes.
        repair: What was done to the network as a whole afterwards, and what it gained, by name
            (``second_sweep``, ``distillation``): the relative squared error of the outputs on
            held-out calibration images before and after.
    """

    model: str
    device: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    macs: Mapping[str, float]
    layers: tuple[LayerReport, ...]
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    latency: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    repair: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``report.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False) + "\n"
