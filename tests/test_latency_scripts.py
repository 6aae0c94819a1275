"""The two scripts that measure budgets in time, from errors to what the planned networks lose."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from accel import count_conv_macs, latency_budget, timed_plan
from accel.checkpoint import save_model
from accel.device_times import LayerTimes
from accel.models import ModelSpec

CONFIG = """
from accel.data.settings import BundledImages
from accel.experiment import Experiment
from accel.models import ModelSpec

config = Experiment(
    model=ModelSpec("test_latency_scripts:Small"),
    weights=None,
    calibration=BundledImages("calibration"),
    evaluation=BundledImages("test"),
    metrics=("accuracy", "outputs"),
    decompositions=("spatial",),
    rules={"conv1": "dense"},
    positions_per_image=4,
    image_limit=40,
)
"""


class Small(nnx.Module):
    """Four convolutions, the last of which gives as many numbers as there are classes."""

    def __init__(self, rngs: nnx.Rngs):
        widths = (1, 8, 64, 64, 10)
        for index, (before, after) in enumerate(itertools.pairwise(widths), 1):
            setattr(self, f"conv{index}", nnx.Conv(before, after, (3, 3), strides=2, rngs=rngs))

    def __call__(self, images):
        x = images
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.relu(conv(x))
        return self.conv4(x).mean((1, 2))


@pytest.fixture
def planted(script, monkeypatch):
    """Layers take a nanosecond a multiply-accumulate; networks, as they are, as many as theirs."""
    budget = script("measure_latency_budget")

    def measure_times(calls, curves, batch_size, **_options):
        return {
            call.path: LayerTimes(
                1e-9 * curves[call.path].macs.max(initial=1),
                curves[call.path].candidates,
                1e-9 * curves[call.path].macs,
            )
            for call in calls
            if call.path in curves
        }

    def compile_inference(network, shape, dtype=None):
        macs = sum(count_conv_macs(network, jax.ShapeDtypeStruct(shape, np.float32)).values())
        return SimpleNamespace(milliseconds=1e-6 * macs, shape=shape, dtype=dtype)

    def time_in_turns(networks, **_options):
        before, after = (networks[name].milliseconds for name in ("original", "accelerated"))
        figures = {"original_ms": before, "accelerated_ms": after, "speedup": before / after}
        return {**figures, "speedup_error": 0.0}

    monkeypatch.setattr(budget, "measure_times", measure_times)
    for module in (budget, latency_budget, timed_plan):
        monkeypatch.setattr(module, "compile_inference", compile_inference)
    monkeypatch.setattr(timed_plan, "time_in_turns", time_in_turns)
    return budget


@pytest.fixture
def small(tmp_path):
    """A configuration of a small network, and the weights."""
    config, folder = tmp_path / "config.py", tmp_path / "small"
    config.write_text(CONFIG)
    save_model(folder, Small(nnx.Rngs(0)), ModelSpec("test_latency_scripts:Small"))
    return [config, "--weights", folder]


def run(module, monkeypatch, config, *arguments):
    monkeypatch.setattr("sys.argv", ["measure", *map(str, (config, *arguments))])
    return module.main()


def test_curves_are_kept_and_read_back(script):
    budget = script("measure_latency_budget")
    curve = budget.ErrorCurve(
        (budget.Candidate("spatial", (3,)), budget.Candidate("tucker2", (4, 5))),
        np.array([10, 20], np.int64),
        np.array([0.5, 1 / 3]),
    )
    text = budget.to_json({8: {"conv": curve}}, {"model": "a", "multiples": (8,)})
    read = budget.from_json(text, {"model": "a", "multiples": (8,)}, "curves.json")
    ((path, back),) = read[8].items()
    assert path == "conv"
    assert back.candidates == curve.candidates
    np.testing.assert_array_equal(back.macs, curve.macs)
    np.testing.assert_array_equal(back.errors, curve.errors)
    with pytest.raises(ValueError, match=r"curves\.json holds error curves of .*'a'.*'b'"):
        budget.from_json(text, {"model": "b", "multiples": (8,)}, "curves.json")
    with pytest.raises(ValueError, match=r"curves\.json holds no error curves"):
        budget.from_json("[]", {}, "curves.json")


def test_errors_then_times_and_then_what_is_lost_by_the_same_plans(
    planted, script, small, tmp_path, monkeypatch, capfd
):
    config, *weights = small
    curves, out = tmp_path / "curves.json", tmp_path / "budget.json"
    errors_alone = ["--curves", curves, "--out", out, "--batch-sizes", *weights]
    assert run(planted, monkeypatch, config, *errors_alone) == 0
    assert json.loads(curves.read_text())["curves"].keys() == {"1", "8"}
    assert "nothing is timed" in capfd.readouterr().out
    assert not list(tmp_path.glob("budget*"))
    options = ["--curves", curves, "--out", out, "--batch-sizes", "2", "--dtypes", "bfloat16"]
    options += ["--speedups", "1.5", "--random-plans", "2", "--seconds", "0.1", *weights]
    assert run(planted, monkeypatch, config, *options) == 0
    found = json.loads(out.read_text())
    (row,) = found["batches"].values()
    assert (row["batch_size"], row["dtype"]) == (2, "bfloat16")
    asked = row["asked"]["1.5"]
    assert asked["speedup"] == pytest.approx(1.5, rel=0.05)
    assert asked["mac_speedup"] == pytest.approx(asked["speedup"])
    assert row["timing_seconds"] >= row["timing_layers_seconds"] > 0
    assert set(row["mac_plans_4x"]) == {"by MACs", "by MACs, ranks in steps of 8"}
    assert row["mac_plans_4x"]["by MACs"]["mac_speedup"] >= 4
    in_steps = row["mac_plans_4x"]["by MACs, ranks in steps of 8"]["plan"]["layers"]
    ranks = [rank for layer in in_steps for rank in layer["ranks"]]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)
    assert len(row["random_plans"]["plans"]) == 2
    table = out.with_suffix(".md").read_text()
    assert "| 2, bfloat16 | 4× by MACs |" in table
    by_macs = {"MACs": ", a plan of the fewest MACs", "times of layers": ""}
    assert f"| 2, bfloat16 | 1.5× by time{by_macs[asked['found_by']]} |" in table
    with pytest.raises(FileExistsError, match=r"budget\.json exists already"):
        run(planted, monkeypatch, config, *options)
    # Errors that are known are not measured again, whatever the images.
    known = curves.read_text()
    monkeypatch.setattr(planted, "measure_errors", None)
    again = [other if other != out else tmp_path / "again.json" for other in options]
    assert run(planted, monkeypatch, config, *again) == 0
    assert curves.read_text() == known

    errors = script("measure_plan_errors")
    lost = tmp_path / "errors.json"
    options = ["--out", lost, "--seconds", "0.1", *weights]
    assert run(errors, monkeypatch, config, out, *options) == 0
    rows = json.loads(lost.read_text())["rows"]
    as_fast = f"by time, as fast{by_macs[row['as_fast_as_by_macs']['found_by']]}"
    assert [row["plan"] for row in rows] == ["4× by MACs", as_fast]
    assert all(0 <= row["metrics"]["top1"]["accelerated"] <= 1 for row in rows)
    # Both in the same turns, with the same original.
    assert len({row["original_ms"] for row in rows}) == 1
    for row in rows:
        measured = row["in_turns_speedup"]
        assert measured > 0
        told = f"| {row['plan']} | {row['original_ms']:.1f} ms | {row['in_turns_ms']:.1f} ms"
        assert f"{told} | {measured:.2f}× |" in lost.with_suffix(".md").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_plans_that_cannot_be_are_told_and_the_rest_is_measured(
    planted, small, tmp_path, monkeypatch
):
    config, *weights = small
    out = tmp_path / "budget.json"
    options = ["--curves", tmp_path / "curves.json", "--out", out, "--batch-sizes", "2", *weights]
    options += ["--speedups", "1.5", "--random-plans", "0", "--seconds", "0.1"]

    def refused(*_, **__):
        raise ValueError("4× cannot be reached")

    monkeypatch.setattr(planted, "select_ranks", refused)
    assert run(planted, monkeypatch, config, *options) == 0
    (row,) = json.loads(out.read_text())["batches"].values()
    assert row["mac_plans_4x"]["by MACs"] == {"refused": "4× cannot be reached"}
    assert row["as_fast_as_by_macs"] == {"refused": "4× cannot be reached"}
    assert row["random_plans"]["plans"] == []
    assert "| 2, float32 | 4× by MACs | | | refused | | |" in out.with_suffix(".md").read_text()
    again = [tmp_path / "again.json" if option == out else option for option in options]
    for wrong in (["--dtypes", "bf16"], ["--batch-sizes", "0"], ["--speedups", "0.5"]):
        with pytest.raises(ValueError, match=r"bf16|batch sizes of 1 or more|speedups"):
            run(planted, monkeypatch, config, *again, *wrong)


def test_what_was_measured_before_a_stop_is_kept_and_does_not_stand_in_the_way(
    planted, small, tmp_path, monkeypatch
):
    config, *weights = small
    out = tmp_path / "budget.json"
    options = ["--curves", tmp_path / "curves.json", "--out", out, "--batch-sizes", "2", *weights]

    def stopped(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(planted, "select_for_latency", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(planted, monkeypatch, config, *options)
    assert json.loads((tmp_path / "budget.json.partial").read_text())["batches"]
    assert not out.exists()
    assert run(planted, monkeypatch, config, *options, "--speedups", "1.5", "--seconds", "0.1") == 0
    assert out.exists()


def test_a_file_that_holds_no_timed_plans_is_named(script):
    errors = script("measure_plan_errors")
    with pytest.raises(ValueError, match="expected batches, found of, curves"):
        errors.timed_plans({"of": {}, "curves": {}})
    with pytest.raises(ValueError, match="batch 8: the measurement was stopped"):
        errors.timed_plans({"batches": {"8": {"asked": {}}}})
    # Of the time before types were measured: told before networks are fitted for minutes.
    with pytest.raises(ValueError, match="batch 8: expected its batch_size and dtype"):
        errors.timed_plans({"batches": {"8": {"as_fast_as_by_macs": {}}}})
