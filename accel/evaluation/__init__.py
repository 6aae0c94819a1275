"""What a network's outputs are worth: accuracy, and closeness to another network's outputs."""

from accel.evaluation.accuracy import accuracy
from accel.evaluation.comparison import compare_outputs

__all__ = ["accuracy", "compare_outputs"]
