"""Every documented command, run for real (with --smoke where it would take long)."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import accel
from accel.cli import main
from accel.configuration import load_config
from accel.data import fashion_test_images
from accel.data.settings import BundledImages, FolderImages
from accel.experiment import Experiment, run
from accel.progress import Progress
from accel.repair import Distillation
from accel.rewrite import FactorizedConv

ROOT = Path(__file__).parent.parent
REPORT_FIELDS = {
    "model",
    "device",
    "versions",
    "macs",
    "latency",
    "metrics",
    "layers",
    "seconds",
}


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    assert main(["run", str(ROOT / "configs/quickstart.py"), "--smoke", "--out", str(out)]) == 0
    return out


def test_the_quickstart_writes_its_folder(quickstart):
    assert {p.name for p in quickstart.iterdir()} == {
        "experiment.json",
        "log.txt",
        "model",
        "report.json",
    }
    report = json.loads((quickstart / "report.json").read_text())
    assert report.keys() >= REPORT_FIELDS
    assert report["macs"]["speedup"] >= 4.0
    assert report["settings"]["image_shape"] == [28, 28, 1]
    assert report["seconds"].keys() >= {"calibrate", "solve", "evaluate", "total"}
    assert report["latency"]["1"].keys() >= {"original_ms", "accelerated_ms", "speedup"}
    assert report["metrics"]["top1"].keys() == {"original", "accelerated"}
    assert [layer["path"] for layer in report["layers"]] == [
        *("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3")
    ]
    assert "conv3_3" in (quickstart / "log.txt").read_text()
    model = accel.load_model(quickstart / "model")
    images = next(fashion_test_images().batches(8))
    assert np.isfinite(model(images)).all()


def test_values_beyond_the_type_to_evaluate_in_show_before_anything_runs(tmp_path, capfd):
    spec = accel.ModelSpec("small_vgg")
    model = spec.build()
    model.conv1_2.bias[...] = np.full(model.conv1_2.bias.shape, 7e4, np.float32)
    accel.save_model(tmp_path / "large", model, spec)
    command = ["run", str(ROOT / "configs/quickstart.py"), "--weights", str(tmp_path / "large")]
    command += ["--smoke", "--inference-dtype", "float16", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "conv1_2/bias: a value of 7e+04 is beyond float16's range" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_nothing_is_overwritten(quickstart, capfd):
    config = str(ROOT / "configs/quickstart.py")
    assert main(["run", config, "--smoke", "--out", str(quickstart)]) == 1
    assert "exists already; nothing is overwritten" in capfd.readouterr().err


def test_a_stopped_run_of_another_experiment_is_not_mixed_up(tmp_path, capfd):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "experiment.json").write_text("{}")
    config = str(ROOT / "configs/quickstart.py")
    assert main(["run", config, "--smoke", "--out", str(tmp_path / "out")]) == 1
    assert "unfinished run of another experiment" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"latency_seconds": 0.0}, "latency needs batch sizes of 1 or more"),
        ({"second_sweep": -1}, "second_sweep is 0 or more, found -1"),
        (
            "evaluation",
            r"original network cannot be called with images of shape \(1, 224, 224, 3\)",
        ),
        ("labels", "evaluation images: labels are needed here, but the images have none"),
    ],
)
def test_what_would_fail_after_the_long_work_is_refused_before(wrong, message, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "coloured.png")
    quickstart = load_config(ROOT / "configs" / "quickstart.py", Experiment).smoke()
    if wrong == "evaluation":
        wrong = {"evaluation": FolderImages(tmp_path)}
    if wrong == "labels":
        wrong = {"evaluation": BundledImages("calibration")}
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(quickstart, **wrong), "small_vgg", tmp_path / "out", Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["coloured.png"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--rank-selection", "greedy_energy"], "chooses ranks of one kind of chain"),
        (["--speedup", "1"], "a finite number above 1"),
        (["--positions-per-image", "0"], "positions_per_image and batch_size are 1 or more"),
    ],
)
def test_a_mistake_shows_before_anything_is_evaluated_and_is_not_in_the_way_of_its_correction(
    wrong, message, tmp_path, capfd, monkeypatch
):
    def not_yet(*_, **__):
        raise AssertionError("evaluated before it was known whether the run can be")

    monkeypatch.setattr("accel.experiment.accuracy", not_yet)
    out = tmp_path / "out"
    command = ["run", str(ROOT / "configs/quickstart.py"), "--out", str(out)]
    assert main([*command, *wrong]) == 1
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


class Said(Progress):
    text = ""

    def say(self, text):
        self.text += text + "\n"


class StopsInSecondEpoch(Progress):
    def describe(self, text):
        if "epoch 2" in text:
            raise KeyboardInterrupt


def test_repairs_that_were_begun_with_other_settings_are_not_in_the_way(tmp_path):
    spec = accel.ModelSpec(
        "accel.models.vgg:VGG",
        {"stages": ((8, 12),), "num_classes": 10, "in_channels": 1, "pooled_size": 2}
        | {"hidden_features": ()},
    )
    accel.save_model(tmp_path / "small", spec.build(), spec)
    experiment = dataclasses.replace(
        load_config(ROOT / "configs" / "quickstart.py", Experiment).smoke(),
        model=spec,
        weights=tmp_path / "small",
        speedup=1.5,
        metrics=("outputs",),
        latency_batches=(),
        distillation=Distillation(epochs=3),
    )
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(experiment, "small", out, StopsInSecondEpoch())
    changed = dataclasses.replace(
        experiment, distillation=Distillation(epochs=1, learning_rate=1e-6)
    )
    said = Said()
    result = run(changed, "small", out, said)
    assert "the distillation that was begun had other settings; it begins anew" in said.text
    assert len(result.report.repair["distillation"]["epochs"]) == 2
    assert not (out / "repairs").exists()


def test_fields_are_overridden_and_recorded_and_a_failed_measurement_loses_nothing(
    tmp_path, capfd, monkeypatch
):
    out = tmp_path / "out"
    config = str(ROOT / "configs/quickstart.py")
    overrides = ["--speedup", "2.5", "--solver", "reduced_rank_regression", "--rank-selection"]
    overrides += ["uniform", "--seed", "3", "--latency-batches"]
    command = ["run", config, "--smoke", "--out", str(out), *overrides]

    def no_memory(*_):
        raise ValueError("no memory is left")

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "evaluate", no_memory)
        assert main(command) == 1
    assert "no memory is left" in capfd.readouterr().err
    unfinished = tmp_path / "out.partial"
    accelerated = accel.load_model(unfinished / "model")
    solved = [file.read_bytes() for file in sorted((unfinished / "layers").iterdir())]
    assert len(solved) == 6

    # The corrected command goes on with the layers.
    def not_again(*_):
        raise AssertionError("a layer was solved again")

    with monkeypatch.context() as patched:
        patched.setattr("accel.network_reconstruction.solve_layer", not_again)
        assert main([*command, "--metrics", "outputs"]) == 0
    images = next(fashion_test_images().batches(8))
    np.testing.assert_array_equal(accel.load_model(out / "model")(images), accelerated(images))
    report = json.loads((out / "report.json").read_text())
    assert 2.5 <= report["macs"]["speedup"] < 2.6
    assert report["settings"]["solver"]["name"] == "ReducedRankRegression"
    assert report["settings"]["rank_selection"] == "uniform"
    assert report["settings"]["seed"] == 3


def test_finetune_takes_a_folder_of_run_and_writes_another(quickstart, idx_files, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["finetune", str(quickstart), str(ROOT / "configs/finetune_fashion.py"), "--smoke"]
    command += ["--images.folder", str(idx_files), "--held-back.folder", str(idx_files)]
    command += ["--out", str(out)]
    # A failed start leaves nothing that stands in the way of the corrected command.
    assert main([*command, "--learning-rate", "nan"]) == 1
    assert "learning_rate is a number above 0, found nan" in capfd.readouterr().err
    assert main(command) == 0
    assert {p.name for p in out.iterdir()} == {
        "experiment.json",
        "log.txt",
        "model",
        "report.json",
    }
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= {"model", "device", "versions", "settings", "history", "seconds"}
    assert report["metrics"]["top1"].keys() == {"before", "after"}
    assert [epoch.keys() for epoch in report["history"]] == [
        {"loss", "accuracy", "evaluation", "seconds"}
    ]
    images = next(fashion_test_images().batches(8))
    before, after = (accel.load_model(folder / "model")(images) for folder in (quickstart, out))
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
    assert main(command) == 1
    assert "exists already; nothing is overwritten" in capfd.readouterr().err


def test_finetune_without_its_images_says_what_is_missing(quickstart, tmp_path, capfd):
    for config, message in {
        "finetune_fashion": "no folder of IDX files given",
        "finetune_vgg16_imagenet": "no folder of data sets given",
    }.items():
        command = ["finetune", str(quickstart), str(ROOT / f"configs/{config}.py")]
        assert main([*command, "--out", str(tmp_path / "out")]) == 1
        assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def tiny_vgg16(path, classes=None):
    """A VGG-16 file under torchvision's names, as wide as the real one."""
    widths = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    indices = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    random = np.random.default_rng(0)
    tensors, channels = {}, 3
    for index, width in zip(indices, widths, strict=True):
        kernel = random.standard_normal((width, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        tensors[f"features.{index}.weight"] = kernel.astype(np.float32)
        tensors[f"features.{index}.bias"] = np.zeros(width, np.float32)
        channels = width
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for index in range(4):
        pixels = random.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 60)).save(folder / f"{index}.png")
    return folder


def test_vgg16_photos_runs_on_a_weight_file_and_a_folder_of_pictures(tmp_path, pictures):
    weights = tiny_vgg16(tmp_path / "vgg16.safetensors")
    arguments = ["--smoke", "--weights", str(weights), "--out", str(tmp_path / "out")]
    for which in ("calibration", "evaluation"):
        arguments += [f"--{which}.folder", str(pictures), f"--{which}.image-size", "32"]
        arguments += [f"--{which}.shorter-side", "40"]
    # Joint reconstruction, which other runs here have, takes minutes at 512 channels.
    arguments += ["--reconstruction", "responses"]
    assert main(["run", str(ROOT / "configs/vgg16_photos.py"), *arguments]) == 0
    metrics = json.loads((tmp_path / "out" / "report.json").read_text())["metrics"]
    assert metrics.keys() == {"relative_squared_error", "cosine"}


@pytest.mark.parametrize(
    "config", ["vgg16_photos", "vgg16_imagenet", "vgg16_imagenet_folder", "vgg16_probe_fashion"]
)
def test_a_config_without_its_files_says_what_is_missing(config, tmp_path, capfd):
    arguments = ["run", str(ROOT / f"configs/{config}.py"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "no weights given (--weights FILE)" in capfd.readouterr().err
    # A failed start leaves nothing that stands in the way of the corrected command.
    weights = str(tiny_vgg16(tmp_path / "weights.safetensors"))
    assert main([*arguments, "--weights", weights]) == 1
    assert "another experiment" not in capfd.readouterr().err


def test_convert_makes_a_model_folder_that_run_takes(tmp_path, capfd):
    file = ROOT / "accel/bundled/fashion_vgg.safetensors"
    folder = tmp_path / "model"
    convert = ["convert", str(file), "--model", "small_vgg", "--out", str(folder)]
    assert main(convert) == 0
    config = str(ROOT / "configs/quickstart.py")
    out = tmp_path / "out"
    run = ["run", config, "--smoke", "--reconstruction", "responses", "--weights", str(folder)]
    assert main([*run, "--out", str(out)]) == 0
    capfd.readouterr()
    assert main(convert) == 1
    assert "exists already" in capfd.readouterr().err


def test_a_model_folder_of_another_network_is_refused(tmp_path, capfd):
    file, folder = ROOT / "accel/bundled/fashion_vgg.safetensors", tmp_path / "model"
    assert main(["convert", str(file), "--model", "small_vgg", "--out", str(folder)]) == 0
    config = str(ROOT / "configs/vgg16_photos.py")
    out = str(tmp_path / "out")
    assert main(["run", config, "--weights", str(folder), "--out", out]) == 1
    assert "holds ModelSpec(name='small_vgg'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.py"], "nothing.py: no such config file"),
        (["run", str(ROOT / "accel/plan.py")], "expected 'config' to be of type Experiment"),
        (["finetune", "nothing", str(ROOT / "accel/plan.py")], "to be of type Finetuning"),
        (["finetune", "nothing", str(ROOT / "configs/finetune_fashion.py")], "is no model folder"),
        (["convert", "nothing.h5", "--model", "vgg16", "--out", "x"], "nothing.h5"),
        (["convert", "nothing.h5", "--model", "vgg99", "--out", "x"], "unknown model 'vgg99'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capfd):
    assert main(arguments) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_usage(capfd):
    assert main([]) == 0
    assert "accel run CONFIG" in capfd.readouterr().out
    assert main(["dance"]) == 2


@pytest.mark.slow
def test_the_bundled_network_keeps_its_accuracy_at_4x(tmp_path):
    out = tmp_path / "out"
    assert main(["run", str(ROOT / "configs/quickstart.py"), "--out", str(out)]) == 0
    top1 = json.loads((out / "report.json").read_text())["metrics"]["top1"]
    assert top1["original"] >= 0.93
    assert top1["accelerated"] >= top1["original"] - 0.02
    shutil.rmtree(out)


def test_a_users_own_network_runs_by_a_config_beside_it(tmp_path, monkeypatch, idx_files, capfd):
    (tmp_path / "my_network.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, rngs, width=8):\n"
        "        self.stem = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)\n"
        "        self.body = nnx.Conv(width, width, (3, 3), rngs=rngs)\n"
        "        self.head = nnx.Linear(width, 10, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.head(nnx.relu(self.body(nnx.relu(self.stem(x)))).mean((1, 2)))\n"
    )
    (tmp_path / "my_config.py").write_text(
        "from pathlib import Path\n"
        "from accel.data.settings import IdxImages\n"
        "from accel.experiment import Experiment\n"
        "from accel.models import ModelSpec\n"
        "config = Experiment(\n"
        "    model=ModelSpec('my_network:Net', {'width': 12}), weights=None,\n"
        f"    calibration=IdxImages(Path({str(idx_files)!r})),\n"
        f"    evaluation=IdxImages(Path({str(idx_files)!r})),\n"
        "    reconstruction='responses',\n"
        ")\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = load_config(tmp_path / "my_config.py", Experiment)
    accel.save_model(tmp_path / "model", config.model.build(), config.model)
    out = tmp_path / "out"
    arguments = ["--smoke", "--weights", str(tmp_path / "model"), "--out", str(out)]
    assert main(["run", str(tmp_path / "my_config.py"), *arguments]) == 0
    accelerated: Any = accel.load_model(out / "model", config.model.build)
    assert isinstance(accelerated.body, FactorizedConv)

    # The folder names the builder, but only the user's word has it imported.
    sys.path.remove(str(tmp_path))
    sys.modules.pop("my_network")
    monkeypatch.chdir(tmp_path)
    timed = ["benchmark", str(out), "--batch-sizes", "1", "--seconds", "0.1"]
    trained = ["finetune", str(out), str(ROOT / "configs/finetune_fashion.py"), "--smoke"]
    trained += ["--images.folder", str(idx_files), "--held-back.folder", str(idx_files)]
    trained += ["--out", str(tmp_path / "finetuned")]
    for command in (timed, trained):
        assert main(command) == 1
        assert "by my_network:Net, code that is not run at a folder's" in capfd.readouterr().err
        assert main([*command, "--builder", "others:Net"]) == 1
        assert "is of a network built by my_network:Net, not by others:N" in capfd.readouterr().err
        assert "my_network" not in sys.modules
    for command in (timed, trained):
        assert main([*command, "--builder", "my_network:Net"]) == 0
    (batch,) = json.loads((out / "benchmark.json").read_text())["batches"]
    assert {layer["path"] for layer in batch["layers"]} == {"stem", "body"}
    report = json.loads((tmp_path / "finetuned" / "report.json").read_text())
    assert report["model"] == "my_network:Net"
    finetuned: Any = accel.load_model(tmp_path / "finetuned" / "model", config.model.build)
    before, after = (net.body.factors[0].kernel[...] for net in (accelerated, finetuned))
    assert before.shape == after.shape
    assert not np.array_equal(before, after)
