"""Kind and rank of every layer by measured errors, against enumeration, and the curves."""

from __future__ import annotations

import dataclasses
import itertools
import sys

import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

import accel
from accel import calibrate, measure_errors, select_ranks
from accel.chain_filters import BEATEN, with_promising_chains, with_rank_multiple
from accel.decompositions import DECOMPOSITIONS
from accel.error_curves import ErrorCurve, cheaper_chains, macs_of
from accel.rank_selection import Candidate, LayerErrors, measured_error

IMAGES = networks.images(40)
KINDS = ("channel", "spatial")


def layers_of(seed: int) -> list[LayerErrors]:
    random = np.random.default_rng(seed)
    return [
        LayerErrors(
            path=f"layer{index}",
            candidates=tuple(Candidate("channel", (rank,)) for rank in range(1, 6)),
            costs=random.integers(1, 40, 5),
            errors=random.random(5) ** 3,
            dense_cost=int(random.integers(20, 40)),
        )
        for index in range(4)
    ]


def cost_and_loss(layers, chosen) -> tuple[int, float]:
    cost, loss = 0, 0.0
    for layer in layers:
        candidate = chosen[layer.path]
        index = None if candidate is None else layer.candidates.index(candidate)
        cost += layer.dense_cost if index is None else int(layer.costs[index])
        loss += 0.0 if index is None else float(layer.errors[index])
    return cost, loss


@pytest.mark.parametrize("seed", range(20))
def test_the_selection_is_the_best_of_all(seed):
    layers = layers_of(seed)
    other, dense = 7, sum(layer.dense_cost for layer in layers)
    cheapest = sum(min(layer.costs.min(), layer.dense_cost) for layer in layers)
    for budget in np.linspace(other + cheapest, other + dense, 5).astype(int).tolist():
        chosen = measured_error(layers, other, budget)
        cost, loss = cost_and_loss(layers, chosen)
        assert other + cost <= budget
        options = [(None, *layer.candidates) for layer in layers]
        paths = [layer.path for layer in layers]
        every = (
            cost_and_loss(layers, dict(zip(paths, some, strict=True)))
            for some in itertools.product(*options)
        )
        assert loss == pytest.approx(min(le for c, le in every if other + c <= budget), abs=1e-12)


def test_rules_fix_ranks_and_a_budget_out_of_reach_is_named():
    first, second, *_ = layers_of(0)
    rank = next(
        c.ranks[0]
        for c, m in zip(first.candidates, first.costs, strict=True)
        if m < first.dense_cost
    )
    fixed = LayerErrors(
        first.path, first.candidates, first.costs, first.errors, first.dense_cost, fixed=rank
    )
    dense = LayerErrors(
        second.path, second.candidates, second.costs, second.errors, second.dense_cost, "dense"
    )
    chosen = measured_error([fixed, dense], 0, 10**6)
    assert chosen[first.path] == Candidate("channel", (rank,))
    assert chosen[second.path] is None
    with pytest.raises(ValueError, match=r"cannot be met: .* largest reachable speedup is"):
        measured_error([fixed, dense], 0, 1)


@pytest.fixture(scope="module")
def measured():
    calibration = calibrate(networks.network("chain"), IMAGES, decompositions=KINDS)
    return calibration, measure_errors(calibration)


def test_curves_fall_with_the_cost_and_hold_every_cheaper_chain(measured):
    calibration, curves = measured
    for call in calibration.calls:
        curve = curves[call.path]
        assert (curve.macs < calibration.macs[call.path]).all()
        for kind in {candidate.decomposition for candidate in curve.candidates}:
            chosen = [c.decomposition == kind for c in curve.candidates]
            assert (np.diff(curve.macs[chosen]) > 0).all()
            errors = curve.errors[chosen]
            assert (np.diff(errors) <= 1e-12).all()
            # The cheapest chain does harm, the dearest next to none.
            assert errors[0] > 1e-4
            assert errors[-1] < 0.2 * errors[0]
            assert DECOMPOSITIONS[kind].unsuitable(call.layer) is None


def test_an_error_of_a_curve_is_the_error_of_that_chain_in_the_network(measured):
    """The error against the network's output with this one chain in it, by hand."""
    calibration, curves = measured
    call = calibration.calls[1]
    curve = curves[call.path]
    index = int(np.argmin(np.abs(curve.macs - 0.25 * calibration.macs[call.path])))
    candidate = curve.candidates[index]
    decomposition = DECOMPOSITIONS[candidate.decomposition]
    plan = accel.AccelerationPlan(
        tuple(
            accel.LayerPlan(c.path, *((decomposition.name, candidate.ranks) if c is call else ()))
            for c in calibration.calls
        ),
        calibration.folded,
    )
    result = accel.reconstruct(calibration, plan, solver="reduced_rank_regression")
    images = networks.images(60, seed=3)
    model = nnx.clone(calibration.model)
    expected = model(images)
    seen = float(jnp.sum((result.model(images) - expected) ** 2) / jnp.sum(expected**2))
    assert seen == pytest.approx(curve.errors[index], rel=0.6)


def test_a_plan_by_measured_errors_fits_the_budget_and_rules(measured):
    calibration, curves = measured
    for speedup in (1.5, 2.0, 3.0):
        plan = select_ranks(calibration, speedup, curves=curves, rules={"even": "dense"})
        assert {layer.path: layer.reason for layer in plan.layers}["even"] == "by rule"
        macs = accel.reconstruct(calibration, plan).report.macs
        assert speedup <= macs["speedup"] < 1.25 * speedup


class OneChannelHead(nnx.Module):
    """Its last layer is so small that every chain is dearer."""

    def __init__(self, rngs):
        self.body = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.head = nnx.Conv(16, 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


@pytest.fixture(scope="module")
def stepped():
    """Errors of chains with ranks in steps of 4, beside all others."""
    calibration = calibrate(networks.network("chain"), IMAGES, decompositions=("tucker2", *KINDS))
    return calibration, measure_errors(calibration, rank_multiple=4)


def test_ranks_are_multiples_of_what_was_asked_for(stepped):
    calibration, curves = stepped
    rules = {"first": 3}
    kept = with_rank_multiple(calibration, curves, 4, rules=rules)
    for path, curve in kept.items():
        if path == "first":
            assert curve is curves[path]
            continue
        # Nothing else has changed, and nothing is missing.
        everything, left = (
            list(zip(c.candidates, c.macs, c.errors, strict=True)) for c in (curves[path], curve)
        )
        assert left == [row for row in everything if all(rank % 4 == 0 for rank in row[0].ranks)]
    plan = select_ranks(calibration, 1.5, curves=kept, rules=rules)
    chosen = {layer.path: layer for layer in plan.layers if layer.decomposition is not None}
    assert len(chosen) > 1
    assert chosen.pop("first").ranks[0] == 3
    assert all(rank % 4 == 0 for layer in chosen.values() for rank in layer.ranks)
    assert with_rank_multiple(calibration, curves, 1) is curves
    with pytest.raises(ValueError, match="rank_multiple of 64: no layer has a cheaper chain"):
        with_rank_multiple(calibration, curves, 64)
    with pytest.raises(ValueError, match=r"1 or more, found 2\.5"):
        with_rank_multiple(calibration, curves, 2.5)


def test_chains_of_two_ranks_are_rounded_to_multiples(stepped):
    """All pairs of multiples that are close to a balance are there, with errors of their own."""
    curve = stepped[1]["even"]  # From 16 channels to 12.
    ranks = [candidate.ranks for candidate in curve.candidates]
    pairs = dict(zip(ranks, curve.errors, strict=True))
    assert {(4, 4), (8, 4), (8, 8), (12, 8)} <= pairs.keys()
    assert pairs[4, 4] > pairs[8, 4] > pairs[8, 8] > pairs[12, 8]


def test_a_rule_that_fixes_a_rank_fixes_both(stepped):
    """The second one is what the decomposition gives the first, whatever the error of others."""
    calibration, curves = stepped
    tucker2 = {
        path: curve.chosen([c.decomposition == "tucker2" for c in curve.candidates])
        for path, curve in curves.items()
    }
    for rank in (3, 5, 6):
        plan = select_ranks(calibration, 1.1, curves=tucker2, rules={"strided": rank})
        (layer,) = (layer for layer in plan.layers if layer.path == "strided")
        # From 12 channels to 16: both keep the same share.
        wanted = {DECOMPOSITIONS["tucker2"].ranks(calibration.calls[1].layer, r) for r in range(17)}
        assert layer.ranks[0] == rank
        assert layer.ranks in wanted


def test_chains_that_are_beaten_by_far_are_not_kept(measured):
    calibration, curves = measured
    random = np.random.default_rng(0)
    curves = {
        path: dataclasses.replace(curve, errors=random.random(len(curve.errors)))
        for path, curve in curves.items()
    }
    rules = {"strided": 3, "dilated": "dense"}
    kept = with_promising_chains(calibration, curves, rules=rules)
    assert kept["dilated"].candidates == ()
    # What the rule allows, by whatever others beat it: one rank is fixed, and so is the other.
    assert {chain.ranks[0] for chain in kept["strided"].candidates} == {3}
    (call,) = (call for call in calibration.calls if call.path == "strided")
    for chain in kept["strided"].candidates:
        kind = DECOMPOSITIONS[chain.decomposition]
        assert chain.ranks in {kind.ranks(call.layer, rank) for rank in range(1, 17)}
    assert {chain.decomposition for chain in kept["strided"].candidates} == {
        chain.decomposition for chain in curves["strided"].candidates
    }
    assert 0 < sum(len(c.macs) for c in kept.values()) < sum(len(c.macs) for c in curves.values())
    for path, curve in curves.items():
        if path in rules:
            continue
        left = set(kept[path].candidates)
        for chain, macs, error in zip(curve.candidates, curve.macs, curve.errors, strict=True):
            better = (kept[path].macs <= BEATEN * macs) & (kept[path].errors <= error)
            assert (chain in left) != better.any()
    for speedup in (1.5, 2.2):
        plans = [select_ranks(calibration, speedup, curves=c, rules=rules) for c in (curves, kept)]
        assert plans[0] == plans[1]


class OneLayer(nnx.Module):
    def __init__(self, width):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.relu(self.conv(x))


def one_layer_images(width):
    return np.random.default_rng(0).random((4, 6, 6, width), np.float32)


def promising(width, kinds, **settings):
    """Ranks of all chains of a layer by kind, and of those that are promising; none is beaten."""
    calibration = calibrate(OneLayer(width), one_layer_images(width), decompositions=kinds)
    (call,) = calibration.calls
    dense = calibration.macs["conv"]
    chains = dict.fromkeys(
        Candidate(kind, ranks)
        for kind in kinds
        for multiple in (1, 8)
        for line in cheaper_chains(call, DECOMPOSITIONS[kind], dense, multiple)
        for ranks in line
    )
    macs = np.array([macs_of(call, DECOMPOSITIONS[c.decomposition], c.ranks) for c in chains])
    curves = {"conv": ErrorCurve(tuple(chains), macs, 1.0 / macs)}
    kept = with_promising_chains(calibration, curves, **settings)["conv"].candidates
    return tuple(
        {kind: [c.ranks for c in some if c.decomposition == kind] for kind in kinds}
        for some in (chains, kept)
    )


def fill(pairs):
    return [ranks for ranks in pairs if all(rank % 8 == 0 for rank in ranks)]


def test_of_a_wide_layer_ranks_that_fill_vectors_are_kept():
    kinds = ("channel", "spatial", "channel_spatial", "tucker2")
    every, kept = promising(64, kinds)
    # 640 and 384 MACs a position for each rank, 36,864 for the layer.
    assert kept["channel"] == every["channel"] == [(rank,) for rank in range(1, 58)]
    assert kept["spatial"] == [(rank,) for rank in range(8, 96, 8)]
    for kind in kinds[2:]:
        assert kept[kind] == fill(every[kind])
        assert 8 <= len(kept[kind]) < len(every[kind])
    # What multiples are asked for, those are as good as any.
    every, kept = promising(64, kinds, rank_multiple=3)
    assert kept == every
    _, kept = promising(64, ("spatial",), rules={"conv": 13})
    assert kept["spatial"] == [(13,)]


def test_many_pairs_of_few_first_ranks_make_no_layer_wide():
    every, kept = promising(32, ("tucker2",))
    assert len(fill(every["tucker2"])) > 8
    assert kept == every


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("asked", "rounded_to"),
    [
        ({"latency_speedup": 1.5}, 8),
        ({"latency_ms": 1.0}, 8),
        ({"latency_speedup": 1.5, "rank_multiple": 3}, 3),
        ({"speedup": 1.5}, 1),
        ({"parameter_ratio": 1.5, "rank_multiple": 2}, 2),
    ],
)
def test_errors_are_measured_at_the_ranks_that_a_budget_takes(
    monkeypatch, tmp_path, asked, rounded_to
):
    def measure_errors(*_, rank_multiple, **__):
        raise Asked(rank_multiple)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys.modules["accel.accelerate"], "measure_errors", measure_errors)
    with pytest.raises(Asked, match=f"^{rounded_to}$"):
        accel.accelerate(OneLayer(16), one_layer_images(16), **asked)


class FewInputs(nnx.Module):
    """A layer that looks at 4 mixtures of its 16 inputs, and gives 16 mixtures of 10 outputs."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        orthogonal = nnx.initializers.orthogonal()
        inputs, outputs = orthogonal(rngs.params(), (16, 4)), orthogonal(rngs.params(), (10, 16))
        core = nnx.initializers.normal()(rngs.params(), (3, 3, 4, 10))
        self.conv.kernel[...] = inputs @ core @ outputs

    def __call__(self, x):
        return self.conv(nnx.relu(self.stem(x)))


def test_two_ranks_of_a_chain_are_chosen_apart():
    calibration = calibrate(FewInputs(nnx.Rngs(0)), IMAGES, decompositions="tucker2")
    curve = measure_errors(calibration)["conv"]
    pairs = [candidate.ranks for candidate in curve.candidates]
    assert len(set(pairs)) == len(pairs)
    alike = np.array([first == second for first, second in pairs])
    affordable = curve.macs <= 0.37 * calibration.macs["conv"]
    best = int(np.argmin(np.where(affordable, curve.errors, np.inf)))
    assert pairs[best][0] < pairs[best][1]
    assert curve.errors[best] < 0.5 * curve.errors[affordable & alike].min()
    # What is measured holds for the network: with this pair against the best of equal ranks.
    errors = []
    for index in (best, int(np.argmin(np.where(affordable & alike, curve.errors, np.inf)))):
        layers = (accel.LayerPlan("stem"), accel.LayerPlan("conv", "tucker2", pairs[index]))
        plan = accel.AccelerationPlan(layers, calibration.folded)
        result = accel.reconstruct(calibration, plan, solver="reduced_rank_regression")
        images = networks.images(60, seed=3)
        expected = calibration.model(images)
        errors.append(float(jnp.sum((result.model(images) - expected) ** 2)))
    assert errors[0] < 0.5 * errors[1]


def test_a_network_is_accelerated_with_ranks_in_steps():
    result = accel.accelerate(networks.network("chain"), IMAGES, 1.5, rank_multiple=2)
    ranks = [rank for layer in result.plan.layers for rank in layer.ranks]
    assert ranks
    assert all(rank % 2 == 0 for rank in ranks)
    assert result.report.settings["rank_multiple"] == 2
    assert result.report.macs["speedup"] >= 1.5


def test_a_layer_that_no_chain_makes_cheaper_stays_dense_and_no_cache_is_needed():
    plans = [
        accel.accelerate(
            OneChannelHead(nnx.Rngs(0)), IMAGES, 1.3, decompositions=KINDS, cache_bytes=cache
        ).plan
        for cache in (0, 10**9)
    ]
    assert plans[0] == plans[1]
    reasons = {layer.path: layer.reason for layer in plans[0].layers}
    assert reasons == {"body": "", "head": "cheaper as it is"}


def test_too_few_images_to_measure_on_are_refused():
    with pytest.raises(ValueError, match="needs 2 images that are fitted to or more, found 1"):
        accel.accelerate(OneChannelHead(nnx.Rngs(0)), IMAGES[:2], 1.3)


def test_a_rule_may_ask_for_any_rank_that_is_cheaper():
    calibration = calibrate(networks.network("chain"), IMAGES, decompositions="channel")
    curves = measure_errors(calibration)
    wide = max(curves, key=lambda path: curves[path].macs.max())
    for rank in (1, max(c.ranks[0] for c in curves[wide].candidates)):
        plan = select_ranks(calibration, 1.01, curves=curves, rules={wide: rank})
        (layer,) = (layer for layer in plan.layers if layer.path == wide)
        assert layer.ranks == (rank,)
        assert curves[wide].macs.max() < calibration.macs[wide]


class OwnConv(nnx.Conv):
    """May compute something else than its parent."""


class WithOwnConv(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.own = OwnConv(16, 16, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(16, 4, (2, 2), strides=2, rngs=rngs)

    def __call__(self, x):
        return self.up(nnx.relu(self.own(nnx.relu(self.body(x)))))


def test_everything_that_convolves_is_in_the_report():
    result = accel.accelerate(WithOwnConv(nnx.Rngs(0)), IMAGES, 1.1, decompositions=KINDS)
    layers = {layer.path: layer for layer in result.report.layers}
    assert layers["body"].decomposition is not None
    assert layers["own"].reason == "computed by OwnConv, which is no nnx.Conv"
    assert layers["up"].reason == "computed by ConvTranspose, which is no nnx.Conv"
    assert layers["own"].layer_type == "OwnConv"
    assert sum(layer.macs_original for layer in layers.values()) == result.report.macs["original"]


def test_why_a_layer_stays_as_it_is():
    calibration = calibrate(networks.network("chain"), IMAGES, decompositions="channel")
    curves = measure_errors(calibration)
    plan = select_ranks(calibration, 1.001, curves=curves)
    kept = {layer.path for layer in plan.layers if layer.decomposition is None}
    assert any(curves[path].macs.min() < calibration.macs[path] for path in kept & curves.keys())
    for layer in plan.layers:
        if layer.path in kept and layer.path in curves:
            assert layer.reason == "kept by the rank selection"
