"""The acceleration of a network, in the order of the paper.

``accelerate`` folds batch normalisation, lets the original network answer at sampled positions
(``calibrate``), chooses the ranks of all layers at once (``select_ranks``), and then replaces one
convolution after the other in order of execution, each fitted to the original's responses through
the nonlinearity, from what the already accelerated network feeds it (``reconstruct``).
Zhang, Zou, He, Sun, arXiv:1505.06798, sections 3.1 to 3.4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from accel.batch_norm import find_foldable, fold_batch_norm
from accel.calibration import (
    AcceleratedRun,
    ArraySource,
    ImageSource,
    OriginalRun,
    fitting_images,
    sample_positions,
)
from accel.cost import count_conv_macs
from accel.decompositions import DECOMPOSITIONS, Decomposition, Weights
from accel.memory import available_bytes, peak_bytes, resident_bytes
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import LayerCall, Program, specification, trace
from accel.progress import Progress
from accel.rank_selection import (
    RANK_SELECTION,
    LayerChoices,
    RankProblem,
    Rules,
    apply_rules,
    budget_from_speedup,
)
from accel.report.environment import device_name, versions
from accel.report.report import LayerReport, Report
from accel.rewrite import FactorizedConv, rewrite
from accel.solution import Solution, load_solution, save_solution
from accel.solvers import SOLVERS, Responses, Solver, objective, response_spectrum

GIBIBYTE = 2**30


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the original network said about the calibration images.

    Attributes:
        model: The network with batch normalisation folded, in evaluation mode.
        folded: The batch normalisations that were folded, with the convolutions that took them in.
        program: The same network, traced.
        calls: The convolutions that can be replaced, in order of execution.
        left_out: The other convolutions, and why each stays as it is.
        decomposition: The decomposition that was asked for.
        source: The calibration images.
        batch_size: The batch size that the program was traced for.
        fitting: Which images are used for fitting; the others measure the error.
        positions: Where each convolution was looked at, by path.
        targets: The responses there, ``[images, positions, d]`` float32, by path.
        macs: Multiply-accumulates per image of every convolution of the network, by path or, where
            it is no module of its own, by place in the program.
        seconds: Time that calibrating took, compilation included.
        stated_peak_bytes: Bound on the host memory of the whole run, stated before it began.
        cache_bytes: How much of it may hold the accelerated network's activations.
    """

    model: nnx.Module
    folded: Mapping[str, str]
    program: Program
    calls: tuple[LayerCall, ...]
    left_out: Mapping[str, str]
    decomposition: Decomposition
    source: ImageSource
    batch_size: int
    fitting: np.ndarray
    positions: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    macs: Mapping[str, int]
    seconds: float
    stated_peak_bytes: int
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """An accelerated network.

    Attributes:
        model: An ordinary ``nnx.Module`` that shares nothing with the original.
        plan: What became of each convolution.
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
    decomposition: str = "channel",
    solver: str | Solver = "alternating",
    asymmetric: bool = True,
    rank_selection: str = "exact_energy",
    rules: Rules | None = None,
    positions_per_image: int = 10,
    batch_size: int = 16,
    cache_bytes: int | None = None,
    seed: int = 0,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Makes a trained convolutional network cheaper by ``speedup``, without retraining.

    Args:
        model: The network, called as ``model(images)`` with ``[batch, …, channels]``; it is not
            changed.
        images: Calibration images as the network takes them, without labels; an array or a source
            that streams them. A tenth of them, drawn by ``seed``, is kept for measuring errors.
        speedup: Multiply-accumulates of all convolutions now over those wanted.
        decomposition: Name of the chain that replaces a convolution (``DECOMPOSITIONS``).
        solver: How a layer is fitted: a name of ``SOLVERS`` or a solver.
        asymmetric: Whether a layer is fitted to the inputs that it will get from the accelerated
            network, instead of those of the original.
        rank_selection: How ranks are chosen (``RANK_SELECTION``).
        rules: Layers by path pattern that stay ``"dense"`` or get a fixed rank.
        positions_per_image: Output positions sampled per image and layer.
        batch_size: Images per batch while calibrating.
        cache_bytes: Host memory for activations between layers; by default a quarter of what is
            available. Less costs time, not accuracy.
        seed: Seed of all that is drawn.
        resume: A folder that keeps each layer's solution as soon as it is found, so that a run that
            was stopped goes on there when it is called again with the same arguments.
        progress: Receives what the run is doing.

    Raises:
        ValueError: If the network, the images or what is asked for do not fit; the message names
            the layer, pattern or argument.
    """
    if rank_selection not in RANK_SELECTION:
        raise ValueError(
            f"unknown rank selection {rank_selection!r}; known: {', '.join(RANK_SELECTION)}"
        )
    chosen_solver = solver_named(solver)
    calibration = calibrate(
        model,
        images,
        decomposition=decomposition,
        positions_per_image=positions_per_image,
        batch_size=batch_size,
        cache_bytes=cache_bytes,
        seed=seed,
        rules=rules,
        progress=progress,
    )
    plan = select_ranks(calibration, speedup, rank_selection=rank_selection, rules=rules)
    result = reconstruct(
        calibration,
        plan,
        solver=chosen_solver,
        asymmetric=asymmetric,
        resume=resume,
        progress=progress,
    )
    settings = {
        "speedup": speedup,
        "rank_selection": rank_selection,
        "rules": dict(rules or {}),
        "positions_per_image": positions_per_image,
        "seed": seed,
    }
    report = dataclasses.replace(result.report, settings={**settings, **result.report.settings})
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


def calibrate(
    model: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    *,
    decomposition: str = "channel",
    positions_per_image: int = 10,
    batch_size: int = 16,
    cache_bytes: int | None = None,
    seed: int = 0,
    rules: Rules | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Runs the original network once over the images and keeps its responses at sampled positions.

    One calibration serves any number of plans, solvers and speedups. The arguments are those of
    ``accelerate``; ``rules`` are only checked here, so that a mistake shows before the work.
    """
    progress = progress or Progress()
    start = time.perf_counter()
    if decomposition not in DECOMPOSITIONS:
        raise ValueError(
            f"unknown decomposition {decomposition!r}; known: {', '.join(DECOMPOSITIONS)}"
        )
    chain = DECOMPOSITIONS[decomposition]
    source = (
        ArraySource(np.asarray(images)) if isinstance(images, np.ndarray | jax.Array) else images
    )
    if len(source) < 2:
        raise ValueError(f"calibration needs 2 images or more, found {len(source)}")
    if positions_per_image < 1 or batch_size < 1:
        raise ValueError(
            "positions_per_image and batch_size are 1 or more, found"
            f" {positions_per_image} and {batch_size}"
        )
    _check_parameters(model)
    batch_size = min(batch_size, len(source))
    first = np.asarray(next(iter(source.batches(batch_size))))
    batch = jax.ShapeDtypeStruct(first.shape, first.dtype)
    evaluated = nnx.clone(model)
    evaluated.eval()
    folded_pairs = find_foldable(evaluated, batch)
    folded = fold_batch_norm(evaluated, folded_pairs)
    program = trace(folded, batch)
    left_out = dict(program.left_out)
    for call in program.calls:
        if (reason := chain.unsuitable(call.layer)) is not None:
            left_out[call.path] = reason
    calls = tuple(call for call in program.calls if call.path not in left_out)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} has no convolution to accelerate: "
            + (", ".join(f"{path} ({reason})" for path, reason in left_out.items()) or "none found")
        )
    apply_rules(_widths(calls), rules or {})

    position_key, _ = jax.random.split(jax.random.key(seed))
    positions = {
        call.path: sample_positions(
            position_key, call, len(source), batch_size, positions_per_image
        )
        for call in calls
    }
    run = OriginalRun(program, calls, source, batch_size, positions)
    stated, cache = _memory_needed(run, program, source, batch_size, cache_bytes)
    progress.say(
        f"calibrating {len(calls)} convolutions on {len(source)} images; host memory stays under"
        f" {stated / GIBIBYTE:.1f} GiB, {cache / GIBIBYTE:.1f} GiB of it for activations"
    )
    progress.begin("original network", len(source))
    targets = run.responses(progress.advance)
    return Calibration(
        model=folded,
        folded=folded_pairs,
        program=program,
        calls=calls,
        left_out=left_out,
        decomposition=chain,
        source=source,
        batch_size=batch_size,
        fitting=fitting_images(len(source), seed),
        positions=positions,
        targets=targets,
        macs=count_conv_macs(folded, batch),
        seconds=time.perf_counter() - start,
        stated_peak_bytes=stated,
        cache_bytes=cache,
    )


def select_ranks(
    calibration: Calibration,
    speedup: float,
    *,
    rank_selection: str = "exact_energy",
    rules: Rules | None = None,
) -> AccelerationPlan:
    """Chooses what becomes of each convolution so that the network gets cheaper by ``speedup``.

    The arguments are those of ``accelerate``.
    """
    fixed = apply_rules(_widths(calibration.calls), rules or {})
    layers = []
    for call in calibration.calls:
        positions = math.prod(specification(call.output).shape[:-1]) // calibration.batch_size
        unit = calibration.decomposition.factors(call.layer, 1)
        targets = calibration.targets[call.path][calibration.fitting]
        layers.append(
            LayerChoices(
                path=call.path,
                spectrum=np.asarray(response_spectrum(_rows(targets)), np.float64),
                dense_macs=calibration.macs[call.path],
                macs_per_rank=sum(factor.macs(positions) for factor in unit),
                fixed=fixed[call.path],
            )
        )
    total = sum(calibration.macs.values())
    problem = RankProblem(
        layers=tuple(layers),
        other_macs=total - sum(layer.dense_macs for layer in layers),
        budget_macs=budget_from_speedup(total, speedup),
    )
    ranks = RANK_SELECTION[rank_selection](problem)
    plans = []
    for path in _execution_order(calibration):
        if path in calibration.left_out:
            plans.append(LayerPlan(path, reason=calibration.left_out[path]))
        elif (rank := ranks[path]) is None:
            reason = "by rule" if fixed[path] == "dense" else "cheaper as it is"
            plans.append(LayerPlan(path, reason=reason))
        else:
            plans.append(LayerPlan(path, calibration.decomposition.name, (rank,)))
    return AccelerationPlan(tuple(plans), calibration.folded)


def reconstruct(
    calibration: Calibration,
    plan: AccelerationPlan,
    *,
    solver: str | Solver = "alternating",
    asymmetric: bool = True,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> Result:
    """Replaces the convolutions of ``plan`` one after the other, each fitted to responses.

    Args:
        calibration: From ``calibrate``.
        plan: From ``select_ranks``, or made by hand.
        solver: As in ``accelerate``.
        asymmetric: As in ``accelerate``.
        resume: A folder that keeps each layer's solution as soon as it is found; layers that it
            holds from an earlier call with the same arguments are not solved again.
        progress: As in ``accelerate``.
    """
    progress = progress or Progress()
    solver = solver_named(solver)
    decomposition = calibration.decomposition
    plans = {layer.path: layer for layer in plan.layers}
    calls = [call for call in calibration.calls if plans[call.path].decomposition is not None]
    run = AcceleratedRun(
        calibration.program,
        calls,
        calibration.source,
        calibration.batch_size,
        calibration.cache_bytes,
    )
    weights: dict[str, tuple[Weights, ...]] = {}
    errors: dict[str, float] = {}
    seconds = {"calibrate": calibration.seconds, "solve": 0.0}
    for index, call in enumerate(calls, start=1):
        (rank,) = plans[call.path].ranks
        progress.begin(f"{index}/{len(calls)} {call.path}, rank {rank}", len(calibration.source))
        start = time.perf_counter()
        inputs = run.responses(calibration.positions[call.path], progress.advance)
        responded = time.perf_counter()
        problem = _problem(calibration, call, inputs, rank, solver, asymmetric)
        solution = None if resume is None else load_solution(resume, call.path, problem)
        if solution is None:
            solution = _solve(calibration, call, inputs, rank, solver, asymmetric)
            if resume is not None:
                save_solution(resume, call.path, solution, problem)
        errors[call.path] = solution.response_error
        bias = None if call.layer.bias is None else call.layer.bias[...]
        weights[call.path] = decomposition.weights(
            call.layer.kernel[...], bias, solution.factorization
        )
        solved = time.perf_counter()
        factors = decomposition.factors(call.layer, rank)
        run.replace(FactorizedConv(call.layer, factors, weights[call.path]))
        seconds["calibrate"] += responded - start + time.perf_counter() - solved
        seconds["solve"] += solved - responded
    model = rewrite(calibration.model, plan, weights)
    report = _report(calibration, plan, model, errors, seconds)
    settings = {
        "solver": {"name": type(solver).__name__, **dataclasses.asdict(solver)},
        "asymmetric": asymmetric,
        "images": len(calibration.source),
    }
    return Result(model, plan, dataclasses.replace(report, settings=settings))


def _problem(
    calibration: Calibration,
    call: LayerCall,
    inputs: np.ndarray,
    rank: int,
    solver: Solver,
    asymmetric: bool,
) -> str:
    """Tells the problem of one layer from every other: all that its solution hangs on."""
    digest = hashlib.sha256(repr((rank, solver, asymmetric, call.activation)).encode())
    for array in (inputs, calibration.targets[call.path], calibration.fitting):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _solve(
    calibration: Calibration,
    call: LayerCall,
    inputs: np.ndarray,
    rank: int,
    solver: Solver,
    asymmetric: bool,
) -> Solution:
    """Fits one layer, and measures the fit on the images that are not used for fitting."""
    targets, fitting = calibration.targets[call.path], calibration.fitting
    fitted = Responses(
        inputs=_rows((inputs if asymmetric else targets)[fitting]), targets=_rows(targets[fitting])
    )
    try:
        factorization = solver(fitted, rank, call.activation)
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"{call.path}: {error}") from error
    held_out = Responses(inputs=_rows(inputs[~fitting]), targets=_rows(targets[~fitting]))
    error, energy = objective(held_out, factorization, call.activation)
    return Solution(factorization, error / energy if energy > 0 else 0.0)


def _report(
    calibration: Calibration,
    plan: AccelerationPlan,
    model: nnx.Module,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Report:
    after = count_conv_macs(model, specification(calibration.program.images))
    activations = {call.path: call.activation for call in calibration.program.calls}
    layers = tuple(
        LayerReport(
            path=layer.path,
            decomposition=layer.decomposition,
            ranks=layer.ranks,
            macs_original=calibration.macs.get(layer.path, 0),
            macs_accelerated=sum(
                macs
                for path, macs in after.items()
                if path == layer.path or path.startswith(f"{layer.path}/")
            ),
            response_error=errors.get(layer.path),
            activation=activations.get(layer.path, "identity"),
            reason=layer.reason,
        )
        for layer in plan.layers
    )
    original, accelerated = sum(calibration.macs.values()), sum(after.values())
    return Report(
        model=type(calibration.model).__name__,
        device=device_name(),
        versions=versions(),
        settings={},
        macs={
            "original": original,
            "accelerated": accelerated,
            "speedup": original / accelerated,
        },
        layers=layers,
        seconds={**seconds, "total": sum(seconds.values())},
        memory={
            "stated_peak_bytes": calibration.stated_peak_bytes,
            "measured_peak_bytes": peak_bytes(),
        },
    )


def _widths(calls: Sequence[LayerCall]) -> dict[str, int]:
    return {call.path: specification(call.output).shape[-1] for call in calls}


def _execution_order(calibration: Calibration) -> list[str]:
    called = [call.path for call in calibration.program.calls]
    return [*called, *(path for path in calibration.left_out if path not in called)]


def _rows(responses: np.ndarray) -> np.ndarray:
    return responses.reshape(-1, responses.shape[-1])


def _check_parameters(model: nnx.Module) -> None:
    for path, value in nnx.to_flat_state(nnx.state(model)):
        array = value[...]
        if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
            raise ValueError(f"{'/'.join(map(str, path))}: the parameter holds NaN or Inf")


def _memory_needed(
    run: OriginalRun,
    program: Program,
    source: ImageSource,
    batch_size: int,
    cache_bytes: int | None,
) -> tuple[int, int]:
    """Bounds on the host memory of a run: in all, and of it for cached activations."""
    if cache_bytes is None:
        available = available_bytes()
        cache_bytes = 4 * GIBIBYTE if available is None else available // 4
    live = AcceleratedRun(program, run.calls, source, batch_size, cache_bytes).live_bytes
    cache = min(cache_bytes, live)
    widest = max(
        run.positions[call.path].size * specification(call.output).shape[-1] for call in run.calls
    )
    parameters = sum(value.nbytes for value in program.parameters)
    needed = (
        resident_bytes()
        + run.response_bytes
        + run.working_bytes
        + cache
        # The accelerated network: its weights, and the working set of one of its steps.
        + parameters
        + run.working_bytes
        # A solver: inputs and targets in float32, and about ten float64 arrays of that size.
        + widest * (2 * 4 + 10 * 8)
        # Compiled code and the allocator's slack.
        + GIBIBYTE // 2
    )
    return needed, cache
