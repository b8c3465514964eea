"""Aioli against numbers worked out by hand, and its traps."""

import numpy as np
import pytest
from steered import make_round

from ideal.errors import UserError
from ideal.mixers.aioli import AioliController, mixture_of, normalised, probe_mixture, solved
from ideal.mixers.controller import StepStatistics


def test_probe_mixture_by_hand():
    np.testing.assert_allclose(probe_mixture(1, 3), [0.125, 0.75, 0.125])


def test_coefficients_are_found_again():
    """Drops that are linear in the mixtures as drawn, not in those that were wanted."""
    truth = np.array([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.5]])
    drawn = np.array([[6, 1, 1], [2, 5, 1], [0, 2, 6]]) / 8
    np.testing.assert_allclose(solved(truth @ drawn.T, drawn), truth, atol=1e-12)


def test_probes_that_drew_alike_give_finite_coefficients():
    assert np.isfinite(solved(np.ones((2, 2)), np.full((2, 2), 0.5))).all()


def test_normalised_by_hand():
    """Least entry -1: (4, 0, 2, 2) / 8. Without a negative one nothing is shifted. All the same: uniform."""
    np.testing.assert_allclose(normalised(np.array([[3.0, -1.0], [1.0, 1.0]])), [[0.5, 0], [0.25, 0.25]])
    np.testing.assert_allclose(normalised(np.array([[3.0, 1.0]])), [[0.75, 0.25]])
    np.testing.assert_allclose(normalised(np.zeros((2, 2))), 0.25)
    np.testing.assert_allclose(normalised(np.full((2, 2), -1.0)), 0.25)


def test_mixture_by_hand_and_its_largest_ratio():
    p = mixture_of(np.array([[0.5, 0.0], [0.25, 0.25]]))
    np.testing.assert_allclose(p[0] / p[1], np.exp(0.5), rtol=1e-12)
    p = mixture_of(np.array([[0.5, 0.0], [0.5, 0.0]]))
    np.testing.assert_allclose(p[0] / p[1], np.e, rtol=1e-12)


def run_through(controller: AioliController, truth: np.ndarray, steps: int) -> list[np.ndarray]:
    """Each step's probabilities; a world in which the losses fall by truth x the rows' parts, per step."""
    seen, losses = [], np.full(len(truth), 100.0)
    for step in range(1, steps + 1):
        if controller.wants_losses(step):
            controller.evaluated(step, losses)
        p = controller.probabilities()
        seen.append(p)
        losses = losses - truth @ p
        controller.observe(StepStatistics(8 * p, 80 * p, 80 * p))
    return seen


def test_a_whole_loop():
    """14 steps, 2 revisions of 7: a probe step of each domain, then 5 steps on what they say."""
    truth = np.array([[2.0, 0.0], [0.5, 1.0]])
    controller = AioliController(seed=3, revisions=2)
    controller.begin(make_round(steps=14, rows=[0.5, 0.5]))
    assert [s for s in range(1, 15) if controller.wants_losses(s)] == [1, 2, 3, 8, 9, 10]
    seen = run_through(controller, truth, 14)
    for start in (0, 7):
        assert sorted(p[0] for p in seen[start : start + 2]) == pytest.approx([0.25, 0.75])
        for p in seen[start + 2 : start + 7]:
            # A / 3.5: columns 2.5 and 1.
            np.testing.assert_allclose(p[0] / p[1], np.exp(1.5 / 3.5), rtol=1e-9)


def test_weights_of_capabilities_count():
    truth = np.array([[2.0, 0.0], [0.0, 2.0]])
    controller = AioliController(seed=3, revisions=1)
    controller.begin(make_round(steps=6, rows=[0.5, 0.5], weights=[1.0, 0.0]))
    p = run_through(controller, truth, 6)[-1]
    np.testing.assert_allclose(p[0] / p[1], np.e, rtol=1e-9)


def test_coefficients_have_a_memory():
    """0.9 of the last and 0.1 of those before, which were all of one domain."""
    controller = AioliController(seed=3, revisions=2)
    controller.begin(make_round(steps=8, rows=[0.5, 0.5], capabilities=("x",)))
    controller.drops, controller.mixtures = np.array([[1.0, 0.0]]), np.eye(2)
    controller.revise()
    controller.drops = np.array([[0.0, 1.0]])
    controller.revise()
    np.testing.assert_allclose(controller.coefficients, [[0.1, 0.9]])


def test_too_short_for_its_probes():
    with pytest.raises(UserError, match=r"^mixing\.rounds: 3 revision\(s\) in 8 optimizer steps leave 2 .* 3 domains"):
        AioliController(seed=0, revisions=3).begin(make_round(steps=8, rows=[0.3, 0.3, 0.4]))


def test_one_domain_needs_no_probe():
    controller = AioliController(seed=0, revisions=3)
    controller.begin(make_round(steps=3, rows=[1.0]))
    assert not any(controller.wants_losses(step) for step in (1, 2, 3))
    np.testing.assert_array_equal(controller.probabilities(), [1.0])
