"""Mixers against numbers worked out by hand, and what holds for any influence."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ideal.mixers import MIXERS, Mixer, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.base import ratios_of_shares
from ideal.mixers.ideal import fixed_step, keep_volume

# Two capabilities (weights 1/4, 3/4), three domains.
MATRIX = np.array([[-4.0, 0.0, 2.0], [0.0, -2.0, 2.0]])
WEIGHTS = np.array([0.25, 0.75])
SHARES = np.array([0.5, 0.3, 0.2])
RATIOS = np.array([1.0, 0.5, 2.0])
SETUP = Setup(
    seed=0,
    domains=("a", "b", "c"),
    capabilities=("a", "b"),
    weights=WEIGHTS,
    pool_sizes=np.array([100.0, 40.0, 10.0]),
    pool_tokens=np.array([500.0, 600.0, 100.0]),
    base_loss=None,
)


def mixer(method: str = "ideal", **config: object) -> Mixer:
    return MIXERS[method](MixingConfig(method=method, **config), SETUP)


def result(influence: np.ndarray | None = MATRIX, shares: np.ndarray = SHARES, round: int = 0) -> RoundResult:
    return RoundResult(
        round, np.array([100.0, 40.0, 10.0]), RATIOS, shares, np.array([1.0, 2.0]), WEIGHTS, influence
    )


def propose(influence: np.ndarray = MATRIX, shares: np.ndarray = SHARES, **config: object) -> Step:
    step = mixer(**config).propose([result(influence, shares)])
    assert step is not None
    return step


def test_free_step_by_hand():
    """alpha = (-1, -1.5, 2); gamma = 0.15 / 2; beta = (0.075, 0.1125, -0.15)."""
    step = propose()
    np.testing.assert_allclose(step.alpha, [-1, -1.5, 2], rtol=1e-14)
    np.testing.assert_allclose(step.beta, [0.075, 0.1125, -0.15], rtol=1e-14)
    np.testing.assert_allclose(step.ratios, [1.075, 0.55625, 1.7], rtol=1e-14)


def test_fixed_step_by_hand():
    """sum alpha = -0.5, so alpha = (-0.75, -1.35, 2.1), and beta = (0.75, 1.35, -2.1) / 14 before scaling.

    sum s (1 + beta) = 1 + (0.5 * 0.75 + 0.3 * 1.35 - 0.2 * 2.1) / 14 = 1 + 0.36 / 14.
    """
    step = propose(budget="fixed")
    np.testing.assert_allclose(step.alpha, [-0.75, -1.35, 2.1], rtol=1e-14)
    grown = 1 + 0.36 / 14
    expected = (1 + np.array([0.75, 1.35, -2.1]) / 14) / grown - 1
    np.testing.assert_allclose(step.beta, expected, rtol=1e-13)
    np.testing.assert_allclose(step.ratios, RATIOS * (1 + expected), rtol=1e-14)
    assert abs(SHARES @ (1 + step.beta) - 1) < 1e-15


def test_step_uses_the_last_round_alone():
    step = mixer().propose([result(-MATRIX), result(round=1)])
    assert step is not None
    np.testing.assert_array_equal(step.beta, propose().beta)


numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
matrices = st.integers(2, 6).flatmap(lambda n: arrays(np.float64, (2, n), elements=numbers))
changes = st.floats(0.01, 0.9)


def shares_for(data: st.DataObject, n: int) -> np.ndarray:
    parts = np.array(data.draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)))
    return parts / parts.sum()


def proposed(matrix: np.ndarray, shares: np.ndarray, **config: object) -> Step:
    n = len(shares)
    last = RoundResult(0, np.full(n, 50.0), np.ones(n), shares, np.ones(2), WEIGHTS, matrix)
    step = mixer(**config).propose([last])
    assert step is not None
    return step


@given(st.data(), matrices, changes)
def test_free_step_goes_against_alpha_by_m(data, matrix, m):
    step = proposed(matrix, shares_for(data, matrix.shape[1]), max_change=m)
    assume(np.abs(step.alpha).max() > 1e-6)
    assert np.abs(step.beta).max() == pytest.approx(m, rel=1e-12)
    np.testing.assert_allclose(step.alpha, WEIGHTS @ matrix, rtol=1e-9, atol=1e-9)
    assert (step.beta * step.alpha <= 0).all()
    assert (step.ratios > 0).all(), "with m below 1 no domain vanishes"


@given(st.data(), matrices, changes)
def test_fixed_step_keeps_the_volume(data, matrix, m):
    shares = shares_for(data, matrix.shape[1])
    step = proposed(matrix, shares, max_change=m, budget="fixed")
    assert shares @ (1 + step.beta) == pytest.approx(1, abs=1e-12)
    assert (step.beta > -1).all()
    assert abs(step.alpha.sum()) <= 1e-9 * max(1, np.abs(matrix).max())


@given(st.data(), matrices)
def test_fixed_step_ignores_influence_of_volume_alone(data, matrix):
    """Influence in proportion to the shares is that of the total: in fixed volume it moves nothing."""
    shares = shares_for(data, matrix.shape[1])
    plain = proposed(matrix, shares, budget="fixed")
    assume(np.abs(plain.alpha).max() > 1e-3)
    more = proposed(matrix - 10 * shares, shares, budget="fixed")
    np.testing.assert_allclose(more.beta, plain.beta, atol=1e-7)


def test_no_influence_no_change():
    for budget in ("free", "fixed"):
        step = propose(np.zeros((2, 3)), budget=budget)
        np.testing.assert_allclose(step.beta, 0, atol=1e-15)
        np.testing.assert_allclose(step.ratios, RATIOS, rtol=1e-15)
    assert (fixed_step(np.zeros(3), 0.15) == 0).all()


def test_tiny_influence_is_not_clamped():
    np.testing.assert_allclose(fixed_step(np.array([1e-30, -2e-30]), 0.1), [-0.05, 0.1], rtol=1e-14)


def test_keep_volume_of_equal_growth_is_no_change():
    np.testing.assert_allclose(keep_volume(np.full(3, 0.15), SHARES), 0, atol=1e-15)


def test_joint_keeps_the_given_sizes():
    joint = mixer("joint")
    assert joint.propose([result(None)]) is None
    assert not joint.needs_influence and joint.last_round() == 0
    np.testing.assert_array_equal(joint.start(RATIOS), RATIOS)


def test_uniform_gives_equal_sizes_with_the_starts_total():
    uniform = mixer("uniform")
    ratios = uniform.start(RATIOS)
    # 100 + 20 + 20 examples: 140 / 3 each.
    np.testing.assert_allclose(ratios * SETUP.pool_sizes, [140 / 3] * 3, rtol=1e-14)
    assert uniform.propose([result(None)]) is None
    assert not uniform.needs_influence and uniform.last_round() == 0


def test_ideal_starts_where_it_is_told_to_and_moves():
    ideal = mixer(rounds=4)
    assert ideal.needs_influence and ideal.last_round() == 4
    np.testing.assert_array_equal(ideal.start(RATIOS), RATIOS)


def test_volume_is_free_for_ideal_alone():
    assert not mixer(budget="free").keeps_volume and mixer(budget="fixed").keeps_volume
    assert mixer("uniform", budget="free").keeps_volume


def test_ratios_of_shares_by_hand():
    """1000 tokens in shares 1/2, 1/2, 0 of pools of 500, 600 and 100 tokens."""
    ratios = ratios_of_shares(np.array([2.0, 2.0, 0.0]), 1000.0, SETUP.pool_tokens)
    np.testing.assert_allclose(ratios, [1, 5 / 6, 0], rtol=1e-15)


def test_step_to_shares_keeps_the_volume_and_knows_no_change_from_nothing():
    """Before: 1 * 500 + 0 * 600 + 2 * 100 = 700 tokens; after, 560 and 140 of the first two domains."""
    last = replace(result(None), ratios=np.array([1.0, 0.0, 2.0]))
    step = mixer("joint").step_to(np.array([0.8, 0.2, 0.0]), last)
    np.testing.assert_allclose(step.ratios, [1.12, 140 / 600, 0], rtol=1e-14)
    np.testing.assert_allclose(step.beta, [0.12, np.nan, np.nan], rtol=1e-13)
