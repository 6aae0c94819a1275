"""Other runtimes on the same machine, to hold XLA's times against: ONNX Runtime and PyTorch."""

from __future__ import annotations

import importlib
import os
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


def torch_runner(
    builder: str, image_shape: Sequence[int], batch_size: int
) -> tuple[str, Callable[[], Any]]:
    """PyTorch's name and version, and what runs a network of it once, on CPU.

    It runs in inference mode on a batch of any float32 images, channels last in memory, with as
    many threads as there are cores for this process, which is what XLA does.

    Args:
        builder: ``package.module:function``, to be called without arguments; it returns a
            ``torch.nn.Module`` that takes images with channels first.
        image_shape: Shape of one image, ``(height, width, channels)``.
        batch_size: Images per batch.

    Raises:
        ValueError: If PyTorch is not installed, the network cannot be built, or takes other images.
    """
    module, _, function = builder.partition(":")
    if not (module and function):
        raise ValueError(f"{builder!r}: expected package.module:function")
    # Its threads would go on spinning after a run, into the next one's time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError("PyTorch is not installed: pip install torch") from error
    try:
        network = getattr(importlib.import_module(module), function)()
    except Exception as error:  # A builder can raise anything.
        raise ValueError(f"{builder}: {type(error).__name__}: {error}") from error
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"{builder}: expected a torch.nn.Module, found {type(network).__name__}")
    torch.set_num_threads(usable_cores())
    network.eval()
    shape = (batch_size, image_shape[-1], *image_shape[:-1])
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def run() -> Any:
        with torch.inference_mode():
            return network(images)

    try:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        run()
    except Exception as error:  # As can a network.
        raise ValueError(f"{builder}: images of shape {shape}: {error}") from error
    return f"PyTorch {torch.__version__}", run


def _fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Whether a shape is one that is declared; a size without a number can be any."""
    return len(shape) == len(declared) and all(
        not isinstance(size, int) or size == wanted
        for wanted, size in zip(shape, declared, strict=True)
    )
