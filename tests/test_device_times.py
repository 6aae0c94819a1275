import math
import time
from collections import Counter

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from planted_loops import plant_loops

from accel import (
    calibrate,
    count_conv_macs,
    device_times,
    inference,
    measure_errors,
    measure_times,
    timing_loops,
)
from accel.decompositions import DECOMPOSITIONS
from accel.device_times import ENOUGH, PASSES, LayerTimes
from accel.plan import LayerPlan
from accel.rank_selection import Candidate
from accel.rewrite import chain_for
from accel.time_cache import Place, TimeCache, layer_text
from accel.timed_chains import SHARES, TimedChains
from accel.timing_loops import layer_seconds, seconds_in_turns

KINDS = ("channel", "spatial", "tucker2")
IMAGES = networks.images(40)


def conv(inputs, outputs):
    return nnx.Conv(inputs, outputs, (3, 3), rngs=nnx.Rngs(0))


@pytest.fixture
def measured(measured_chain):
    return measured_chain[1:]


@pytest.mark.optimized
def test_sixteen_times_the_work_takes_several_times_as_long():
    small = layer_seconds([conv(32, 32)], (1, 32, 32, 32), np.float32, "relu", None)[0]
    large = layer_seconds([conv(128, 128)], (1, 32, 32, 128), np.float32, "relu", None)[0]
    assert 0 < 4 * small < large


@pytest.mark.optimized
@pytest.mark.parametrize("runs_per_turn", [1, 4])
@pytest.mark.parametrize("kind", ["dense", "1x1", "channel", "spatial", "tucker2"])
def test_a_layer_is_really_run_each_time(kind, runs_per_turn, monkeypatch):
    """Were the layer moved out of the loop, the time of a run would fall with their number."""
    monkeypatch.setattr(timing_loops, "_runs_per_turn", lambda _output_bytes: runs_per_turn)
    layer, shape = conv(64, 64), (4, 32, 32, 64)
    if kind == "1x1":
        layer = nnx.Conv(64, 64, (1, 1), rngs=nnx.Rngs(0))
    elif kind != "dense":
        decomposition = DECOMPOSITIONS[kind]
        ranks = (32, 32) if kind == "tucker2" else (32,)
        layer = chain_for(layer, decomposition.factors(layer, *ranks))
    (seconds,) = layer_seconds([layer], shape, np.float32, "identity", None)
    image = jax.ShapeDtypeStruct((1, *shape[1:]), np.float32)
    operations = 4 * sum(count_conv_macs(nnx.Sequential(layer), image).values())
    assert operations > 4 * 32 * 32 * 64 * 60
    # No core does 2^40 multiply-accumulates a second.
    assert seconds > operations / 2**40


@pytest.mark.optimized
@pytest.mark.parametrize("constant_bytes", [0, 2**30])
def test_what_is_handed_over_is_not_in_the_time(constant_bytes, monkeypatch):
    """Of 100 MB of images the layer reads less than a thousandth; a copy takes much longer."""
    monkeypatch.setattr(inference, "CONSTANT_BYTES", constant_bytes)
    layer = nnx.Conv(64, 1, (1, 1), strides=56, rngs=nnx.Rngs(0))
    images = np.ones((8, 224, 224, 64), np.float32)
    copied = images.copy()
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(copied, images)
        copies.append(time.perf_counter() - start)
    # Other tests run meanwhile.
    times = layer_seconds([layer] * 3, images.shape, images.dtype, "relu", None)
    assert 0 < 2 * min(times) < min(copies)


def test_what_slows_the_device_down_for_a_while_does_not_count(monkeypatch):
    """Planted: a device that is up to twice as slow for some passes, and that stalls once."""
    true = {"as it is": 4e-3, "fast": 2e-5, "slow": 3e-2}
    clock, passed, stalls = [0.0], [], {14: 0.5}

    class Buffers:
        def __init__(self, loop):
            pass

        def seconds(self, loop, count):
            passed.append(loop.program)
            slow = 1 + math.sin(clock[0] / 4) ** 2
            taken = count * len(loop.outputs) * true[loop.program] * slow
            clock[0] += taken + 0.2
            return taken + stalls.get(len(passed), 0.0)

    monkeypatch.setattr(timing_loops, "_Buffers", Buffers)
    loops = [timing_loops.Loop(name, (), None, [None] * 2) for name in true]
    dense, *others = seconds_in_turns(loops)
    assert true["as it is"] <= dense <= 2 * true["as it is"]
    proportions = [true[name] / true["as it is"] for name in ("fast", "slow")]
    assert [seconds / dense for seconds in others] == pytest.approx(proportions, rel=0.05)
    assert len(passed) > max(stalls)


class Alike(nnx.Module):
    """Two convolutions of one shape, and one of another."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 12, (3, 3), rngs=rngs)
        self.first = nnx.Conv(12, 12, (3, 3), rngs=rngs)
        self.second = nnx.Conv(12, 12, (3, 3), rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem(images))
        return nnx.relu(self.second(nnx.relu(self.first(x))))


def work(layer, *, input_shape, **_):
    """Seconds in proportion to parameters and positions, so many that one turn is enough."""
    size = sum(part.size for part in jax.tree.leaves(nnx.state(layer, nnx.Param)))
    return 1e-3 * size * math.prod(input_shape[:3])


def true_times(calibration, curves, batch_size):
    times = {}
    for call in calibration.calls:
        shape = (batch_size, *call.input.aval.shape[1:])
        chains = [
            chain_for(call.layer, DECOMPOSITIONS[c.decomposition].factors(call.layer, *c.ranks))
            for c in curves[call.path].candidates
        ]
        times[call.path] = LayerTimes(
            work(call.layer, input_shape=shape),
            curves[call.path].candidates,
            np.array([work(chain, input_shape=shape) for chain in chains]),
        )
    return times


def test_proportions_hold_while_the_device_slows_down(monkeypatch):
    """Planted: slower by a quarter over a pass of 40 layers, forwards and then backwards."""
    turns = []

    def slower(_layer):
        turns.append(None)
        return 1 + len(turns) / 400

    plant_loops(monkeypatch, None, slower)
    true = [1.0, *np.linspace(0.1, 3.0, 40).tolist()]
    first, *others = (
        timing_loops.Timer(timing_loops.Loop((None, seconds), (), None, [None])) for seconds in true
    )
    for backwards in (False, True):
        found = timing_loops.proportions(first, others, backwards=backwards)
        np.testing.assert_allclose(found.others, true[1:], rtol=0.05)
    assert 1.0 <= found.seconds <= 2.0


def test_layers_of_all_places_are_timed_in_turns_and_chains_follow(measured, monkeypatch, tmp_path):
    """Planted: a device that is five times slower while one place after the other is timed."""
    calibration, curves = measured
    clock = [0]

    def slower(_layer):
        clock[0] += 1
        return 1 + 4 * math.sin(clock[0] / 100) ** 2

    timed = plant_loops(monkeypatch, work, slower)
    times = measure_times(calibration.calls, curves, 2, options=None, cache=tmp_path)
    true = true_times(calibration, curves, 2)
    first = calibration.calls[0].path
    for path, found in times.items():
        share = found.dense / times[first].dense
        assert share == pytest.approx(true[path].dense / true[first].dense, rel=0.15)
        np.testing.assert_allclose(
            found.chains / found.dense, true[path].chains / true[path].dense, rtol=0.35
        )
    # Known, with these: nothing is timed again.
    timed.clear()
    again = measure_times(calibration.calls, curves, 2, options=None, cache=tmp_path)
    assert not timed
    for path, found in again.items():
        assert found.dense == times[path].dense
        np.testing.assert_array_equal(found.chains, times[path].chains)


def noisy(seed, off=0.2):
    """Each time that a layer is timed, it is off by so much."""
    random = np.random.default_rng(seed)
    return lambda _layer: math.exp(off * random.standard_normal())


def test_chains_that_plans_are_made_of_are_timed_more_often(measured, monkeypatch, tmp_path):
    calibration, curves = measured
    plant_loops(monkeypatch, work, noisy(0, 0.05))
    times = measure_times(calibration.calls, curves, 2, options=None, cache=tmp_path)
    cache = TimeCache(tmp_path, None)
    chosen = device_times._chosen(times, curves)
    often = seldom = 0
    for call in calibration.calls:
        place = device_times._place(call, 2, None)
        chains = TimedChains(place, [curves[call.path]], None, cache)
        beside = chains.timed_beside(chosen[call.path])
        assert all(len(chains.measured[chain]) == ENOUGH for chain in beside)
        often += len(beside)
        counts = [len(found) for found in chains.measured.values()]
        assert min(counts) >= PASSES
        assert max(counts) <= ENOUGH
        seldom += counts.count(PASSES)
    assert often >= len(calibration.calls)
    assert seldom > often


def test_plans_are_better_where_their_chains_are_timed_often(measured, monkeypatch, tmp_path):
    """Planted: what is chosen by noisy times costs more, in truth, than what is best."""
    calibration, curves = measured
    calls = calibration.calls[1:4]

    def measured_times(enough, slower, name):
        monkeypatch.setattr(device_times, "ENOUGH", enough)
        plant_loops(monkeypatch, work, slower)
        return measure_times(calls, curves, 2, options=None, cache=tmp_path / name)

    true = measured_times(PASSES, lambda _layer: 1.0, "true")
    dense = sum(times.dense for times in true.values())

    def costs(path, times, price):
        return curves[path].errors + price * times.chains / times.dense * true[path].dense / dense

    def lost(enough, seed):
        times = measured_times(enough, noisy(seed), f"{enough}-{seed}")
        found = 0.0
        for price in (0.1, 0.3, 1.0):
            for path, layer in times.items():
                chosen = costs(path, layer, price).argmin()
                in_truth = costs(path, true[path], price)
                found += in_truth[chosen] / in_truth.min() - 1
        return found

    seldom = np.mean([lost(PASSES, seed) for seed in range(3)])
    often = np.mean([lost(ENOUGH, seed) for seed in range(3)])
    assert 0 < often < 0.6 * seldom


def test_passes_go_over_the_network_forwards_and_backwards_within_a_place(
    measured, monkeypatch, tmp_path
):
    calibration, curves = measured
    calls = calibration.calls[:3]
    monkeypatch.setattr(device_times, "ENOUGH", PASSES)
    timed = plant_loops(monkeypatch, work)
    measure_times(calls, curves, 2, options=None, cache=tmp_path)
    originals = {layer_text(call.layer): call.path for call in calls}
    # Without layers as they are, each chain before its first time and each time.
    visits: list[tuple[str, list[str]]] = []
    for layer, _ in timed:
        text = layer_text(layer)
        if text in originals:
            if not visits or visits[-1][0] != originals[text]:
                visits.append((originals[text], []))
        else:
            visits[-1][1].append(text)
    chains = [(path, order) for path, order in visits if order]
    assert [path for path, _ in chains] == [call.path for call in calls] * PASSES
    for (_, first), (_, second) in zip(chains, chains[len(calls) :], strict=False):
        assert second == list(dict.fromkeys(first))[::-1]


def test_a_chain_that_was_slowed_down_once_is_not_missed(measured, monkeypatch, tmp_path):
    calibration, curves = measured
    calls = calibration.calls[2:4]

    def times(stalled, name):
        runs: Counter[str] = Counter()

        def slower(layer):
            runs[layer_text(layer)] += 1
            # The first run is not timed.
            return 3.0 if layer_text(layer) == stalled and runs[stalled] == 2 else 1.0

        plant_loops(monkeypatch, work, slower)
        found = measure_times(calls, curves, 2, options=None, cache=tmp_path / name)
        assert stalled is None or runs[stalled] > PASSES + 1
        return found

    alone = times(None, "alone")
    chosen = device_times._chosen(alone, curves)
    call = calls[0]
    place = device_times._place(call, 2, None)
    chains = TimedChains(place, [curves[call.path]], None, TimeCache(tmp_path / "none", None))
    stalled = chains.timed_beside(chosen[call.path])[0]
    disturbed = times(layer_text(chains._module(stalled)), "disturbed")
    index = alone[call.path].candidates.index(stalled)
    assert disturbed[call.path].chains[index] == pytest.approx(alone[call.path].chains[index])
    assert device_times._chosen(disturbed, curves) == chosen


def test_a_run_that_was_stopped_goes_on_with_what_it_timed(measured, monkeypatch, tmp_path):
    calibration, curves = measured
    arguments = (calibration.calls, curves, 2)
    turns = []

    def slower(_layer):
        turns.append(None)
        if len(turns) == 600:
            raise KeyboardInterrupt
        return 1.0

    def kept():
        cache = TimeCache(tmp_path / "stopped", None)
        places = [device_times._place(call, 2, None) for call in calibration.calls]
        timed = [
            TimedChains(place, [curves[call.path]], None, cache)
            for call, place in zip(calibration.calls, places, strict=True)
        ]
        return sum(len(found) for chains in timed for found in chains.measured.values())

    plant_loops(monkeypatch, work, slower)
    with pytest.raises(KeyboardInterrupt):
        measure_times(*arguments, options=None, cache=tmp_path / "stopped")
    before = kept()
    assert before > 100
    timed = plant_loops(monkeypatch, work)
    resumed = measure_times(*arguments, options=None, cache=tmp_path / "stopped")
    of_resumed = len(timed)
    timed.clear()
    at_once = measure_times(*arguments, options=None, cache=tmp_path / "at once")
    # Without noise both time the same.
    assert of_resumed < len(timed) - before
    for path, times in at_once.items():
        assert resumed[path].dense == pytest.approx(times.dense)
        np.testing.assert_allclose(resumed[path].chains, times.chains)


def test_times_are_kept_on_disk_and_damage_is_named(monkeypatch, tmp_path):
    layer, shape = conv(4, 4), (1, 8, 8, 4)
    place = Place(layer, shape, np.float32, "relu")
    timed = plant_loops(monkeypatch, work)
    cache = TimeCache(tmp_path, None)
    assert cache.seconds([place]) == pytest.approx([work(layer, input_shape=shape)])
    cache.measured(place, conv(4, 5)).append(0.5)
    cache.save()
    again = TimeCache(tmp_path, None)
    timed.clear()
    assert again.seconds([place]) == cache.seconds([place])
    assert not timed
    assert again.measured(place, conv(4, 5)) == [0.5]
    valid = nnx.Conv(4, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    others = [
        place._replace(layer=conv(4, 5)),
        place._replace(layer=valid),
        place._replace(input_shape=(2, 8, 8, 4)),
        place._replace(activation="identity"),
        place._replace(dtype=jnp.bfloat16),
    ]
    for other in others:
        assert again.measured(other, conv(4, 5)) == []
        timed.clear()
        again.seconds([other])
        assert timed
    assert again.measured(place, valid) == []
    # What others measured meanwhile is not lost: of the same chain, the longer list.
    again.measured(place, conv(4, 5)).append(0.7)
    again.measured(place, conv(4, 6)).append(0.6)
    again.save()
    cache.measured(place, conv(4, 7)).append(0.8)
    cache.save()
    last = TimeCache(tmp_path, None)
    found = [last.measured(place, conv(4, outputs)) for outputs in (5, 6, 7, 8)]
    assert found == [[0.5, 0.7], [0.6], [0.8], []]
    timed.clear()
    last.seconds([others[2]])
    assert not timed
    for damage, told in (("[]", ""), (cache.file.read_text().replace("0.8", "NaN"), ".*nan is no")):
        cache.file.write_text(damage)
        with pytest.raises(ValueError, match=rf"times-.*json holds no times of layers{told}"):
            TimeCache(tmp_path, None)


@pytest.mark.parametrize("round_ranks_take", [1.0, 0.5])
def test_times_between_measured_ranks_are_interpolated(measured, tmp_path, round_ranks_take):
    """Chains of one rank and of two: with times on two straight lines over MACs, multiples of 8
    and the rest, all come out exactly."""
    calibration, curves = measured
    (call,) = (call for call in calibration.calls if call.path == "dilated")
    curve = curves["dilated"]
    place = device_times._place(call, 2, None)
    chains = TimedChains(place, [curve], None, TimeCache(tmp_path, None))
    macs = dict(zip(curve.candidates, curve.macs.tolist(), strict=True))

    def taken(chain):
        return macs[chain] * (round_ranks_take if all(r % 8 == 0 for r in chain.ranks) else 1.0)

    for chain, found in chains.measured.items():
        # The median counts.
        found.extend([taken(chain), 0.0, taken(chain), 1e9])
    # Round and other ranks of three kinds.
    assert len(chains.measured) <= min(len(curve.candidates), 3 * 2 * len(SHARES))
    assert {len(candidate.ranks) for candidate in curve.candidates} == {1, 2}
    wanted = [taken(chain) for chain in curve.candidates]
    np.testing.assert_allclose(chains.proportions(curve.candidates), wanted)
    assert chains.proportions([]).shape == (0,)
    for chain in curve.candidates:
        beside = chains.timed_beside([chain])
        assert (beside == [chain]) == (chain in chains.measured)
        assert min(macs[c] for c in beside) <= macs[chain] <= max(macs[c] for c in beside)
        assert {c.decomposition for c in beside} == {chain.decomposition}


def test_what_was_not_timed_is_named():
    candidates = (Candidate("channel", (2,)), Candidate("channel", (4,)))
    times = LayerTimes(5.0, candidates, np.array([1.0, 2.0]))
    assert times.of(LayerPlan("conv")) == 5.0
    assert times.of(LayerPlan("conv", "channel", (4,))) == 2.0
    with pytest.raises(ValueError, match=r"conv: .* was not timed"):
        times.of(LayerPlan("conv", "channel", (3,)))


def test_layers_of_one_shape_are_timed_once(tmp_path, monkeypatch):
    """Each has the chains that its own curve has left; all are timed in one go."""
    calibration = calibrate(Alike(nnx.Rngs(0)), IMAGES[:20], decompositions=KINDS)
    curves = measure_errors(calibration)
    whole = curves["first"]
    places = np.arange(len(whole.candidates))
    curves["first"] = whole.chosen((places % 3 != 0).tolist())
    curves["second"] = whole.chosen((places % 3 != 1).tolist())
    compiled = []

    def parameters(layer, **arguments):
        compiled.append(layer)
        return work(layer, **arguments)

    plant_loops(monkeypatch, parameters)

    def timed(*paths):
        compiled.clear()
        calls = [call for call in calibration.calls if call.path in paths]
        cache = tmp_path / "-".join(paths)
        return measure_times(calls, curves, 2, options=None, cache=cache), len(compiled)

    both, of_both = timed("first", "second")
    _, of_one = timed("first")
    _, of_all = timed("stem", "first", "second")
    assert of_both <= of_one + 2  # The ends may be others.
    assert of_all > of_both + 5
    assert both["first"].dense == both["second"].dense
    for path in ("first", "second"):
        assert both[path].candidates == curves[path].candidates
        kept = [chain.decomposition == "spatial" for chain in both[path].candidates]
        assert (np.diff(both[path].chains[kept]) > 0).all()
