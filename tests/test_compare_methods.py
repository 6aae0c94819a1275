import dataclasses
from pathlib import Path

import pytest

from accel.experiment import BUNDLED, BundledImages, Experiment, FolderImages
from accel.models import ModelSpec

EXPERIMENT = Experiment(
    model=ModelSpec("vgg16_body"),
    weights="/somewhere/vgg16.onnx",
    calibration=FolderImages(Path("/somewhere/calibration"), windows=1),
    evaluation=FolderImages(Path("/somewhere/validation"), labels=Path("/somewhere/labels.txt")),
)


@pytest.fixture
def compare(script):
    return script("compare_methods")


def test_the_folder_of_the_same_experiment_is_gone_on_in(compare, tmp_path):
    out = tmp_path / "new" / "folder"
    compare.begin(out, EXPERIMENT)
    (out / "raw.jsonl").write_text('{"seed": 0}\n')
    compare.begin(out, dataclasses.replace(EXPERIMENT))
    assert (out / "experiment.json").read_text() == compare.record(EXPERIMENT)


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": "/somewhere/vgg19.onnx"},
        {"positions_per_image": 11},
        {"evaluation": BundledImages("test")},
        {"calibration": FolderImages(Path("/somewhere/calibration"), windows=2)},
    ],
)
def test_the_folder_of_another_experiment_is_refused_and_left_alone(compare, tmp_path, changed):
    compare.begin(tmp_path, EXPERIMENT)
    with pytest.raises(FileExistsError, match="results of another experiment"):
        compare.begin(tmp_path, dataclasses.replace(EXPERIMENT, **changed))
    assert (tmp_path / "experiment.json").read_text() == compare.record(EXPERIMENT)


def test_results_of_an_unknown_experiment_are_refused(compare, tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"seed": 0}\n')
    with pytest.raises(FileExistsError, match=r"results without experiment\.json"):
        compare.begin(tmp_path, EXPERIMENT)
    assert not (tmp_path / "experiment.json").exists()
    (tmp_path / "raw.jsonl").write_text("\n")
    compare.begin(tmp_path, EXPERIMENT)
    assert (tmp_path / "experiment.json").exists()


def test_the_record_tells_nothing_of_the_machine(compare):
    text = compare.record(EXPERIMENT)
    assert "somewhere" not in text
    assert all(name in text for name in ("vgg16.onnx", "calibration", "validation", "labels.txt"))
    elsewhere = dataclasses.replace(
        EXPERIMENT,
        weights=Path("vgg16.onnx"),
        calibration=FolderImages(Path("calibration/"), windows=1),
    )
    assert compare.record(elsewhere) == text
    bundled = dataclasses.replace(EXPERIMENT, weights=BUNDLED)
    assert '"weights": "bundled"' in compare.record(bundled)


def test_the_command_line_refuses_in_one_line(compare, tmp_path, monkeypatch):
    compare.begin(tmp_path, EXPERIMENT)
    config = Path(__file__).parent.parent / "configs" / "quickstart.py"
    monkeypatch.setattr("sys.argv", ["compare_methods.py", str(config), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="results of another experiment"):
        compare.main()
    assert not (tmp_path / "environment.json").exists()
