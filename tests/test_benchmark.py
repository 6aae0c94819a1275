import itertools
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import networks
import numpy as np
import onnx
import pytest
from flax import nnx

import accel
from accel.benchmark import xla_flops
from accel.cli import main
from accel.compiler import network_options
from accel.plan import AccelerationPlan, LayerPlan
from accel.rewrite import FactorizedConv, rewrite
from accel.timing_rounds import (
    PATIENCE,
    SETTLING,
    latency,
    speedup_in_rounds,
    time_in_turns,
    time_rounds,
)

SIZE = 8
PLAN = AccelerationPlan(
    (
        LayerPlan("conv1_1", reason="by rule"),
        LayerPlan("conv1_2", "spatial", (10,)),
        LayerPlan("conv2_1", "channel", (20,)),
        *(LayerPlan(name, reason="by rule") for name in ("conv2_2", "conv3_1", "conv3_2")),
        LayerPlan("conv3_3", "channel_input", (12,)),
    )
)


class Products(nnx.Module):
    """A network of ``count`` matrix products, one after the other."""

    def __init__(self, count):
        self.count = count
        self.matrix = nnx.Param(jnp.eye(256))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, images):
        x = self.dropout(images.reshape(images.shape[0], 256))
        for _ in range(self.count):
            x = jnp.tanh(x @ self.matrix[...])
        return x


@pytest.mark.optimized
def test_a_network_of_an_eighth_of_the_work_is_found_faster():
    original, accelerated = Products(64), Products(8)
    table = latency(original, accelerated, (16, 16, 1), batch_sizes=(64, 256), repeats=7, seconds=5)
    assert set(table) == {"64", "256"}
    for row in table.values():
        assert set(row) == {
            *("original_ms", "original_spread_ms", "accelerated_ms", "accelerated_spread_ms"),
            *("speedup", "speedup_error", "runs"),
        }
        assert row["speedup"] > 2
        assert row["runs"] == 7
    assert not original.dropout.deterministic


def test_runs_alternate_and_end_with_the_time():
    calls = []

    def run(name):
        calls.append(name)
        time.sleep(0.01)

    runs = {name: lambda name=name: run(name) for name in "ab"}
    times = time_rounds(runs, repeats=4, seconds=10)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(len(values) == 4 and min(values) >= 10 for values in times.values())

    assert all(len(values) == 3 for values in time_rounds(runs, 1000, 1e-9).values())
    begin = time.perf_counter()
    assert len(time_rounds(runs, 1000, 0.2)["a"]) < 20
    assert time.perf_counter() - begin < 1


def test_a_speedup_holds_while_the_device_slows_down():
    """Planted: twice as fast, each time a tenth off, on a device up to three times as slow."""
    random = np.random.default_rng(0)
    found, of_medians = [], []
    for _ in range(200):
        slower = np.linspace(1.0, 3.0, 21)[random.permutation(21)]
        original = 2.0 * slower * np.exp(0.1 * random.standard_normal(21))
        accelerated = slower * np.exp(0.1 * random.standard_normal(21))
        found.append(speedup_in_rounds(original, accelerated))
        of_medians.append(np.median(original) / np.median(accelerated))
    speedups, errors = np.transpose(found)
    assert np.median(speedups) == pytest.approx(2.0, rel=0.01)
    assert np.std(speedups) / 2 == pytest.approx(np.mean(errors), rel=0.25)
    assert np.std(of_medians) > 1.5 * np.std(speedups)
    assert speedup_in_rounds([3.0] * 5, [1.0] * 5) == (3.0, 0.0)


def test_networks_are_timed_until_the_speedup_is_precise(monkeypatch):
    """Planted: ratios of 2.8, 3 and 3.2 by turns; every other round takes twice as long."""
    clock, calls = [0.0], [0]
    monkeypatch.setattr("accel.timing_rounds.time.perf_counter", lambda: clock[0])

    class Network:
        shape = (1, 2, 2, 1)

        def __init__(self, seconds):
            self.seconds = seconds

        def __call__(self, images):
            number = calls[0] // 2
            calls[0] += 1
            clock[0] += self.seconds(number % 3) * (1 + number % 2)
            return images

    networks = {
        "original": Network(lambda turn: 2.8 + 0.2 * turn),
        "accelerated": Network(lambda _turn: 1.0),
    }

    def row(repeats, precision):
        calls[0] = 0
        settled = ("original", "accelerated")
        return time_in_turns(
            networks, repeats=repeats, seconds=100.0, settled=settled, precision=precision
        )

    alone = row(1000, None)
    assert alone["speedup"] == pytest.approx(3.0)
    assert alone["original_ms"] / alone["accelerated_ms"] != pytest.approx(3.0, rel=0.01)
    precise = row(1000, 0.02)
    assert precise["speedup_error"] <= 0.02 < alone["speedup_error"]
    assert alone["runs"] < precise["runs"] < PATIENCE * alone["runs"]
    # Nor do few runs end it where they are not enough.
    assert row(10, None)["runs"] == 10
    assert row(10, 0.02)["runs"] == precise["runs"]


def test_rounds_go_on_where_they_are_not_enough_yet(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("accel.timing_rounds.time.perf_counter", lambda: clock[0])

    def run():
        clock[0] += 1.0

    def rounds(enough):
        return len(time_rounds({"a": run}, 1000, 10.0, enough=enough)["a"])

    assert rounds(lambda _: True) == 11
    assert rounds(lambda times: len(times["a"]) >= 20) == 20
    assert rounds(lambda _: False) == PATIENCE * 10 + 1


def test_rounds_before_the_clock_starts_end_with_the_time_given(monkeypatch):
    """Where memory goes back to the system at every run, no round ever finds it."""
    faults = itertools.count(step=10_000)
    monkeypatch.setattr("accel.timing_rounds.page_faults", lambda: next(faults))
    calls = []
    runs = {"a": lambda: calls.append(time.sleep(0.01))}
    found = time_rounds(runs, repeats=3, seconds=10)
    assert len(calls) - len(found["a"]) == SETTLING
    calls.clear()
    found = time_rounds(runs, repeats=3, seconds=0.02)
    assert 0 < len(calls) - len(found["a"]) < 5


def test_what_ran_just_before_is_left_out_of_rounds_before_the_clock(monkeypatch):
    faults = itertools.count(step=10_000)
    monkeypatch.setattr("accel.timing_rounds.page_faults", lambda: next(faults))
    calls = {"before": 0, "new": 0}

    def counted(name):
        calls[name] += 1

    runs = {name: partial(counted, name) for name in calls}
    time_rounds(runs, repeats=3, seconds=10, settled=("before",))
    assert calls == {"before": 3, "new": SETTLING + 3}


def test_networks_with_batch_norm_are_timed_and_left_as_they_are():
    model = networks.Residual(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    shape = networks.images(1).shape[1:]
    (row,) = latency(model, model, shape, batch_sizes=(2,), repeats=3).values()
    assert row["original_ms"] > 0
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    )


@pytest.mark.parametrize(
    "options", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"repeats": 2}, {"seconds": 0.0}]
)
def test_impossible_measurements_are_refused(options):
    model = Products(1)
    with pytest.raises(ValueError, match="latency needs batch sizes of 1 or more, 3 repeats"):
        latency(model, model, (16, 16, 1), **options)


@pytest.fixture(scope="module")
def accelerated_folder(tmp_path_factory):
    """A folder as ``accel run`` writes it, of a network whose weights nobody fitted."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    spec = accel.ModelSpec("small_vgg")
    accel.save_model(folder / "model", rewrite(spec.build(), PLAN), spec, PLAN)
    (folder / "report.json").write_text(json.dumps({"settings": {"image_shape": [SIZE, SIZE, 1]}}))
    return folder


@pytest.fixture
def timed_layers(monkeypatch):
    """Layers are not timed: one takes 2 ms, a chain 1 ms. What was asked for is in the list."""
    asked = []

    def seconds(layers, input_shape, dtype, activation, options):
        chains = [isinstance(layer, FactorizedConv) for layer in layers]
        assert options == network_options(layers[0])
        asked.extend((chain, input_shape, np.dtype(dtype).name, activation) for chain in chains)
        return [0.001 if chain else 0.002 for chain in chains]

    monkeypatch.setattr("accel.benchmark.layer_seconds", seconds)
    return asked


def test_a_benchmark_holds_what_its_figures_come_from(accelerated_folder, timed_layers, capfd):
    command = ["benchmark", str(accelerated_folder), "--batch-sizes", "1", "3", "--seconds", "0.2"]
    assert main(command) == 0
    file = accelerated_folder / "benchmark.json"
    found = json.loads(file.read_text())
    assert {path.name for path in accelerated_folder.iterdir()} == {
        *("model", "report.json", "benchmark.json")
    }
    assert found["command"].startswith("accel benchmark out --batch-sizes 1 3")
    assert (found["model"], found["dtype"], found["image_shape"]) == (
        "small_vgg",
        "float32",
        [SIZE, SIZE, 1],
    )
    assert found["device"]
    assert found["versions"]["jax"] == jax.__version__
    assert found["not_timed"] == {}
    assert [batch["batch_size"] for batch in found["batches"]] == [1, 3]
    for batch in found["batches"]:
        before, after = batch["original"], batch["accelerated"]
        for times in (before, after):
            assert min(times["median_ms"], times["compile_seconds"]) > 0
            assert times["interquartile_range_ms"] >= 0
            assert times["xla_temporary_bytes"] > 0
        assert batch["runs"] >= 3
        assert batch["measured_speedup"] > 0
        assert batch["macs_speedup"] == found["macs"]["speedup"]
        assert batch["measured_over_macs"] == pytest.approx(
            batch["measured_speedup"] / batch["macs_speedup"]
        )
        if jax.default_backend() == "gpu":
            assert batch["xla_speedup"] is before["xla_flops"] is after["xla_flops"] is None
        else:
            assert batch["xla_speedup"] == before["xla_flops"] / after["xla_flops"]
            # Two operations a multiply-accumulate; our count has those on padding, XLA's has not.
            macs = found["macs"]["original"] * batch["batch_size"]
            assert 0.5 * 2 * macs < before["xla_flops"] < 1.1 * 2 * macs
        for name in ("original", "accelerated"):
            layers = batch["layers"]
            assert sum(layer[f"macs_{name}"] for layer in layers) == found["macs"][name]
            for layer in layers:
                share = layer[f"{name}_ms"] / batch[name]["median_ms"]
                assert layer[f"{name}_share"] == pytest.approx(share)
        assert [
            (layer["path"], layer["decomposition"], tuple(layer["ranks"])) for layer in layers
        ] == [(layer.path, layer.decomposition, layer.ranks) for layer in PLAN.layers]
        for layer in layers:
            replaced = layer["decomposition"] is not None
            assert layer["original_ms"] == 2.0
            assert layer["accelerated_ms"] == (1.0 if replaced else 2.0)
            assert (layer["macs_accelerated"] < layer["macs_original"]) == replaced
    # In order of execution, a chain right after the layer that it stands in for.
    assert timed_layers[:5] == [
        (False, (1, SIZE, SIZE, 1), "float32", "relu"),
        (False, (1, SIZE, SIZE, 64), "float32", "relu"),
        (True, (1, SIZE, SIZE, 64), "float32", "relu"),
        (False, (1, SIZE // 2, SIZE // 2, 64), "float32", "relu"),
        (True, (1, SIZE // 2, SIZE // 2, 64), "float32", "relu"),
    ]
    assert timed_layers[10:12] == [
        (False, (3, SIZE, SIZE, 1), "float32", "relu"),
        (False, (3, SIZE, SIZE, 64), "float32", "relu"),
    ]
    assert "layers at batch 3" in capfd.readouterr().out

    written = file.read_text()
    assert main(command) == 1
    assert f"{file} exists already; nothing is overwritten" in capfd.readouterr().err
    assert file.read_text() == written


def onnx_file(file, shape):
    """An ONNX file of a network that is one ReLU."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["images"], ["outputs"])],
        "relu",
        [value("images", onnx.TensorProto.FLOAT, shape)],
        [value("outputs", onnx.TensorProto.FLOAT, shape)],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), file)
    return file


def test_a_peer_takes_part_in_the_turns(accelerated_folder, timed_layers, tmp_path, capfd):
    out = tmp_path / "benchmark.json"
    command = ["benchmark", str(accelerated_folder), "--batch-sizes", "2", "--seconds", "0.2"]
    channels_first = onnx_file(tmp_path / "first.onnx", ("n", 1, SIZE, SIZE))
    assert main([*command, "--out", str(out), "--onnx", str(channels_first)]) == 0
    (batch,) = json.loads(out.read_text())["batches"]
    (name,) = batch["peers"]
    assert name.startswith("ONNX Runtime 1.")
    assert batch["peers"][name]["median_ms"] > 0
    capfd.readouterr()

    other = onnx_file(tmp_path / "other.onnx", (1, SIZE, SIZE, 1))
    assert main([*command, "--out", str(tmp_path / "no.json"), "--onnx", str(other)]) == 1
    assert (
        "other.onnx: expected one input for float32 images (2, 8, 8, 1)" in capfd.readouterr().err
    )
    other.write_text("no network")
    assert main([*command, "--out", str(tmp_path / "no.json"), "--onnx", str(other)]) == 1
    assert "other.onnx: ONNX Runtime cannot read it" in capfd.readouterr().err
    assert not (tmp_path / "no.json").exists()


TORCH_NETWORKS = """
import torch

def relu():
    return torch.nn.ReLU()

def three_channels():
    return torch.nn.Conv2d(3, 1, 1)

def no_network():
    return 1

def failing():
    raise RuntimeError("nothing there")
"""


def test_pytorch_takes_part_in_the_turns(
    accelerated_folder, timed_layers, tmp_path, capfd, monkeypatch
):
    pytest.importorskip("torch")
    (tmp_path / "torch_networks.py").write_text(TORCH_NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "torch_networks", None)
    del sys.modules["torch_networks"]  # And again after the test.
    command = ["benchmark", str(accelerated_folder), "--batch-sizes", "2", "--seconds", "0.2"]
    assert main([*command, "--out", "benchmark.json", "--torch", "torch_networks:relu"]) == 0
    (batch,) = json.loads(Path("benchmark.json").read_text())["batches"]
    (name,) = batch["peers"]
    assert name.startswith("PyTorch 2.")
    assert batch["peers"][name]["median_ms"] > 0
    for function, problem in {
        "three_channels": "three_channels: images of shape (2, 1, 8, 8): ",
        "no_network": "no_network: expected a torch.nn.Module, found int",
        "failing": "failing: RuntimeError: nothing there",
        "missing": "missing: AttributeError: ",
        "": "': expected package.module:function",
    }.items():
        capfd.readouterr()
        assert main([*command, "--out", "no.json", "--torch", f"torch_networks:{function}"]) == 1
        assert f"torch_networks:{problem}" in capfd.readouterr().err
    assert not Path("no.json").exists()


def test_without_pytorch_the_error_says_so(
    accelerated_folder, tmp_path, timed_layers, capfd, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["benchmark", str(accelerated_folder), "--out", str(tmp_path / "no.json")]
    assert main([*command, "--torch", "any:network"]) == 1
    assert "PyTorch is not installed" in capfd.readouterr().err


def test_an_older_folder_needs_the_shape_of_its_images(
    accelerated_folder, timed_layers, tmp_path, capfd
):
    folder, out = tmp_path / "older", tmp_path / "times.json"
    shutil.copytree(accelerated_folder / "model", folder / "model")
    (folder / "report.json").write_text(json.dumps({"settings": {}}))
    command = ["benchmark", str(folder), "--out", str(out), "--batch-sizes", "2"]
    command += ["--seconds", "0.1"]
    assert main(command) == 1
    assert "give it (--image-size HEIGHT WIDTH CHANNELS)" in capfd.readouterr().err
    assert main([*command, "--image-size", "12", "8", "1"]) == 0
    assert json.loads(out.read_text())["image_shape"] == [12, 8, 1]
    assert timed_layers[0][1] == (2, 12, 8, 1)
    assert not (folder / "benchmark.json").exists()


def test_networks_compute_in_what_the_run_evaluated_in(accelerated_folder, timed_layers, tmp_path):
    folder = tmp_path / "reduced"
    shutil.copytree(accelerated_folder / "model", folder / "model")
    settings = {"image_shape": [SIZE, SIZE, 1], "inference_dtype": "bfloat16"}
    (folder / "report.json").write_text(json.dumps({"settings": settings}))
    command = ["benchmark", str(folder), "--batch-sizes", "2", "--seconds", "0.1"]
    assert main(command) == 0
    assert json.loads((folder / "benchmark.json").read_text())["dtype"] == "bfloat16"
    assert {str(dtype) for _, _, dtype, *_ in timed_layers} == {"bfloat16"}
    assert main([*command, "--dtype", "float32", "--out", str(tmp_path / "single.json")]) == 0
    assert json.loads((tmp_path / "single.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "8", "8", "3"], "VGG cannot be called with one image, of shape (1, 8, 8"),
        (["--image-size", "8", "0", "1"], "1 or more each, found (8, 0, 1)"),
        (["--batch-sizes", "1", "0"], "benchmark needs batch sizes of 1 or more"),
        (["--seconds", "nan"], "and a time above 0, found (1, 8), 30 and nan"),
        (["--out", "nowhere/times.json"], "nowhere is no folder to write times.json to"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_measured(
    arguments, message, accelerated_folder, timed_layers, tmp_path, capfd
):
    out = ["--out", str(tmp_path / "times.json")]
    assert main(["benchmark", str(accelerated_folder), *out, *arguments]) == 1
    assert message in capfd.readouterr().err
    assert not timed_layers
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"model/model.json": None}, "is no model folder"),
        ({"model/model.json": '{"format": 1, "model": null}'}, "how its original network is built"),
        ({"model/plan.json": None}, "holds no accelerated network"),
        ({"model/plan.json": "{}"}, "not an acceleration plan"),
        ({"report.json": None}, "is no report of a run"),
        ({"report.json": "[]"}, "is no report of a run"),
        ({"report.json": '{"settings": {"image_shape": "8x8"}}'}, "1 or more each, found 8x8"),
    ],
)
def test_folders_that_hold_something_else_are_refused(
    broken, message, accelerated_folder, timed_layers, tmp_path, capfd
):
    folder = tmp_path / "folder"
    shutil.copytree(accelerated_folder, folder)
    for name, text in broken.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    assert main(["benchmark", str(folder), "--out", str(tmp_path / "times.json")]) == 1
    assert message in capfd.readouterr().err
    assert not timed_layers


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there all are None")
def test_operations_that_xla_does_not_tell_are_none():
    def told(analysis):
        return xla_flops(SimpleNamespace(cost_analysis=lambda: analysis))

    assert told({"flops": 12.0}) == 12.0
    assert [told(analysis) for analysis in (None, {}, {"flops": -1.0})] == [None] * 3
