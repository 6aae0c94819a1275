"""The trial of one kernel for a pair of convolutions; its times are measured on GPUs only."""

import json

import jax
import numpy as np
import pytest


@pytest.fixture
def pair(script, monkeypatch):
    module = script("measure_fused_pair")
    monkeypatch.setitem(module.LAYERS, "small", (7, 32, 16, 64))
    return module


@pytest.mark.parametrize("positions", [16, 32, 64])
def test_it_computes_what_the_two_convolutions_do(pair, positions):
    given = pair.operands("small", "float32", 2)
    tiling = pair.Tiling(positions, 16, 4, 2)
    wanted = pair.two_convolutions(*given)
    np.testing.assert_allclose(
        pair.one_kernel(*given, tiling=tiling, interpret=True), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there are such kernels")
def test_where_no_tiling_runs_the_reason_is_kept(pair, tmp_path, monkeypatch):
    """On CPU there is no such kernel."""
    out = tmp_path / "pair.json"
    command = ["measure", "--out", str(out), "--layers", "small", "--batch-sizes", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--repeats", "3", "--seconds", "0.1"])
    assert pair.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["two_ms"] > 0
        assert row["tiling"] is row["one_ms"] is None
        assert len(row["refused"]) == len(pair.TILINGS)
    assert "none runs" in out.with_suffix(".md").read_text()
    with pytest.raises(FileExistsError, match=r"pair\.json exists already"):
        pair.main()
