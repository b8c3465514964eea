"""What users may ask for, against cases by hand, brute force and a quadratic program solved another way."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from ideal.mixers import MIXERS, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.goal import SOFTNESS, Goal
from ideal.mixers.limits import Limits, hold_total
from ideal.mixers.nearest import Constraints, least_excess, nearest_change
from ideal.seeding import generator

FREE = np.full(3, np.inf)


# Shares within limits


def test_hold_total_by_hand():
    amounts, least = np.array([6.0, 3.0, 1.0]), np.zeros(3)
    np.testing.assert_allclose(hold_total(amounts, least, FREE, 20.0), [12, 6, 2])
    # The first stops at 8; 12 are left for the others, 3 to 1.
    np.testing.assert_allclose(hold_total(amounts, least, np.array([8.0, 100.0, 100.0]), 20.0), [8, 9, 3])
    # And the third has 5 at least: 7 are left.
    np.testing.assert_allclose(hold_total(amounts, np.array([0, 0, 5.0]), np.array([8.0, 100, 100]), 20.0), [8, 7, 5])


def test_what_domains_with_a_share_cannot_hold_goes_to_the_others():
    found = hold_total(np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0]), np.array([4.0, np.inf, 2.0]), 10.0)
    np.testing.assert_allclose(found, [4, 4, 2])
    # A domain that stays out has no room.
    found = hold_total(np.array([1.0, 0.0, 0.0]), np.zeros(3), np.array([4.0, np.inf, 0.0]), 10.0)
    np.testing.assert_allclose(found, [4, 6, 0])


def test_a_total_out_of_reach_counts_as_the_nearest():
    pinned = np.array([2.0, 3.0])
    np.testing.assert_allclose(hold_total(np.ones(2), pinned, pinned, 5.1), pinned)


parts = st.floats(0.01, 10)


@given(st.data(), st.integers(2, 6), st.floats(0, 1))
def test_shares_within_limits(data, n, position):
    """Sum, bounds and the order of what no limit touches; by bisection, which knows nothing of kinks."""
    draw = lambda: np.array(data.draw(st.lists(parts, min_size=n, max_size=n)))  # noqa: E731
    amounts, least = draw(), draw() * np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    most = least + draw()
    total = least.sum() + position * (most - least).sum()
    found = hold_total(amounts, least, most, total)
    assert found.sum() == pytest.approx(total, rel=1e-9, abs=1e-9)
    assert (found >= least).all() and (found <= most).all()
    inside = (found > least * (1 + 1e-9)) & (found < most * (1 - 1e-9)) & (found > 0)
    factors = found[inside] / amounts[inside]
    if inside.any():
        np.testing.assert_allclose(factors, factors[0], rtol=1e-9)
        low, high = 0.0, 1e5
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(middle * amounts, least, most).sum() < total else (low, middle)
        np.testing.assert_allclose(found, np.clip(low * amounts, least, most), rtol=1e-6, atol=1e-8)


# The nearest change


def random_constraints(number: int) -> tuple[np.ndarray, Constraints]:
    """A wanted change and constraints that bind about half of the time; every second one keeps the total."""
    draw = generator(number, "constraints")
    n, count = int(draw.integers(2, 7)), int(draw.integers(0, 4))
    lower, upper = (0.15 * draw.choice([1.0, 1.0, 0.2, 0.0], n) for _ in range(2))
    least, most = (0.0, 0.0) if number % 2 else (-np.inf, float(draw.choice([0.01, np.inf])))
    slopes, room = draw.normal(size=(count, n)), draw.choice([0.0, 0.01, 0.05], count)
    found = Constraints(-lower, upper, draw.dirichlet(np.ones(n)), least, most, slopes, room)
    return 0.15 * draw.uniform(-1, 1, n), found


def by_distance_programming(wanted: np.ndarray, found: Constraints) -> np.ndarray:
    """The same problem by non-negative least squares (Lawson and Hanson 1974, chapter 23, LDP)."""
    matrix, most = found.rows
    used, n = np.isfinite(most), len(wanted)
    sides = -np.vstack([matrix[used], np.eye(n), -np.eye(n)])
    bounds = -np.concatenate([most[used], found.upper, -found.lower]) - sides @ wanted
    system, target = np.vstack([sides.T, bounds]), np.append(np.zeros(n), 1.0)
    residual = system @ nnls(system, target, maxiter=1000)[0] - target
    return wanted - residual[:n] / residual[n]


def test_nearest_change_is_that_of_another_solver():
    moved = 0
    for number in range(60):
        wanted, found = random_constraints(number)
        change = nearest_change(wanted, found)
        assert found.allow(change) and least_excess(found) == pytest.approx(0, abs=1e-9)
        if change is not wanted:
            moved += 1
            np.testing.assert_allclose(change, by_distance_programming(wanted, found), atol=1e-8)
    assert 20 < moved < 60


def test_nearest_change_against_a_grid():
    """Two domains and a loss that may rise by .01: no allowed point of a fine grid is nearer."""
    wanted, slopes = np.array([0.15, -0.1]), np.array([[0.3, 0.1]])
    box, half = np.full(2, 0.15), np.full(2, 0.5)
    found = Constraints(-box, box, half, -np.inf, 0.02, slopes, np.array([0.01]))
    change = nearest_change(wanted, found)
    axis = np.linspace(-0.15, 0.15, 151)
    allowed = [point for point in map(np.array, product(axis, axis)) if found.allow(point)]
    nearest = min(((point - wanted) ** 2).sum() for point in allowed)
    assert ((change - wanted) ** 2).sum() <= nearest + 1e-12
    assert ((change - wanted) ** 2).sum() == pytest.approx(nearest, abs=1e-3)


def test_least_excess_by_hand():
    """At most .15 of each of two domains takes .03 off, and .05 are needed."""
    box, half = np.full(2, 0.15), np.full(2, 0.5)
    found = Constraints(-box, box, half, -np.inf, np.inf, np.array([[-0.1, -0.1]]), np.array([-0.05]))
    assert least_excess(found) == pytest.approx(0.02)
    reachable = replace(found, room=np.array([-0.03 + 1e-9]))
    np.testing.assert_allclose(nearest_change(np.zeros(2), reachable), 0.15, atol=1e-6)


# The worst capability


def test_the_worst_capability_by_hand():
    goal = Goal(np.array([0.5, 0.5, 0.0]), np.array([1.0, 2.0, 1.0]))
    losses = np.array([1.1, 2.0, 9.0])  # distances .1 and 0; the third has no weight
    parts = 0.5 * np.exp(np.array([0.1, 0.0]) / SOFTNESS)
    assert goal.value(losses) == pytest.approx(SOFTNESS * np.log(parts.sum()))
    np.testing.assert_allclose(goal.pull(losses), [*(parts / parts.sum() / [1, 2]), 0])
    steps = 1e-6 * np.eye(3)
    slopes = [(goal.value(losses + step) - goal.value(losses - step)) / 2e-6 for step in steps]
    np.testing.assert_allclose(goal.pull(losses), slopes, atol=1e-8)
    assert 0.1 - SOFTNESS * np.log(2) <= goal.value(losses) <= 0.1
    assert goal.value(1e3 * losses) == pytest.approx(1099 - SOFTNESS * np.log(2)), "no power overflows"


# Steps

SETUP = Setup(
    seed=0,
    domains=("a", "b", "c"),
    capabilities=("a", "b"),
    weights=np.array([0.5, 0.5]),
    pool_sizes=np.array([100.0, 100.0, 100.0]),
    pool_tokens=np.array([500.0, 300.0, 200.0]),
    base_loss=np.array([2.0, 2.0]),
)
MATRIX = np.array([[-4.0, 1.0, 0.5], [2.0, -1.0, 0.0]])


def limits(least: list[float], most: list[float]) -> Setup:
    return replace(SETUP, limits=Limits(np.array(least), np.array(most)))


def first(ratios: list[float] | None = None, losses: tuple[float, float] = (1.0, 1.0)) -> RoundResult:
    found = np.ones(3) if ratios is None else np.array(ratios)
    shares = found * SETUP.pool_tokens / (found @ SETUP.pool_tokens)
    return RoundResult(0, SETUP.pool_sizes, found, shares, np.array(losses), SETUP.weights, MATRIX)


def propose(setup: Setup = SETUP, rounds: list[RoundResult] | None = None, **config: object) -> Step:
    step = MIXERS["ideal"](MixingConfig(**{"step": "fixed", **config}), setup).propose(rounds or [first()])
    assert step is not None
    return step


RULES = [{"step": step, "budget": budget} for step in ("fixed", "surrogate") for budget in ("free", "fixed")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
def test_steps_keep_to_limits(rule):
    """a is held, b is pinned, c moves (and a within its limit)."""
    setup = limits([0.0, 1.0, 0.5], [1.05, 1.0, np.inf])
    step = propose(setup, **rule)
    assert step.ratios[1] == pytest.approx(1, abs=1e-6)
    assert step.ratios[0] <= 1.05 + 1e-6 and step.ratios[2] >= 0.5 - 1e-6
    if rule["budget"] == "fixed":
        assert step.ratios @ SETUP.pool_tokens == pytest.approx(1000, rel=1e-6)
    assert np.abs(step.beta).max() > 0.01, "what may move does"


def test_a_pinned_domain_does_not_set_the_step():
    """alpha = (-1, 0, .25): without a, b and c move as in a mixture of their own; gamma = .15 / .25."""
    step = propose(limits([1.0, 0, 0], [1.0, np.inf, np.inf]), max_change=0.15)
    np.testing.assert_allclose(step.beta, [0, 0, -0.15], atol=1e-12)
    # Shares .6 and .4: centred alpha (-.15, .15), beta (.15, -.15) before 1 + .15 (.6 - .4) = 1.03.
    step = propose(limits([1.0, 0, 0], [1.0, np.inf, np.inf]), max_change=0.15, budget="fixed")
    np.testing.assert_allclose(step.beta, [0, 1.15 / 1.03 - 1, 0.85 / 1.03 - 1], atol=1e-12)


def test_limits_that_do_not_bind_change_nothing():
    for rule in RULES:
        found, plain = propose(limits([0] * 3, [9] * 3), **rule), propose(**rule)
        np.testing.assert_allclose(found.ratios, plain.ratios, rtol=1e-9)


def test_a_cap_of_the_total():
    for rule in ("fixed", "surrogate"):
        step = propose(step=rule, budget="free", max_total=1.01, max_change=0.3)
        assert step.ratios @ SETUP.pool_tokens <= 1010 * (1 + 1e-6)
        assert propose(step=rule, budget="free", max_change=0.3).ratios @ SETUP.pool_tokens > 1020


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
def test_no_capability_is_predicted_to_get_worse_than_the_start(rule):
    """More of a helps a and hurts b; b may not rise by more than the noise."""
    setup = replace(SETUP, weights=np.array([0.9, 0.1]))
    rounds = [replace(first(), weights=setup.weights)]
    before, then = (propose(setup, rounds, **rule, **more).information["predicted"]["reference_loss"]
                    for more in ({}, {"no_worse": "start", "noise": 0.01}))  # fmt: skip
    assert before["b"] > 1.02 and then["b"] == pytest.approx(1.01, abs=1e-4) and then["a"] < 1


def test_a_loss_that_is_too_high_already_is_brought_down_as_far_as_a_step_can():
    setup = replace(SETUP, no_worse=np.array([np.inf, 0.5]))
    step = propose(setup, no_worse={"b": 0.5}, noise=0.0)
    assert "no step after round 0 is predicted to bring" in step.warnings[0]
    np.testing.assert_allclose(step.beta[:2], [-0.15, 0.15], atol=1e-6)  # all that lowers b
    assert propose(setup, [first(losses=(1.0, 0.5))], no_worse={"b": 0.5}).warnings == []


def test_the_worst_capability_is_what_moves_the_mixture():
    """b is the one that has gained least on its target: the step lowers b, whatever a would like."""
    setup = replace(SETUP, target=np.array([1.0, 0.5]))
    for rule in RULES:
        step = propose(setup, objective="worst", **rule)
        predicted = step.information["predicted"]
        assert predicted["reference_loss"]["b"] < 1 < predicted["reference_loss"]["a"]
        assert predicted["objective"] < Goal(SETUP.weights, setup.target).value(np.ones(2))


def test_the_fixed_steps_prediction_and_its_scale():
    """First order by M beta; a second round that changed by less than it was said to raises the scale."""
    step = propose(max_change=0.1)
    said = step.information
    for name, row, kappa in zip("ab", MATRIX, said["scale"].values(), strict=True):
        assert said["unscaled"]["reference_loss"][name] == pytest.approx(1 + row @ step.beta)
        assert said["predicted"]["reference_loss"][name] == pytest.approx(1 + row @ step.beta / kappa)
    assert list(said["scale"].values()) == pytest.approx([list(said["scale"].values())[0]] * 2), "the prior's, for both"
    after = replace(first(list(step.ratios)), round=1, reference_loss=1 + MATRIX @ step.beta / 20)
    again = propose(rounds=[first(), after], max_change=0.1).information["scale"]
    assert again["a"] > said["scale"]["a"]


def test_every_method_that_sets_shares_keeps_to_limits():
    setup = replace(limits([0.9, 0, 0], [1.0, np.inf, 1.1]), base_loss=np.ones(2))
    for method in ("uniform", "temperature", "random"):
        ratios = MIXERS[method](MixingConfig(method=method), setup).start(np.ones(3))
        assert 0.9 - 1e-9 <= ratios[0] <= 1 + 1e-9 and ratios[2] <= 1.1 + 1e-9
        assert ratios @ SETUP.pool_tokens == pytest.approx(1000)


def test_a_declared_domain_serves_a_capability():
    """loss: b has its own capability and x, which names it; c gets nothing but what it serves."""
    setup = replace(
        SETUP, capabilities=("a", "b", "x", "y"), weights=np.array([0.25] * 4), served_by={"x": "b", "y": "c"}
    )
    last = replace(first(), reference_loss=np.array([1.0, 2.0, 3.0, 4.0]), weights=setup.weights)
    step = MIXERS["loss"](MixingConfig(method="loss"), setup).propose([last])
    assert step is not None
    np.testing.assert_allclose(step.ratios * SETUP.pool_tokens, [100, 500, 400])
