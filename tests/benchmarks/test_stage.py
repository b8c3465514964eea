"""Which models are evaluated on what, and what is written; the harness itself is played here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ideal.benchmarks import stage
from ideal.benchmarks.harness import Wanted
from ideal.benchmarks.stage import evaluate_models
from ideal.compare.leaderboard import RunNumbers, leaderboard
from ideal.compare.writing import write_leaderboard
from ideal.errors import UserError
from ideal.report import load_run

SCORES = {"sums": 0.25, "picks": 0.5}


class Played:
    """In place of the harness: notes what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.stop_after: int | None = None
        self.bonus: dict[str, float] = {}
        self.loaded: list[str] = []

        class Tasks:
            def __init__(tasks, wanted: Wanted) -> None:
                tasks.wanted = wanted

            def settings(tasks, task: str, chat: bool) -> dict[str, Any]:
                return {"limit": tasks.wanted.limit, "chat_template": chat}

            def load(tasks, task: str, chat: bool) -> None:
                self.loaded.append(task)
                if task == "absent":
                    raise UserError("absent cannot be loaded")

        monkeypatch.setattr(stage, "Tasks", Tasks)
        monkeypatch.setattr(stage, "has_chat_template", lambda model: False)
        monkeypatch.setattr(stage, "run_tasks", self.run)

    def run(self, model: Path, tasks: Any, missing: list[str], chat: bool, say: Any) -> Any:
        for task in missing:
            if self.stop_after is not None and len(self.calls) >= self.stop_after:
                raise KeyboardInterrupt
            self.calls.append((str(model), task))
            score = SCORES[task] + self.bonus.get(str(model), 0)
            settings = {**tasks.settings(task, chat), "task": task}
            yield task, {"score": score, "error": 0.1, "metric": "acc,none", "higher_is_better": True, "rows": 4,
                         "metrics": {}, "settings": settings, "seconds": 1.0}  # fmt: skip


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_model(folder: Path, weights: str = "w") -> Path:
    write(folder / "config.json", {})
    (folder / "model.safetensors").write_text(weights)
    return folder


def make_run(folder: Path, best: int = 0, weights: str = "w") -> Path:
    for number, q in enumerate([0.5, 0.4]):
        domains = {"a": {"pool": 4, "size": 4, "ratio": 1.0, "share": 1.0, "beta": 0}}
        mixture = {"round": number, "total_tokens": 9, "domains": domains}
        write(folder / f"round_{number:02d}/mixture.json", mixture)
        losses = {"reference_loss": {"a": q}, "test_loss": {"a": q}, "Q": q, "Q_test": q}
        write(folder / f"round_{number:02d}/evaluation.json", losses)
    write(folder / "mixture.json", {**mixture, "round": best})
    write(folder / "state.json", {"finished": True, "best_round": best})
    (folder / "config.yaml").write_text("mixing: {method: ideal, budget: fixed}\n")
    make_model(folder / "model", weights)
    return folder


def tasks(*names: str, **more: Any) -> Wanted:
    return Wanted(names or ("sums", "picks"), **more)


def test_results_of_a_run_stand_beside_it_and_in_its_report(tmp_path: Path, played: Played) -> None:
    run = make_run(tmp_path / "run", best=1)
    evaluate_models([run], tasks())
    content = json.loads((run / "benchmarks.json").read_text())
    assert content["round"] == 1 and {t: e["score"] for t, e in content["tasks"].items()} == SCORES
    page = (run / "report.html").read_text()
    assert "Benchmarks of round 1" in page and "0.2500 ± 0.1000" in page and "acc,none" in page
    assert "benchmarks.json" in page


def test_the_same_command_goes_on_where_it_stopped(tmp_path: Path, played: Played) -> None:
    run = make_run(tmp_path / "run")
    played.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate_models([run], tasks())
    played.stop_after = None
    evaluate_models([run], tasks())
    evaluate_models([run], tasks())
    assert played.calls == [(str(run / "model"), "sums"), (str(run / "model"), "picks")]


def test_what_is_run_again(tmp_path: Path, played: Played) -> None:
    """Other settings: that task alone. Another model: all of it, and nothing is left of the old one's results."""
    model = make_model(tmp_path / "model")
    evaluate_models([model], tasks())
    evaluate_models([model], tasks("sums", limit=2))
    assert [task for _, task in played.calls] == ["sums", "picks", "sums"]
    (model / "model.safetensors").write_text("v")
    evaluate_models([model], tasks("sums"))
    assert len(played.calls) == 4
    assert set(json.loads((model / "benchmarks.json").read_text())["tasks"]) == {"sums"}


def test_nothing_is_run_where_a_task_cannot_be_loaded(tmp_path: Path, played: Played) -> None:
    with pytest.raises(UserError, match="absent cannot be loaded"):
        evaluate_models([make_model(tmp_path / "model")], tasks("sums", "absent"))
    assert not played.calls and played.loaded == ["sums", "absent"]


def test_scores_of_another_round_are_not_shown(tmp_path: Path, played: Played) -> None:
    """A run that went on after it was evaluated, and came to another best round."""
    run = make_run(tmp_path / "run", best=0)
    evaluate_models([run], tasks())
    assert set(load_run(run).benchmarks) == {"sums", "picks"}
    write(run / "mixture.json", {**json.loads((run / "mixture.json").read_text()), "round": 1})
    assert load_run(run).benchmarks == {}


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda run: (run / "model/config.json").unlink(), "model is not there any more; start it over"),
        (lambda run: write(run / "state.json", {"finished": False}), "not finished: the same command continues"),
        (lambda run: (run / "state.json").unlink(), "no model's folder .*, no run and no comparison"),
    ],
)
def test_what_cannot_be_evaluated(tmp_path: Path, played: Played, spoil: Any, text: str) -> None:
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises(UserError, match=text):
        evaluate_models([run], tasks())


def test_every_result_of_a_comparison_and_its_leaderboard(tmp_path: Path, played: Played) -> None:
    """m scores .1 and .3 above joint: .2 +- .1 paired. The average is of both tasks."""
    numbers = []
    for row in ("joint", "m"):
        for seed in (0, 1):
            run = make_run(tmp_path / row / f"seed_{seed}", weights=f"{row}{seed}")
            played.bonus[str(run / "model")] = (0.1 + 0.2 * seed) * (row == "m")
            losses = {"a": 0.5 - 0.1 * (row == "m")}
            numbers.append(RunNumbers(row, seed, losses, losses, losses["a"], losses["a"], {"a": 1.0}, {"a": 1.0}, 9, 1,
                                      9.0, 1.0, 0.0, 0.0, 0.0))  # fmt: skip
    write_leaderboard(tmp_path, {**leaderboard(numbers, {}, {"m, seed 2": "diverged"}, 6), "compare": {}})
    before = (tmp_path / "leaderboard.md").read_text()
    assert "Benchmarks" not in before
    evaluate_models([tmp_path], tasks())
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    assert len(played.calls) == 8
    assert content["benchmarks"]["rows"]["m"]["sums"] == pytest.approx(
        {"mean": 0.45, "error": 0.1, "change": 0.2, "change_error": 0.1}
    )
    text = (tmp_path / "leaderboard.md").read_text()
    assert "| m | 0.5750 ± 0.1000 | 0.4500 ± 0.1000 | 0.7000 ± 0.1000 |" in text
    assert "| m | +0.2000 ± 0.1000 | +0.2000 ± 0.1000 | +0.2000 ± 0.1000 |" in text
    assert "Failed: m, seed 2: diverged" in text and content["expected"] == 6, "all else stays"
    assert "Benchmarks" in (tmp_path / "leaderboard.html").read_text()
    shutil.rmtree(tmp_path / "m/seed_1/model")
    with pytest.raises(UserError, match="make the comparison with --keep_models all"):
        evaluate_models([tmp_path], tasks())
