import json

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

LAYERS = {"conv1_2": ("tucker2", (9, 9)), "conv2_2": ("spatial", (20,)), "conv3_1": (None, ())}


@pytest.fixture
def forms(script):
    return script("measure_runtime_forms")


def test_every_form_is_timed_and_told(forms, tmp_path, monkeypatch, capsys):
    report, out = tmp_path / "report.json", tmp_path / "forms.json"
    layers = [
        {"path": path, "decomposition": kind, "ranks": list(ranks)}
        for path, (kind, ranks) in LAYERS.items()
    ]
    settings = {"image_shape": [28, 28, 1]}
    report.write_text(
        json.dumps({"layers": layers, "settings": settings, "macs": {"speedup": 1.5}})
    )
    command = ["measure", "configs/quickstart.py", str(report), "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--batch-sizes", "2", "--repeats", "3"])
    assert forms.main() == 0
    found = json.loads(out.read_text())
    rows = found["batches"]["2"]
    assert len(rows) == 12 + 4
    assert all(0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows.values())
    table = out.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {rows['accelerated: jax.jit']['speedup']:.2f}× |" in next(
        line for line in table.splitlines() if line.startswith("| accelerated: jax.jit")
    )
    assert not any("speedup" in row for name, row in rows.items() if name.startswith("original"))
    with pytest.raises(FileExistsError, match=r"forms\.json exists already"):
        forms.main()


def test_speedups_are_those_of_rounds_against_the_original_in_the_same_form(forms):
    times = {
        "original: jax.jit": [10.0, 40.0, 30.0],
        f"original: {forms.COMPILED}": [8.0, 12.0, 16.0],
        "accelerated: jax.jit": [5.0, 10.0, 20.0],
        "accelerated: and ranks in steps of 8": [8.0, 4.0, 4.0],
    }
    assert forms._row("accelerated: jax.jit", times)["speedup"] == 2
    assert forms._row("accelerated: and ranks in steps of 8", times)["speedup"] == 3
    assert forms._row("original: jax.jit", times)["median_ms"] == 30


def test_a_file_that_is_no_report_is_named(forms, tmp_path):
    for name, text in (("none", None), ("list", "[]"), ("other", '{"layers": []}')):
        file = tmp_path / f"{name}.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(ValueError, match=rf"{name}\.json is no report of a run"):
            forms.planned_by(file)


def test_products_of_matrices_are_the_convolutions(forms):
    model = nnx.Sequential(
        nnx.Conv(4, 6, (1, 1), rngs=nnx.Rngs(0)),
        nnx.Conv(6, 5, (1, 1), strides=2, rngs=nnx.Rngs(1)),
        nnx.Conv(5, 5, (3, 3), rngs=nnx.Rngs(2)),
    )
    images = jnp.asarray(networks.images(2))[..., :1] * jnp.ones(4)
    products = forms.with_products(model)
    np.testing.assert_allclose(products(images), model(images), rtol=1e-5, atol=1e-5)
    assert products.layers[0].conv_general_dilated is not model.layers[0].conv_general_dilated


def test_columns_that_are_computed_at_once_are_those_of_the_convolutions(forms):
    model = nnx.Sequential(
        nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)),
        nnx.Conv(6, 5, (1, 4), rngs=nnx.Rngs(1)),
        nnx.Conv(5, 5, (3, 1), rngs=nnx.Rngs(2)),
        nnx.Conv(5, 5, (3, 3), strides=2, rngs=nnx.Rngs(3)),
    )
    images = jnp.asarray(networks.images(2, size=12))[..., :1] * jnp.arange(4.0)
    columns = forms.with_columns(model)
    np.testing.assert_allclose(columns(images), model(images), rtol=1e-5, atol=1e-5)
    # The first two are wide, and have few channels: 4 + 2 and 4 + 3 taps instead of 3 and 4.
    told = str(jax.make_jaxpr(columns)(images))
    assert "f32[3,6,4,24]" in told
    assert "f32[1,7,6,20]" in told
