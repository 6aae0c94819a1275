"""Folders of unfinished runs: told apart, shared by no two processes."""

import dataclasses
import json
import subprocess
import sys
import threading

import pytest

from accel.experiment import AFTER_SOLVING, Experiment
from accel.files import check_new, locked, unfinished_folder

HOLD = """
import sys
from pathlib import Path
from accel.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_process_holds_is_refused_until_that_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(FileExistsError, match="another process is writing to"),
            locked(tmp_path),
        ):
            pass
        waited = threading.Event()

        def wait():
            with locked(tmp_path, wait=True):
                waited.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not waited.wait(0.2)
        other.kill()
        other.wait()
        waiting.join()
        assert waited.is_set()
    with locked(tmp_path):
        pass


def test_an_unfinished_run_is_taken_over_if_it_differs_in_what_is_free(tmp_path):
    out = tmp_path / "sub" / "out"
    record = {"speedup": 2.0, "metrics": ["outputs"]}
    with unfinished_folder(json.dumps(record), out, free=("metrics",)) as folder:
        (folder / "layers").mkdir()
    other = {**record, "metrics": ["accuracy"], "speedup": 3.0}
    with (
        pytest.raises(FileExistsError, match="unfinished run of another experiment"),
        unfinished_folder(json.dumps(other), out, free=("metrics",)),
    ):
        pass
    assert json.loads((folder / "experiment.json").read_text()) == record
    changed = {**record, "metrics": ["accuracy"]}
    with unfinished_folder(json.dumps(changed), out, free=("metrics",)) as again:
        assert again == folder
        assert (again / "layers").is_dir()
        assert json.loads((folder / "experiment.json").read_text()) == changed
        with (
            pytest.raises(FileExistsError, match="another process"),
            unfinished_folder(json.dumps(changed), out, free=("metrics",)),
        ):
            pass


def test_a_run_that_was_refused_before_it_began_is_not_in_the_way_of_another(tmp_path):
    with (
        pytest.raises(ValueError, match="no speedup"),
        unfinished_folder('{"speedup": 1.0}', tmp_path / "out"),
    ):
        raise ValueError("no speedup")
    assert not list(tmp_path.iterdir())
    with unfinished_folder('{"speedup": 2.0}', tmp_path / "out") as folder:
        assert json.loads((folder / "experiment.json").read_text()) == {"speedup": 2.0}


def test_figures_and_their_table_need_two_files_that_are_new(tmp_path):
    check_new(tmp_path / "figures.json")
    with pytest.raises(ValueError, match=r"figures\.md: that is where the table"):
        check_new(tmp_path / "figures.md")
    for name in ("one.json", "two.md"):
        (tmp_path / name).touch()
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            check_new((tmp_path / name).with_suffix(".json"))


@pytest.mark.parametrize("damaged", ["", "[]", "{"])
def test_a_folder_whose_record_is_damaged_is_not_taken_over(damaged, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "experiment.json").write_text(damaged)
    with (
        pytest.raises(FileExistsError, match="unfinished run of another experiment"),
        unfinished_folder("{}", tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out.partial" / "experiment.json").read_text() == damaged


def test_what_may_change_after_solving_are_fields_of_an_experiment():
    assert set(AFTER_SOLVING) <= {field.name for field in dataclasses.fields(Experiment)}
