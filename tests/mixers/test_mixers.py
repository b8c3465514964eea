"""Mixers against numbers worked out by hand, and what holds for any influence."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ideal.errors import UserError
from ideal.mixers import MIXERS, Mixer, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.base import ratios_of_shares
from ideal.mixers.paper_step import fixed_step, keep_volume
from ideal.mixers.random import drawn_shares

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
    return MIXERS[method](MixingConfig(**{"method": method, "step": "fixed", **config}), SETUP)


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
    names = tuple(map(str, range(n)))
    setup = replace(SETUP, domains=names, pool_sizes=last.pool_sizes, pool_tokens=1000 * shares)
    step = MIXERS["ideal"](MixingConfig(**{"step": "fixed", **config}), setup).propose([last])
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


def test_uniform_gives_equal_sizes_with_the_starts_tokens():
    uniform = mixer("uniform")
    # 500 + 300 + 200 tokens; examples have 5, 15 and 10 in the mean, so 1000 / 30 of each.
    np.testing.assert_allclose(uniform.start(RATIOS) * SETUP.pool_sizes, [100 / 3] * 3, rtol=1e-14)
    # Without the second domain, 700 / 15.
    some = uniform.start(np.array([1.0, 0.0, 2.0]))
    np.testing.assert_allclose(some * SETUP.pool_sizes, [140 / 3, 0, 140 / 3], rtol=1e-14)
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


def test_temperature_by_hand():
    """Sizes 100, 20, 20; T = 2: 5^(1/2) : 1 : 1. Tokens 5 sqrt(5) + 15 + 10 for 1000."""
    ratios = mixer("temperature").start(RATIOS)
    unit = 1000 / (5 * 5**0.5 + 25)
    np.testing.assert_allclose(ratios * SETUP.pool_sizes, [5**0.5 * unit, unit, unit], rtol=1e-14)


@given(st.floats(0.01, 1e6))
def test_temperature_keeps_the_volume_and_what_is_left_out(temperature):
    ratios = mixer("temperature", temperature=temperature).start(np.array([1.0, 0.0, 2.0]))
    assert ratios @ SETUP.pool_tokens == pytest.approx(700, rel=1e-12) and ratios[1] == 0
    # At T = 0.01 the ratio of 20 to 100 is 5^-100; sizes fall with T on the larger side and rise on the smaller.
    colder = mixer("temperature", temperature=temperature / 2).start(np.array([1.0, 0.0, 2.0]))
    assert colder[0] >= ratios[0] and colder[2] <= ratios[2]


def test_temperature_ends_at_joint_and_uniform():
    np.testing.assert_allclose(mixer("temperature", temperature=1).start(RATIOS), RATIOS, rtol=1e-14)
    hot, uniform = mixer("temperature", temperature=1e12).start(RATIOS), mixer("uniform").start(RATIOS)
    np.testing.assert_allclose(hot, uniform, rtol=1e-11)


# Domain c has no capability in SETUP; here it has one, before the others, to tell names from places.
NAMED = replace(
    SETUP,
    capabilities=("c", "a", "b", "more"),
    weights=np.array([0.1, 0.2, 0.3, 0.4]),
    base_loss=np.array([5.0, 1.0, 1.0, 100.0]),
)


def loss_mixer(setup: Setup) -> Mixer:
    return MIXERS["loss"](MixingConfig(method="loss"), setup)


def test_loss_by_hand():
    """w L = (0.2, 0.3, 0.5) for a, b, c: of 1000 tokens 200, 300 and 500."""
    ratios = loss_mixer(NAMED).start(RATIOS)
    np.testing.assert_allclose(ratios * SETUP.pool_tokens, [200, 300, 500], rtol=1e-14)
    # With b left out, 2/7 and 5/7 of 700.
    some = loss_mixer(NAMED).start(np.array([1.0, 0.0, 2.0]))
    np.testing.assert_allclose(some * SETUP.pool_tokens, [200, 0, 500], rtol=1e-14)


@pytest.mark.parametrize("method", ["ideal", "power_law"])
def test_others_may_begin_where_loss_does(method):
    """Their round 0 is `loss`'s, also while the base model's losses are unknown; given: the ratios as they are."""
    for setup in (NAMED, replace(NAMED, base_loss=None)):
        own = MIXERS[method](MixingConfig(method=method, first="loss"), setup)
        assert own.needs_base_loss
        np.testing.assert_array_equal(own.start(RATIOS), loss_mixer(setup).start(RATIOS))
    given = MIXERS[method](MixingConfig(method=method), NAMED)
    assert given.start(RATIOS) is RATIOS and not given.needs_base_loss
    unnamed = replace(NAMED, capabilities=("a", "b", "d", "more"))
    with pytest.raises(UserError, match=r"mixing\.first: loss needs .* c has none; .* set mixing\.first to something"):
        MIXERS[method](MixingConfig(method=method, first="loss"), unnamed).start(RATIOS)


def test_loss_follows_the_last_round():
    """Now w L = (0.2, 0.6, 0.2)."""
    rounds = [
        replace(result(None), weights=NAMED.weights, reference_loss=np.array(losses))
        for losses in ([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 2.0, 7.0])
    ]
    step = loss_mixer(NAMED).propose(rounds)
    assert step is not None and loss_mixer(NAMED).last_round() == 2
    np.testing.assert_allclose(step.ratios * SETUP.pool_tokens, [200, 600, 200], rtol=1e-14)
    np.testing.assert_allclose(step.beta, [-0.6, 1, 0], rtol=1e-13, atol=1e-15)


def test_loss_before_the_base_model_is_evaluated():
    waiting = loss_mixer(replace(NAMED, base_loss=None))
    np.testing.assert_array_equal(waiting.start(RATIOS), RATIOS)


def test_loss_needs_a_capability_of_every_domains_name():
    unnamed = replace(NAMED, base_loss=None, capabilities=("a", "b", "d", "more"))
    with pytest.raises(UserError, match=r"mixing\.method: loss needs .* c has none; give data\.domains\.c\.reference"):
        loss_mixer(unnamed).start(RATIOS)
    loss_mixer(unnamed).start(np.array([1.0, 0.5, 0.0]))
    with pytest.raises(UserError, match="weights .* all 0"):
        loss_mixer(replace(NAMED, weights=np.array([0.0, 0.0, 0.0, 1.0]))).start(RATIOS)


def test_specific_tries_each_domain_with_the_starts_tokens():
    specific = mixer("specific", rounds=7)
    assert specific.last_round() == 2 and not specific.successive
    rounds, ratios = [], specific.start(RATIOS)
    for domain, tokens in enumerate(SETUP.pool_tokens):
        expected = np.zeros(3)
        expected[domain] = 1000 / tokens
        np.testing.assert_allclose(ratios, expected, rtol=1e-13)
        rounds.append(replace(result(None, round=domain), ratios=ratios))
        if domain < 2:
            step = specific.propose(rounds)
            assert step is not None and np.isnan(step.beta).all()
            ratios = step.ratios
    with pytest.raises(UserError, match=r"mixing\.ratios: specific .* b is 0"):
        specific.start(np.array([1.0, 0.0, 2.0]))


def test_random_draws_differ_keep_the_volume_and_depend_on_the_seed():
    random = mixer("random", rounds=5)
    assert random.last_round() == 5 and not random.successive
    first = random.start(RATIOS)
    step = random.propose([replace(result(None), ratios=first)])
    other = MIXERS["random"](MixingConfig(), replace(SETUP, seed=1)).start(RATIOS)
    assert step is not None
    for ratios in (first, step.ratios, other):
        assert ratios @ SETUP.pool_tokens == pytest.approx(1000, rel=1e-12) and (ratios > 0).all()
    assert not np.allclose(first, step.ratios) and not np.allclose(first, other)
    np.testing.assert_array_equal(random.start(RATIOS), first)


def test_random_shares_are_uniform_on_the_simplex():
    """Dirichlet(1, 1, 1): means 1/3, variances 1/18; 4000 draws, so standard errors of the mean of 0.0037."""
    taking_part = np.array([True, False, True, True])
    draws = np.array([drawn_shares(0, number, taking_part) for number in range(4000)])
    assert (draws[:, 1] == 0).all()
    error = (1 / 18 / 4000) ** 0.5
    np.testing.assert_allclose(draws.mean(0), [1 / 3, 0, 1 / 3, 1 / 3], atol=4.5 * error)
    # A share's marginal is Beta(1, 2), of which a quarter lies above 1/2.
    above = (draws[:, 0] > 0.5).mean()
    assert abs(above - 0.25) < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
