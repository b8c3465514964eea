"""DoReMi against numbers worked out by hand, and its traps."""

import numpy as np
import pytest
from steered import make_round

from ideal.mixers.controller import Measurement
from ideal.mixers.doremi import DoremiController, complaints, mean_excess, updated


def measured(tokens: list[float], excess: list[float]) -> Measurement:
    return Measurement(np.array(tokens, dtype=float), np.array(excess), None, None, 1.0)


def test_mean_excess_by_hand():
    """6 nats over 4 tokens; no token keeps what was known."""
    found = mean_excess(np.array([6.0, 0.0]), np.array([4.0, 0.0]), np.array([9.0, 4.6]))
    np.testing.assert_array_equal(found, [1.5, 4.6])


def test_update_by_hand():
    """alpha = (1/4, 3/4), lambda = (ln 3, 0), eta 1: 3/4 and 3/4, so halves; eps 0.2 of uniform changes nothing."""
    np.testing.assert_allclose(updated(np.array([0.25, 0.75]), np.array([np.log(3), 0]), 1.0, 0.2), [0.5, 0.5])
    found = updated(np.array([0.25, 0.75]), np.zeros(2), 1.0, 0.2)
    np.testing.assert_allclose(found, [0.8 * 0.25 + 0.1, 0.8 * 0.75 + 0.1], rtol=1e-14)
    assert np.isfinite(updated(np.array([0.5, 0.5]), np.array([1e4, 0.0]), 1.0, 1e-3)).all()


def test_weights_act_in_the_step_that_measured_them_and_their_mean_is_the_output():
    controller = DoremiController()
    controller.begin(make_round(steps=9, rows=[0.25, 0.75], vocabulary=100))
    np.testing.assert_array_equal(controller.weights, [0.25, 0.75])
    controller.measured(measured([4, 4], [4 * np.log(3), 0.0]))
    fresh = 0.999 * 0.5 + 0.0005
    np.testing.assert_allclose(controller.weights, [fresh, 1 - fresh], rtol=1e-12)
    # Rows of one length: q = 1/2 each, so the losses weigh alpha / q.
    np.testing.assert_allclose(controller.loss_weights(), 2 * controller.weights)
    # The mean begins with the initial weights as its first member.
    assert controller.observed()["shares"]["a"] == pytest.approx((0.25 + fresh) / 2)


def test_loss_weights_undo_how_tokens_were_drawn():
    """Rows of a hold 1 token, of b 9: drawn alike, tokens are 0.1 and 0.9, and alpha / q makes up for it."""
    controller = DoremiController()
    controller.begin(make_round(steps=9, rows=[0.9, 0.1], mean_tokens=[1.0, 9.0]))
    np.testing.assert_allclose(controller.weights, [0.5, 0.5])
    np.testing.assert_allclose(controller.loss_weights(), [5.0, 5 / 9])


def test_a_domain_missing_from_a_step_keeps_its_score():
    """And before it was ever measured it counts as hard as ln V."""
    controller = DoremiController()
    controller.begin(make_round(steps=9, rows=[0.5, 0.5], vocabulary=100))
    controller.measured(measured([4, 0], [2.0, 0.0]))
    np.testing.assert_allclose(controller.scores, [0.5, np.log(100)])
    controller.measured(measured([0, 4], [0.0, 1.0]))
    np.testing.assert_allclose(controller.scores, [0.5, 0.25])


def output(shares: list[float], last: list[float] | None = None) -> dict[str, dict[str, float]]:
    return {
        "shares": dict(zip("abc", shares, strict=True)),
        "last_weights": dict(zip("abc", last or shares, strict=True)),
    }


def test_complaints():
    assert complaints([output([0.3, 0.3, 0.4])]) == []
    (one_hot,) = complaints([output([0.95, 0.03, 0.02])])
    assert "a 95%" in one_hot
    (late,) = complaints([output([0.3, 0.3, 0.4], [0.2, 0.4, 0.4])])
    assert "0.20 (L1)" in late and "another seed" in late
    (moved,) = complaints([output([0.5, 0.3, 0.2]), output([0.3, 0.3, 0.4])])
    assert "0.40 (L1)" in moved and "mixing.rounds" in moved
