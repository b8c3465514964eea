"""DoGE against numbers worked out by hand, and its traps."""

import numpy as np
import pytest
from steered import make_round

from ideal.mixers.base import MixingConfig
from ideal.mixers.controller import Measurement
from ideal.mixers.doge import Doge, DogeController, scores_of, updated


def measured(alignment: list[float], norms: list[float], tokens: list[float], rate: float = 1.0) -> Measurement:
    return Measurement(np.array(tokens), None, np.array(alignment), np.array(norms), rate)


def test_scores_by_hand():
    """Mean norm 0.5: 0.2 / 0.5 = 0.4; against the target counts as 0; 4 / 0.5 = 8 is cut to 5."""
    found = scores_of(np.array([0.2, -0.3, 4.0]), np.array([0.25, 0.5, 0.75]))
    np.testing.assert_allclose(found, [0.4, 0, 5], rtol=1e-5)


def test_update_by_hand():
    """alpha = (1/4, 3/4), s = (ln 3, 0), step 1: both weigh 3/4, so halves. It maximises a.s - KL(a | alpha)."""
    np.testing.assert_allclose(updated(np.array([0.25, 0.75]), np.array([np.log(3), 0]), 1.0), [0.5, 0.5])
    alpha, s = np.array([0.2, 0.3, 0.5]), np.array([1.0, 0.0, 3.0])
    best = updated(alpha, s, 1.0)

    def gain(a: np.ndarray) -> float:
        return float(a @ s - a @ np.log(a / alpha))

    for other in np.random.default_rng(0).dirichlet(np.ones(3), 200):
        assert gain(other) <= gain(best) + 1e-12


def test_the_largest_move_of_a_step():
    """exp(5 x 0.01) = 1.051 between two domains, whatever was measured."""
    controller = DogeController()
    controller.begin(make_round(steps=9, rows=[0.5, 0.5]))
    controller.measured(measured([1e9, 0.0], [1.0, 1.0], [4, 4]))
    assert controller.weights[0] / controller.weights[1] == pytest.approx(np.exp(0.05))


def test_learning_rates_of_zero_move_nothing():
    controller = DogeController()
    controller.begin(make_round(steps=9, rows=[0.25, 0.75]))
    controller.measured(measured([0.5, 0.0], [1.0, 1.0], [4, 4], rate=0.0))
    np.testing.assert_allclose(controller.weights, [0.25, 0.75])


def test_an_absent_domain_keeps_its_score_and_does_not_enter_the_mean_norm():
    """Else b would lose share in every step that draws no row of it."""
    controller, other = DogeController(), DogeController()
    for each in (controller, other):
        each.begin(make_round(steps=9, rows=[0.5, 0.5]))
        each.measured(measured([0.3, 0.3], [0.5, 0.5], [4, 4]))
    controller.measured(measured([0.3, 0.0], [0.5, 0.0], [4, 0]))
    other.measured(measured([0.3, 0.3], [0.5, 0.5], [4, 4]))
    np.testing.assert_allclose(controller.weights, other.weights, rtol=1e-14)
    fresh = DogeController()
    fresh.begin(make_round(steps=9, rows=[0.5, 0.5]))
    fresh.measured(measured([0.2, 0.0], [0.4, 0.0], [4, 0]))
    assert fresh.weights[0] / fresh.weights[1] == pytest.approx(np.exp(0.01 * 0.5), rel=1e-6)


def test_output_is_the_mean_over_the_steps():
    controller = DogeController()
    controller.begin(make_round(steps=9, rows=[0.5, 0.5], mean_tokens=[1.0, 3.0]))
    seen = []
    for _ in range(3):
        controller.measured(measured([0.3, 0.0], [0.5, 0.5], [4, 4]))
        seen.append(controller.weights)
    assert list(controller.observed()["shares"].values()) == pytest.approx(np.mean(seen, axis=0).tolist())
    # Rows drawn alike hold tokens 1/4 and 3/4.
    np.testing.assert_allclose(controller.loss_weights(), controller.weights / [0.25, 0.75])


def test_proxies_and_the_final_round():
    doge = Doge(MixingConfig(method="doge", rounds=2), None)
    assert doge.last_round() == 2
    assert [doge.is_result(number) for number in range(3)] == [False, False, True]
    assert [doge.controller(number, []) is None for number in range(3)] == [False, False, True]
