import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import networks
import numpy as np
import pytest

from accel import calibrate, measure_errors
from accel.data import fashion_test_images

SCRIPTS = Path(__file__).parent.parent / "scripts"

# Most of the suite's time is XLA's, compiling small programs: what one process has compiled the
# others take from this folder, which lives as long as the suite runs.
COMPILED = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        os.environ[COMPILED] = tempfile.mkdtemp(prefix="accel-tests-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # What one process is just writing another may find unfinished; JAX then compiles it itself.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
    )
    jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # From the start: modules draw images and weights when they are imported.
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(COMPILED, ""), ignore_errors=True)


@pytest.fixture(autouse=True)
def optimized(request):
    """Programs are compiled quickly rather than well, except for tests marked ``optimized``.

    These are the ones that look at times, or at what XLA makes of a program. What programs compute
    does not hang on it.
    """
    wanted = request.node.get_closest_marker("optimized") is not None
    if wanted and jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # JAX would take what a test before compiled quickly.
    jax.config.update("jax_disable_most_optimizations", not wanted)


@pytest.fixture(scope="session")
def measured_chain():
    """A small network, its calibration and the error curves of its layers; none may be changed."""
    model = networks.network("chain")
    kinds = ("channel", "spatial", "tucker2")
    calibration = calibrate(model, networks.images(40), decompositions=kinds)
    return model, calibration, measure_errors(calibration)


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
