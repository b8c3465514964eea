"""A leaderboard's mathematics and tables against numbers worked out by hand."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ideal.compare import tables
from ideal.compare.figures import draw
from ideal.compare.leaderboard import (
    RunNumbers,
    by_chance,
    comparable,
    exceeds,
    leaderboard,
    marked,
    mean_and_error,
    mean_of_tries,
    numbers_of,
    paired,
    trained_tokens,
    training_run_equivalents,
)
from ideal.compare.writing import clear_leaderboard, console_tables, write_leaderboard
from ideal.report.files import RoundFiles, RunFiles


def run(row: str, seed: int, a: float, b: float, **more: Any) -> RunNumbers:
    """A run with test losses a and b (reference losses 1 higher), equally weighted."""
    plain = RunNumbers(
        row=row,
        seed=seed,
        reference_loss={"a": a + 1, "b": b + 1},
        test_loss={"a": a, "b": b},
        Q=(a + b) / 2 + 1,
        Q_test=(a + b) / 2,
        ratios={"x": 1.0, "y": 0.5},
        shares={"x": 0.75, "y": 0.25},
        tokens=1000,
        inner_loops=1,
        trained_tokens=2000.0,
        training_seconds=10.0,
        measuring_seconds=0.0,
        evaluation_seconds=1.0,
        influence_seconds=0.0,
    )
    return replace(plain, **more)


# Statistics


def test_mean_and_error():
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7."""
    assert mean_and_error(np.array([1.0, 2, 6])) == pytest.approx((3, math.sqrt(7 / 3)))
    mean, error = mean_and_error(np.array([5.0]))
    assert mean == 5 and math.isnan(error), "one seed has no error"


def test_differences_are_taken_seed_by_seed():
    """Seeds differ by tens, methods by 1 and 3: mean -2, sd sqrt(2), error 1. Seed 9 has no partner."""
    own, other = {0: 10.0, 1: 50.0, 9: 0.0}, {1: 53.0, 0: 11.0}
    assert paired(own, other) == pytest.approx((-2, 1))
    assert paired(own, own) == (0.0, 0.0)


def test_two_standard_errors():
    assert exceeds(-2.1, 1.0) and exceeds(2.1, 1.0)
    assert not exceeds(2.0, 1.0) and not exceeds(100.0, math.nan)
    assert not exceeds(0.0, 0.0) and exceeds(0.1, 0.0)


def test_best_and_worst_must_stand_out():
    """Differences of best to next: -1 and -1.2, mean -1.1, error 0.1. Worst to next: 1 and -0.8, error 0.9."""
    columns = {"best": {0: 1.0, 1: 2.0}, "next": {0: 2.0, 1: 3.2}, "worst": {0: 3.0, 1: 2.4}}
    assert marked(columns) == ("best", None)
    # Unsteady: -1 and +0.8.
    columns["best"] = {0: 1.0, 1: 4.0}
    assert marked(columns)[0] is None
    assert marked({"alone": {0: 1.0, 1: 2.0}}) == (None, None)
    assert marked({"a": {0: 1.0}, "b": {0: 9.0}}) == (None, None), "one seed marks nothing"


def test_a_row_without_all_seeds_is_not_marked():
    columns = {"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}, "short": {0: 0.0}}
    assert marked(columns) == ("a", "b")


def test_what_chance_alone_marks():
    """Student's t beyond 2 with 1, 2 and 4 degrees of freedom, from closed forms; the normal's 4.55% in the limit."""
    assert by_chance(2) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-4)
    assert by_chance(3) == pytest.approx(1 - 2 / math.sqrt(6), abs=1e-4)
    assert by_chance(5) == pytest.approx(0.1161, abs=1e-4)
    assert by_chance(2001) == pytest.approx(0.0455, abs=3e-4)
    assert math.isnan(by_chance(1))


# Cost


def round_files(number: int, **training: Any) -> RoundFiles:
    mixture = {"total_tokens": 900, "domains": {"x": {"size": 20}, "y": {"size": 13}}}
    return RoundFiles(number, mixture=mixture, training=training)


def test_trained_tokens_of_an_inner_loop():
    """33 rows in batches of 8 are 5 steps per pass: 10 steps are two passes, 3 steps 3/5 of one."""
    assert trained_tokens(round_files(0, steps=10), 8) == 1800
    assert trained_tokens(round_files(0, steps=3), 8) == 540
    # A steered one says what it drew.
    assert trained_tokens(round_files(0, steps=10, observed={"trained_tokens": {"x": 700, "y": 41}}), 8) == 741
    assert trained_tokens(round_files(0), 8) is None


def test_training_run_equivalents():
    """(2000 + 500) / 2000 + (4 + 1.5 + 2) / 10 = 1.25 + 0.75."""
    joint = run("joint", 0, 1, 1)
    own = run("m", 0, 1, 1, trained_tokens=2500.0, influence_seconds=4.0, evaluation_seconds=1.5, measuring_seconds=2.0)
    assert training_run_equivalents(own, joint) == pytest.approx(2)
    assert training_run_equivalents(joint, joint) == pytest.approx(1.1), "its own evaluations"
    assert training_run_equivalents(replace(own, evaluation_seconds=None), joint) is None
    assert own.seconds == 15.5, "measurements are within the inner loops"


def files_of_a_run() -> RunFiles:
    """A proxy that must not be the result, though it is the lowest on the reference sets, then two results."""

    def one(number: int, q: float, is_result: bool, **more: Any) -> RoundFiles:
        evaluation = {"reference_loss": {"a": q}, "test_loss": {"a": 10 - q}, "Q": q, "Q_test": 10 - q}
        mixture = {
            "total_tokens": 100 + number,
            "domains": {"x": {"size": 16, "ratio": 1.0, "share": 0.5}, "y": {"size": 16, "ratio": 2.0, "share": 0.5}},
        }
        training = {"steps": 4, "seconds": 3.0, "measuring_seconds": 0.5, "is_result": is_result}
        return RoundFiles(number, mixture=mixture, evaluation=evaluation, training=training, **more)

    def took(round: int | None, seconds: float, phase: str = "reference losses") -> dict[str, Any]:
        return {"round": round, "phase": phase, "values": {"seconds": seconds}}

    return RunFiles(
        folder=Path("nowhere"),
        config={"train": {"global_batch_size": 16}},
        rounds=[
            one(0, 1.0, False),
            one(1, 3.0, True, influence={"seconds": {"covariances": 2.0, "gradients": 5.0}}),
            one(2, 4.0, True),
        ],
        metrics=[took(None, 1.0), took(0, 9.0), took(0, 2.0), took(1, 2.0), took(2, 2.0),
                 took(1, 50.0, "test losses"), took(0, 70.0, "train")],
    )  # fmt: skip


def test_numbers_of_a_run():
    """Result: round 1 of 0, 1, 2. Tokens: 4 steps of 2 per pass, so 2 (100 + 101 + 102). Repeated events count once."""
    found = numbers_of(files_of_a_run(), "m", 7)
    assert (found.row, found.seed, found.Q, found.Q_test, found.tokens) == ("m", 7, 3.0, 7.0, 101)
    assert found.ratios == {"x": 1.0, "y": 2.0} and found.inner_loops == 3
    assert found.trained_tokens == 606
    assert (found.training_seconds, found.measuring_seconds) == (9.0, 1.5)
    assert (found.evaluation_seconds, found.influence_seconds) == (7.0, 7.0)


def test_mean_of_tries():
    """Rounds 1 and 2 count, at half of what all three cost; 3 and 4 on the reference sets, 7 and 6 on the test sets."""
    files = files_of_a_run()
    tries = replace(files, config={**files.config, "mixing": {"method": "random"}})
    found = mean_of_tries(tries, numbers_of(tries, "random", 7))
    assert found is not None and (found.row, found.seed, found.inner_loops) == ("mean_of_random", 7, 1)
    assert (found.Q, found.reference_loss, found.Q_test, found.test_loss) == (3.5, {"a": 3.5}, 6.5, {"a": 6.5})
    assert found.ratios == {"x": 1.0, "y": 2.0} and found.shares == {"x": 0.5, "y": 0.5} and found.tokens in (101, 102)
    assert (found.trained_tokens, found.training_seconds, found.evaluation_seconds) == (303, 4.5, 3.5)
    assert mean_of_tries(files, numbers_of(files, "m", 7)) is None, "ideal's rounds follow from each other"
    alone = replace(tries, rounds=tries.rounds[:2])
    assert mean_of_tries(alone, numbers_of(alone, "random", 7)) is None, "one result is no mean"


def test_the_worst_of_a_mean_of_tries_is_the_mean_of_the_worst():
    """Each try's highest loss is 9, of another capability: their mean is 9, where the mean losses' highest is 5."""
    files = files_of_a_run()
    losses = [{"a": 1.0, "b": 9.0}, {"a": 9.0, "b": 1.0}]
    rounds = [
        replace(this, evaluation={**this.evaluation, "reference_loss": found, "test_loss": found})
        for this, found in zip(files.results, losses, strict=True)
    ]
    tries = replace(files, config={**files.config, "mixing": {"method": "random"}}, rounds=[files.rounds[0], *rounds])
    best = numbers_of(tries, "random", 7)
    found = mean_of_tries(tries, best)
    assert found is not None and found.reference_loss == {"a": 5.0, "b": 5.0}
    assert found.worst("test_loss") == found.worst("reference_loss") == best.worst("test_loss") == 9.0


def test_what_is_not_recorded_is_not_guessed():
    files = files_of_a_run()
    found = numbers_of(replace(files, metrics=files.metrics[1:]), "m", 7)
    assert found.evaluation_seconds is None and found.seconds is None
    assert training_run_equivalents(found, numbers_of(files, "joint", 7)) is None


# The leaderboard


@pytest.fixture
def content() -> dict[str, Any]:
    """joint, a method that grew to 1.2 and 1.3 times joint's tokens, its control, and a third in one seed only."""
    runs = [
        run("joint", 0, 2.0, 4.0),
        run("joint", 1, 3.0, 5.0),
        run("m", 0, 1.0, 3.0, tokens=1200, ratios={"x": 1.0, "y": 1.0}),
        run("m", 1, 1.8, 4.2, tokens=1300, ratios={"x": 1.0, "y": 2.0}),
        run("joint_as_m", 0, 1.5, 3.5, tokens=1200),
        run("joint_as_m", 1, 2.5, 4.5, tokens=1300),
        run("late", 0, 9.0, 7.0),
    ]
    found = leaderboard(runs, {"joint_as_m": "m"}, {"late, seed 1": "diverged"}, 6)
    return dict(json.loads(json.dumps(found, allow_nan=False)))


def row(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(found) for found in content["rows"] if found["row"] == name)


def test_rows_by_average_and_controls_beside_their_method(content):
    assert [found["row"] for found in content["rows"]] == ["m", "joint_as_m", "joint", "late"]
    assert content["losses"] == "test" and content["seeds"] == [0, 1]
    assert (content["finished"], content["expected"]) == (5, 6)


def test_losses_of_a_row(content):
    """m: averages 2 and 3; worst 3 and 4.2; against joint -1 and -1; b: -1 and -0.8."""
    found = row(content, "m")["losses"]
    assert found["average"] == pytest.approx({"mean": 2.5, "error": 0.5, "change": -1.0, "change_error": 0.0})
    assert found["worst"] == pytest.approx({"mean": 3.6, "error": 0.6, "change": -0.9, "change_error": 0.1})
    assert found["capability b"]["change"] == pytest.approx(-0.9)
    assert row(content, "late")["losses"]["average"]["error"] is None, "one seed"
    assert row(content, "m")["against_control"] == pytest.approx({"mean": -0.5, "error": 0.0})


def test_volume_and_mixture_of_a_row(content):
    found = row(content, "m")
    assert found["volume"] == pytest.approx({"mean": 1.25, "error": 0.05})
    assert found["ratios"]["y"] == pytest.approx({"mean": 1.5, "error": 0.5})
    assert found["equivalents"] == pytest.approx({"mean": 1.1, "error": 0.0})


def test_a_mean_of_tries_stands_beside_its_method():
    runs = [run("joint", 0, 2.0, 4.0), run("random", 0, 1.0, 3.0), run("mean_of_random", 0, 9.0, 9.0)]
    content = leaderboard(runs, {"mean_of_random": "random"}, {}, 2)
    assert [found["row"] for found in content["rows"]] == ["random", "mean_of_random", "joint"]
    assert content["finished"] == 2 and "against_control" not in row(content, "random")
    assert tables.losses_table(content).rows[1][:2] == ["random, mean of its tries", "9.0000"]
    assert any("the cost of one" in line for line in tables.explained(content))


def test_reference_sets_where_a_test_set_is_missing():
    runs = [run("joint", 0, 2.0, 4.0), run("m", 0, 1.0, 3.0, test_loss={"a": 1.0}, Q_test=None)]
    content = leaderboard(runs, {}, {}, 2)
    assert content["losses"] == "reference" and row(content, "joint")["losses"]["average"]["mean"] == 4.0
    assert any("reference sets, on which each run chose" in line for line in tables.explained(content))


def test_an_empty_leaderboard_says_so():
    content = leaderboard([], {}, {}, 6)
    assert "So far: 0 of 6 runs" in tables.markdown(content) and tables.as_csv(content) == ""


def test_tables(content):
    losses = tables.losses_table(content)
    assert losses.header == ["method", "average", "against joint", "worst", "a", "b"]
    assert losses.rows[0] == ["m", "2.5000 ± 0.5000 (best)", "-1.0000 ± 0.0000", "3.6000 ± 0.6000 (best)",
                              "1.4000 ± 0.4000 (best)", "3.6000 ± 0.6000 (best)"]  # fmt: skip
    assert losses.rows[1][0] == "joint x 1.25 (as m)" and losses.rows[2][2] == "-"
    assert losses.rows[3][1:3] == ["8.0000", "+5.0000 ± -"]
    assert losses.rows[2][1].endswith("(worst)"), "late has not all seeds"
    assert tables.summary_table(content).rows[0] == [*losses.rows[0][:4], "1.10 ± 0.00"]
    assert [line[0] for line in tables.changes_table(content).rows] == ["m", "joint x 1.25 (as m)", "late"]
    assert tables.cost_table(content).rows[0] == ["m", "2", "1", "1.10 ± 0.00", "11.0 s", "1.250 ± 0.050"]
    assert tables.mixture_table(content, "ratios").rows[0] == ["m", "1.000 ± 0.000", "1.500 ± 0.500"]


def test_markdown_and_csv(content):
    text = tables.markdown(content)
    assert "| m | 2.5000 ± 0.5000 (best) | -1.0000 ± 0.0000 |" in text
    assert "Failed: late, seed 1: diverged" in text and "So far: 5 of 6 runs" in text
    assert "m against joint with as many trained tokens, seed by seed: average loss -0.5000 ± 0.0000." in text
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(content))))
    assert [line["row"] for line in lines] == ["m", "joint_as_m", "joint", "late"]
    assert float(lines[0]["average change"]) == -1 and float(lines[0]["ratio y"]) == 1.5
    assert lines[3]["average error"] == "" and float(lines[0]["loss b error"]) == pytest.approx(0.6)


def test_a_name_that_would_break_a_table():
    text = tables.as_markdown(tables.Table("", ["loss", "a|b"], [["m", "1"]]))
    assert text.splitlines()[0] == "| loss | a\\|b |"


def test_page_and_figures(content, tmp_path):
    """What a person sees holds the tables' numbers, whatever the names are."""
    text = json.dumps(content).replace('"late', '"<late>').replace('"m"', '"m & $x$"')
    write_leaderboard(tmp_path, json.loads(text))
    page = (tmp_path / "leaderboard.html").read_text()
    assert "&lt;late&gt;" in page and "<late>" not in page and "m &amp; $x$" in page
    assert "2.5000 ± 0.5000 (best)" in page and page.count("data:image/svg+xml;base64,") == 2
    assert 'href="joint/seed_1/report.html"' in page and 'href="%3Clate%3E/seed_0/report.html"' in page
    for name in ("score_and_cost", "mixtures"):
        assert (tmp_path / f"figures/{name}.png").stat().st_size > 5000
    assert {"leaderboard.json", "leaderboard.csv", "leaderboard.md"} <= {path.name for path in tmp_path.iterdir()}
    clear_leaderboard(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_points_of_the_score_figure(content):
    """joint at its cost of 1.1 and its average loss of 3.5; one row of a seed without errors."""
    axes = draw(content)["score_and_cost"].axes[0]
    points = [point for line in axes.lines for point in np.transpose(line.get_data()).astype(float)]
    for expected in [(1.1, 3.5), (1.1, 2.5), (1.1, 3.0), (1.1, 8.0)]:
        assert any(np.allclose(point, expected) for point in points)
    names = [text.get_text() for text in axes.texts]
    assert sorted(names) == ["joint", "joint x 1.25 (as m)", "late", "m"]


def test_a_leaderboard_without_costs_or_rows_still_has_a_page(tmp_path):
    write_leaderboard(tmp_path, leaderboard([], {}, {}, 4))
    assert "So far: 0 of 4 runs" in (tmp_path / "leaderboard.html").read_text()
    unknown = [run("joint", 0, 1.0, 2.0, training_seconds=None)]
    content = leaderboard(unknown, {}, {}, 4)
    assert list(draw(content)) == ["mixtures"]
    assert tables.cost_table(content).rows[0][3:5] == ["-", "-"]


# Benchmarks


def scored(run: RunNumbers, **scores: float) -> RunNumbers:
    ways = {"metric": "acc,none", "higher_is_better": True, "rows": 10, "settings": {"limit": None}}
    return replace(run, benchmarks={task: {"score": score, **ways} for task, score in scores.items()})


def with_benchmarks() -> dict[str, Any]:
    """gsm8k over seeds: joint .2 .3, m .5 .5; m lacks bbh in seed 1, so its average is that of seed 0."""
    runs = [
        scored(run("joint", 0, 2.0, 4.0), gsm8k=0.2, bbh=0.6),
        scored(run("joint", 1, 3.0, 5.0), gsm8k=0.3, bbh=0.8),
        scored(run("m", 0, 1.0, 3.0), gsm8k=0.5, bbh=0.7),
        scored(run("m", 1, 1.8, 4.2), gsm8k=0.5),
        run("unscored", 0, 1.0, 1.0),
    ]
    return dict(json.loads(json.dumps(leaderboard(runs, {}, {}, 6), allow_nan=False)))


def test_benchmarks_over_seeds():
    found = with_benchmarks()["benchmarks"]
    assert found["rows"]["m"]["gsm8k"] == pytest.approx(
        {"mean": 0.5, "error": 0.0, "change": 0.25, "change_error": 0.05}
    )
    assert found["rows"]["joint"]["average"] == pytest.approx(
        {"mean": 0.475, "error": 0.075, "change": 0.0, "change_error": 0.0}
    )
    assert found["rows"]["m"]["average"]["mean"] == pytest.approx(0.6)
    assert found["rows"]["m"]["average"]["change"] == pytest.approx(0.2) and "unscored" not in found["rows"]
    assert found["rows"]["m"]["average"]["error"] is None, "one seed"
    # .25 with an error of .05 stands out; bbh and the average have one seed in common with joint's, and no error.
    assert found["best"] == {"average": None, "gsm8k": "m", "bbh": None}


def test_benchmarks_in_tables():
    content = with_benchmarks()
    table = tables.scores_table(content, "benchmarks")
    assert table.header == ["score", "average", "gsm8k", "bbh"]
    assert dict(zip([row[0] for row in table.rows], table.rows, strict=True))["m"][2] == "0.5000 ± 0.0000 (best)"
    changes = tables.score_changes_table(content, "benchmarks")
    assert changes.rows == [["m", "+0.2000 ± -", "+0.2500 ± 0.0500", "+0.1000 ± -"]]
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(tables.as_csv(content)))}
    assert float(lines["m"]["score gsm8k"]) == 0.5 and float(lines["m"]["score gsm8k change"]) == 0.25
    assert lines["unscored"]["score gsm8k"] == ""


def with_scores(tests: bool = True) -> dict[str, Any]:
    """math over seeds: joint .2 .3, m .5 .7; its average of two only where both are known."""
    found = [
        ("joint", 0, {"math": 0.2, "code": 0.6}),
        ("joint", 1, {"math": 0.3, "code": 0.8}),
        ("m", 0, {"math": 0.5, "code": 0.6}),
        ("m", 1, {"math": 0.7, "code": 0.7}),
    ]
    runs = [
        run(row, seed, 2.0, 4.0, reference_score={name: value / 2 for name, value in scores.items()},
            test_score=scores if tests else {"math": scores["math"]})
        for row, seed, scores in found
    ]  # fmt: skip
    runs.append(run("unscored", 0, 1.0, 1.0))
    return dict(json.loads(json.dumps(leaderboard(runs, {}, {}, 6), allow_nan=False)))


def test_capability_scores_over_seeds(tmp_path):
    """math: m - joint is .3 and .4; the averages are .4, .55 and .55, .7, so they differ by .15 in both seeds."""
    content = with_scores()
    found = content["scores"]
    assert found["kind"] == "test" and "unscored" not in found["rows"]
    assert found["rows"]["m"]["math"] == pytest.approx(
        {"mean": 0.6, "error": 0.1, "change": 0.35, "change_error": 0.05}
    )
    assert found["rows"]["m"]["average"] == pytest.approx(
        {"mean": 0.625, "error": 0.075, "change": 0.15, "change_error": 0.0}, abs=1e-12
    )
    assert found["best"] == {"average": "m", "math": "m", "code": None}
    assert with_scores(tests=False)["scores"]["kind"] == "reference"
    assert with_scores(tests=False)["scores"]["rows"]["m"]["math"]["mean"] == pytest.approx(0.3)
    table = tables.scores_table(content, "scores")
    assert [row[:2] for row in table.rows] == [["joint", "0.4750 ± 0.0750"], ["m", "0.6250 ± 0.0750 (best)"]]
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(tables.as_csv(content)))}
    assert float(lines["m"]["capability score math change"]) == pytest.approx(0.35)
    assert lines["unscored"]["capability score math"] == ""
    write_leaderboard(tmp_path, content)
    for name in ("leaderboard.html", "leaderboard.md"):
        text = (tmp_path / name).read_text()
        assert "+0.3500 ± 0.0500" in text and "answers on the test sets" in text and "Benchmarks" not in text
    assert "0.6250 ± 0.0750 (best)" in console_tables(tmp_path)


def test_a_leaderboard_without_scores_says_nothing_of_them(content):
    assert content["scores"]["rows"] == {} and tables.scores_in_words(content) == []
    before = {key: value for key, value in content.items() if key != "scores"}
    assert tables.markdown(before) == tables.markdown(content) and "## Scores" not in tables.markdown(content)


def test_scores_of_tries_are_means_where_all_have_them():
    files = files_of_a_run()
    for this, value in zip(files.rounds[1:], (0.2, 0.6), strict=True):
        this.evaluation.update(reference_score={"a": value}, test_score={})
    best = numbers_of(files, "m", 7)
    assert best.reference_score == {"a": 0.2} and best.test_score == {}
    random = replace(files, config={**files.config, "mixing": {"method": "random"}})
    mean = mean_of_tries(random, best)
    assert mean is not None and mean.reference_score == pytest.approx({"a": 0.4})
    del files.rounds[2].evaluation["reference_score"]
    mean = mean_of_tries(random, best)
    assert mean is not None and mean.reference_score == {}


def test_a_task_where_less_is_better_and_one_run_differently():
    cases = [(row, wiki, seed) for row, wiki in (("joint", 9.0), ("m", 5.0)) for seed in (0, 1)]
    runs = [scored(run(row, seed, 1, 1), wiki=wiki, other=0.5) for row, wiki, seed in cases]
    for each in runs:
        each.benchmarks["wiki"]["higher_is_better"] = False
    runs[0].benchmarks["other"] = {**runs[0].benchmarks["other"], "rows": 3}
    content = leaderboard(runs, {}, {}, 4)
    assert content["benchmarks"]["best"] == {"wiki": "m"}
    assert "other was not run in the same way on all models, so it is left out here." in tables.markdown(content)


def test_what_may_be_compared() -> None:
    def found(**settings: object) -> dict[str, object]:
        return {"settings": settings, "metric": "acc,none", "rows": 5, "score": 0.1}

    models = [
        {"same": found(limit=None), "limited": found(limit=None), "alone": found(limit=3)},
        {"same": found(limit=None), "limited": found(limit=10)},
        {"same": {**found(limit=None), "score": 0.9, "seconds": 3.0}},
    ]
    assert comparable(models) == (["same", "alone"], ["limited"])
    assert comparable([{"t": found()}, {"t": {**found(), "rows": 4}}]) == ([], ["t"])
    assert comparable([{}, {}]) == ([], [])
