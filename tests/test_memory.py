"""The memory that a machine's files tell of, and the memory that runs leave behind."""

import ctypes
import resource
import subprocess
import sys

import jax
import networks
import numpy as np
import pytest
from monitoring import compilations

from accel import calibrate, reconstruct, select_ranks
from accel.memory import (
    available_bytes,
    keep_free_memory,
    release_free_memory,
    resident_bytes,
    stop_keeping_free_memory,
)

MIB = 2**20


@pytest.fixture
def machine(tmp_path):
    """Writes files by path, into a machine that has 1,000 MiB available."""

    def write(files):
        files = {"proc/meminfo": "MemTotal: 4096000 kB\nMemAvailable: 1024000 kB\n", **files}
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")
        return tmp_path

    return write


def version_1(folder, limit, usage, inactive):
    folder = f"sys/fs/cgroup/memory{folder}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}",
    }


def version_2(folder, limit, usage, inactive):
    folder = f"sys/fs/cgroup{folder}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}",
    }


V1 = {"proc/self/cgroup": "9:cpu,cpuacct:/\n4:memory:/a/b\n0::/"}
V2 = {"proc/self/cgroup": "0::/a/b"}


def test_without_control_groups_it_is_the_machines(machine):
    assert available_bytes(machine({})) == 1000 * MIB


@pytest.mark.parametrize("files", [V1, V2], ids=["v1", "v2"])
def test_groups_without_figures_change_nothing(machine, files):
    assert available_bytes(machine(files)) == 1000 * MIB


@pytest.mark.parametrize(("table", "group"), [(V1, version_1), (V2, version_2)], ids=["v1", "v2"])
@pytest.mark.parametrize("folder", ["/a/b", "/a", ""])
def test_the_limit_of_a_group_or_of_one_above_holds(machine, table, group, folder):
    """The page cache of 40 MiB can be had; a path that is not mounted leaves the groups above."""
    limited = group(folder, 500 * MIB, 300 * MIB, 40 * MIB)
    assert available_bytes(machine({**table, **limited})) == 240 * MIB


@pytest.mark.parametrize(("table", "group"), [(V1, version_1), (V2, version_2)], ids=["v1", "v2"])
def test_the_tightest_limit_holds(machine, table, group):
    files = table | group("/a/b", 500 * MIB, 300 * MIB, 0) | group("/a", 600 * MIB, 550 * MIB, 0)
    assert available_bytes(machine(files)) == 50 * MIB
    wide = group("/a/b", 5000 * MIB, 300 * MIB, 0) | group("/a", 6000 * MIB, 550 * MIB, 0)
    assert available_bytes(machine(table | wide)) == 1000 * MIB


def test_groups_without_a_limit_change_nothing(machine):
    # What version 1 gives where there is none, and the word of version 2.
    assert available_bytes(machine(V1 | version_1("/a/b", 2**63 - 4096, 300, 0))) == 1000 * MIB
    assert available_bytes(machine(V2 | version_2("/a/b", "max", 300, 0))) == 1000 * MIB


def test_a_group_over_its_limit_has_nothing_left(machine):
    assert available_bytes(machine(V2 | version_2("/a/b", 100, 200, 50))) == 0


def test_a_system_that_tells_nothing(tmp_path):
    assert available_bytes(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc takes free memory out of gaps")
def test_free_memory_between_what_is_in_use_is_handed_back():
    blocks = [np.ones(2**13) for _ in range(2_000)]
    kept = blocks[::2]
    before = resident_bytes()
    del blocks
    release_free_memory()
    assert resident_bytes() < before - 40 * MIB
    assert all(block.all() for block in kept)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_is_kept_is_not_faulted_in_again():
    """A page is 4 KiB: 64 MiB from the system are 16,384 of them, touched one by one."""

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            np.ones(2**26, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    try:
        keep_free_memory()
        faults()
        kept = faults()
    finally:
        stop_keeping_free_memory()
    assert kept < 100
    # Huge pages are faulted in by 2 MiB.
    assert faults() >= 4 * 2**26 / 2**21


FAULTS = """
import resource, sys
import jax, jax.numpy as jnp
from accel.memory import keep_free_memory, use_one_pool

if sys.argv[1] == "one":
    use_one_pool()
keep_free_memory()
# Its intermediate results have 192 MiB.
program = jax.jit(lambda x: jnp.cumsum(jnp.tile(x, 2**10))[-1])
x = jnp.ones(3 * 2**13)
# It takes a while until enough free memory lies about.
for repeat in range(40):
    if repeat == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="programs have no memory of the host")
def test_large_blocks_of_jaxs_threads_are_kept_in_one_pool():
    faults = {
        pools: int(subprocess.check_output([sys.executable, "-c", FAULTS, pools], text=True))
        for pools in ("one", "many")
    }
    # Every run touches as much, by pages of 4 KiB, or of 2 MiB where the system makes them huge.
    assert faults["many"] >= 10 * 192 / 2
    assert faults["one"] < faults["many"] / 5


@pytest.mark.parametrize("kind", ["channel", "channel_spatial"])
def test_reconstructing_again_and_again_takes_no_more_memory(kind):
    images = np.asarray(networks.images(64, size=96))
    calibration = calibrate(networks.network("chain"), images, decompositions=kind, batch_size=8)
    compiled, resident = [], []
    for speedup in (2.0, 2.0, 2.5, 3.0):
        plan = select_ranks(calibration, speedup, rank_selection="exact_energy")
        with compilations() as seen:
            reconstruct(calibration, plan)
        compiled.append(len(seen))
        resident.append(resident_bytes())
    # Other ranks: only the segments are compiled, which are dropped with the run.
    assert compiled[0] > compiled[1] > 0
    assert compiled[2:] == [compiled[1]] * 2
    assert max(resident[1:]) < resident[0] + 32 * MIB
