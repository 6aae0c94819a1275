"""Repairing an accelerated network as a whole, once all its layers are in place."""

from accel.repair.distillation import (
    Distillation,
    Distilled,
    Epoch,
    TrainingDiverged,
    distill,
)

__all__ = ["Distillation", "Distilled", "Epoch", "TrainingDiverged", "distill"]
