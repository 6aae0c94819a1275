"""How much host memory this process has used, and how much it can still have."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


def peak_bytes() -> int:
    """The largest resident size this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def page_faults() -> int:
    """How many pages of memory the system has given to this process so far, one at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident_bytes() -> int:
    """The resident size of this process now; its peak where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return peak_bytes()
    return int(status.read_text().split()[1]) * resource.getpagesize()


def release_free_memory() -> None:
    """Hands free memory that the C library holds on to back to the system (glibc; else nothing)."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def keep_free_memory() -> None:
    """Lets the C library hold on to memory that is freed (glibc; else nothing).

    Blocks above 64 MiB, such as those of VGG-16 at batch 8, still go back unless ``use_one_pool``
    was called first; older versions of glibc keep none of more than 32 MiB.

    A program on CPU takes memory for its intermediate results at every run and frees it after. What
    went back to the system comes in fresh pages, each of which costs a fault: on VGG-16 up to half
    of an accelerated network's time, or none of it, by the chance of what lies beside.

    It takes some runs until enough lies free, since other small blocks are put into the gaps.
    """
    _set_thresholds(_KEPT)


def use_one_pool() -> None:
    """Lets all threads that begin from now on share one pool of memory (glibc; else nothing).

    The pools that glibc gives to threads hold blocks of up to 64 MiB; larger ones are the system's
    own at every run, whatever ``keep_free_memory`` says. To be called before JAX starts its
    threads, that is before its first array.
    """
    _mallopt(_ARENA_MAX, 1)
    _one_pool.append(True)


def one_pool() -> bool:
    """Whether ``use_one_pool`` was called."""
    return bool(_one_pool)


def stop_keeping_free_memory() -> None:
    """Undoes ``keep_free_memory``, and hands back what is free."""
    _set_thresholds(_USUAL)
    release_free_memory()


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """``keep_free_memory`` while this lasts; what comes after has all the memory there is."""
    keep_free_memory()
    try:
        yield
    finally:
        stop_keeping_free_memory()


# mallopt's M_ARENA_MAX: how many pools there may be.
_ARENA_MAX = -8
# mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: from which size on memory is the system's own,
# and how much may lie free. Without a word glibc lets them grow up to the usual ones.
_PARAMETERS = (-3, -1)
_KEPT = (2**30, 2**31 - 1)
_USUAL = (2**25, 2**26)


_one_pool: list[bool] = []
# Those that were set last: setting them takes as long as a small layer.
_set: list[tuple[int, int]] = []


def _set_thresholds(thresholds: tuple[int, int]) -> None:
    if _set == [thresholds]:
        return
    for parameter, threshold in zip(_PARAMETERS, thresholds, strict=True):
        _mallopt(parameter, threshold)
    _set[:] = [thresholds]


def _mallopt(parameter: int, value: int) -> None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(parameter, value)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be taken without swapping, or None where the system does not tell.

    The least of what the machine has and what the control groups of this process (containers, batch
    jobs) still allow it, versions 1 and 2.

    Args:
        root: The folder that holds ``proc`` and ``sys``.
    """
    return min((*_machine_available(root), *_groups_available(root)), default=None)


def _machine_available(root: Path) -> Iterator[int]:
    information = root / "proc/meminfo"
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


class _Files(NamedTuple):
    """Where a version of control groups keeps its figures."""

    mount: str
    limit: str
    usage: str
    page_cache: str


_VERSION_1 = _Files(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_VERSION_2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _groups_available(root: Path) -> Iterator[int]:
    groups = root / "proc/self/cgroup"
    if not groups.exists():
        return
    for line in groups.read_text().splitlines():
        _, controllers, path = line.split(":", maxsplit=2)
        if not controllers:
            files = _VERSION_2
        elif "memory" in controllers.split(","):
            files = _VERSION_1
        else:
            continue
        # The limit of every group above holds as well. A container may see the path that its group
        # has outside, where only the group itself is mounted: the walk up ends at it.
        group = PurePosixPath(path.removeprefix("/"))
        for folder in (group, *group.parents):
            yield from _group_available(root / files.mount / folder, files)


def _group_available(folder: Path, files: _Files) -> Iterator[int]:
    limit, usage, statistics = (folder / name for name in (files.limit, files.usage, "memory.stat"))
    if not (limit.exists() and usage.exists()) or limit.read_text().strip() == "max":
        return
    used = int(usage.read_text())
    # Files that were read count as used, but are dropped where memory is wanted.
    if statistics.exists():
        figures = dict(line.split() for line in statistics.read_text().splitlines())
        used -= int(figures.get(files.page_cache, 0))
    yield max(0, int(limit.read_text()) - used)
