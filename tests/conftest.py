import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from accel.data import fashion_test_images

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Imports a file of ``scripts/`` by name."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def idx_files(tmp_path_factory):
    """A training set in Fashion-MNIST's format, large enough that 3,000 images can be held back."""
    folder = tmp_path_factory.mktemp("idx")
    pixels, labels = fashion_test_images().read(0, 3_100)
    for name, array in (
        ("train-images-idx3-ubyte", pixels[..., 0]),
        ("train-labels-idx1-ubyte", labels.astype(np.uint8)),
    ):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / name).write_bytes(header + array.tobytes())
    return folder
