"""Runs whose models answer and are scored: the same on one process and two, resumed, chosen by, refused."""

import json
import math
from pathlib import Path
from typing import Any

import miniature
import pytest
from miniature import DOMAINS, REFERENCE, TEST, arguments, read, run, run_on_ranks

from ideal.data import ScoredRow, ScoredSet
from ideal.errors import UserError
from ideal.report import final_summary, load_run
from ideal.scores import Question, choice_line, judged, questions, standard_error, summary
from ideal.scoring.sandbox import CannotIsolate
from ideal.scoring.scorers import Task

SCORERS = {"math": "number", "reasoning": "exact", "safety": "option"}
FEW: dict[str, Any] = {"data__max_examples": 16, "mixing__rounds": 1, "evaluation__max_new_tokens": 8}
SCORED = {**FEW, **{f"data__domains__{name}__scorer": scorer for name, scorer in SCORERS.items()}}
ROUNDS = {**SCORED, "evaluation__generate": "rounds"}


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """The base model's, then those of the rounds."""
    return [read(path) for path in [folder / "base/evaluation.json", *sorted(folder.glob("round_*/evaluation.json"))]]


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one process; the round is chosen by the score."""
    output = tmp_path_factory.mktemp("scored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        miniature.quick(patch)
        assert run(data, output, **ROUNDS, evaluation__choose_by="score") == 0
    return output


def test_evaluations_hold_scores(scored):
    for content in evaluations(scored):
        assert list(content["reference_score"]) == list(DOMAINS)
        assert list(content["test_score"]) == ["math", "reasoning"]
        assert content["score"] == pytest.approx(sum(content["reference_score"].values()) / 3)
        assert content["score_test"] is None, "safety counts and has no test set"
    assert max(e["score"] for e in evaluations(scored)) > 0
    best = read(scored / "state.json")["best_round"]
    found = [e["score"] for e in evaluations(scored)[1:]]
    assert best == found.index(max(found))
    summary_text = final_summary(load_run(scored))
    assert "core on the reference sets" in summary_text and "lowest Q" not in summary_text
    events = [json.loads(line) for line in (scored / "metrics.jsonl").read_text().splitlines()]
    of_scores = [event for event in events if event["phase"] == "scores"]
    assert [event["round"] for event in of_scores] == [None, 0, 1] and of_scores[0]["values"]["seconds"] > 0


def test_answers_are_kept_and_agree_with_the_scores(scored, data):
    for folder in (scored / "base", scored / "round_00"):
        lines, content = answers(folder), read(folder / "evaluation.json")
        assert len(lines) == 3 * REFERENCE + 2 * TEST
        for kind in ("reference", "test"):
            for name, mean in content[f"{kind}_score"].items():
                own = [line["score"] for line in lines if (line["set"], line["capability"]) == (kind, name)]
                assert mean == pytest.approx(sum(own) / len(own))
                error = math.sqrt(mean * (1 - mean) / (len(own) - 1))
                assert content[f"{kind}_score_error"][name] == pytest.approx(error)
        rows = [json.loads(line) for line in (data / "math/reference.jsonl").read_text().splitlines()]
        of_math = [line for line in lines if line["capability"] == "math" and line["set"] == "reference"]
        found = [(line["row"], line["prompt"], line["expected"]) for line in of_math]
        assert found == [(number, row["question"], row["answer"]) for number, row in enumerate(rows, 1)]


def test_two_processes_give_the_same(scored, data, tmp_path):
    done = run_on_ranks(data, tmp_path / "run", **ROUNDS, evaluation__choose_by="score")
    assert done.returncode == 0, done.stderr[-3000:]
    assert answers(tmp_path / "run/base") == answers(scored / "base")
    assert evaluations(tmp_path / "run")[0]["reference_score"] == evaluations(scored)[0]["reference_score"]
    for number in (0, 1):
        one, two = (answers(folder / f"round_{number:02d}") for folder in (scored, tmp_path / "run"))
        assert [line["row"] for line in one] == [line["row"] for line in two]
        # Training differs by rounding between 1 and 2 processes, so a close call may turn.
        assert sum(a == b for a, b in zip(one, two, strict=True)) >= 0.9 * len(one)


def test_losses_and_steps_are_those_of_a_run_without_scores(scored, data, tmp_path, quick):
    assert run(data, tmp_path / "run", **FEW) == 0
    for plain, other in zip(evaluations(tmp_path / "run"), evaluations(scored), strict=True):
        assert set(plain) == {"reference_loss", "test_loss", "Q", "Q_test"}
        assert {key: other[key] for key in plain} == plain
    name = "round_01/mixture.json"
    assert read(tmp_path / "run" / name) == read(scored / name)
    assert not [*(tmp_path / "run").rglob("answers.jsonl")]


def test_killed_before_and_after_the_answers_are_written(scored, data, tmp_path, quick, monkeypatch):
    class Killed(BaseException):
        pass

    from ideal.rounds import evaluating

    real, seen = {"score_model": evaluating.score_model, "write_json_lines": evaluating.write_json_lines}, set()

    def dying(name: str, after: bool) -> Any:
        def call(*words: Any, **more: Any) -> Any:
            place = (name, str(words[0] if after else words[2]))
            if after:
                real[name](*words, **more)
            if place not in seen:
                seen.add(place)
                raise Killed
            return None if after else real[name](*words, **more)

        return call

    monkeypatch.setattr(evaluating, "score_model", dying("score_model", after=False))
    monkeypatch.setattr(evaluating, "write_json_lines", dying("write_json_lines", after=True))
    attempts = 0
    while attempts < 10:
        attempts += 1
        try:
            assert run(data, tmp_path / "run", **ROUNDS, evaluation__choose_by="score") == 0
            break
        except Killed:
            continue
    assert attempts == 7, "twice for each of three models"
    assert evaluations(tmp_path / "run") == evaluations(scored)
    for folder in ("base", "round_00", "round_01"):
        assert answers(tmp_path / "run" / folder) == answers(scored / folder)


def test_the_best_round_is_the_one_of_the_highest_score(data, tmp_path, quick, monkeypatch, capsys):
    """Of scores 0.5, 0.9, 0.9, 0.95 the second: the third is no better, and patience has an end."""
    planted = {None: 0.2, 0: 0.5, 1: 0.9, 2: 0.9, 3: 0.95}

    def score_model(run: Any, model: Any, description: str, here: Any) -> dict[str, Any]:
        value = planted[None if here is None else here.number]
        same = dict.fromkeys(DOMAINS, value)
        return {"reference_score": same, "test_score": {}, "score": value, "score_test": None}

    def losses(run: Any, model: Any, description: str, number: int | None) -> dict[str, Any]:
        """By Q the first round would be the best."""
        same = dict.fromkeys(DOMAINS, float(number or 0) + 1)
        return {"reference_loss": same, "test_loss": {}, "Q": same["math"], "Q_test": None}

    monkeypatch.setattr("ideal.rounds.evaluating.score_model", score_model)
    monkeypatch.setattr("ideal.rounds.evaluating.evaluate_model", losses)
    few = {**ROUNDS, "mixing__rounds": 3, "mixing__patience": 1, "evaluation__choose_by": "score"}
    assert run(data, tmp_path / "run", **few) == 0
    state = read(tmp_path / "run/state.json")
    assert state["best_round"] == 1 == read(tmp_path / "run/mixture.json")["round"]
    assert state["reason"] == "the score of round 2 (0.9000) is not above round 1's (0.9000)"
    out = capsys.readouterr().out
    assert "Best round: 1 of rounds 0 to 2, by the score on the reference sets." in out
    assert "Score on the reference sets: base model 0.2000 -> start 0.5000 -> best 0.9000" in out


def test_scores_at_the_end_alone(data, tmp_path, quick):
    assert run(data, tmp_path / "run", **SCORED, evaluation__generate="end", evaluation__score_examples=4) == 0
    best = read(tmp_path / "run/state.json")["best_round"]
    base, *rounds = evaluations(tmp_path / "run")
    assert "score" in base and ["score" in e for e in rounds] == [number == best for number in (0, 1)]
    drawn = [(line["set"], line["capability"]) for line in answers(tmp_path / "run/base")]
    assert len(drawn) == 5 * 4 and {drawn.count(each) for each in drawn} == {4}
    assert (tmp_path / "run/model/model.safetensors").is_file()


# What is refused, in one line and before anything is loaded


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"data__domains__math__scorer": "numbr"}, "math.scorer: there is no scorer 'numbr'; did you mean number?"),
        ({**FEW, "evaluation__generate": "end"}, "evaluation.generate: no capability has a scorer; give one, as "
                                                 "data.domains.math.scorer"),
        ({**SCORED, "evaluation__choose_by": "score"}, "evaluation.choose_by: score needs those of every round; set "
                                                       "evaluation.generate to rounds"),
        ({**ROUNDS, "data__domains__math__scorer": "unit_tests"}, "data.domains.math.scorer: unit_tests runs code that "
         "the model has written, isolated from all else; set evaluation.run_code to true to allow it, or leave the"),
        ({**ROUNDS, "data__domains__safety__scorer": "null", "evaluation__choose_by": "score"},
         "data.domains.safety.scorer: is missing, and evaluation.choose_by: score needs one for every capability"),
        ({**ROUNDS, "evaluation__generate": "always"}, "evaluation.generate: 'always': "),
    ],
)  # fmt: skip
def test_refusals(data, tmp_path, capsys, given, line):
    assert run(data, tmp_path / "run", **given) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_capability_without_weight_needs_no_scorer(data, tmp_path, monkeypatch):
    given = {**ROUNDS, "data__domains__safety__scorer": "null", "data__domains__safety__weight": 0}
    words = arguments(data, tmp_path, **given, evaluation__choose_by="score")
    from ideal.config import read_command
    from main import ARGUMENTS

    assert read_command(ARGUMENTS, words).config.evaluation.choose_by == "score"


def test_where_code_cannot_be_isolated_nothing_begins(data, tmp_path, capsys, monkeypatch):
    def probe() -> None:
        raise CannotIsolate("there are no namespaces")

    monkeypatch.setattr("ideal.preparation.probe", probe)
    given = {**ROUNDS, "data__domains__math__scorer": "unit_tests", "evaluation__run_code": "true"}
    assert run(data, tmp_path / "run", **given) == 2
    error = capsys.readouterr().err
    line = "evaluation.run_code: code cannot be isolated on this machine, so none is run: there are no namespaces"
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


# The parts


def question(scorer: str, reference: str = "4", kind: str = "reference", row: int = 1, **fields: Any) -> Question:
    return Question(kind, "a", scorer, ScoredRow(row, Task("2+2?", reference, fields), [1]))


def test_rows_are_drawn_by_the_seed():
    rows = [question("number", row=number).row for number in range(20)]
    sets = [ScoredSet("reference", "a", "number", rows), ScoredSet("test", "a", "number", rows)]
    assert [q.row.row for q in questions(sets, None, 0)] == [*range(20), *range(20)]
    few = [[(q.kind, q.row.row) for q in questions(sets, 5, seed)] for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and [kind for kind, _ in few[0]] == ["reference"] * 5 + ["test"] * 5
    assert few[0] == sorted(few[0])


def test_answers_are_judged():
    asked = [question("number"), question("exact", "Four."), question("number")]
    lines = judged(asked, {0: "it is 4", 1: "five"}, "")
    assert {place: (line["score"], line["detail"]) for place, line in lines.items()} == {0: (1, "4"), 1: (0, "five")}


def test_code_that_can_no_longer_be_isolated_ends_the_run(monkeypatch):
    def run_isolated(source: str) -> None:
        raise CannotIsolate("no more")

    monkeypatch.setattr("ideal.scoring.scorers.run_isolated", run_isolated)
    with pytest.raises(UserError, match="evaluation.run_code: code cannot be isolated .*no more"):
        judged([question("unit_tests", tests="assert True")], {0: "x = 1"}, "")


def test_the_first_of_the_likeliest_choices_counts():
    asked = question("choice", choices=["a", "b", "c"], label=1)
    assert [choice_line(asked, values)["score"] for values in ([-3, -1, -2], [-1, -1, -2], [-3, -1, -1])] == [1, 0, 1]
    assert choice_line(asked, [-3, -1, -2])["answer"] == "b"


def test_summary_by_hand():
    lines = [
        {"set": "reference", "capability": name, "score": value}
        for name, value in [("a", 1.0), ("a", 0.0), ("a", 1.0), ("a", 1.0), ("b", 0.5)]
    ]
    content = summary([*lines, {"set": "test", "capability": "b", "score": 1.0}], {"a": 0.5, "b": 0.5, "c": 0.0})
    assert content == {
        "reference_score": {"a": 0.75, "b": 0.5},
        "reference_score_error": {"a": pytest.approx(math.sqrt(0.75 * 0.25 / 3)), "b": None},
        "score": 0.625,
        "test_score": {"b": 1.0},
        "test_score_error": {"b": None},
        "score_test": None,
    }
    assert standard_error([1.0, 1.0]) == 0 and summary([], {})["reference_score"] == {}
