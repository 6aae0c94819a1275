"""Where a figure was measured: the device and the versions of what ran there."""

from __future__ import annotations

import os
import platform
import shlex
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
    """Versions of Python and of the packages that a result may hang on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
