import dataclasses
import types

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from planted_loops import plant_loops

from accel import (
    accelerate,
    budgets,
    compile_inference,
    count_conv_macs,
    latency_budget,
    measure_times,
    select_ranks,
    time_correction,
    timed_plan,
)
from accel.budgets import Budget
from accel.compiler import network_options
from accel.device_times import LayerTimes
from accel.latency_budget import select_for_latency
from accel.plan import LayerPlan
from accel.program import named_layers
from accel.rank_selection import Candidate
from accel.rewrite import rewrite
from accel.selection import select_by_parameters, select_by_time, select_within_error
from accel.time_cache import TimeCache, default_cache
from accel.time_correction import correct_times, random_plans
from accel.timed_plan import TimedPlan, sum_ms, time_plan

KINDS = ("channel", "spatial", "tucker2")
IMAGES = networks.images(40)


@pytest.fixture
def measured(measured_chain):
    return measured_chain


def planted(calibration, curves, seconds_per_mac=1e-9):
    """Times that are proportional to MACs."""
    return {
        call.path: LayerTimes(
            seconds_per_mac * calibration.macs[call.path],
            curves[call.path].candidates,
            seconds_per_mac * curves[call.path].macs,
        )
        for call in calibration.calls
    }


def plant_times(monkeypatch, milliseconds):
    """Lets networks, as they are and not compiled, take the time that a function gives."""

    def time_in_turns(networks, **_):
        before = milliseconds(networks["original"].network)
        after = milliseconds(networks["accelerated"].network)
        figures = {"original_ms": before, "accelerated_ms": after, "speedup": before / after}
        return {**figures, "speedup_error": 0.0}

    def compile_inference(network, shape, dtype=None):
        return types.SimpleNamespace(network=network, shape=shape, dtype=dtype)

    monkeypatch.setattr(latency_budget, "compile_inference", compile_inference)
    monkeypatch.setattr(timed_plan, "compile_inference", compile_inference)
    monkeypatch.setattr(timed_plan, "time_in_turns", time_in_turns)


def one_by_one(plan_timed):
    """``time_plans`` by a function that times a plan."""

    def time_plans(calibration, original, plans, times, seconds, precision=None):
        return (plan_timed(calibration, original, plan, times, seconds) for plan in plans)

    return time_plans


def compiled(model, calibration):
    return compile_inference(model, (1, *calibration.program.images.aval.shape[1:]))


def test_everything_is_timed_in_the_type_that_was_asked_for(measured, monkeypatch, tmp_path):
    model, calibration, curves = measured
    layers, types, compiled_in = [], [], []

    def looped(layer, *, dtype, **_arguments):
        layers.append(layer)
        types.append(dtype)
        return float(sum(part.size for part in jax.tree.leaves(nnx.state(layer, nnx.Param))))

    plant_loops(monkeypatch, looped)
    monkeypatch.setattr(latency_budget, "correct_times", lambda _c, _o, times, *_, **__: times)
    plant_times(monkeypatch, lambda network: sum(count_conv_macs(network, IMAGES[:1]).values()))
    planted_compile = latency_budget.compile_inference

    def compile_inference(network, shape, dtype=None):
        compiled_in.append(dtype)
        return planted_compile(network, shape, dtype)

    for module in (latency_budget, timed_plan):
        monkeypatch.setattr(module, "compile_inference", compile_inference)
    select_for_latency(
        calibration, model, 1.5, curves=curves, dtype="bfloat16", cache=tmp_path, seconds=0.1
    )
    assert set(types) == {"bfloat16"}
    assert len(compiled_in) > 1
    assert set(compiled_in) == {"bfloat16"}
    kernels = [
        part.kernel
        for layer in layers
        for _, part in nnx.iter_graph(layer)
        if isinstance(part, nnx.Conv)
    ]
    assert {kernel.dtype for kernel in kernels} == {jnp.dtype("bfloat16")}


def test_times_in_proportion_to_macs_give_the_plan_of_macs(measured):
    _, calibration, curves = measured
    plan = select_ranks(calibration, 2.5, curves=curves)
    times = planted(calibration, curves)
    total = sum(calibration.macs.values())
    rest = total - sum(calibration.macs[call.path] for call in calibration.calls)
    budget = 1e-9 * (total / 2.5 - rest)
    assert select_by_time(calibration, budget, times, curves) == plan


def test_a_layer_stays_as_it_is_where_its_chains_are_slower(measured):
    _, calibration, curves = measured
    times = planted(calibration, curves)
    slow = calibration.calls[1].path
    times[slow] = dataclasses.replace(times[slow], chains=times[slow].chains + times[slow].dense)
    budget = sum(time.dense for time in times.values()) / 1.5
    plan = {
        layer.path: layer for layer in select_by_time(calibration, budget, times, curves).layers
    }
    assert plan[slow].decomposition is None
    assert plan[slow].reason
    assert any(layer.decomposition for layer in plan.values())


@pytest.mark.parametrize("speedup", [1.5, 2.0, 2.5])
def test_the_speedup_asked_for_is_found_though_times_do_not_add_up(measured, monkeypatch, speedup):
    """Planted: a network takes a constant and a power of the sum of what its layers take."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    total = 1e-9 * sum(calibration.macs.values())
    batch = jax.ShapeDtypeStruct((1, *IMAGES.shape[1:]), np.float32)

    def milliseconds(network):
        macs = sum(count_conv_macs(network, batch).values())
        return 1000 * (0.1 * total + 0.7 * total * (1e-9 * macs / total) ** 0.8)

    plant_times(monkeypatch, milliseconds)
    found = select_for_latency(calibration, model, speedup, curves=curves, times=times)
    assert found.speedup == pytest.approx(speedup, rel=0.05)
    assert found.original_ms == pytest.approx(1000 * 0.8 * total)
    with pytest.raises(ValueError, match=r"latency_speedup of 60 was not reached .* timed is \d"):
        select_for_latency(calibration, model, 60.0, curves=curves, times=times)


@pytest.mark.parametrize("speedup", [1.5, 1.8])
def test_layers_told_too_fast_do_not_lead_away_from_a_better_plan_of_fewer_macs(
    measured, monkeypatch, speedup
):
    """Planted: networks take as long as their MACs, and of layers some chains are told too fast."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    random = np.random.default_rng(0)
    for layer in times.values():
        layer.chains[:] *= random.uniform(0.4, 1, len(layer.chains))
    batch = jax.ShapeDtypeStruct((1, *IMAGES.shape[1:]), np.float32)

    def milliseconds(network):
        return float(sum(count_conv_macs(network, batch).values()))

    plant_times(monkeypatch, milliseconds)

    def error(plan):
        return sum(curves[layer.path].of(layer) for layer in plan.layers)

    def found():
        return select_for_latency(calibration, model, speedup, curves=curves, times=times)

    best = error(select_ranks(calibration, speedup, curves=curves))
    assert found().speedup >= 0.985 * speedup
    assert error(found().plan) <= 1.1 * best
    assert found().figures()["found_by"] == "MACs"
    monkeypatch.setattr(latency_budget, "ROUNDS_BY_MACS", 0)
    assert error(found().plan) > 1.1 * best
    assert found().figures()["found_by"] == "times of layers"


@pytest.mark.parametrize("speedup", [1.6, 2.0])
def test_a_speedup_is_found_where_times_jump(measured, monkeypatch, speedup):
    """Planted: a network takes half as long again unless its second convolution is as it was."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    second = calibration.calls[1].path
    batch = jax.ShapeDtypeStruct((1, *IMAGES.shape[1:]), np.float32)
    dense = count_conv_macs(model, batch)[second]

    def milliseconds(network):
        macs = count_conv_macs(network, batch)
        return sum(macs.values()) * (1 if macs.get(second) == dense else 1.5)

    plant_times(monkeypatch, milliseconds)
    found = select_for_latency(calibration, model, speedup, curves=curves, times=times)
    assert found.speedup >= 0.95 * speedup


@pytest.mark.parametrize("slow_plans", [0, 5])
def test_times_are_corrected_by_those_of_whole_networks(measured, monkeypatch, slow_plans):
    """Planted: in a network spatial chains take 1.5 times as long as alone, and channel ones 0.8.

    What is no layer takes a tenth of the original. What slows both networks of a pair down, by
    another factor each time, makes no difference; nor do some plans that take twice their time.
    """
    model, calibration, curves = measured
    times = planted(calibration, curves)
    scales = {"spatial": 1.5, "channel": 0.8}
    random = np.random.default_rng(0)
    rest = 100 * sum(layer.dense for layer in times.values())
    original = 11 * rest

    def milliseconds(plan):
        return rest + 1000 * sum(
            scales.get(layer.decomposition, 1.0) * times[layer.path].of(layer)
            for layer in plan.layers
            if layer.path in times
        )

    outliers = [2.0] * slow_plans

    def plan_timed(_calibration, _original, plan, _times, _seconds):
        slow, whole = random.uniform(0.8, 1.2), milliseconds(plan)
        whole *= outliers.pop() if outliers else 1.0
        return TimedPlan(
            plan, 1, None, slow * original, slow * whole, sum_ms(plan, times), original / whole, 0.0
        )

    monkeypatch.setattr(time_correction, "time_plans", one_by_one(plan_timed))
    corrected = correct_times(calibration, compiled(model, calibration), times, curves)
    assert not outliers
    # Times of another speed of the machine are as good as any: what counts are shares.
    dense = 1000 * sum(layer.dense for layer in corrected.values())
    shares = [
        (milliseconds(plan) / original, sum_ms(plan, corrected) / dense, sum_ms(plan, times))
        for plan in random_plans(calibration, times, curves, 10, seed=time_correction.STAGES)
    ]
    off = [abs(found / true - 1) for true, found, _ in shares]
    off_before = [abs(before / original / true - 1) for true, _, before in shares]
    assert max(off) < 0.05
    assert np.median(off) < 0.02
    assert np.median(off_before) > 0.05


def test_where_layers_are_lost_in_noise_their_times_stay_what_they_are(measured, monkeypatch):
    """Planted: next to all else the layers are nothing, and by chance slower ones seem faster."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    dense = 1000 * sum(layer.dense for layer in times.values())

    def plan_timed(_calibration, _original, plan, _times, _seconds):
        whole = 100 * dense - 0.5 * sum_ms(plan, times)
        return TimedPlan(
            plan, 1, None, 99.5 * dense, whole, sum_ms(plan, times), 99.5 * dense / whole, 0.0
        )

    monkeypatch.setattr(time_correction, "time_plans", one_by_one(plan_timed))
    corrected = correct_times(calibration, compiled(model, calibration), times, curves)
    for path, layer in corrected.items():
        faster = times[path].chains < times[path].dense
        np.testing.assert_array_equal(layer.chains < layer.dense, faster)
        assert faster.any()


def test_a_kind_in_no_timed_plan_is_scaled_like_the_others(measured, monkeypatch):
    """Planted: networks take three times as long as their layers, whatever the kinds."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    original = 3000 * sum(layer.dense for layer in times.values())

    def without_tucker(plan):
        layers = (
            LayerPlan(layer.path) if layer.decomposition == "tucker2" else layer
            for layer in plan.layers
        )
        return dataclasses.replace(plan, layers=tuple(layers))

    def plan_timed(_calibration, _original, plan, _times, _seconds):
        plan = without_tucker(plan)
        whole = 3 * sum_ms(plan, times)
        return TimedPlan(plan, 1, None, original, whole, whole / 3, original / whole, 0.0)

    monkeypatch.setattr(time_correction, "time_plans", one_by_one(plan_timed))
    corrected = correct_times(calibration, compiled(model, calibration), times, curves)
    for path, layer in corrected.items():
        assert layer.dense == pytest.approx(3 * times[path].dense, rel=0.01)
        np.testing.assert_allclose(layer.chains, 3 * times[path].chains, rtol=0.02)


def test_plans_of_chains_that_look_fast_once_times_are_corrected_are_timed_too(
    measured, monkeypatch
):
    """Planted: pairs of k×k and 1×1 are told three times too fast, which hides the other kinds."""
    model, calibration, curves = measured
    true = planted(calibration, curves)
    told = {
        path: dataclasses.replace(
            layer,
            chains=layer.chains
            / np.array([3 if c.decomposition == "channel" else 1 for c in layer.candidates]),
        )
        for path, layer in true.items()
    }
    dense = 1000 * sum(layer.dense for layer in true.values())

    def plan_timed(_calibration, _original, plan, _times, _seconds):
        whole = sum_ms(plan, true)
        return TimedPlan(plan, 1, None, dense, whole, sum_ms(plan, told), dense / whole, 0.0)

    monkeypatch.setattr(time_correction, "time_plans", one_by_one(plan_timed))

    def off() -> float:
        corrected = correct_times(calibration, compiled(model, calibration), told, curves)
        plans = random_plans(calibration, corrected, curves, 20, seed=time_correction.STAGES)
        original = 1000 * sum(layer.dense for layer in corrected.values())
        shares = [(sum_ms(plan, corrected) / original, sum_ms(plan, true)) for plan in plans]
        return float(np.median([abs(share * dense / whole - 1) for share, whole in shares]))

    assert off() < 0.03
    together = time_correction.STAGES * time_correction.PLANS
    monkeypatch.setattr(time_correction, "PLANS", together)
    monkeypatch.setattr(time_correction, "STAGES", 1)
    assert off() > 0.1


def test_random_plans_are_all_different(measured):
    _, calibration, curves = measured
    plans = random_plans(calibration, planted(calibration, curves), curves, 24, seed=0)
    assert len(plans) > 4
    assert all(plan not in plans[:index] for index, plan in enumerate(plans))
    others = random_plans(
        calibration, planted(calibration, curves), curves, 4, seed=0, without=plans[:4]
    )
    assert others == plans[4:8]


def test_milliseconds_that_the_original_needs_not_are_refused(measured):
    model, calibration, curves = measured
    with pytest.raises(ValueError, match=r"latency_ms of 1e\+06: the original takes .* at batch 1"):
        select_for_latency(calibration, model, milliseconds=1e6, curves=curves, seconds=0.1)
    with pytest.raises(ValueError, match="neither a speedup nor milliseconds"):
        select_for_latency(calibration, model, curves=curves)
    with pytest.raises(ValueError, match=r"not both: found 2\.0 and 3\.0"):
        select_for_latency(calibration, model, 2.0, milliseconds=3.0, curves=curves)


@pytest.mark.parametrize("ratio", [2.0, 3.0])
def test_parameters_fit_their_budget(measured, ratio):
    _, calibration, curves = measured

    def parameters(network):
        return sum(
            leaf.size
            for _, layer in named_layers(network, (nnx.Conv,))
            for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))
        )

    plan = select_by_parameters(calibration, ratio, curves)
    accelerated = rewrite(calibration.model, plan)
    # The budget is used, but for less than the step of one rank.
    assert 0.9 * ratio < parameters(calibration.model) / parameters(accelerated)
    assert parameters(accelerated) <= parameters(calibration.model) / ratio


@pytest.mark.parametrize("allowed", [1e-3, 1e-2, 1e-1])
def test_the_cheapest_plan_within_an_error_is_found(measured, allowed):
    """No plan within the budget of one that is a thousandth cheaper has so small an error."""
    _, calibration, curves = measured

    def told(plan):
        error, macs = 0.0, sum(calibration.macs.values())
        for layer in plan.layers:
            if layer.decomposition is None:
                continue
            curve = curves[layer.path]
            index = curve.candidates.index(Candidate(layer.decomposition, layer.ranks))
            error += curve.errors[index]
            macs += int(curve.macs[index]) - calibration.macs[layer.path]
        return error, macs

    error, macs = told(select_within_error(calibration, allowed, curves))
    assert error <= allowed
    total = sum(calibration.macs.values())
    cheaper = select_ranks(calibration, 1.001 * total / macs, curves=curves)
    assert told(cheaper)[0] > allowed


def test_no_plan_within_an_error_is_told(measured):
    _, calibration, curves = measured
    path = calibration.calls[1].path
    with pytest.raises(ValueError, match=r"allowed_error of 1e-12 cannot be kept: .* is the least"):
        select_within_error(calibration, 1e-12, curves, rules={path: 1})


@pytest.mark.optimized
def test_layers_and_networks_are_timed_here(measured, tmp_path):
    model, calibration, curves = measured
    calls = calibration.calls[:2]
    times = measure_times(calls, curves, 2, options=calibration.program.options, cache=tmp_path)
    assert times.keys() == {call.path for call in calls}
    assert all(time.dense > 0 and (time.chains > 0).all() for time in times.values())
    assert list(tmp_path.glob("times-*.json"))
    plan = select_ranks(calibration, 2.0, curves=curves)
    compiled = compile_inference(model, (2, *IMAGES.shape[1:]))
    timed = time_plan(calibration, compiled, plan, times, 0.2)
    assert timed.batch_size == 2
    assert timed.accelerated_ms > 0
    assert timed.layers_ms > 0
    assert timed.speedup > 0
    assert np.isfinite(timed.speedup_error)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"latency_speedup": 1.0}, "latency_speedup must be a finite number above 1"),
        ({"latency_speedup": 2.0, "latency_batch": 0}, "latency_batch is 1 or more, found 0"),
        (
            {"latency_speedup": 2.0, "latency_dtype": "int8"},
            "computed in float32, bfloat16, float16, found 'int8'",
        ),
        (
            {
                "latency_speedup": 2.0,
                "rank_selection": "exact_energy",
                "decompositions": "channel",
            },
            "latency_speedup needs measured_error, found exact_energy",
        ),
        ({"latency_speedup": 2.0, "dense_speedup": 2.0}, "dense_speedup cannot be given"),
        ({"latency_ms": 0.0}, "latency_ms is a finite number above 0, found 0.0"),
        ({"parameter_ratio": 0.5}, "parameter_ratio must be a finite number above 1"),
        ({"allowed_error": float("nan")}, "allowed_error is a finite number above 0, found nan"),
        ({"allowed_disagreement": -0.1}, "allowed_disagreement is a share from 0 to 1, found -0.1"),
        (
            {"latency_ms": 2.0, "allowed_error": 0.1},
            "one budget at most can be given, found latency_ms, allowed_error",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_long_work(options, text):
    with pytest.raises(ValueError, match=text):
        accelerate(networks.network("chain"), IMAGES, **options)


def test_a_run_that_is_resumed_keeps_the_plan_that_was_timed(measured, monkeypatch, tmp_path):
    model, calibration, curves = measured
    timed = []

    def select(calibration, original, speedup, *, milliseconds, **options):
        timed.append(speedup)
        plan = select_ranks(calibration, speedup, curves=curves)
        return TimedPlan(plan, 1, None, 3.0, 2.0, 2.5, 1.5, 0.0)

    monkeypatch.setattr(budgets, "select_for_latency", select)
    asked = Budget(latency_speedup=1.7)
    first = asked.select(calibration, model, curves, resume=tmp_path)
    assert asked.select(calibration, model, curves, resume=tmp_path) == first
    assert first[1]["speedup"] == 1.5
    assert timed == [1.7]
    # Whatever the plan hangs on makes it another one.
    other = Budget(latency_speedup=2.0).select(calibration, model, curves, resume=tmp_path)
    assert other != first
    path = calibration.calls[1].path
    Budget(latency_speedup=2.0).select(
        calibration, model, curves, rules={path: "dense"}, resume=tmp_path
    )
    assert timed == [1.7, 2.0, 2.0]


def test_a_damaged_cache_is_told_before_long_work(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = networks.network("chain")
    cache = TimeCache(default_cache(), network_options(model))
    cache.file.parent.mkdir()
    cache.file.write_text("no times")
    with pytest.raises(ValueError, match="holds no times of layers"):
        accelerate(model, IMAGES, latency_speedup=2.0)


def test_chains_that_are_all_slower_end_in_an_answer(measured, monkeypatch):
    model, calibration, curves = measured
    times = planted(calibration, curves)

    plant_times(monkeypatch, lambda network: 1.0 if network is model else 2.0)
    with pytest.raises(ValueError, match=r"the best of \d plans that were timed is 0\.50"):
        select_for_latency(calibration, model, 2.0, curves=curves, times=times)


def test_rules_hold_for_every_plan_that_is_timed(measured, monkeypatch):
    """Planted: every plan is faster than asked for, so that it is mixed with the slowest one."""
    model, calibration, curves = measured
    times = planted(calibration, curves)
    fixed, kept = calibration.calls[1].path, calibration.calls[2].path
    seen = []

    def plan_timed(calibration, original, plan, times, seconds, precision):
        assert precision == latency_budget.PRECISION
        seen.append({layer.path: layer for layer in plan.layers})
        layers_ms = 1000 * sum(times[layer.path].of(layer) for layer in plan.layers)
        return TimedPlan(plan, 1, None, 9.0, 3.0, layers_ms, 3.0, 0.0)

    monkeypatch.setattr(latency_budget, "time_plan", plan_timed)
    rules = {fixed: 2, kept: "dense"}
    select_for_latency(calibration, model, 1.5, curves=curves, times=times, rules=rules)
    assert len(seen) > 4
    for layers in seen:
        assert layers[fixed].ranks[0] == 2
        assert layers[kept].decomposition is None


def test_budgets_reach_the_selection(measured):
    model, calibration, curves = measured
    options = {"decompositions": KINDS, "reconstruction": "weights"}
    result = accelerate(model, IMAGES, parameter_ratio=2.0, **options)
    assert result.plan == select_by_parameters(calibration, 2.0, curves)
    assert result.report.settings["parameter_ratio"] == 2.0
    assert "speedup" not in result.report.settings
