"""A budget in loss: as few MACs as there can be while the outputs lose no more than is allowed.

The loss of a network g in place of the original f, over calibration images x that are held back
from fitting, is one of

    allowed_error         Σ‖f(x) - g(x)‖² / Σ‖f(x)‖²
    allowed_disagreement  the share of images with argmax f(x) ≠ argmax g(x)

The sum of the errors of single layers (``accel.error_curves``) is an estimate of the first of them.
So they propose a plan; its network is solved and its loss measured, and what was found
corrects the next proposal, log(loss) taken for a straight line in log(sum of errors). All networks
are solved from one calibration, and one of them is the result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from accel.calibration import Calibration
from accel.error_curves import ErrorCurve
from accel.evaluation.comparison import compare_outputs
from accel.evaluation.forward import forward_function, output_shape
from accel.files import write_whole
from accel.images import ArraySource, ImageSource, images_at
from accel.plan import AccelerationPlan
from accel.program import trace
from accel.progress import Progress
from accel.rank_selection import Rules
from accel.report.report import Report
from accel.selection import choice_digest, reachable_errors, select_within_error

ALLOWED_ERROR = "allowed_error"
ALLOWED_DISAGREEMENT = "allowed_disagreement"
# The search ends where the loss is within the allowed one and at least this share of it, or where
# two plans, one within it and one beyond, differ by no more than NARROW in their predicted errors.
ENOUGH = 0.85
NARROW = 1.1
PROBES = 6
# What is aimed at, as a share of the allowed loss: the middle of what ends the search.
AIM = 0.92
# A first guess: loss ≈ SCALE · predicted ** EXPONENT. Disagreement is the chance that a change of
# the outputs in proportion to the root of their error is larger than the lead of the first class;
# measured on the bundled network at errors from 0.001 to 0.24, with errors of layers that were
# predicted alone.
SCALE = {ALLOWED_ERROR: 1.0, ALLOWED_DISAGREEMENT: 0.28}
EXPONENT = {ALLOWED_ERROR: 1.0, ALLOWED_DISAGREEMENT: 0.5}
# The most by which a predicted error is changed as long as all losses are on one side: that line
# holds nearby only, and few images that changed their class say little.
LARGEST_STEP = 10.0


@dataclasses.dataclass(frozen=True)
class AllowedLoss:
    """What may be lost.

    Attributes:
        name: Which loss (see the module's docstring).
        value: The most there may be of it.
    """

    name: Literal["allowed_error", "allowed_disagreement"]
    value: float

    def check(self, model: nnx.Module, images: ImageSource | np.ndarray | jax.Array) -> None:
        """Looks at one image, to find out whether such a loss of the network can be measured.

        Raises:
            ValueError: If its outputs are not one array with a row per image or, for a
                disagreement, these rows are not of two numbers or more.
        """
        source = (
            ArraySource(np.asarray(images[:1]))
            if isinstance(images, np.ndarray | jax.Array)
            else images
        )
        image = next(iter(source.batches(1)), None)
        if image is None:
            return  # ``calibrate`` tells how many images it needs.
        batch = jax.ShapeDtypeStruct(image.shape, image.dtype)
        trace(model, batch)  # Images that do not fit the network are told by it.
        name = type(model).__name__
        shape = output_shape(*forward_function(model), batch, name)
        if self.name == ALLOWED_DISAGREEMENT and not (len(shape) == 2 and shape[1] >= 2):
            raise ValueError(
                f"{self.name} needs a network that answers an image with a row of two numbers or"
                f" more, one a class; the outputs of {name} for one image have the shape {shape}"
            )

    def measure(
        self,
        original: nnx.Module,
        accelerated: nnx.Module,
        held_back: np.ndarray,
        batch_size: int,
    ) -> float:
        """The loss of ``accelerated`` on the images ``[images, …]``."""
        found = compare_outputs(
            original, accelerated, ArraySource(held_back), batch_size=batch_size
        )
        if self.name == ALLOWED_ERROR:
            return found["relative_squared_error"]
        # Counted, as 1 - 0.7 is more than 0.3.
        return round((1 - found["agreement"]) * len(held_back)) / len(held_back)

    def largest(self, images: int) -> float:
        """The largest loss within the allowed one that can occur on so many images."""
        if self.name == ALLOWED_ERROR:
            return self.value
        # 0.29 · 100 is less than 29.
        return math.floor(self.value * images + 1e-9) / images


@dataclasses.dataclass(frozen=True)
class Probe:
    """A plan that was tried.

    Attributes:
        plan: What becomes of each layer.
        predicted: The sum of the measured errors of its chains.
        measured: The loss of its network on the held-back images.
        speedup: In MACs of all convolutions.
    """

    plan: AccelerationPlan
    predicted: float
    measured: float
    speedup: float

    def figures(self) -> dict[str, float]:
        """All but the plan, for a report."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "plan"}


class Reconstructed(Protocol):
    """A network that was solved, and the report about it."""

    @property
    def model(self) -> nnx.Module: ...

    @property
    def report(self) -> Report: ...


Solved = TypeVar("Solved", bound=Reconstructed)


@dataclasses.dataclass(frozen=True)
class WithinLoss(Generic[Solved]):
    """What a search found.

    Attributes:
        result: The network of fewest MACs whose measured loss is within the allowed one.
        measured: Its loss; a little flattered, as the network was chosen by it.
        probes: All that were tried, in order.
        held_back: How many images the loss is measured on: a disagreement is a multiple of one
            over that number.
    """

    result: Solved
    measured: float
    probes: tuple[Probe, ...]
    held_back: int

    def figures(self) -> dict[str, Any]:
        """What a report tells of it."""
        return {
            "measured": self.measured,
            "held_back_images": self.held_back,
            "probes": [probe.figures() for probe in self.probes],
        }


def search_within_loss(
    calibration: Calibration,
    original: nnx.Module,
    allowed: AllowedLoss,
    curves: Mapping[str, ErrorCurve],
    reconstructed: Callable[..., Solved],
    *,
    settings: object = None,
    rules: Rules | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> WithinLoss[Solved]:
    """Searches for the network of fewest MACs whose loss is within the allowed one.

    Ends where the loss is at least 85 % of that, where no plan is left to try, or after six.

    Args:
        calibration: From ``calibrate``.
        original: The network that is the measure, as it was given to ``calibrate``.
        allowed: What may be lost; checked (``AllowedLoss.check``).
        curves: From ``measure_errors``.
        reconstructed: Solves a plan, called as ``reconstruct(calibration, plan, resume=folder)``.
        settings: By what ``reconstructed`` solves, its ``repr`` to be told from others by where a
            search is resumed.
        rules: As in ``accelerate``.
        resume: A folder for what was found: the predicted and the measured figures of every plan
            that was tried, and the solutions of its layers in a folder of its own. A search that
            was stopped goes on with the plan that it was at; the network that it returns is put
            together from its solutions where it was solved before.
        progress: Receives what is being tried.

    Raises:
        ValueError: If every loss that was measured is beyond the allowed one; the message says the
            smallest, and its speedup. If rules leave no layer to replace.
    """
    progress = progress or Progress()
    indices = np.flatnonzero(~calibration.fitting)
    held_back = images_at(calibration.source, indices, calibration.batch_size)
    # They take the place of cached activations, so that no more memory is needed than was stated.
    cache_bytes = max(0, calibration.cache_bytes - held_back.nbytes)
    calibration = dataclasses.replace(calibration, cache_bytes=cache_bytes)
    reachable = reachable_errors(calibration, curves, rules=rules)
    asked = (allowed, settings, hashlib.sha256(held_back.tobytes()).hexdigest())
    digest = choice_digest(asked, curves, rules or {})
    probes = [] if resume is None else _load(resume, digest)
    best: Solved | None = None
    while len(probes) < PROBES and not _good_enough(probes, allowed, len(held_back)):
        first, *further = _sums(probes, allowed, len(held_back), reachable)
        plan = select_within_error(calibration, first, curves, rules=rules)
        # Between the ranks that there are, no plan may have that sum.
        while further and _tried(plan, probes):
            plan = select_within_error(calibration, further.pop(0), curves, rules=rules)
        if _tried(plan, probes):
            break
        predicted = math.fsum(
            curves[layer.path].of(layer) for layer in plan.layers if layer.path in curves
        )
        progress.say(
            f"{allowed.name}, plan {len(probes) + 1} of {PROBES} at most: the errors of its layers"
            f" add up to {predicted:.3g}"
        )
        result = reconstructed(calibration, plan, resume=_folder(resume, plan))
        measured = allowed.measure(original, result.model, held_back, calibration.batch_size)
        probe = Probe(plan, predicted, measured, result.report.macs["speedup"])
        progress.say(
            f"{probe.speedup:.2f}× fewer MACs: {measured:.3g} of {allowed.value:g} allowed, on"
            f" {len(held_back)} held-back images"
        )
        probes.append(probe)
        if resume is not None:
            _save(resume, digest, probes)
        if _fastest_within(probes, allowed) is probe:
            best = result
    chosen = _fastest_within(probes, allowed)
    if chosen is None:
        closest = min(probes, key=lambda probe: probe.measured)
        raise ValueError(
            f"{allowed.name} of {allowed.value:g} was not reached: the smallest of"
            f" {len(probes)} networks that were measured on {len(held_back)} held-back images is"
            f" {closest.measured:.3g}, at {closest.speedup:.2f}× fewer MACs"
        )
    if best is None:
        # Solved and measured before the run was stopped.
        best = reconstructed(calibration, chosen.plan, resume=_folder(resume, chosen.plan))
    return WithinLoss(best, chosen.measured, tuple(probes), len(held_back))


def _tried(plan: AccelerationPlan, probes: Sequence[Probe]) -> bool:
    return any(plan == probe.plan for probe in probes)


def _fastest_within(probes: Sequence[Probe], allowed: AllowedLoss) -> Probe | None:
    within = (probe for probe in probes if probe.measured <= allowed.value)
    return max(within, key=lambda probe: probe.speedup, default=None)


def _gentlest_beyond(probes: Sequence[Probe], allowed: AllowedLoss) -> Probe | None:
    """The other end of where to search: the slowest that loses too much.

    Where the loss falls by chance as plans get cheaper, only what is faster than the fastest within
    the allowed loss matters.
    """
    within = _fastest_within(probes, allowed)
    beyond = (
        probe
        for probe in probes
        if probe.measured > allowed.value and (within is None or probe.speedup > within.speedup)
    )
    return min(beyond, key=lambda probe: probe.speedup, default=None)


def _good_enough(probes: Sequence[Probe], allowed: AllowedLoss, images: int) -> bool:
    within, beyond = _fastest_within(probes, allowed), _gentlest_beyond(probes, allowed)
    if within is None:
        return False
    # Where no image may change its class, 0 of them say nothing of how many more MACs could go.
    if (largest := allowed.largest(images)) > 0 and within.measured >= ENOUGH * largest:
        return True
    return beyond is not None and beyond.predicted <= NARROW * within.predicted


def _sums(
    probes: Sequence[Probe], allowed: AllowedLoss, images: int, reachable: tuple[float, float]
) -> list[float]:
    """The predicted error to try next, then others, towards faster plans, if its plan was tried."""
    least, most = reachable
    beyond = _gentlest_beyond(probes, allowed)
    end = most if beyond is None else beyond.predicted
    first = min(max(_next_sum(probes, allowed, images), least), most)
    if first >= end:
        return [first]
    return [first, *(first ** (1 - share) * end**share for share in (0.1, 0.3, 0.6)), end]


def _next_sum(probes: Sequence[Probe], allowed: AllowedLoss, images: int) -> float:
    """The predicted error at which the loss should be the one that is aimed at.

    Of a disagreement that is half an image at least, and none at all is taken for a quarter of one:
    a logarithm needs more than 0.
    """
    exponent = EXPONENT[allowed.name]
    image = 0.0 if allowed.name == ALLOWED_ERROR else 1 / images
    aim = max(AIM * allowed.largest(images), image / 2)

    def log_loss(probe: Probe) -> float:
        return math.log(max(probe.measured, image / 4, sys.float_info.min))

    within, beyond = _fastest_within(probes, allowed), _gentlest_beyond(probes, allowed)
    if within is not None and beyond is not None:
        low, high = log_loss(within), log_loss(beyond)
        # Away from both ends, where the line is not straight.
        share = min(max((math.log(aim) - low) / (high - low), 0.1), 0.9)
        return within.predicted ** (1 - share) * beyond.predicted**share
    nearest = within or beyond
    if nearest is None:
        return (aim / SCALE[allowed.name]) ** (1 / exponent)
    slope, largest = exponent, math.log(LARGEST_STEP)
    if len(probes) > 1:
        # Of the two that are next to what is sought; no steeper or flatter than noise can explain.
        ordered = sorted(probes, key=lambda probe: probe.predicted)
        slower, faster = ordered[:2] if within is None else ordered[-2:]
        slope = log_loss(faster) - log_loss(slower)
        slope /= math.log(faster.predicted / slower.predicted)
        slope = min(max(slope, exponent / 2), 2 * exponent)
    step = (math.log(aim) - log_loss(nearest)) / slope
    return nearest.predicted * math.exp(min(max(step, -largest), largest))


def _folder(resume: Path | None, plan: AccelerationPlan) -> Path | None:
    """Where the solutions of a plan's layers are kept, apart from those of other plans."""
    if resume is None:
        return None
    return resume / f"plan-{hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]}"


def _save(folder: Path, digest: str, probes: Sequence[Probe]) -> None:
    told = [{**probe.figures(), "plan": probe.plan.to_json()} for probe in probes]
    write_whole(folder / "probes.json", json.dumps({"digest": digest, "probes": told}))


def _load(folder: Path, digest: str) -> list[Probe]:
    """The probes of a search that was stopped; none where it was another one."""
    file = folder / "probes.json"
    content = json.loads(file.read_text()) if file.exists() else {}
    if content.get("digest") != digest:
        return []
    return [
        Probe(**(told | {"plan": AccelerationPlan.from_json(told["plan"])}))
        for told in content["probes"]
    ]
