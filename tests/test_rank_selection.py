"""Rank selection against brute force, integer programming and its own definitions."""

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.cost import ConvShape
from accel.models.vgg import STAGES
from accel.rank_selection import (
    RANK_SELECTION,
    LayerChoices,
    RankProblem,
    Rule,
    apply_rules,
    budget_from_speedup,
)

METHODS = pytest.mark.parametrize("method", RANK_SELECTION.values(), ids=RANK_SELECTION.keys())
greedy_energy, exact_energy = RANK_SELECTION["greedy_energy"], RANK_SELECTION["exact_energy"]
uniform = RANK_SELECTION["uniform"]


def layer(path="conv", spectrum=(4.0, 2.0, 1.0, 1.0), dense=80, per_rank=20, fixed=None):
    return LayerChoices(path, np.array(spectrum), dense, linear(per_rank, len(spectrum)), fixed)


def linear(per_rank: int, width: int) -> np.ndarray:
    """MACs of a chain whose cost is proportional to its rank."""
    return per_rank * np.arange(1, width + 1)


def spectrum(kind: str, width: int, seed: int = 0) -> np.ndarray:
    index = np.arange(1, width + 1)
    random = np.random.default_rng((seed, width))
    return {
        "power": lambda: index**-1.5,
        "exponential": lambda: np.exp(-index / (width / 20)),
        "flat": lambda: np.ones(width),
        "random": lambda: np.sort(random.gamma(0.3, size=width))[::-1],
    }[kind]()


def vgg16(kind: str, speedup: float) -> RankProblem:
    """VGG-16 at 224×224 with pairs of a 3×3 and a 1×1 convolution; conv1_1 stays dense."""
    layers, channels, side = [], 3, 224
    for stage, widths in enumerate(STAGES["vgg16"], start=1):
        for index, width in enumerate(widths, start=1):
            original = ConvShape((3, 3), channels, width, side * side)
            pair = ConvShape((3, 3), channels, 1, side * side), ConvShape((1, 1), 1, width, side**2)
            layers.append(
                LayerChoices(
                    f"conv{stage}_{index}",
                    spectrum(kind, width, seed=len(layers)),
                    original.macs,
                    linear(sum(shape.macs for shape in pair), width),
                )
            )
            channels = width
        side //= 2
    first, *others = layers
    total = sum(choices.dense_macs for choices in layers)
    return RankProblem(tuple(others), first.dense_macs, budget_from_speedup(total, speedup))


def loss(choices: LayerChoices, rank: int | None) -> float:
    """log(E(d)/E(r)) by the definition, without the code under test."""
    values = choices.spectrum
    if rank is None or not values[0]:
        return 0.0
    return -math.log1p(-math.fsum(values[rank:]) / math.fsum(values))


def cost(choices: LayerChoices, rank: int | None) -> int:
    return choices.dense_macs if rank is None else int(choices.rank_macs[rank - 1])


def least_loss_by_enumeration(problem: RankProblem) -> float:
    """Every selection is tried, ranks that do not pay included."""
    best = math.inf
    options = [
        [None, *range(1, choices.width + 1)]
        if choices.fixed is None
        else [None]
        if choices.fixed == "dense" or cost(choices, choices.fixed) >= choices.dense_macs
        else [choices.fixed]
        for choices in problem.layers
    ]
    for ranks in itertools.product(*options):
        pairs = list(zip(problem.layers, ranks, strict=True))
        if problem.other_macs + sum(cost(*pair) for pair in pairs) <= problem.budget_macs:
            best = min(best, sum(loss(*pair) for pair in pairs))
    return best


def least_loss_by_integer_program(problem: RankProblem) -> float:
    """The optimum of the 0-1 program by HiGHS; losses are scaled up, its gap is an absolute one."""
    options = [
        (index, rank)
        for index, choices in enumerate(problem.layers)
        for rank in [None, *range(1, choices.width + 1)]
    ]
    losses = np.array([loss(problem.layers[index], rank) for index, rank in options])
    costs = np.array([cost(problem.layers[index], rank) for index, rank in options], float)
    one_each = scipy.sparse.csr_array(
        (np.ones(len(options)), ([index for index, _ in options], range(len(options))))
    )
    scale = 1e4
    solution = scipy.optimize.milp(
        losses * scale,
        integrality=1,
        bounds=(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(
                costs / problem.budget_macs, ub=1 - problem.other_macs / problem.budget_macs
            ),
        ],
        options={"mip_rel_gap": 0},
    )
    assert solution.success
    return solution.fun / scale


def least_loss_by_table(problem: RankProblem) -> float:
    """The optimum by dynamic programming over every budget from 0 up."""
    table = np.zeros(problem.budget_macs - problem.other_macs + 1)
    for choices in problem.layers:
        better = np.full_like(table, np.inf)
        for rank in [None, *range(1, choices.width + 1)]:
            spent = cost(choices, rank)
            if spent < len(table):
                without = table[: len(table) - spent]
                better[spent:] = np.minimum(better[spent:], without + loss(choices, rank))
        table = better
    return table[-1]


@st.composite
def problems(draw, largest_width=5, rules=True):
    layers = []
    for index in range(draw(st.integers(1, 4))):
        width = draw(st.integers(1, largest_width))
        eigenvalue = st.one_of(st.just(0.0), st.floats(1e-12, 1e6), st.sampled_from([1.0, 2.0]))
        values = sorted(draw(st.lists(eigenvalue, min_size=width, max_size=width)), reverse=True)
        fixed = st.one_of(st.none(), st.none(), st.just("dense"), st.integers(1, width))
        layers.append(
            LayerChoices(
                f"layer{index}",
                np.array(values),
                draw(st.integers(1, 60)),
                np.cumsum(draw(st.lists(st.integers(1, 20), min_size=width, max_size=width))),
                draw(fixed) if rules else None,
            )
        )
    other = draw(st.integers(0, 30))
    least = RankProblem(tuple(layers), other, 10**9)
    floor = least.macs(least.complete({choices.path: 1 for choices in least.free}))
    total = other + sum(choices.dense_macs for choices in layers)
    return RankProblem(tuple(layers), other, draw(st.integers(floor, max(floor, total))))


class TestMethods:
    @METHODS
    @settings(max_examples=60, deadline=None)
    @given(problem=problems())
    def test_selections_are_valid(self, method, problem):
        ranks = method(problem)
        assert list(ranks) == [choices.path for choices in problem.layers]
        spent = problem.other_macs
        for choices in problem.layers:
            rank = ranks[choices.path]
            assert rank is None or 1 <= rank <= choices.width
            assert rank is None or cost(choices, rank) < choices.dense_macs
            if choices.fixed == "dense":
                assert rank is None
            elif choices.fixed is not None:
                paying = cost(choices, choices.fixed) < choices.dense_macs
                assert rank == (choices.fixed if paying else None)
            spent += cost(choices, rank)
        assert spent == problem.macs(ranks) <= problem.budget_macs
        assert problem.log_energy(ranks) == pytest.approx(
            -sum(loss(choices, ranks[choices.path]) for choices in problem.layers), abs=1e-9
        )

    @METHODS
    @settings(max_examples=40, deadline=None)
    @given(problem=problems(), seed=st.randoms(use_true_random=False))
    def test_order_of_layers_does_not_matter(self, method, problem, seed):
        layers = list(problem.layers)
        seed.shuffle(layers)
        shuffled = RankProblem(tuple(layers), problem.other_macs, problem.budget_macs)
        assert method(shuffled) == method(problem)

    @METHODS
    def test_order_of_equal_layers_does_not_matter(self, method):
        # Four ranks for three equal layers: one of them gets two, or none does.
        selected = [
            method(RankProblem(tuple(layer(path, np.ones(4)) for path in paths), 0, 80))
            for paths in itertools.permutations("abc")
        ]
        assert all(ranks == selected[0] for ranks in selected)

    @METHODS
    @settings(max_examples=30, deadline=None)
    @given(problem=problems(), exponent=st.sampled_from([-300, -20, 0, 20, 300]))
    def test_units_of_a_spectrum_do_not_matter(self, method, problem, exponent):
        first, *others = problem.layers
        # By a power of two, so that nothing is rounded; a smallest eigenvalue stays normal.
        values = first.spectrum * 2.0**exponent
        scaled = LayerChoices(first.path, values, first.dense_macs, first.rank_macs, first.fixed)
        other = RankProblem((scaled, *others), problem.other_macs, problem.budget_macs)
        assert method(other) == method(problem)

    @METHODS
    def test_everything_stays_dense_where_it_fits(self, method):
        problem = RankProblem((layer("a"), layer("b", dense=50)), 7, 7 + 80 + 50)
        ranks = method(problem)
        assert problem.log_energy(ranks) == 0
        assert ranks == {"a": None, "b": None}

    @METHODS
    def test_layer_that_never_pays_stays_dense(self, method):
        cheap = layer("pointwise", dense=20, per_rank=20)
        ranks = method(RankProblem((cheap, layer("conv")), 0, 65))
        assert ranks == {"pointwise": None, "conv": 2}

    @METHODS
    def test_all_layers_without_energy(self, method):
        dead = [layer(path, np.zeros(4)) for path in "ab"]
        problem = RankProblem(tuple(dead), 0, 100)
        assert problem.macs(method(problem)) <= 100

    @METHODS
    @pytest.mark.parametrize("kind", ["power", "exponential", "flat", "random"])
    def test_vgg16_uses_its_budget_at_4x(self, method, kind):
        problem = vgg16(kind, 4.0)
        begun = time.perf_counter()
        ranks = method(problem)
        assert time.perf_counter() - begun < 2
        assert 0.99 * problem.budget_macs < problem.macs(ranks) <= problem.budget_macs
        total = problem.macs(dict.fromkeys(ranks))
        assert total == 15_346_630_656
        assert 4.0 <= total / problem.macs(ranks) < 4.04


class TestUniform:
    def test_by_hand(self):
        # Fractions of the ranks: a 1/4, 2/4, 3/4; b 3/10, 6/10, 9/10. Up to 6/10: 40 + 60 MACs.
        a, b = layer("a"), layer("b", np.ones(5), dense=100, per_rank=30)
        assert uniform(RankProblem((a, b), 5, 105)) == {"a": 2, "b": 2}
        assert uniform(RankProblem((a, b), 5, 104)) == {"a": 2, "b": 1}
        assert uniform(RankProblem((a, b), 5, 124)) == {"a": 2, "b": 2}
        assert uniform(RankProblem((a, b), 5, 125)) == {"a": 3, "b": 2}

    def test_equal_layers_get_equal_ranks(self):
        ranks = uniform(RankProblem((layer("a"), layer("b")), 0, 119))
        assert ranks == {"a": 2, "b": 2}

    @settings(max_examples=60, deadline=None)
    @given(problem=problems(), more=st.integers(0, 200))
    def test_monotone_in_the_budget(self, problem, more):
        larger = RankProblem(problem.layers, problem.other_macs, problem.budget_macs + more)
        small, large = uniform(problem), uniform(larger)
        for path in small:
            assert (small[path] or math.inf) <= (large[path] or math.inf)

    @settings(max_examples=60, deadline=None)
    @given(problem=problems(largest_width=8, rules=False), between=st.floats(0, 1))
    def test_largest_fraction_that_fits(self, problem, between):
        def at(fraction):
            ranks = {}
            for choices in problem.layers:
                allowed = [
                    rank
                    for rank in range(1, choices.width + 1)
                    if cost(choices, rank) <= fraction * choices.dense_macs
                ]
                rank = max(allowed, default=1)
                pays = fraction < 1 and cost(choices, rank) < choices.dense_macs
                ranks[choices.path] = rank if pays else None
            return ranks

        steps = [
            Fraction(cost(choices, rank), choices.dense_macs)
            for choices in problem.layers
            for rank in range(1, choices.width + 1)
        ]
        fractions = [0, Fraction(between), *(step for step in steps if step < 1), 1]
        fitting = [f for f in fractions if problem.macs(at(f)) <= problem.budget_macs]
        assert uniform(problem) == at(max(fitting))


class TestGreedy:
    def test_by_hand(self):
        # (ΔE/E)/ΔC of the last eigenvalue. a: 1/8/20, then 1/7/20, 2/6/20.
        # b: 1/4/10, then 1/3/10, 1/2/10. From 80 + 40 MACs, dense: a to 3 (60), a to 2 (40).
        a, b = layer("a"), layer("b", np.ones(4), dense=40, per_rank=10)
        assert greedy_energy(RankProblem((a, b), 3, 3 + 100)) == {"a": 3, "b": None}
        assert greedy_energy(RankProblem((a, b), 3, 3 + 99)) == {"a": 2, "b": None}
        # Next least is a's 2/6/20 = 1/60, before b's 1/40.
        assert greedy_energy(RankProblem((a, b), 3, 3 + 79)) == {"a": 1, "b": None}
        assert greedy_energy(RankProblem((a, b), 3, 3 + 59)) == {"a": 1, "b": 3}

    @pytest.mark.parametrize("kind", ["power", "exponential", "random"])
    def test_against_the_plain_definition(self, kind):
        """One eigenvalue at a time over all layers, everything computed anew."""
        problem = vgg16(kind, 4.0)
        ranks = {choices.path: choices.width for choices in problem.layers}
        while (
            problem.other_macs
            + sum(min(cost(c, ranks[c.path]), c.dense_macs) for c in problem.layers)
            > problem.budget_macs
        ):
            lost = {
                c.path: c.spectrum[ranks[c.path] - 1]
                / c.spectrum[: ranks[c.path]].sum()
                / c.rank_macs[0]
                for c in problem.layers
                if ranks[c.path] > 1
            }
            ranks[min(lost, key=lost.__getitem__)] -= 1
        expected = {
            c.path: ranks[c.path] if cost(c, ranks[c.path]) < c.dense_macs else None
            for c in problem.layers
        }
        assert greedy_energy(problem) == expected

    def test_layer_without_energy_goes_first(self):
        dead = layer("dead", np.zeros(4))
        assert greedy_energy(RankProblem((dead, layer("conv")), 0, 100)) == {
            "dead": 1,
            "conv": None,
        }


class TestExact:
    @settings(max_examples=150, deadline=None)
    @given(problem=problems())
    def test_equals_enumeration(self, problem):
        found = -problem.log_energy(exact_energy(problem))
        assert found == pytest.approx(least_loss_by_enumeration(problem), abs=1e-9)

    @pytest.mark.parametrize("kind", ["power", "exponential", "flat", "random"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_table_of_all_budgets(self, kind, seed):
        random = np.random.default_rng(seed)
        layers = tuple(
            LayerChoices(
                f"layer{index}",
                spectrum(kind, width, seed=index),
                dense_macs=int(random.integers(1, 10) * width),
                rank_macs=linear(int(random.integers(1, 10)), width),
            )
            for index, width in enumerate(random.integers(5, 60, 12).tolist())
        )
        total = 50 + sum(choices.dense_macs for choices in layers)
        least = 50 + sum(min(c.dense_macs, int(c.rank_macs[0])) for c in layers)
        for budget in random.integers(least, total, 4).tolist():
            problem = RankProblem(layers, 50, budget)
            found = -problem.log_energy(exact_energy(problem))
            assert found == pytest.approx(least_loss_by_table(problem), rel=1e-12, abs=1e-12)

    @pytest.mark.parametrize("kind", ["power", "random"])
    @pytest.mark.parametrize("speedup", [1.5, 3.0])
    def test_equals_integer_program(self, kind, speedup):
        full = vgg16(kind, speedup)
        # Layers of 64 and 128 channels, where HiGHS needs no minutes.
        problem = RankProblem(
            full.layers[:4],
            0,
            budget_from_speedup(sum(c.dense_macs for c in full.layers[:4]), speedup),
        )
        found = -problem.log_energy(exact_energy(problem))
        assert found == pytest.approx(least_loss_by_integer_program(problem), abs=2e-9)

    @settings(max_examples=60, deadline=None)
    @given(problem=problems(largest_width=30))
    def test_no_method_is_better(self, problem):
        exact = problem.log_energy(exact_energy(problem))
        for method in (uniform, greedy_energy):
            assert exact >= problem.log_energy(method(problem)) - 1e-11

    @pytest.mark.parametrize("kind", ["power", "exponential", "flat", "random"])
    @pytest.mark.parametrize("speedup", [1.2, 4.0, 10.0])
    def test_never_below_greedy_on_vgg16(self, kind, speedup):
        problem = vgg16(kind, speedup)
        exact = problem.log_energy(exact_energy(problem))
        greedy = problem.log_energy(greedy_energy(problem))
        assert exact >= greedy >= problem.log_energy(uniform(problem))

    def test_losses_far_below_one(self):
        """All of the energy in few directions: tolerances must go by the losses there are."""
        layers = tuple(
            LayerChoices(
                f"layer{index}", 10.0 ** -np.arange(64.0), 50 + index, linear(1 + index % 3, 64)
            )
            for index in range(12)
        )
        problem = RankProblem(layers, 0, 600)
        begun = time.perf_counter()
        found = -problem.log_energy(exact_energy(problem))
        assert time.perf_counter() - begun < 2
        assert 0 < found < 1e-20
        assert found == pytest.approx(least_loss_by_table(problem), rel=1e-12, abs=0)

    def test_many_layers_of_one_shape(self):
        layers = tuple(
            LayerChoices(
                f"layer{index:03}", np.ones(128), 196 * 9 * 128**2, linear(196 * 10 * 128, 128)
            )
            for index in range(60)
        )
        total = sum(choices.dense_macs for choices in layers)
        problem = RankProblem(layers, 0, budget_from_speedup(total, 2.0))
        begun = time.perf_counter()
        ranks = exact_energy(problem)
        assert time.perf_counter() - begun < 2
        assert problem.log_energy(ranks) >= problem.log_energy(greedy_energy(problem))


class TestProblem:
    def test_infeasible_budget_names_the_largest_speedup(self):
        # Rank 1 in both costs 2 · 20 MACs beside 10 others; 170 in all.
        layers = (layer("a"), layer("b"))
        with pytest.raises(ValueError, match=r"speedup is 3\.400×"):
            RankProblem(layers, 10, 49)
        assert exact_energy(RankProblem(layers, 10, 50)) == {"a": 1, "b": 1}

    @pytest.mark.parametrize(("fixed", "reachable"), [("dense", "1.545"), (3, "1.888")])
    def test_infeasible_rules(self, fixed, reachable):
        with pytest.raises(ValueError, match=rf"speedup is {reachable}×"):
            RankProblem((layer("a", fixed=fixed), layer("b")), 10, 80)

    def test_named_speedup_can_be_reached(self):
        layers = vgg16("power", 4.0).layers
        with pytest.raises(ValueError, match="largest reachable") as error:
            RankProblem(layers, 1000, 1)
        reachable = float(str(error.value).rsplit("is ", 1)[1].rstrip("×"))
        total = 1000 + sum(choices.dense_macs for choices in layers)
        RankProblem(layers, 1000, budget_from_speedup(total, reachable))
        with pytest.raises(ValueError, match="largest reachable"):
            RankProblem(layers, 1000, budget_from_speedup(total, reachable + 0.001))

    def test_fixed_ranks(self):
        layers = (layer("a", fixed=1), layer("b", fixed=4), layer("c", fixed="dense"), layer("d"))
        expected = {"a": 1, "b": None, "c": None, "d": 2}  # b's pair would cost what b costs
        for method in RANK_SELECTION.values():
            assert method(RankProblem(layers, 0, 20 + 80 + 80 + 40)) == expected

    def test_paths_stand_once(self):
        with pytest.raises(ValueError, match="twice: conv"):
            RankProblem((layer(), layer()), 0, 1000)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"spectrum": np.ones((2, 2))}, "one row"),
            ({"spectrum": []}, "one row"),
            ({"spectrum": [1.0, math.nan]}, "NaN"),
            ({"spectrum": [math.inf, 1.0]}, "NaN or infinite"),
            ({"spectrum": [1.0, -0.1]}, "negative"),
            ({"spectrum": [-1e-9, -1.0]}, "negative"),
            ({"spectrum": [1.0, 2.0]}, "descending"),
            ({"dense": 0}, "dense"),
            ({"per_rank": 0}, "for each of 4 ranks and ascend"),
            ({"fixed": 5}, "between 1 and the layer's width 4, found 5"),
            ({"fixed": 0}, "between 1"),
        ],
    )
    def test_refuses_wrong_layers(self, wrong, message):
        with pytest.raises(ValueError, match=f"^conv: .*{message}"):
            layer(**wrong)

    def test_rounding_below_zero_is_zero(self):
        assert layer(spectrum=[1.0, 0.5, -1e-6]).spectrum.tolist() == [1.0, 0.5, 0.0]

    def test_small_tails_are_not_lost(self):
        choices = layer(spectrum=[1.0, 1e-20, 1e-21])
        np.testing.assert_allclose(choices.log_energies, [-1.1e-20, -1e-21, 0.0], rtol=1e-14)


class TestBudget:
    def test_floor(self):
        assert budget_from_speedup(15_346_630_656, 4.0) == 3_836_657_664
        assert budget_from_speedup(10, 3.0) == 3

    @pytest.mark.parametrize("speedup", [1.0, 0.5, 0.0, -2.0, math.nan, math.inf])
    def test_refuses_what_is_no_speedup(self, speedup):
        with pytest.raises(ValueError, match="above 1"):
            budget_from_speedup(100, speedup)


class TestRules:
    WIDTHS = {"conv1_1": 64, "conv1_2": 64, "blocks/0/conv2": 32, "blocks/1/conv2": 32}  # noqa: RUF012

    def test_later_rules_win(self):
        rules = {"*": 8, "conv1_?": "dense", "conv1_2": 64}
        expected = {"conv1_1": "dense", "conv1_2": 64, "blocks/0/conv2": 8, "blocks/1/conv2": 8}
        assert apply_rules(self.WIDTHS, rules) == expected
        assert apply_rules(self.WIDTHS, [Rule(*rule) for rule in rules.items()]) == expected

    def test_other_layers_are_free(self):
        assert apply_rules(self.WIDTHS, {"blocks/*/conv2": 8}) == {
            "conv1_1": None,
            "conv1_2": None,
            "blocks/0/conv2": 8,
            "blocks/1/conv2": 8,
        }
        assert apply_rules(self.WIDTHS, {}) == dict.fromkeys(self.WIDTHS)

    @pytest.mark.parametrize("pattern", ["conv9_*", "Conv1_1", "conv1"])
    def test_rule_without_a_layer(self, pattern):
        with pytest.raises(ValueError, match=rf"'{pattern[:-1]}.*conv1_1, conv1_2, blocks/0/conv2"):
            apply_rules(self.WIDTHS, {"*": 8, pattern: "dense"})

    def test_rank_above_the_width(self):
        with pytest.raises(ValueError, match=r"blocks/0/conv2: .*33.* 32"):
            apply_rules(self.WIDTHS, {"*": 33})
        widened = {"*": 33, "blocks/*": "dense"}
        assert apply_rules(self.WIDTHS, widened)["conv1_1"] == 33

    @pytest.mark.parametrize("value", [0, -1, "sparse", 2.5, True, None])
    def test_wrong_values(self, value):
        with pytest.raises(ValueError, match="rule 'conv1_1': expected"):
            apply_rules(self.WIDTHS, {"conv1_1": value})
