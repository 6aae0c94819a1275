import time

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

from accel.benchmark import _interleaved, latency


class Products(nnx.Module):
    """A network of ``count`` matrix products, one after the other."""

    def __init__(self, count):
        self.count = count
        self.matrix = nnx.Param(jnp.eye(256))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, images):
        x = self.dropout(images.reshape(images.shape[0], 256))
        for _ in range(self.count):
            x = jnp.tanh(x @ self.matrix[...])
        return x


def test_a_network_of_an_eighth_of_the_work_is_found_faster():
    original, accelerated = Products(64), Products(8)
    table = latency(original, accelerated, (16, 16, 1), batch_sizes=(64, 256), repeats=7, seconds=5)
    assert set(table) == {"64", "256"}
    for row in table.values():
        assert set(row) == {
            *("original_ms", "original_spread_ms", "accelerated_ms", "accelerated_spread_ms"),
            *("speedup", "runs"),
        }
        assert row["speedup"] == pytest.approx(row["original_ms"] / row["accelerated_ms"])
        assert row["speedup"] > 2
        assert row["runs"] == 7
    assert not original.dropout.deterministic


def test_runs_alternate_and_end_with_the_time():
    calls = []

    def run(name):
        calls.append(name)
        time.sleep(0.01)

    runs = {name: lambda name=name: run(name) for name in "ab"}
    times = _interleaved(runs, repeats=4, seconds=10)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert all(len(values) == 4 and min(values) >= 10 for values in times.values())

    assert all(len(values) == 3 for values in _interleaved(runs, 1000, 1e-9).values())
    begin = time.perf_counter()
    assert len(_interleaved(runs, 1000, 0.2)["a"]) < 20
    assert time.perf_counter() - begin < 1


def test_networks_with_batch_norm_are_timed_and_left_as_they_are():
    model = networks.Residual(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    shape = networks.images(1).shape[1:]
    (row,) = latency(model, model, shape, batch_sizes=(2,), repeats=3).values()
    assert row["original_ms"] > 0
    jax.tree.map(
        np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    )


@pytest.mark.parametrize(
    "options", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"repeats": 2}, {"seconds": 0.0}]
)
def test_impossible_measurements_are_refused(options):
    model = Products(1)
    with pytest.raises(ValueError, match="latency needs batch sizes of 1 or more, 3 repeats"):
        latency(model, model, (16, 16, 1), **options)
