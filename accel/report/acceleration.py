"""The report of an acceleration: MACs by layer before and after, errors, times, memory."""

from __future__ import annotations

from collections.abc import Mapping

from flax import nnx

from accel.calibration import Calibration
from accel.cost import count_conv_macs, count_dense_macs
from accel.interpreter import specification
from accel.memory import peak_bytes
from accel.plan import AccelerationPlan
from accel.program import path_name
from accel.report.environment import device_name, versions
from accel.report.report import LayerReport, Report


def acceleration_report(
    calibration: Calibration,
    plan: AccelerationPlan,
    model: nnx.Module,
    errors: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Report:
    """The report of a network that was put together, without settings.

    Args:
        calibration: From ``calibrate``.
        plan: What became of each layer.
        model: The accelerated network.
        errors: By path, what replaced layers lose on the images that are not fitted to.
        seconds: What each step took; their sum is added.
    """
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
