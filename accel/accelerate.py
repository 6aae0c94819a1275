"""The acceleration of a network, in the order of the paper.

``accelerate`` folds batch normalisation, lets the original network answer at sampled positions
(``calibrate``), chooses kind and ranks of all layers at once (``select_ranks``), and then replaces
one convolution after the other in order of execution, each fitted to the original's responses
through the nonlinearity, from what the already accelerated network feeds it (``reconstruct``).
Where a loss is allowed instead of a speedup asked for, the last two steps are repeated until the
loss is the one that was allowed (``search_within_loss``).
Zhang, Zou, He, Sun, arXiv:1505.06798, sections 3.1 to 3.5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.budgets import Budget
from accel.calibration import ALL_KINDS, Calibration, calibrate, layer_kinds
from accel.cost import count_conv_macs, count_dense_macs
from accel.decompositions import DECOMPOSITIONS, Split, Weights
from accel.images import ImageSource
from accel.loss_budget import search_within_loss
from accel.memory import peak_bytes, release_free_memory
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import LayerCall, named_layers, path_name, specification
from accel.progress import Progress
from accel.rank_selection import Rules, check_speedup
from accel.reconstruction import JOINT, RECONSTRUCTIONS, LayerProblem
from accel.report.environment import device_name, versions
from accel.report.report import LayerReport, Report
from accel.rewrite import chain_for, rewrite
from accel.runs import AcceleratedRun
from accel.selection import (
    MEASURED_ERROR,
    check_rank_selection,
    measure_errors,
    measure_sensitivity,
    select_ranks,
)
from accel.sensitivity import Sensitivity
from accel.solution import SOLUTION_FORMAT, Solution, load_solution, save_solution
from accel.solvers import SOLVERS, Alternating, ReducedRankRegression, Solver


@dataclasses.dataclass(frozen=True)
class Result:
    """An accelerated network.

    Attributes:
        model: An ordinary ``nnx.Module`` that shares nothing with the original.
        plan: What became of each layer.
        report: What was done and what it gave.
    """

    model: nnx.Module
    plan: AccelerationPlan
    report: Report


def accelerate(
    model: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    speedup: float = 4.0,
    *,
    decompositions: str | Sequence[str] = ALL_KINDS,
    reconstruction: str = "joint",
    solver: str | Solver = "alternating",
    asymmetric: bool = True,
    rank_selection: str = MEASURED_ERROR,
    rules: Rules | None = None,
    dense_speedup: float | None = None,
    latency_speedup: float | None = None,
    latency_ms: float | None = None,
    latency_batch: int = 1,
    parameter_ratio: float | None = None,
    allowed_error: float | None = None,
    allowed_disagreement: float | None = None,
    positions_per_image: int = 10,
    batch_size: int = 16,
    cache_bytes: int | None = None,
    seed: int = 0,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Makes a trained convolutional network cheaper by ``speedup``, without retraining.

    Args:
        model: The network, called as ``model(images)`` with ``[batch, …, channels]``; it is not
            changed.
        images: Calibration images as the network takes them, without labels; an array or a source
            that streams them. A tenth of them, drawn by ``seed``, is kept for measuring errors;
            where the source has ``groups``, a tenth of those (see ``split_images``).
        speedup: Multiply-accumulates of all convolutions now over those wanted.
        decompositions: Names of the chains that may replace a convolution (``DECOMPOSITIONS``); the
            best one of each layer is chosen where ranks are selected by ``measured_error``. Dense
            layers have one kind only, ``svd``, which need not be named.
        reconstruction: What is fitted to what (``RECONSTRUCTIONS``): ``weights`` approximates
            kernels and looks at no image, ``responses`` is the paper's, ``joint`` fits all factors.
        solver: How responses are fitted: a name of ``SOLVERS`` or a solver. ``joint`` has a fit of
            its own and takes from ``alternating`` the turns through the nonlinearity, of which the
            other, linear ones have none.
        asymmetric: Whether a layer is fitted to the inputs that it will get from the accelerated
            network, instead of those of the original.
        rank_selection: How ranks are chosen: ``measured_error``, or by energies
            (``RANK_SELECTION``) for a single kind of chain.
        rules: Layers by path pattern that stay ``"dense"`` or get a fixed rank.
        dense_speedup: Multiply-accumulates of all dense layers (``nnx.Linear``) now over those
            wanted: a budget apart from that of the convolutions. None leaves dense layers alone.
        latency_speedup: A budget in time instead of ``speedup``: the original's measured time for
            a batch over that of the accelerated network, on the default device, which should have
            nothing else to do (``accel.latency_budget``).
        latency_ms: A budget in time instead of ``speedup``: the accelerated network's own, for a
            batch, in milliseconds.
        latency_batch: Images per batch in these measurements.
        parameter_ratio: A budget in parameters instead of ``speedup``: those of all convolutions
            now over those wanted.
        allowed_error: Instead of ``speedup``, the largest relative squared error of the outputs,
            Σ‖f - g‖²/Σ‖f‖², measured on the calibration images that are not fitted to: the network
            of fewest MACs within it is searched for (``accel.loss_budget``).
        allowed_disagreement: Likewise, the largest share of these images whose top-1 class changes;
            0 for none. For networks that answer an image with a row of two numbers or more. Of
            this and the budgets above one at most can be given; they need ``measured_error``.
        positions_per_image: Output positions sampled per image and layer.
        batch_size: Images per batch while calibrating.
        cache_bytes: Host memory for activations between layers; by default a quarter of what is
            available. Less costs time, not accuracy.
        seed: Seed of all that is drawn.
        resume: A folder that keeps each layer's solution as soon as it is found, so that a run that
            was stopped goes on there when it is called again with the same arguments; of a search,
            also what networks lose that were solved and measured.
        progress: Receives what the run is doing.

    Raises:
        ValueError: If the network, the images or what is asked for do not fit; the message names
            the layer, pattern or argument.
    """
    check_rank_selection(rank_selection, layer_kinds(decompositions, dense_speedup is not None))
    if dense_speedup is not None:
        check_speedup("dense_speedup", dense_speedup)
    resume = None if resume is None else Path(resume)
    chosen_solver = solver_named(solver)
    _check_reconstruction(reconstruction, chosen_solver)
    budget = Budget(
        latency_speedup=latency_speedup,
        latency_ms=latency_ms,
        parameter_ratio=parameter_ratio,
        allowed_error=allowed_error,
        allowed_disagreement=allowed_disagreement,
        latency_batch=latency_batch,
    )
    budget.check(rank_selection, dense_speedup)
    allowed_loss = budget.allowed_loss
    if allowed_loss is not None:
        allowed_loss.check(model, images)
    calibration = calibrate(
        model,
        images,
        decompositions=decompositions,
        positions_per_image=positions_per_image,
        batch_size=batch_size,
        cache_bytes=cache_bytes,
        seed=seed,
        rules=rules,
        dense_layers=dense_speedup is not None,
        progress=progress,
    )
    sensitivity, curves = None, None
    start = time.perf_counter()
    if rank_selection == MEASURED_ERROR or reconstruction == JOINT:
        sensitivity = measure_sensitivity(calibration, progress=progress)
    if rank_selection == MEASURED_ERROR:
        curves = measure_errors(calibration, sensitivity, progress=progress)
    reconstructed = partial(
        reconstruct,
        reconstruction=reconstruction,
        solver=chosen_solver,
        asymmetric=asymmetric,
        sensitivity=sensitivity,
        progress=progress,
    )
    found: dict[str, Any] = {}
    if allowed_loss is not None and curves is not None:
        searched = search_within_loss(
            calibration,
            model,
            allowed_loss,
            curves,
            reconstructed,
            settings=(reconstruction, chosen_solver, asymmetric),
            rules=rules,
            resume=resume,
            progress=progress,
        )
        result, found = searched.result, {"loss_search": searched.figures()}
        # Networks that were solved on the way belong to the choice of the one that is returned.
        solved = result.report.seconds["total"] - calibration.seconds
        selected = time.perf_counter() - start - solved
    else:
        if budget.given and curves is not None:
            plan, timed = budget.select(
                calibration, model, curves, rules=rules, resume=resume, progress=progress
            )
            found = {"planned_latency": timed} if timed else {}
        else:
            plan = select_ranks(
                calibration,
                speedup,
                rank_selection=rank_selection,
                rules=rules,
                curves=curves,
                dense_speedup=dense_speedup,
            )
        selected = time.perf_counter() - start
        result = reconstructed(calibration, plan, resume=resume)
    settings = {
        **(budget.given or {"speedup": speedup}),
        **found,
        "rank_selection": rank_selection,
        "rules": dict(rules or {}),
        "dense_speedup": dense_speedup,
        "positions_per_image": positions_per_image,
        "seed": seed,
    }
    seconds = {**result.report.seconds, "select": selected}
    seconds["total"] += selected
    report = dataclasses.replace(
        result.report, settings={**settings, **result.report.settings}, seconds=seconds
    )
    return dataclasses.replace(result, report=report)


def solver_named(solver: str | Solver) -> Solver:
    """The solver of that name with its default settings; a solver is returned as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    return SOLVERS[solver]()


def _check_reconstruction(name: str, solver: Solver) -> None:
    if name not in RECONSTRUCTIONS:
        raise ValueError(f"unknown reconstruction {name!r}; known: {', '.join(RECONSTRUCTIONS)}")
    if name != JOINT:
        return
    # It has fits of its own in the place of these two, and calls no other.
    if not isinstance(solver, ReducedRankRegression | Alternating):
        raise ValueError(
            f"reconstruction='joint' does not call {solver}; choose reconstruction='responses'"
        )
    # All that it takes from them are the turns: whatever else they say would be lost.
    settings = {f.name: f.default for f in dataclasses.fields(solver) if f.name != "schedule"}
    if any(getattr(solver, name) != value for name, value in settings.items()):
        raise ValueError(
            f"{solver} has settings that reconstruction='joint' does not take over; choose"
            " reconstruction='responses'"
        )


def reconstruct(
    calibration: Calibration,
    plan: AccelerationPlan,
    *,
    reconstruction: str = "joint",
    solver: str | Solver = "alternating",
    asymmetric: bool = True,
    sensitivity: Mapping[str, Sensitivity] | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replaces the layers of ``plan`` one after the other, each fitted to responses.

    Args:
        calibration: From ``calibrate``.
        plan: From ``select_ranks``, or made by hand.
        solver: As in ``accelerate``.
        asymmetric: As in ``accelerate``.
        sensitivity: From ``measure_sensitivity``; for ``joint`` alone, which measures it where it
            is not given.
        resume: A folder that keeps each layer's solution as soon as it is found; layers that it
            holds from an earlier call with the same arguments are not solved again.
        progress: As in ``accelerate``.
    """
    # Activations come and go in sizes that change from layer to layer, which leaves the allocator
    # with gaps; a calibration and every call before would leave some more.
    release_free_memory()
    progress = progress or Progress()
    resume = None if resume is None else Path(resume)
    solver = solver_named(solver)
    _check_reconstruction(reconstruction, solver)
    _check_plan(calibration, plan)
    if reconstruction == JOINT and sensitivity is None:
        sensitivity = measure_sensitivity(calibration, progress=progress)
    plans = {layer.path: layer for layer in plan.layers}
    calls = [call for call in calibration.calls if plans[call.path].decomposition is not None]
    run, original = (
        AcceleratedRun(
            calibration.program,
            calls,
            calibration.source,
            calibration.batch_size,
            cache_bytes,
        )
        for cache_bytes in _shares(calibration.cache_bytes, asymmetric)
    )
    weights: dict[str, tuple[Weights, ...]] = {}
    errors: dict[str, float] = {}
    seconds = {"calibrate": calibration.seconds, "solve": 0.0}
    for index, call in enumerate(calls, start=1):
        layer = plans[call.path]
        decomposition = DECOMPOSITIONS[str(layer.decomposition)]
        progress.begin(
            f"{index}/{len(calls)} {call.path}, {layer.decomposition}"
            f" {', '.join(map(str, layer.ranks))}",
            len(calibration.source),
        )
        start = time.perf_counter()
        positions = calibration.positions[call.path]
        seen = run.patches(positions, progress.advance)
        # Symmetric: fitted to what the original network feeds the layer, whatever it will get.
        fitted = seen if asymmetric else original.patches(positions)
        responded = time.perf_counter()
        metric = sensitivity[call.path] if sensitivity and reconstruction == JOINT else None
        settings = (SOLUTION_FORMAT, layer, reconstruction, solver, call.activation)
        # What it is given at last, too: its error is measured on that.
        given = (fitted,) if asymmetric else (fitted, seen)
        arrays = (*given, calibration.targets[call.path], calibration.fitting)
        digest = _digest(settings, *arrays, *(metric or ()))
        solution = None if resume is None else load_solution(resume, call.path, digest)
        if solution is None:
            problem = layer_problem(calibration, call, layer, fitted, solver, metric)
            split = solve_layer(problem, reconstruction, call.path)
            solution = Solution(split, held_out_error(calibration, call, layer, seen, split))
            if resume is not None:
                save_solution(resume, call.path, solution, digest)
        errors[call.path] = solution.response_error
        weights[call.path] = decomposition.weights(call.layer, layer.ranks, solution.split)
        solved = time.perf_counter()
        factors = decomposition.factors(call.layer, *layer.ranks)
        run.replace(chain_for(call.layer, factors, weights[call.path]))
        original.keep()
        seconds["calibrate"] += responded - start + time.perf_counter() - solved
        seconds["solve"] += solved - responded
    model = rewrite(calibration.model, plan, weights)
    report = _report(calibration, plan, model, errors, seconds)
    settings = {
        "reconstruction": reconstruction,
        "solver": {"name": type(solver).__name__, **dataclasses.asdict(solver)},
        "asymmetric": asymmetric,
        "images": len(calibration.source),
    }
    return Result(model, plan, dataclasses.replace(report, settings=settings))


def _shares(cache_bytes: int, asymmetric: bool) -> tuple[int, int]:
    """What the walks through the accelerated and the original network may each cache."""
    return (cache_bytes, 0) if asymmetric else (cache_bytes // 2, cache_bytes // 2)


def _digest(settings: tuple, *arrays: np.ndarray) -> str:
    """Tells the problem of one layer from every other: all that its solution hangs on."""
    digest = hashlib.sha256(repr(settings).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def layer_problem(
    calibration: Calibration,
    call: LayerCall,
    layer: LayerPlan,
    patches: np.ndarray,
    solver: Solver,
    sensitivity: Sensitivity | None = None,
) -> LayerProblem:
    """The fitting of one layer to the images that are used for fitting.

    Args:
        calibration: From ``calibrate``.
        call: The layer.
        layer: Its chain and ranks.
        patches: What it sees of all images, ``[images, positions, p]``.
        solver: Fits the last factor.
        sensitivity: Of the layer, from ``measure_sensitivity``.
    """
    fitting = calibration.fitting
    return LayerProblem(
        conv=call.layer,
        decomposition=DECOMPOSITIONS[str(layer.decomposition)],
        ranks=layer.ranks,
        patches=_rows(patches[fitting]),
        targets=_rows(calibration.targets[call.path][fitting]),
        tuning=np.repeat(calibration.tuning[fitting], patches.shape[1]),
        activation=call.activation,
        solver=solver,
        sensitivity=sensitivity,
    )


def solve_layer(problem: LayerProblem, reconstruction: str, path: str) -> Split:
    """The factors of one layer; what cannot be solved is told with the layer's path."""
    try:
        split = RECONSTRUCTIONS[reconstruction](problem)
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"{path}: {error}") from error
    for name, factor in split._asdict().items():
        if factor is not None and not np.isfinite(factor).all():
            raise FloatingPointError(f"{path}: the chain's {name} came out with NaN or Inf")
    return split


def held_out_error(
    calibration: Calibration, call: LayerCall, layer: LayerPlan, patches: np.ndarray, split: Split
) -> float:
    """``Σ‖r(y) - r(y')‖²/Σ‖r(y)‖²`` on the images that are not used for fitting."""
    held_out = ~calibration.fitting
    structure = DECOMPOSITIONS[str(layer.decomposition)].structure(call.layer)
    given, wanted = (
        np.maximum(responses, 0) if call.activation == "relu" else responses
        for responses in (
            split(structure, _rows(patches[held_out])),
            _rows(calibration.targets[call.path][held_out]),
        )
    )
    energy = float(np.sum(wanted**2, dtype=np.float64))
    return float(np.sum((given - wanted) ** 2, dtype=np.float64)) / energy if energy > 0 else 0.0


def _check_plan(calibration: Calibration, plan: AccelerationPlan) -> None:
    """Raises ValueError where a plan, made by hand perhaps, does not fit the network."""
    calls = {call.path: call for call in calibration.calls}
    planned = {layer.path: layer for layer in plan.layers}
    if missing := [path for path in calls if path not in planned]:
        raise ValueError(f"the plan says nothing of {missing[0]}")
    known = {path for path, _ in named_layers(calibration.model, (nnx.Conv, nnx.Linear))}
    known |= calibration.left_out.keys()
    for layer in plan.layers:
        if layer.path not in known:
            raise ValueError(f"the plan names {layer.path!r}, which is no layer of the network")
        if layer.decomposition is None:
            continue
        if layer.path not in calls:
            raise ValueError(f"{layer.path}: the plan decomposes it, but it cannot be replaced")
        if layer.decomposition not in DECOMPOSITIONS:
            raise ValueError(f"{layer.path}: unknown decomposition {layer.decomposition!r}")
        conv = calls[layer.path].layer
        decomposition = DECOMPOSITIONS[layer.decomposition]
        if (reason := decomposition.unsuitable(conv)) is not None:
            raise ValueError(f"{layer.path}: {decomposition.name} does not fit: {reason}")
        decomposition.factors(conv, *layer.ranks)
        largest = decomposition.ranks(conv, decomposition.largest_rank(conv))
        if any(rank > most for rank, most in zip(layer.ranks, largest, strict=True)):
            raise ValueError(
                f"{layer.path}: ranks of {decomposition.name} are at most {largest}, found"
                f" {layer.ranks}"
            )


def _report(
    calibration: Calibration,
    plan: AccelerationPlan,
    model: nnx.Module,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Report:
    images = specification(calibration.program.images)
    after = count_conv_macs(model, images)
    dense_after = count_dense_macs(model, images) if calibration.dense_macs else {}
    layer_types = {
        path_name(parts): type(node).__name__ for parts, node in nnx.iter_graph(calibration.model)
    }
    activations = {call.path: call.activation for call in calibration.program.calls}
    before = {**calibration.macs, **calibration.dense_macs}
    layers = tuple(
        LayerReport(
            path=layer.path,
            layer_type=layer_types[layer.path],
            decomposition=layer.decomposition,
            ranks=layer.ranks,
            macs_original=before.get(layer.path, 0),
            macs_accelerated=sum(
                macs
                for path, macs in {**after, **dense_after}.items()
                if path == layer.path or path.startswith(f"{layer.path}/")
            ),
            response_error=errors.get(layer.path),
            activation=activations.get(layer.path, "identity"),
            reason=layer.reason,
        )
        for layer in plan.layers
    )
    original, accelerated = sum(calibration.macs.values()), sum(after.values())
    macs = {"original": original, "accelerated": accelerated, "speedup": original / accelerated}
    if calibration.dense_macs:
        original, accelerated = sum(calibration.dense_macs.values()), sum(dense_after.values())
        macs |= {
            "dense_original": original,
            "dense_accelerated": accelerated,
            "dense_speedup": original / accelerated,
        }
    return Report(
        model=type(calibration.model).__name__,
        device=device_name(),
        versions=versions(),
        settings={},
        macs=macs,
        layers=layers,
        seconds={**seconds, "total": sum(seconds.values())},
        memory={
            "stated_peak_bytes": calibration.stated_peak_bytes,
            "measured_peak_bytes": peak_bytes(),
        },
    )


def _rows(responses: np.ndarray) -> np.ndarray:
    return responses.reshape(-1, responses.shape[-1])
