"""Budgets in loss: whole runs on a tiny network, and the search by planted losses."""

import dataclasses
import importlib
import json
import math
from functools import partial

import networks
import numpy as np
import pytest
from flax import nnx

import accel
from accel import accelerate, reconstruct
from accel.images import fitting_images
from accel.loss_budget import AllowedLoss, search_within_loss
from accel.rewrite import rewrite
from accel.runs import OriginalRun
from accel.selection import reachable_errors

IMAGES = np.asarray(networks.images(80))
HELD_BACK = IMAGES[~fitting_images(accel.ArraySource(IMAGES), 0)]


class Classifier(nnx.Module):
    """Small, and nothing in it averages errors away."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.head = nnx.Linear(7 * 7 * 16, 5, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.second(nnx.relu(self.first(images))))
        return self.head(x.reshape(len(x), -1))


class Counting(accel.ArraySource):
    """Counts how often the images are gone through."""

    reads = 0

    def batches(self, batch_size):
        Counting.reads += 1
        return super().batches(batch_size)


@dataclasses.dataclass(frozen=True)
class Run:
    """A network, a run of ``accelerate``, what its steps gave, and how often images were read."""

    model: nnx.Module
    result: accel.Result
    given: dict[str, list]
    reads: int

    def search(self, name, value, solve=reconstruct, **options):
        """Searches on what the run measured."""
        (calibration,), (sensitivity,), (curves,) = self.given.values()
        solve = partial(solve, sensitivity=sensitivity)
        allowed = AllowedLoss(name, value)
        return search_within_loss(calibration, self.model, allowed, curves, solve, **options)

    def outputs(self, result):
        """Of the original and an accelerated network, for the images that nothing is fitted to."""
        return [
            np.asarray(network(HELD_BACK), np.float64) for network in (self.model, result.model)
        ]

    def error(self, result):
        f, g = self.outputs(result)
        return np.sum((f - g) ** 2) / np.sum(f**2)


@pytest.fixture(scope="module")
def run():
    """A run with an error of 0.05 allowed."""
    model = Classifier(nnx.Rngs(0))
    given = {"calibrate": [], "measure_sensitivity": [], "measure_errors": []}

    def kept(name, step):
        def call(*arguments, **options):
            given[name].append(step(*arguments, **options))
            return given[name][-1]

        return call

    module = importlib.import_module("accel.accelerate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "reads", 0)
        for name in given:
            patch.setattr(module, name, kept(name, getattr(module, name)))
        result = accelerate(model, Counting(IMAGES), decompositions="channel", allowed_error=0.05)
        return Run(model, result, given, Counting.reads)


def test_the_outputs_lose_no_more_than_is_allowed(run):
    result = run.result
    settings = result.report.settings
    told = settings["loss_search"]
    assert run.error(result) <= 0.05
    assert run.error(result) == pytest.approx(told["measured"], rel=1e-4)
    assert told["held_back_images"] == len(HELD_BACK) == 8
    assert max(
        probe["speedup"] for probe in told["probes"] if probe["measured"] <= 0.05
    ) == pytest.approx(result.report.macs["speedup"])
    assert settings["allowed_error"] == 0.05
    assert "speedup" not in settings
    assert json.loads(result.report.to_json())["settings"]["loss_search"] == told


def test_images_are_calibrated_on_once(run):
    assert [len(calls) for calls in run.given.values()] == [1, 1, 1]
    # One image, one batch, calibration, sensitivity, errors, held-back images; then the plans.
    assert run.reads == 6 + len(run.result.report.settings["loss_search"]["probes"])


def test_more_loss_allows_fewer_macs(run):
    found = run.search("allowed_error", 0.3)
    assert run.error(found.result) <= 0.3
    assert found.result.report.macs["accelerated"] < run.result.report.macs["accelerated"]


def test_no_more_images_change_their_class_than_is_allowed(run):
    allowed = 0.3
    found = run.search("allowed_disagreement", allowed)
    f, g = run.outputs(found.result)
    changed = np.mean(f.argmax(1) != g.argmax(1))
    assert changed == found.measured <= allowed
    # The fastest of all that were measured within it.
    assert found.result.report.macs["speedup"] == max(
        probe.speedup for probe in found.probes if probe.measured <= allowed
    )


def test_a_loss_that_is_out_of_reach_is_told_with_the_smallest(run):
    with pytest.raises(
        ValueError,
        match=r"allowed_error of 1e-06 was not reached: the smallest of 1 networks that were"
        r" measured on 8 held-back images is 0\.0\d+, at 1\.\d\d× fewer MACs",
    ):
        run.search("allowed_error", 1e-6)


def test_what_cannot_be_measured_is_told_after_one_image(run, monkeypatch):
    monkeypatch.setattr(Counting, "reads", 0)
    monkeypatch.setattr(OriginalRun, "responses", lambda *_: pytest.fail("long work"))
    with pytest.raises(
        ValueError,
        match=r"allowed_disagreement needs a network that answers .* outputs of Conv for one image"
        r" have the shape \(1, 7, 7, 16\)",
    ):
        accelerate(run.model.first, Counting(IMAGES), allowed_disagreement=0.1)
    with pytest.raises(ValueError, match="Classifier cannot be called with images of shape"):
        accelerate(run.model, Counting(IMAGES[..., :2]), allowed_error=0.1)
    assert Counting.reads == 2


@dataclasses.dataclass(frozen=True)
class Told:
    """As much of a report as the search looks at."""

    macs: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Unsolved:
    """A plan in place of its network: what that would lose is planted."""

    model: accel.AccelerationPlan
    report: Told


@pytest.fixture
def planted(run, monkeypatch):
    """Searches with ``loss(predicted error)`` in place of what would be measured.

    ``middle`` is a predicted error halfway between the gentlest and the cheapest plan.
    """
    (calibration,), _, (curves,) = run.given.values()
    total = sum(calibration.macs.values())

    def search(allowed, loss, **options):
        solved = []

        def solve(calibration, plan, *, resume):
            solved.append(plan)
            macs = accel.count_conv_macs(rewrite(calibration.model, plan), IMAGES[:1])
            return Unsolved(plan, Told({"speedup": total / sum(macs.values())}))

        def measure(self, original, plan, held_back, batch_size):
            return loss(math.fsum(curves[layer.path].of(layer) for layer in plan.layers))

        monkeypatch.setattr(AllowedLoss, "measure", measure)
        return search_within_loss(calibration, run.model, allowed, curves, solve, **options), solved

    search.reachable = reachable_errors(calibration, curves)
    search.middle = math.sqrt(math.prod(search.reachable))
    return search


@pytest.mark.parametrize(
    "loss",
    [lambda p: p, lambda p: 3 * p, lambda p: 0.4 * p**0.8, lambda p: 2 * p**1.3, np.tanh],
)
def test_a_loss_that_goes_with_the_prediction_is_found_soon(planted, loss):
    allowed = loss(planted.middle)
    found, solved = planted(AllowedLoss("allowed_error", allowed), loss)
    assert 0.8 * allowed <= found.measured <= allowed
    assert len(solved) == len(found.probes) <= 5
    assert all(plan not in solved[:at] for at, plan in enumerate(solved))


def jump(middle):
    """No image changes its class up to some predicted error, all of them beyond."""
    return lambda predicted: float(predicted > middle)


def test_where_the_loss_jumps_the_last_plan_before_it_is_found(planted):
    allowed = AllowedLoss("allowed_disagreement", 0.0)
    found, _ = planted(allowed, jump(planted.middle))
    within = [probe for probe in found.probes if probe.measured == 0]
    assert found.measured == 0
    assert found.result.model == max(within, key=lambda probe: probe.speedup).plan
    assert planted.middle / 1.4 < max(probe.predicted for probe in within) <= planted.middle


def test_where_all_may_be_lost_the_cheapest_plan_is_taken(planted):
    found, _ = planted(AllowedLoss("allowed_error", 5.0), lambda p: min(p, 1.0))
    assert found.probes[-1].predicted == pytest.approx(planted.reachable[1])
    assert found.result.model == found.probes[-1].plan


def test_rules_that_leave_no_layer_are_told(planted):
    with pytest.raises(ValueError, match="largest reachable speedup is 1"):
        planted(AllowedLoss("allowed_error", 0.1), lambda p: p, rules={"*": "dense"})


def test_a_search_that_was_stopped_goes_on(planted, tmp_path):
    allowed, loss = AllowedLoss("allowed_disagreement", 0.0), jump(planted.middle)
    whole, solved = planted(allowed, loss)
    assert len(solved) > 2

    class Stop(Exception):
        pass

    class StopsAtThirdPlan(accel.Progress):
        def say(self, text):
            if "plan 3 of" in text:
                raise Stop

    with pytest.raises(Stop):
        planted(allowed, loss, resume=tmp_path, progress=StopsAtThirdPlan())
    resumed, solved_then = planted(allowed, loss, resume=tmp_path)
    assert resumed == whole
    # What was measured before is not measured again; the result is put together once more.
    assert solved_then in (solved[2:], [*solved[2:], whole.result.model])
    again, loaded = planted(allowed, loss, resume=tmp_path)
    assert again == whole
    assert loaded == [whole.result.model]
    # Another budget is another search.
    other, _ = planted(AllowedLoss("allowed_error", planted.middle), lambda p: p, resume=tmp_path)
    assert other.probes[0] not in whole.probes
    assert other.measured > 0


def test_a_network_that_was_solved_is_loaded_by_a_run_that_was_stopped(run, tmp_path):
    first = run.search("allowed_error", 0.05, resume=tmp_path)

    def loaded(calibration, plan, *, resume, sensitivity):
        assert {file.stem for file in resume.iterdir()} == {
            layer.path for layer in plan.layers if layer.decomposition is not None
        }
        return reconstruct(calibration, plan, resume=resume, sensitivity=sensitivity)

    second = run.search("allowed_error", 0.05, loaded, resume=tmp_path)
    assert second.probes == first.probes
    np.testing.assert_array_equal(run.outputs(first.result)[1], run.outputs(second.result)[1])
