"""The search benchmark's arithmetic, on hand-made curves and sweeps."""

import json
from hashlib import sha256

import numpy as np
import pytest
from search_page import markdown, rendered
from search_regret import Point, at_budget, chosen, regrets, start_content, within
from search_runs import TUNED, settings_of
from search_sweep import FRESH, PICKING, Plan, around, best_of, centre_of, ranked, reweighed, stored

SHARES = {"math": 0.25, "code": 0.75}


def point(rounds: int, cost: float, q_test: float, loops: float | None = None) -> Point:
    return Point(rounds, cost if loops is None else loops, cost, q_test, q_test, SHARES)


def curves(*of_seeds: list[tuple[float, float]]) -> dict[int, list[Point]]:
    """By seed, points of (cost, test Q)."""
    return {
        seed: [point(number + 1, *pair) for number, pair in enumerate(pairs)] for seed, pairs in enumerate(of_seeds)
    }


def test_a_budget_holds_what_it_pays_for_on_average():
    found = curves([(1.0, 0.5), (1.9, 0.4), (3.2, 0.3)], [(1.0, 0.7), (2.1, 0.6), (3.0, 0.1)])
    reached = within([found], 2, "cost")
    assert reached is not None
    assert [reached[seed].q_test for seed in (0, 1)] == [0.4, 0.6], "a mean cost of 2.0, though one seed's is 2.1"
    assert within([found], 3, "cost") == {0: found[0][1], 1: found[1][1]}, "3.1 is more than 2% above 3"
    assert within([found], 0.9, "cost") is None


def test_of_several_settings_the_dearest_that_is_allowed_counts():
    """Whatever they found: the longer one is worse here and counts all the same."""
    small, large = curves([(3.0, 0.1)]), curves([(5.0, 0.9)])
    assert regrets({"regmix": [small, large]}, 0.05, 5, "cost") == {"regmix": {0: pytest.approx(0.85)}}
    assert regrets({"regmix": [small, large]}, 0.05, 4.8, "cost") == {"regmix": {0: pytest.approx(0.05)}}
    assert regrets({"regmix": [small, large]}, 0.05, 2, "cost") == {}


def test_inner_loops_alone_are_an_axis_of_their_own():
    found = {0: [point(1, 1.0, 0.5), point(2, 4.0, 0.2, loops=2.0)]}
    assert within([found], 2, "loops") == {0: found[0][1]}
    assert within([found], 2, "cost") == {0: found[0][0]}


def test_differences_are_paired_by_seed():
    """Two rows whose seeds differ far more than the rows do: only pairing shows it."""
    ideal, loss, odm = {0: 0.10, 1: 0.50, 2: 0.90}, {0: 0.14, 1: 0.53, 2: 0.95}, {0: 2.0, 1: 2.0, 2: 2.0}
    found = at_budget({"ideal": ideal, "loss": loss, "odm": odm})
    assert (found["lowest"], found["rule"], found["tied"]) == ("ideal", "loss", [])
    differences = np.array([-0.04, -0.03, -0.05])
    row = found["rows"]["ideal"]
    assert row["against_rule"] == pytest.approx(differences.mean())
    assert row["against_rule_error"] == pytest.approx(differences.std(ddof=1) / np.sqrt(3))
    assert row["regret_error"] == pytest.approx(np.std([0.1, 0.5, 0.9], ddof=1) / np.sqrt(3))
    assert "against_rule" not in found["rows"]["loss"]
    found = at_budget({"ideal": ideal, "joint": loss})["rows"]
    assert found["ideal"]["against_start"] == pytest.approx(differences.mean())
    assert "against_start" not in found["joint"]


def test_what_does_not_exceed_two_errors_is_a_tie():
    found = at_budget({"ideal": {0: 0.1, 1: 0.2, 2: 0.3}, "loss": {0: 0.3, 1: 0.1, 2: 0.3}})
    assert found["lowest"] == "ideal" and found["tied"] == ["loss"]


def test_the_first_of_equal_constants_is_kept():
    assert chosen({0.15: [0.25, 0.5], 0.3: [0.375, 0.375], 0.6: [0.125, 0.75]}) == 0.15


def test_no_method_has_more_than_three_values_to_tune():
    rows = {setting.row for setting in settings_of(["uniform", "skewed"], 10, {})}
    assert set(TUNED) <= rows and all(len(values) <= 3 for _, values in TUNED.values())


def test_no_method_trains_longer_than_the_others_may():
    for setting in settings_of(["uniform"], 10, {"regmix": 0.125}):
        rounds, length = setting.keys.get("rounds", 0), setting.keys.get("proxy_length", 1.0)
        if setting.row in ("ideal", "ideal, surrogate", "loss", "random", "regmix"):
            assert rounds * length + 1 <= 10


def row(name: str, seed: int, q: float) -> dict[str, object]:
    return {"key": f"{name}/{seed}", "seed": seed, "Q_test": q, "shares": SHARES, "total_tokens": 100, "seconds": 1.5}


SWEEP = [
    *(row("a", PICKING + i, q) for i, q in enumerate((0.30, 0.20, 0.22))),
    *(row("b", PICKING + 20 + i, q) for i, q in enumerate((0.25, 0.26, 0.27))),
    row("c", PICKING + 40, 0.01),
    *(row("a", FRESH + i, q) for i, q in enumerate((0.28, 0.32))),
]


def test_the_best_mixture_is_measured_by_seeds_that_did_not_pick_it():
    best = best_of(SWEEP)
    assert best.name == "a" and best.picked == pytest.approx(0.24)
    assert (best.q, best.seeds) == (pytest.approx(0.30), 2)
    assert best.error == pytest.approx(0.02) and best.deviation == pytest.approx(0.02 * np.sqrt(2))


def test_one_lucky_run_does_not_win():
    """c has the lowest value, from a single seed."""
    assert ranked({"a": [0.2, 0.3], "b": [0.1, 0.2], "c": [0.01]}) == ["b", "a"]


def test_the_stored_sweep_does_not_depend_on_order_or_clock():
    again = [{**found, "seconds": 99.0} for found in reversed(SWEEP)]
    content, digest = stored(SWEEP)
    assert stored(again) == (content, digest) and digest == sha256(content).hexdigest()
    assert len(content.splitlines()) == len(SWEEP) and "seconds" not in json.loads(content.splitlines()[0])
    assert stored(SWEEP[:-1])[1] != digest


def test_other_weights_take_over_what_does_not_depend_on_weights():
    """Mixtures near the best so far were chosen by the old weights, and fresh seeds measured the old best one."""
    losses = {"reference_loss": {"math": 1.0, "code": 2.0}, "test_loss": {"math": 3.0, "code": 5.0}}
    rows = [{"key": key, "seed": seed, **losses, "Q": 1.5, "Q_test": 4.0} for key, seed in (
        ("random 0/10000", PICKING), ("near 0.1/11000", PICKING + 1000), ("random 0/20000", FRESH)
    )]  # fmt: skip
    (found,) = reweighed(rows, {"math": 0.2, "code": 0.8})
    assert found["key"] == "random 0/10000"
    assert (found["Q"], found["Q_test"]) == (pytest.approx(1.8), pytest.approx(4.6))


def test_generations_centre_on_the_best():
    shares = np.array([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1], [0.0, 1.0]])
    centre = centre_of(shares, np.array([0.1, 0.2, 9.0, 8.0]), 2)
    expected = np.sqrt([0.5 * 0.2, 0.5 * 0.8])
    assert centre == pytest.approx(expected / expected.sum())
    children = around(centre, 0.01, 2000, np.random.default_rng(0))
    assert children.sum(1) == pytest.approx(np.ones(2000))
    # log(p0 / p1) is normal around the centre's with standard deviation .01 sqrt(2); 2000 draws know it to 2%.
    logs = np.log(children[:, 0] / children[:, 1])
    assert abs(logs.mean() - np.log(centre[0] / centre[1])) < 4 * 0.01 * np.sqrt(2 / 2000)
    assert abs(logs.std() / (0.01 * np.sqrt(2)) - 1) < 0.1


def test_the_plan_counts_its_runs():
    assert Plan().runs == 50 + 5 * 20 + 1 + 24 * 2 + 8 * 3 + 4 * 6 + 20
    assert Plan().random + Plan().generations * Plan().children >= 150


def test_the_page_says_who_wins_and_what_is_missing():
    """Also where it is a rule without gradients."""
    rows = {
        "joint": [curves([(1.0, 0.5)], [(1.0, 0.52)])],
        "loss": [curves([(1.0, 0.3), (2.0, 0.2)], [(1.0, 0.31), (2.0, 0.21)])],
        "ideal": [curves([(1.0, 0.5), (2.5, 0.4)], [(1.0, 0.52), (2.5, 0.4)])],
    }
    found = start_content(rows, 0.1)
    assert found["budgets"]["cost"]["2"]["lowest"] == "loss"
    content = {
        "sweep": {"runs": 9, "mixtures": 3, "total_tokens": 100, "shares": SHARES, "error": 0.01, "seeds": 2, "q": 0.1,
                  "picked": 0.09, "file": "search/sweep.jsonl", "sha256": "0" * 64},
        "seeds": [0, 1], "tolerance": 0.02, "tuning": [], "tuning_seeds": [50], "tuning_loops": 5,
        "command": "bash scripts/search_benchmark.sh", "weights": {"math": 0.25, "code": 0.75}, "tuned_elsewhere": True,
        "unfinished": ["doge"], "starts": {"uniform": {"ratios": "math 1", **found}},
    }  # fmt: skip
    page = markdown(content, "figures/search.svg")
    assert "- 2: **loss**, 0.105 ± 0.005; told apart from all others." in page
    assert "Not finished, and so not in the tables: doge." in page
    assert "weighed: math 1, code 3." in page and "Tuned in [search.md](search.md)" in page
    assert b"<svg" in rendered(content)
