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
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from accel.budgets import Budget
from accel.calibration import ALL_KINDS, calibrate, layer_kinds
from accel.chain_filters import measured_multiple, with_rank_multiple
from accel.error_curves import check_rank_multiple
from accel.images import ImageSource
from accel.loss_budget import search_within_loss
from accel.measurements import measure_errors, measure_sensitivity
from accel.network_reconstruction import Result, check_reconstruction, reconstruct, solver_named
from accel.progress import Progress
from accel.rank_selection import Rules, check_speedup
from accel.reconstruction import JOINT
from accel.selection import (
    MEASURED_ERROR,
    check_rank_selection,
    select_ranks,
)
from accel.solvers import Solver


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
    rank_multiple: int = 1,
    rules: Rules | None = None,
    dense_speedup: float | None = None,
    latency_speedup: float | None = None,
    latency_ms: float | None = None,
    latency_batch: int = 1,
    latency_dtype: str | None = None,
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
            its own and takes from ``alternating`` the turns through the nonlinearity;
            ``reduced_rank_regression`` has none, and it takes no others.
        asymmetric: Whether a layer is fitted to the inputs that it will get from the accelerated
            network, instead of those of the original.
        rank_selection: How ranks are chosen: ``measured_error``, or by energies
            (``RANK_SELECTION``) for a single kind of chain.
        rank_multiple: Ranks that ``measured_error`` chooses are multiples of this, which the
            vectors and tiles of many devices are full at; those that rules fix need not be. With 1,
            a budget in time still takes multiples of 8 alone in layers that are wide enough
            (``accel.chain_filters``).
        rules: Layers by path pattern that stay ``"dense"`` or get a fixed rank.
        dense_speedup: Multiply-accumulates of all dense layers (``nnx.Linear``) now over those
            wanted: a budget apart from that of the convolutions. None leaves dense layers alone.
        latency_speedup: A budget in time instead of ``speedup``: the original's measured time for
            a batch over that of the accelerated network, on the default device, which should have
            nothing else to do (``accel.latency_budget``).
        latency_ms: A budget in time instead of ``speedup``: the accelerated network's own, for a
            batch, in milliseconds.
        latency_batch: Images per batch in these measurements.
        latency_dtype: What both networks compute in then, such as ``bfloat16``; None for the types
            that they have.
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
    check_rank_multiple(rank_multiple)
    if rank_multiple > 1 and rank_selection != MEASURED_ERROR:
        raise ValueError(f"rank_multiple needs {MEASURED_ERROR}, found {rank_selection}")
    if dense_speedup is not None:
        check_speedup("dense_speedup", dense_speedup)
    resume = None if resume is None else Path(resume)
    chosen_solver = solver_named(solver)
    check_reconstruction(reconstruction, chosen_solver)
    budget = Budget(
        latency_speedup=latency_speedup,
        latency_ms=latency_ms,
        parameter_ratio=parameter_ratio,
        allowed_error=allowed_error,
        allowed_disagreement=allowed_disagreement,
        latency_batch=latency_batch,
        latency_dtype=latency_dtype,
    )
    budget.check(model, rank_selection, dense_speedup)
    if not budget.given:
        check_speedup("speedup", speedup)
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
        multiple = measured_multiple(rank_multiple) if budget.in_time else rank_multiple
        measured = measure_errors(
            calibration, sensitivity, rank_multiple=multiple, progress=progress
        )
        curves = with_rank_multiple(calibration, measured, rank_multiple, rules=rules)
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
                calibration,
                model,
                curves,
                rank_multiple=rank_multiple,
                rules=rules,
                resume=resume,
                progress=progress,
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
        "rank_multiple": rank_multiple,
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
