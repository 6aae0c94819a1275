"""The acceleration of a network, in the order of the paper.

``accelerate`` folds batch normalisation, lets the original network answer at sampled positions
(``calibrate``), chooses kind and ranks of all layers at once (``select_ranks``), and then replaces
one convolution after the other in order of execution, each fitted to the original's responses
through the nonlinearity, from what the already accelerated network feeds it (``reconstruct``).
Zhang, Zou, He, Sun, arXiv:1505.06798, sections 3.1 to 3.5.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
    image_groups,
    patch_size,
    sample_positions,
    split_images,
)
from accel.cost import count_conv_macs
from accel.decompositions import DECOMPOSITIONS, Decomposition, Split, Weights
from accel.error_curves import (
    IMAGES,
    ErrorCurve,
    measure_error_curves,
    rank_macs,
)
from accel.memory import available_bytes, peak_bytes, release_free_memory, resident_bytes
from accel.plan import AccelerationPlan, LayerPlan
from accel.program import LayerCall, Program, specification, trace
from accel.progress import Progress
from accel.rank_selection import (
    RANK_SELECTION,
    Candidate,
    LayerChoices,
    LayerErrors,
    RankProblem,
    Rules,
    apply_rules,
    budget_from_speedup,
    measured_error,
)
from accel.reconstruction import RECONSTRUCTIONS, LayerProblem
from accel.report.environment import device_name, versions
from accel.report.report import LayerReport, Report
from accel.rewrite import FactorizedConv, rewrite
from accel.solution import Solution, load_solution, save_solution
from accel.solvers import SOLVERS, Solver, response_spectrum

# Of the images that are fitted, the part that also chooses how strongly to regularise.
TUNING_FRACTION = 0.2
MEASURED_ERROR = "measured_error"
ALL_KINDS = tuple(DECOMPOSITIONS)
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
        decompositions: The kinds of chain to choose from.
        source: The calibration images.
        batch_size: The batch size that the program was traced for.
        seed: Seed of all that is drawn.
        fitting: Which images are used for fitting; the others measure the error.
        tuning: Which of the fitting images choose how strongly to regularise.
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
    decompositions: tuple[Decomposition, ...]
    source: ImageSource
    batch_size: int
    seed: int
    fitting: np.ndarray
    tuning: np.ndarray
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
    decompositions: str | Sequence[str] = ALL_KINDS,
    reconstruction: str = "joint",
    solver: str | Solver = "alternating",
    asymmetric: bool = True,
    rank_selection: str = MEASURED_ERROR,
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
            that streams them. A tenth of them, drawn by ``seed``, is kept for measuring errors;
            where the source has ``groups``, a tenth of those (see ``split_images``).
        speedup: Multiply-accumulates of all convolutions now over those wanted.
        decompositions: Names of the chains that may replace a convolution (``DECOMPOSITIONS``); the
            best one of each layer is chosen where ranks are selected by ``measured_error``.
        reconstruction: What is fitted to what (``RECONSTRUCTIONS``): ``weights`` approximates
            kernels and looks at no image, ``responses`` is the paper's, ``joint`` fits all factors.
        solver: How responses are fitted: a name of ``SOLVERS`` or a solver.
        asymmetric: Whether a layer is fitted to the inputs that it will get from the accelerated
            network, instead of those of the original.
        rank_selection: How ranks are chosen: ``measured_error``, or by energies
            (``RANK_SELECTION``) for a single kind of chain.
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
    _check_rank_selection(rank_selection, decompositions_named(decompositions))
    _check_reconstruction(reconstruction)
    chosen_solver = solver_named(solver)
    calibration = calibrate(
        model,
        images,
        decompositions=decompositions,
        positions_per_image=positions_per_image,
        batch_size=batch_size,
        cache_bytes=cache_bytes,
        seed=seed,
        rules=rules,
        progress=progress,
    )
    curves = None
    start = time.perf_counter()
    if rank_selection == MEASURED_ERROR:
        curves = measure_errors(calibration, progress=progress)
    plan = select_ranks(
        calibration, speedup, rank_selection=rank_selection, rules=rules, curves=curves
    )
    selected = time.perf_counter() - start
    result = reconstruct(
        calibration,
        plan,
        reconstruction=reconstruction,
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


def decompositions_named(names: str | Sequence[str]) -> tuple[Decomposition, ...]:
    """The decompositions of these names.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in DECOMPOSITIONS:
            raise ValueError(f"unknown decomposition {name!r}; known: {', '.join(DECOMPOSITIONS)}")
    if not names:
        raise ValueError(f"no decomposition given; known: {', '.join(DECOMPOSITIONS)}")
    return tuple(DECOMPOSITIONS[name] for name in dict.fromkeys(names))


def calibrate(
    model: nnx.Module,
    images: ImageSource | np.ndarray | jax.Array,
    *,
    decompositions: str | Sequence[str] = ALL_KINDS,
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
    kinds = decompositions_named(decompositions)
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
        reasons = [kind.unsuitable(call.layer) for kind in kinds]
        if all(reasons):
            left_out[call.path] = str(reasons[0])
    calls = tuple(call for call in program.calls if call.path not in left_out)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} has no convolution to accelerate: "
            + (", ".join(f"{path} ({reason})" for path, reason in left_out.items()) or "none found")
        )
    apply_rules(_widths(calls), rules or {})

    position_key, image_key = jax.random.split(jax.random.key(seed))
    fitting = fitting_images(source, seed)
    tuning = fitting & ~split_images(
        jax.random.fold_in(image_key, 1), image_groups(source), TUNING_FRACTION
    )
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
        decompositions=kinds,
        source=source,
        batch_size=batch_size,
        seed=seed,
        fitting=fitting,
        tuning=tuning,
        positions=positions,
        targets=targets,
        macs=count_conv_macs(folded, batch),
        seconds=time.perf_counter() - start,
        stated_peak_bytes=stated,
        cache_bytes=cache,
    )


def measure_errors(
    calibration: Calibration, *, progress: Progress | None = None
) -> dict[str, ErrorCurve]:
    """Error and cost of every chain that could replace a layer, by path (``accel.error_curves``).

    Measured on some of the images that are used for fitting; one set of curves serves any speedup.
    """
    chosen = np.flatnonzero(calibration.fitting)
    if len(chosen) < 2:
        raise ValueError(
            f"measuring errors needs 2 images that are fitted to or more, found {len(chosen)}"
        )
    step = max(1, len(chosen) // IMAGES)
    return measure_error_curves(
        calibration.program,
        calibration.calls,
        calibration.decompositions,
        _images_at(calibration.source, chosen[::step][:IMAGES], calibration.batch_size),
        calibration.macs,
        batch_size=calibration.batch_size,
        cache_bytes=calibration.cache_bytes,
        seed=calibration.seed,
        progress=progress or Progress(),
    )


def select_ranks(
    calibration: Calibration,
    speedup: float,
    *,
    rank_selection: str = MEASURED_ERROR,
    rules: Rules | None = None,
    curves: Mapping[str, ErrorCurve] | None = None,
) -> AccelerationPlan:
    """Chooses what becomes of each convolution so that the network gets cheaper by ``speedup``.

    Args:
        calibration: From ``calibrate``.
        speedup: As in ``accelerate``.
        rank_selection: As in ``accelerate``.
        rules: As in ``accelerate``.
        curves: From ``measure_errors``, which is called where they are needed and not given.
    """
    _check_rank_selection(rank_selection, calibration.decompositions)
    if rank_selection == MEASURED_ERROR:
        curves = measure_errors(calibration) if curves is None else curves
        chosen = _by_measured_error(calibration, speedup, rules or {}, curves)
    else:
        chosen = _by_energy(calibration, speedup, rank_selection, rules or {})
    fixed = apply_rules(_widths(calibration.calls), rules or {})
    plans = []
    for path in _execution_order(calibration):
        if path in calibration.left_out:
            plans.append(LayerPlan(path, reason=calibration.left_out[path]))
        elif (candidate := chosen[path]) is None:
            reason = "by rule" if fixed[path] == "dense" else "cheaper as it is"
            plans.append(LayerPlan(path, reason=reason))
        else:
            plans.append(LayerPlan(path, candidate.decomposition, candidate.ranks))
    return AccelerationPlan(tuple(plans), calibration.folded)


def _by_energy(
    calibration: Calibration, speedup: float, rank_selection: str, rules: Rules
) -> dict[str, Candidate | None]:
    (decomposition,) = calibration.decompositions
    fixed = apply_rules(_widths(calibration.calls), rules)
    layers = []
    for call in calibration.calls:
        macs = rank_macs(call, decomposition)
        layers.append(
            LayerChoices(
                path=call.path,
                spectrum=_spectrum(calibration, call, decomposition, len(macs)),
                dense_macs=calibration.macs[call.path],
                rank_macs=macs,
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
    found: dict[str, Candidate | None] = {}
    for call in calibration.calls:
        rank = ranks[call.path]
        found[call.path] = (
            None
            if rank is None
            else Candidate(decomposition.name, decomposition.ranks(call.layer, rank))
        )
    return found


def _spectrum(
    calibration: Calibration, call: LayerCall, decomposition: Decomposition, length: int
) -> np.ndarray:
    """Energies of a layer's ranks: of its responses (the paper) where they are what is cut.

    A chain without a last factor keeps all directions of the responses; what it cuts is the kernel.
    Ranks beyond the width of the responses (of a spatial split) hold no energy of their own.
    """
    if decomposition.has_last:
        targets = calibration.targets[call.path][calibration.fitting]
        spectrum = np.asarray(response_spectrum(_rows(targets)), np.float64)
    else:
        structure = decomposition.structure(call.layer)
        kernel = np.asarray(call.layer.kernel[...], np.float64).reshape(-1, structure.out_channels)
        s = structure.middle_taps
        unfolded = kernel[structure.order.reshape(-1)].reshape(s, -1, structure.out_channels)
        unfolded = unfolded.transpose(1, 0, 2).reshape(unfolded.shape[1], -1)
        spectrum = np.linalg.svd(unfolded, compute_uv=False) ** 2
    return np.pad(spectrum, (0, max(0, length - len(spectrum))))[:length]


def _by_measured_error(
    calibration: Calibration, speedup: float, rules: Rules, curves: Mapping[str, ErrorCurve]
) -> dict[str, Candidate | None]:
    fixed = apply_rules(_widths(calibration.calls), rules)
    layers = [
        LayerErrors(
            path=call.path,
            candidates=curves[call.path].candidates,
            macs=curves[call.path].macs,
            errors=curves[call.path].errors * curves[call.path].weight,
            dense_macs=calibration.macs[call.path],
            fixed=fixed[call.path],
        )
        for call in calibration.calls
    ]
    total = sum(calibration.macs.values())
    other = total - sum(layer.dense_macs for layer in layers)
    return measured_error(layers, other, budget_from_speedup(total, speedup))


def _check_rank_selection(name: str, decompositions: Sequence[Decomposition]) -> None:
    if name != MEASURED_ERROR and name not in RANK_SELECTION:
        known = ", ".join((*RANK_SELECTION, MEASURED_ERROR))
        raise ValueError(f"unknown rank selection {name!r}; known: {known}")
    if name != MEASURED_ERROR and len(decompositions) != 1:
        raise ValueError(
            f"{name} chooses ranks of one kind of chain, found"
            f" {', '.join(kind.name for kind in decompositions)}; choose one, or {MEASURED_ERROR}"
        )


def _check_reconstruction(name: str) -> None:
    if name not in RECONSTRUCTIONS:
        raise ValueError(f"unknown reconstruction {name!r}; known: {', '.join(RECONSTRUCTIONS)}")


def reconstruct(
    calibration: Calibration,
    plan: AccelerationPlan,
    *,
    reconstruction: str = "joint",
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
    # Activations come and go in sizes that change from layer to layer, which leaves the allocator
    # with gaps; a calibration and every call before would leave some more.
    release_free_memory()
    progress = progress or Progress()
    _check_reconstruction(reconstruction)
    _check_plan(calibration, plan)
    solver = solver_named(solver)
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
        settings = (layer, reconstruction, solver, call.activation)
        digest = _digest(settings, fitted, calibration.targets[call.path], calibration.fitting)
        solution = None if resume is None else load_solution(resume, call.path, digest)
        if solution is None:
            split = _solve(calibration, call, layer, fitted, reconstruction, solver)
            solution = Solution(split, _held_out_error(calibration, call, layer, seen, split))
            if resume is not None:
                save_solution(resume, call.path, solution, digest)
        errors[call.path] = solution.response_error
        weights[call.path] = decomposition.weights(call.layer, layer.ranks, solution.split)
        solved = time.perf_counter()
        factors = decomposition.factors(call.layer, *layer.ranks)
        run.replace(FactorizedConv(call.layer, factors, weights[call.path]))
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


def _solve(
    calibration: Calibration,
    call: LayerCall,
    layer: LayerPlan,
    patches: np.ndarray,
    reconstruction: str,
    solver: Solver,
) -> Split:
    """Fits one layer to the images that are used for fitting."""
    fitting = calibration.fitting
    positions = patches.shape[1]
    problem = LayerProblem(
        conv=call.layer,
        decomposition=DECOMPOSITIONS[str(layer.decomposition)],
        ranks=layer.ranks,
        patches=_rows(patches[fitting]),
        targets=_rows(calibration.targets[call.path][fitting]),
        tuning=np.repeat(calibration.tuning[fitting], positions),
        activation=call.activation,
        solver=solver,
    )
    try:
        return RECONSTRUCTIONS[reconstruction](problem)
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"{call.path}: {error}") from error


def _held_out_error(
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
    for layer in plan.layers:
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


def _images_at(source: ImageSource, indices: np.ndarray, batch_size: int) -> np.ndarray:
    """Some of the images of a source, by ascending index."""
    found, first = [], 0
    for batch in source.batches(batch_size):
        here = indices[(indices >= first) & (indices < first + len(batch))]
        found.append(np.asarray(batch)[here - first])
        first += len(batch)
        if first > indices[-1]:
            break
    return np.concatenate(found)


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
    solving = max(_solving_bytes(call, run.positions[call.path].size) for call in run.calls)
    parameters = sum(value.nbytes for value in program.parameters)
    needed = (
        resident_bytes()
        + run.response_bytes
        + run.working_bytes
        + cache
        # The accelerated network: its weights, and the working set of one of its steps.
        + parameters
        + run.working_bytes
        + solving
        # Compiled code and the allocator's slack.
        + GIBIBYTE // 2
    )
    return needed, cache


def _solving_bytes(call: LayerCall, rows: int) -> int:
    """What fitting one layer takes on the host, at most."""
    patch, width = patch_size(call), specification(call.output).shape[-1]
    return (
        # Patches, those of them that are fitted, and their features, in float32.
        rows * 3 * patch * 4
        # A solver: inputs and targets in float32, and about ten float64 arrays of that size.
        + rows * width * (2 * 4 + 10 * 8)
        # Second moments of patches and of features, the metric, what is made of them on the way.
        + 20 * 8 * patch**2
    )
