"""Other runtimes on the same machine, to hold XLA's times against: ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel.report.environment import usable_cores


def onnx_runner(
    file: Path, image_shape: Sequence[int], batch_size: int
) -> tuple[str, Callable[[], Any]]:
    """The runtime's name and version, and what runs the network of an ONNX file once, on CPU.

    It runs on a batch of any float32 images, with as many threads as there are cores for this
    process, which is what XLA does.

    Args:
        file: The file; a network with one input, images with channels first or last.
        image_shape: Shape of one image, ``(height, width, channels)``.
        batch_size: Images per batch.

    Raises:
        ValueError: If ONNX Runtime is not installed, cannot read the file, or the network takes
            other images.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("ONNX Runtime is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    # Its threads would go on spinning for some time after a run, into the next one's time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # Its errors have no common type.
        raise ValueError(f"{file}: ONNX Runtime cannot read it: {error}") from error
    inputs = session.get_inputs()
    shapes = [(batch_size, *image_shape), (batch_size, image_shape[-1], *image_shape[:-1])]
    one = len(inputs) == 1 and inputs[0].type == "tensor(float)"
    fitting = [shape for shape in shapes if one and _fits(shape, inputs[0].shape)]
    if not fitting:
        raise ValueError(
            f"{file}: expected one input for float32 images {shapes[0]} or {shapes[1]}, found"
            f" {[(given.type, *given.shape) for given in inputs]}"
        )
    images = np.random.default_rng(0).standard_normal(fitting[0], np.float32)
    given = {inputs[0].name: images}
    return f"ONNX Runtime {onnxruntime.__version__}", lambda: session.run(None, given)


def _fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Whether a shape is one that is declared; a size without a number can be any."""
    return len(shape) == len(declared) and all(
        not isinstance(size, int) or size == wanted
        for wanted, size in zip(shape, declared, strict=True)
    )
