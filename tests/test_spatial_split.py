"""The script that measures ways to split kernels: against NumPy, and run on the bundled network."""

import json

import networks
import numpy as np
import pytest

from accel import calibrate
from accel.runs import AcceleratedRun


@pytest.fixture
def ways(script):
    return script("measure_spatial_split")


@pytest.fixture(scope="module")
def layer():
    """A layer, and the patches that it is given of many positions."""
    model = networks.network("chain")
    calibration = calibrate(
        model, networks.images(200), decompositions="spatial", positions_per_image=30
    )
    run = AcceleratedRun(calibration.program, calibration.calls, calibration.source, 16, 10**8)
    run.keep()
    run.keep()
    call = calibration.calls[2]
    patches = run.patches(calibration.positions[call.path])
    fitted, held_out = (
        patches[which].reshape(-1, patches.shape[-1])
        for which in (calibration.fitting, ~calibration.fitting)
    )
    return call, fitted, held_out


def test_weights_are_numpys_singular_value_decomposition(ways, layer):
    call, fitted, held_out = layer
    found = ways.errors(call, 12, fitted, held_out)
    kernel = np.asarray(call.layer.kernel[...], np.float64)
    unfolded = kernel.transpose(0, 2, 1, 3).reshape(kernel.shape[0] * kernel.shape[2], -1)
    left, values, right = np.linalg.svd(unfolded, full_matrices=False)
    cut = (left[:, :12] * values[:12] @ right[:12]).reshape(
        kernel.shape[0], kernel.shape[2], kernel.shape[1], kernel.shape[3]
    )
    cut = cut.transpose(0, 2, 1, 3).reshape(-1, kernel.shape[-1])
    kernel = kernel.reshape(cut.shape)
    assert call.layer.bias is None
    mean = fitted.mean(0, dtype=np.float64)
    wanted = np.maximum(held_out @ kernel, 0)
    given = np.maximum((held_out - mean) @ cut + mean @ kernel, 0)
    expected = np.sum((given - wanted) ** 2) / np.sum(wanted**2)
    assert found["weights"] == pytest.approx(expected, rel=1e-3)


def test_each_way_is_better_than_the_one_before_and_none_loses_anything_at_full_rank(ways, layer):
    call, fitted, held_out = layer
    # On the rows that it was fitted to, whatever looks at more is better.
    found = ways.errors(call, 12, fitted, fitted)
    assert list(found) == list(ways.WAYS)
    weights, refitted, weighted, improved = found.values()
    assert weights > 1.1 * refitted
    assert refitted > 1.02 * weighted
    assert weighted > 1.02 * improved > 0
    whole = ways.errors(call, 48, fitted, held_out)
    assert max(whole.values()) < 1e-6


def test_the_bundled_network_is_measured(ways, tmp_path, monkeypatch, capsys):
    out = tmp_path / "split.json"
    command = ["measure", "configs/quickstart.py", "--out", str(out), "--image-limit", "100"]
    monkeypatch.setattr("sys.argv", command)
    ways.main()
    found = json.loads(out.read_text())
    assert [row["layer"] for row in found["layers"]] == [
        "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3",
    ]  # fmt: skip
    assert all(0.2 < row["share"] <= 0.25 for row in found["layers"])
    assert out.with_suffix(".md").read_text() in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"split\.json exists already"):
        ways.main()
