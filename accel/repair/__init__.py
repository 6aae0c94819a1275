"""Repairing an accelerated network as a whole, once all its layers are in place."""

from accel.repair.distillation import (
    Distillation,
    Distilled,
    Epoch,
    TrainingDiverged,
    distill,
)
from accel.repair.second_sweep import Refitted, refit

__all__ = [
    "Distillation",
    "Distilled",
    "Epoch",
    "Refitted",
    "TrainingDiverged",
    "distill",
    "refit",
]
