"""What results say of the versions that they were measured with."""

import re
import shutil
import subprocess
from importlib.metadata import version

import pytest

from accel.report import environment


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``accel`` somewhere else, with the module that tells versions in it."""
    file = tmp_path / "accel" / "report" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("first")
    monkeypatch.setattr(environment, "__file__", str(file))
    environment._commit.cache_clear()
    yield file
    environment._commit.cache_clear()


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def told():
    environment._commit.cache_clear()
    return environment.versions()["accel"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_version_names_the_commit_and_whether_the_package_is_as_committed(package, tmp_path):
    installed = version("accel")
    assert told() == installed
    git(tmp_path, "init", "--quiet")
    # Nothing was committed.
    assert told() == installed
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert re.fullmatch("[0-9a-f]{12}", commit)
    assert told() == f"{installed}+{commit}"
    # What lies beside the package, such as results, does not change what was run.
    (tmp_path / "results.md").write_text("new")
    assert told() == f"{installed}+{commit}"
    package.write_text("second")
    assert told() == f"{installed}+{commit}.changed"


def test_without_git_the_version_is_told_alone(package, tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert told() == version("accel")
