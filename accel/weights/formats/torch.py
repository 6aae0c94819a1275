"""Reads ``.pth`` and ``.pt`` files of PyTorch: a state dict, that is tensors by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from accel.weights.errors import WeightError
from accel.weights.formats.optional import require


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of the state dict, by its name there; bfloat16 is widened to float32.

    The file goes through PyTorch's weights-only loader, so a pickle that would run code is refused.

    Raises:
        WeightError: If PyTorch is not installed, its loader refuses the file, or the content is not
            a dictionary of tensors.
    """
    torch = require("torch", path=path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightError(
            f"{path}: expected a state dict of tensors; PyTorch's weights-only loader refuses the "
            "file: it is damaged or its pickle would run code"
        ) from error
    if not isinstance(content, dict):
        raise WeightError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightError(
                f"{path}: entry {name!r}: expected a tensor, found {type(tensor).__name__}; "
                "save the model's state dict by itself"
            )
        # NumPy has no bfloat16 that PyTorch could hand over.
        exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        tensors[name] = exact.detach().numpy()
    return tensors
