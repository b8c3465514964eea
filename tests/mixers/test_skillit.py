"""Skill-it against numbers worked out by hand, and its traps."""

import numpy as np
import pytest
from steered import make_round

from ideal.mixers.base import MixingConfig, RoundResult, Setup
from ideal.mixers.skillit import Skillit, SkillitController, graph_of, mixture_of

BEFORE = np.array([2.0, 4.0])
AFTER = np.array([[1.0, 4.0], [2.2, 3.0]])
GRAPH = {"a": {"a": 0.5, "b": 0.0}, "b": {"a": -0.1, "b": 0.25}}


def test_graph_by_hand():
    """Rows are what was trained on, columns what was evaluated; what gets worse is negative."""
    np.testing.assert_allclose(graph_of(BEFORE, AFTER), [[0.5, 0], [-0.1, 0.25]], rtol=1e-12)


def test_mixture_by_hand():
    """eta 0.2, S = (2, 4): a 0.2 x 1, b 0.2 x (-0.2 + 1)."""
    p = mixture_of(graph_of(BEFORE, AFTER), np.array([2.0, 4.0]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(p[0] / p[1], np.exp(0.2 - 0.16), rtol=1e-12)
    # A capability of weight 0 does not count, the other then twice.
    p = mixture_of(graph_of(BEFORE, AFTER), np.array([2.0, 4.0]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(p[0] / p[1], np.exp(2 * (0.2 + 0.04)), rtol=1e-12)


def test_losses_are_found_by_name_and_summed_over_the_window():
    """Capabilities come in another order than the domains, as in the published code's alphabetical groups."""
    controller = SkillitController(GRAPH, revisions=4)
    controller.begin(make_round(steps=10, rows=[0.5, 0.5], capabilities=("b", "a")))
    start = controller.probabilities()
    np.testing.assert_allclose(start[0] / start[1], np.exp(0.2 * (0.5 - 0.15)), rtol=1e-12)
    for losses in ([9.0, 9.0], [1.0, 2.0], [1.0, 1.0], [2.0, 1.0]):
        controller.evaluated(1, np.array(losses))
    # The last three: b 4, a 4.
    p = controller.probabilities()
    np.testing.assert_allclose(p[0] / p[1], np.exp(0.2 * (0.5 * 4 - (-0.1 * 4 + 0.25 * 4))), rtol=1e-12)


def test_always_from_uniform():
    """The same losses again change nothing: moves do not add up."""
    controller = SkillitController(GRAPH, revisions=4)
    controller.begin(make_round(steps=10, rows=[0.5, 0.5]))
    for _ in range(3):
        controller.evaluated(1, np.array([2.0, 4.0]))
    before = controller.probabilities()
    controller.evaluated(1, np.array([2.0, 4.0]))
    np.testing.assert_array_equal(controller.probabilities(), before)


@pytest.mark.parametrize(("steps", "revisions", "expected"), [(12, 2, [5, 9]), (10, 2, [5, 9]), (5, 0, [])])
def test_when_losses_are_wanted(steps, revisions, expected):
    controller = SkillitController(GRAPH, revisions)
    controller.begin(make_round(steps=steps, rows=[0.5, 0.5]))
    assert [step for step in range(1, steps + 1) if controller.wants_losses(step)] == expected


def test_domains_of_ratio_0_are_left_out_of_the_graph():
    controller = SkillitController({**GRAPH, "c": {"a": 9.0, "b": 9.0}}, revisions=1)
    controller.begin(make_round(steps=10, rows=[0.5, 0.5]))
    assert controller.probabilities().shape == (2,)


def test_rounds_of_skillit():
    """Two short rounds on one domain each, then the mixture of the graph in rows."""
    half = np.array([0.5, 0.5])
    setup = Setup(0, ("a", "b"), ("a", "b"), half, np.array([10.0, 40.0]), np.array([30.0, 40.0]), BEFORE)
    mixer = Skillit(MixingConfig(method="skillit"), setup)
    assert mixer.last_round() == 2 and [mixer.length(number) for number in range(3)] == [0.5, 0.5, 1.0]
    assert [mixer.is_result(number) for number in range(3)] == [False, False, True]
    # All 70 tokens on the first domain, whose pool holds 30.
    np.testing.assert_allclose(mixer.start(np.ones(2)), [70 / 30, 0])

    def result(number: int, ratios: list[float]) -> RoundResult:
        return RoundResult(
            number, setup.pool_sizes, np.array(ratios), np.array(ratios), AFTER[number], setup.weights, None
        )

    rounds = [result(0, [1.0, 0.0])]
    second = mixer.propose(rounds)
    assert second.ratios[0] == 0 and second.ratios[1] > 0
    rounds.append(result(1, [0.0, 1.0]))
    last = mixer.propose(rounds).ratios * setup.pool_sizes
    np.testing.assert_allclose(last[0] / last[1], np.exp(0.2 * (0.5 - 0.15)), rtol=1e-12)
    assert mixer.controller(1, rounds[:1]) is None
    assert mixer.controller(2, rounds).graph["b"]["a"] == pytest.approx(-0.1)
