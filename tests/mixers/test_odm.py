"""ODM against numbers worked out by hand."""

import numpy as np
import pytest
from steered import make_round

from ideal.mixers.controller import StepStatistics
from ideal.mixers.odm import OdmController, exploration, policy, rewarded


def test_exploration_by_hand():
    """k = 2: 1/2 while sqrt(ln 2 / (2 t)) >= 1/2, that is t <= 2 ln 2 = 1.39; at t = 8 sqrt(0.6931 / 16)."""
    assert [exploration(t, 2) for t in (0, 1)] == [0.5, 0.5]
    assert exploration(8, 2) == pytest.approx(0.20813865, rel=1e-6)
    assert exploration(2, 2) == pytest.approx(0.41627731, rel=1e-6) and exploration(3, 1) == 0


def test_policy_by_hand():
    """k = 2, t = 8, R = (1, 0): e_7 = 0.22251, softmax (0.55540, 0.44460), p = (1 - 2 e_8) softmax + e_8."""
    p = policy(np.array([1.0, 0.0]), 8)
    first = 1 / (1 + np.exp(-np.sqrt(np.log(2) / 14)))
    rest = 1 - 2 * 0.20813865
    np.testing.assert_allclose(p, [rest * first + 0.20813865, rest * (1 - first) + 0.20813865], rtol=1e-6)
    assert p.sum() == pytest.approx(1, abs=1e-15)


def test_policy_is_uniform_at_first_and_never_below_its_floor():
    np.testing.assert_allclose(policy(np.array([9.0, 0.0, -3.0]), 1), 1 / 3)
    p = policy(np.array([1e6, 0.0, 0.0]), 100)
    np.testing.assert_allclose(p[1:], exploration(100, 3), rtol=1e-12)
    assert np.isfinite(p).all() and p.sum() == pytest.approx(1)


def test_rewards_by_hand():
    """0.9 x 2 + 0.1 x 3 / 0.5 = 2.4; what was not drawn keeps its reward, whatever its loss is said to be."""
    found = rewarded(
        np.array([2.0, 5.0]), np.array([3.0, np.nan]), np.array([0.5, 0.5]), np.array([True, False]), 0.9
    )
    np.testing.assert_allclose(found, [2.4, 5.0], rtol=1e-15)


def statistics(tokens: list[float], losses: list[float]) -> StepStatistics:
    return StepStatistics(np.ones(len(tokens)), np.array(tokens), np.array(losses))


def test_harder_domains_are_drawn_more_often():
    controller = OdmController()
    controller.begin(make_round(steps=200, rows=[0.5, 0.3, 0.2]))
    for _ in range(100):
        controller.observe(statistics([10, 10, 10], [20, 40, 30]))
    p = controller.probabilities()
    assert p[1] > p[2] > p[0] > exploration(101, 3)


def test_warmup_keeps_the_starts_proportions():
    """One hundredth of 200 steps."""
    controller = OdmController()
    controller.begin(make_round(steps=200, rows=[0.5, 0.3, 0.2]))
    seen = []
    for _ in range(3):
        seen.append(controller.probabilities())
        controller.observe(statistics([10, 10, 10], [20, 40, 30]))
    np.testing.assert_array_equal(seen[:2], [[0.5, 0.3, 0.2]] * 2)
    np.testing.assert_allclose(seen[2], 1 / 3, rtol=1e-9)


def test_a_domain_without_rows_in_a_step_keeps_its_reward():
    controller = OdmController()
    controller.begin(make_round(steps=10, rows=[0.5, 0.5]))
    controller.observe(statistics([0, 10], [0, 20]))
    np.testing.assert_allclose(controller.rewards, [0, 0.1 * 2 / 0.5])
    assert controller.observed()["rewards"] == {"a": 0.0, "b": pytest.approx(0.4)}
