"""What is measured of the layers of a calibrated network before anything is chosen or solved.

Sensitivities and error curves, each on some of the images that are used for fitting.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from accel import error_curves
from accel.calibration import Calibration
from accel.error_curves import ErrorCurve, check_rank_multiple
from accel.images import images_at, spread
from accel.progress import Progress
from accel.sensitivity import Sensitivity, images_needed, sensitivity_matrices


def measure_sensitivity(
    calibration: Calibration, *, progress: Progress | None = None
) -> dict[str, Sensitivity]:
    """How the network's outputs hang on the responses of each layer (``accel.sensitivity``)."""
    return sensitivity_matrices(
        calibration.program,
        calibration.calls,
        _some_images(calibration, images_needed(calibration.calls, calibration.batch_size)),
        batch_size=calibration.batch_size,
        seed=calibration.seed,
        progress=progress or Progress(),
    )


def measure_errors(
    calibration: Calibration,
    sensitivity: Mapping[str, Sensitivity] | None = None,
    *,
    rank_multiple: int = 1,
    progress: Progress | None = None,
) -> dict[str, ErrorCurve]:
    """Error and cost of every chain that could replace a layer, by path (``accel.error_curves``).

    Measured on some of the images that are used for fitting; one set of curves serves any speedup.

    Args:
        calibration: From ``calibrate``.
        sensitivity: From ``measure_sensitivity``, which is called where it is not given.
        rank_multiple: Chains with ranks rounded to multiples of this are measured beside all
            others: what ``with_rank_multiple`` will be asked for, or ``measured_multiple`` for a
            budget in time.
        progress: As in ``accelerate``.
    """
    check_rank_multiple(rank_multiple)
    if sensitivity is None:
        sensitivity = measure_sensitivity(calibration, progress=progress)
    images = _some_images(calibration, error_curves.IMAGES)
    if len(images) < 2:
        raise ValueError(
            f"measuring errors needs 2 images that are fitted to or more, found {len(images)}"
        )
    return error_curves.measure_error_curves(
        calibration.program,
        calibration.calls,
        calibration.decompositions,
        images,
        {**calibration.macs, **calibration.dense_macs},
        sensitivity,
        rank_multiple=rank_multiple,
        batch_size=calibration.batch_size,
        cache_bytes=calibration.cache_bytes,
        seed=calibration.seed,
        progress=progress or Progress(),
    )


def _some_images(calibration: Calibration, count: int) -> np.ndarray:
    """That many of the images that are fitted to, spread over all of them."""
    chosen = spread(np.flatnonzero(calibration.fitting), count)
    return images_at(calibration.source, chosen, calibration.batch_size)
