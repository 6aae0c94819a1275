"""accel: trained convolutional networks made several times faster, without retraining.

``accelerate`` is the whole job; ``calibrate``, ``select_ranks`` and ``reconstruct`` are its steps.
``finetune`` trains what it gave, or any other network, further on labelled images.
"""

from accel.accelerate import accelerate
from accel.calibration import Calibration, calibrate
from accel.checkpoint import load_model, save_model
from accel.cost import count_conv_macs, count_dense_macs, count_macs
from accel.device_times import LayerTimes, measure_times
from accel.evaluation import accuracy, compare_outputs
from accel.finetune import FinetuneResult, finetune
from accel.images import ArraySource, ImageSource
from accel.inference import Inference, compile_inference
from accel.latency_budget import select_for_latency
from accel.loss_budget import AllowedLoss, Probe, WithinLoss, search_within_loss
from accel.measurements import measure_errors, measure_sensitivity
from accel.memory import use_one_pool
from accel.models import ModelSpec
from accel.network_reconstruction import Result, reconstruct
from accel.plan import AccelerationPlan, LayerPlan
from accel.progress import ConsoleProgress, LineProgress, Progress
from accel.reinitialize import reinitialized
from accel.repair import Distillation, Refitted, distill, refit
from accel.report.console import summary
from accel.report.report import LayerReport, Report
from accel.selection import (
    select_by_parameters,
    select_by_time,
    select_ranks,
    select_within_error,
)
from accel.time_correction import correct_times
from accel.timed_plan import TimedPlan
from accel.timing_rounds import latency

__all__ = [
    "AccelerationPlan",
    "AllowedLoss",
    "ArraySource",
    "Calibration",
    "ConsoleProgress",
    "Distillation",
    "FinetuneResult",
    "ImageSource",
    "Inference",
    "LayerPlan",
    "LayerReport",
    "LayerTimes",
    "LineProgress",
    "ModelSpec",
    "Probe",
    "Progress",
    "Refitted",
    "Report",
    "Result",
    "TimedPlan",
    "WithinLoss",
    "accelerate",
    "accuracy",
    "calibrate",
    "compare_outputs",
    "compile_inference",
    "correct_times",
    "count_conv_macs",
    "count_dense_macs",
    "count_macs",
    "distill",
    "finetune",
    "latency",
    "load_model",
    "measure_errors",
    "measure_sensitivity",
    "measure_times",
    "reconstruct",
    "refit",
    "reinitialized",
    "save_model",
    "search_within_loss",
    "select_by_parameters",
    "select_by_time",
    "select_for_latency",
    "select_ranks",
    "select_within_error",
    "summary",
    "use_one_pool",
]
