"""Where a figure was measured: the device and the versions of what ran there."""

from __future__ import annotations

import functools
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("accel", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def device_name() -> str:
    """The default device in words, a CPU with its number of usable cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{len(jax.devices())} × {device.device_kind}"
    return f"{_processor()}, {usable_cores()} cores"


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may hang on.

    That of ``accel`` names the commit, where it runs in a checkout of Git: ``0.1.0+1a2b3c4d5e6f``,
    with ``.changed`` at the end where the package is not as it was committed.
    """
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "accel" in found and (commit := _commit()):
        found["accel"] += f"+{commit}"
    return found


@functools.cache
def _commit() -> str | None:
    """The commit that the package is of; None where it is in no checkout, or Git does not tell."""
    package = Path(__file__).parents[1]
    if not (package.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}.changed" if git("status", "--porcelain", "--", ".") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The script that is running; of absolute paths, which tell of one machine, only the name."""
    return command_text(["python", *sys.argv])


def command_text(arguments: Sequence[str]) -> str:
    """A command as it is typed; of absolute paths, which tell of one machine, only the name."""

    def named(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return option + equals + (Path(value).name if Path(value).is_absolute() else value)

    return shlex.join([named(argument) for argument in arguments])


def _processor() -> str:
    """The processor's name; a virtual machine's may say the maker alone, so the model is told."""
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        information = ""
    # One paragraph a core.
    lines = [line.partition(":") for line in information.partition("\n\n")[0].splitlines()]
    found = {name.strip(): value.strip() for name, _, value in lines}
    name = found.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name
