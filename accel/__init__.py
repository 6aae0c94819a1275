"""accel: trained convolutional networks made several times faster, without retraining.

``accelerate`` is the whole job; ``calibrate``, ``select_ranks`` and ``reconstruct`` are its steps.
"""

from accel.accelerate import (
    Calibration,
    Result,
    accelerate,
    calibrate,
    reconstruct,
    select_ranks,
)
from accel.calibration import ArraySource, ImageSource
from accel.checkpoint import load_model, save_model
from accel.cost import count_conv_macs, count_macs
from accel.models import ModelSpec
from accel.plan import AccelerationPlan, LayerPlan
from accel.progress import ConsoleProgress, Progress
from accel.report.report import LayerReport, Report

__all__ = [
    "AccelerationPlan",
    "ArraySource",
    "Calibration",
    "ConsoleProgress",
    "ImageSource",
    "LayerPlan",
    "LayerReport",
    "ModelSpec",
    "Progress",
    "Report",
    "Result",
    "accelerate",
    "calibrate",
    "count_conv_macs",
    "count_macs",
    "load_model",
    "reconstruct",
    "save_model",
    "select_ranks",
]
