"""The last step of ``accelerate``: the layers of a plan are replaced, one after the other.

In order of execution, each is fitted to the original's responses at the sampled positions, from
what the network as accelerated so far feeds it (asymmetric), or from what the original does.
Zhang, Zou, He, Sun, arXiv:1505.06798, section 3.3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.calibration import Calibration
from accel.decompositions import DECOMPOSITIONS, Split, Weights
from accel.measurements import measure_sensitivity
from accel.memory import release_free_memory
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import LayerCall, named_layers
from accel.progress import Progress
from accel.reconstruction import JOINT, RECONSTRUCTIONS, LayerProblem
from accel.report.acceleration import acceleration_report
from accel.report.report import Report
from accel.rewrite import chain_for, rewrite
from accel.runs import AcceleratedRun
from accel.sensitivity import Sensitivity
from accel.solution import SOLUTION_FORMAT, Solution, load_solution, save_solution
from accel.solvers import SOLVERS, Alternating, ReducedRankRegression, Solver
from accel.solvers.activations import activate


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
    release_free_memory()  # What a calibration and calls before have left.
    progress = progress or Progress()
    resume = None if resume is None else Path(resume)
    solver = solver_named(solver)
    check_reconstruction(reconstruction, solver)
    _check_plan(calibration, plan)
    if reconstruction == JOINT and sensitivity is None:
        sensitivity = measure_sensitivity(calibration, progress=progress)
    plans = {layer.path: layer for layer in plan.layers}
    calls = [call for call in calibration.calls if plans[call.path].decomposition is not None]
    run, original = (
        AcceleratedRun(
            calibration.program,
            calls or calibration.calls,  # A plan that replaces nothing walks nowhere.
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
        # Activations come and go in sizes that change from layer to layer, which leaves the
        # allocator with gaps as large as what is alive: solving would take its memory beside them.
        release_free_memory()
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
    report = acceleration_report(calibration, plan, model, errors, seconds)
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
    """``Σ‖r(y) - r(y')‖²/Σ‖r(y)‖²`` on the images that are not used for fitting.

    Where all r(y) are zero there, 0 if all r(y') are, too, and otherwise 1.
    """
    held_out = ~calibration.fitting
    structure = DECOMPOSITIONS[str(layer.decomposition)].structure(call.layer)
    given, wanted = (
        np.asarray(activate(jnp.asarray(responses), call.activation))
        for responses in (
            split(structure, _rows(patches[held_out])),
            _rows(calibration.targets[call.path][held_out]),
        )
    )
    energy = float(np.sum(wanted**2, dtype=np.float64))
    error = float(np.sum((given - wanted) ** 2, dtype=np.float64))
    return error / energy if energy > 0 else float(error > 0)


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


def check_reconstruction(name: str, solver: Solver) -> None:
    """Raises ValueError where the name is unknown, or the solver is none that it calls."""
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


def _rows(responses: np.ndarray) -> np.ndarray:
    return responses.reshape(-1, responses.shape[-1])
