"""A comparison in miniature: killed and resumed, its tables against the runs' own files, what it refuses."""

import json
import math
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import psutil
import pytest
from miniature import arguments, files, python, read, run, run_on_ranks

from ideal.compare import stage as compare
from ideal.config import dump, flat, read_command
from ideal.errors import UserError
from main import ARGUMENTS
from scripts.results import page

SEEDS = (3, 4)
# A capability without a test set would turn the tables to the reference sets.
COMPARED = {
    "stage": "compare",
    "seed": SEEDS[0],
    "compare__methods": "[ideal, odm]",
    "compare__seeds": 2,
    "compare__overrides__ideal__max_change": 0.4,
    "data__domains__safety__reference": "none",
}
ROWS = {"joint", "ideal", "odm", "joint_as_ideal"}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed when the second run's first inner loop is over, then resumed."""
    output = tmp_path_factory.mktemp("finished") / "comparison"
    process = subprocess.Popen(
        python() + arguments(data, output, **COMPARED),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=miniature.ROOT,
    )
    deadline = time.monotonic() + 200
    while not (output / f"ideal/seed_{SEEDS[0]}/round_00/influence.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    psutil.Process(process.pid).kill()
    process.wait()
    partial = read(output / "leaderboard.json")
    assert [found["row"] for found in partial["rows"]] == ["joint"], "a killed comparison shows what it has"
    assert (partial["finished"], partial["expected"]) == (1, 6)
    kept = [f"joint/seed_{SEEDS[0]}/round_00/evaluation.json", f"ideal/seed_{SEEDS[0]}/round_00/evaluation.json"]
    before = {name: files(output)[name] for name in kept}
    with pytest.MonkeyPatch.context() as patch:
        miniature.quick(patch)
        assert run(data, output, **COMPARED) == 0
    assert {name: files(output)[name] for name in kept} == before, "finished phases stay"
    return output


def row(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(dict(found) for found in content["rows"] if found["row"] == name)


def result(output: Path, name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(evaluation, mixture) of a run's result."""
    folder = output / name / f"seed_{seed}"
    number = read(folder / "mixture.json")["round"]
    evaluation = read(folder / f"round_{number:02d}/evaluation.json")
    return evaluation, read(folder / f"round_{number:02d}/mixture.json")


def test_the_base_model_is_measured_once_per_seed(finished: Path) -> None:
    """Every run has joint's numbers and seconds for it; another seed's are its own."""

    def seconds(row: str, seed: int) -> list[float]:
        lines = (finished / f"{row}/seed_{seed}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [event for event in map(json.loads, lines) if event["round"] is None]
        return [event["values"]["seconds"] for event in events if event["phase"] == "reference losses"]

    for seed in SEEDS:
        measured = read(finished / f"joint/seed_{seed}/base/evaluation.json")
        for row in ("ideal", "odm"):
            assert seconds(row, seed) == seconds("joint", seed)
            assert read(finished / f"{row}/seed_{seed}/base/evaluation.json") == measured
    assert seconds("joint", SEEDS[0]) != seconds("joint", SEEDS[1])


def test_a_row_per_method_and_one_for_the_control(finished):
    content = read(finished / "leaderboard.json")
    assert {found["row"] for found in content["rows"]} == ROWS
    assert (content["finished"], content["expected"]) == (6, 6) and not content["failed"]
    assert all(found["seeds"] == list(SEEDS) for found in content["rows"])
    assert content["losses"] == "test" and content["capabilities"] == ["math", "reasoning"]
    text = (finished / "leaderboard.md").read_text()
    assert "on the test sets" in text and "So far" not in text
    assert len((finished / "leaderboard.csv").read_text().splitlines()) == 1 + len(ROWS)


def test_losses_are_those_of_the_runs_files(finished):
    content = read(finished / "leaderboard.json")
    for name in ROWS - {"joint_as_ideal"}:
        found = row(content, name)["losses"]
        for column, value in {
            "average": lambda e: np.mean(list(e["test_loss"].values())),
            "worst": lambda e: max(e["test_loss"].values()),
            "capability math": lambda e: e["test_loss"]["math"],
        }.items():
            own, joint = (
                np.array([value(result(finished, each, seed)[0]) for seed in SEEDS]) for each in (name, "joint")
            )
            assert found[column]["mean"] == pytest.approx(own.mean())
            assert found[column]["error"] == pytest.approx(abs(own[0] - own[1]) / 2)
            assert found[column]["change"] == pytest.approx((own - joint).mean(), abs=1e-12)
            change = own - joint
            assert found[column]["change_error"] == pytest.approx(abs(change[0] - change[1]) / 2, abs=1e-12)


def test_cost_is_that_of_the_runs_files(finished):
    """Inner loops by their tokens; outer steps, reference losses and measurements by their seconds."""
    content = read(finished / "leaderboard.json")
    for name in ("joint", "ideal", "odm"):
        costs = []
        for seed in SEEDS:
            folder, joint = (finished / each / f"seed_{seed}" for each in (name, "joint"))
            training = [read(path) for path in sorted(folder.glob("round_*/training.json"))]
            mixtures = [read(path) for path in sorted(folder.glob("round_*/mixture.json"))]
            tokens = 0.0
            for one, mixture in zip(training, mixtures, strict=True):
                rows = sum(domain["size"] for domain in mixture["domains"].values())
                drawn = one["observed"].get("trained_tokens")
                tokens += sum(drawn.values()) if drawn else one["steps"] / math.ceil(rows / 8) * mixture["total_tokens"]
            aside = sum(sum(read(path)["seconds"].values()) for path in folder.glob("round_*/influence.json"))
            events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            losses = {e["round"]: e["values"]["seconds"] for e in events if e["phase"] == "reference losses"}
            aside += sum(losses.values())
            aside += sum(one["measuring_seconds"] for one in training)
            unit = read(joint / "round_00/mixture.json")["total_tokens"]  # one epoch
            costs.append(tokens / unit + aside / read(joint / "round_00/training.json")["seconds"])
        assert row(content, name)["equivalents"]["mean"] == pytest.approx(np.mean(costs))
    assert row(content, "ideal")["inner_loops"]["mean"] == 2
    assert row(content, "ideal")["equivalents"]["mean"] > row(content, "joint")["equivalents"]["mean"] + 1


def test_the_control_has_the_volume_of_what_grew(finished):
    """All of joint's ratios times one factor, to the rounding of sizes; joint itself where nothing grew."""
    for seed in SEEDS:
        joint, ideal = (result(finished, name, seed)[1] for name in ("joint", "ideal"))
        factor = ideal["total_tokens"] / joint["total_tokens"]
        folder = finished / "joint_as_ideal" / f"seed_{seed}"
        assert folder.is_dir() == (factor > 1)
        if factor > 1:
            control = read(folder / "mixture.json")
            for name, domain in control["domains"].items():
                assert domain["size"] == int(factor * joint["domains"][name]["size"] + 0.5)
    assert any((finished / "joint_as_ideal").iterdir()), "a free budget with these seeds grows"


def test_runs_are_ordinary_ones_without_models(finished):
    for name in ROWS:
        for folder in (finished / name).iterdir():
            assert read(folder / "state.json")["finished"]
            assert not (folder / "model").exists() and not (folder / "export").exists()
            assert not [*folder.glob("round_*/model")]


def test_the_same_command_again_trains_nothing(finished, data, quick, monkeypatch, capsys):
    def never(*_: Any) -> None:
        raise AssertionError("all runs are finished")

    monkeypatch.setattr(compare, "run_loop", never)
    before = read(finished / "leaderboard.json")
    assert run(data, finished, **COMPARED) == 0
    assert "compare: 6 of 6 runs are finished" in capsys.readouterr().out
    assert read(finished / "leaderboard.json") == before


def test_results_page(finished):
    """Every table of the leaderboard, and what was changed for single methods."""
    text = page({"demo": finished, "real": None}, Path("figures"))
    tables = (finished / "leaderboard.md").read_text().removeprefix("# Leaderboard").replace("\n## ", "\n### ")
    assert tables.strip() in text and "figures/demo_mixtures.svg" in text and "was not at hand" in text
    average = row(read(finished / "leaderboard.json"), "ideal")["losses"]["average"]
    change = f"{average['change']:+.4f} ± {average['change_error']:.4f}"
    assert f"| IDEAL after two rounds | 57.87 | 59.23 | {change} |" in text
    assert "ideal: max_change 0.4." in text and "Seeds 3, 4." in text
    made_by = next(line for line in text.splitlines() if line.startswith("    python main.py"))
    words = shlex.split(made_by)
    made = read_command(ARGUMENTS, words[words.index("--stage") :])
    again = made.compare
    usual = flat(dump(read_command(ARGUMENTS, ["--model.name_or_path", "MODEL", "--data.domains", "DATA"]).config))
    changed = {key for key, value in flat(dump(made.config)).items() if value != usual.get(key)}
    assert changed == {"train.global_batch_size", "train.learning_rate", "train.disable_tqdm", "mixing.rounds"}
    assert (again.methods, again.seeds) == (["ideal", "odm"], list(SEEDS))
    assert again.overrides == {"ideal": {"max_change": "0.4"}}


def test_another_configuration_is_refused_before_anything_runs(finished, data, capsys):
    before = files(finished)
    assert run(data, finished, **{**COMPARED, "train__learning_rate": 1e-4}) == 2
    assert "train.learning_rate (0.003 -> 0.0001)" in capsys.readouterr().err
    assert files(finished) == before


def test_two_processes_give_the_same(finished, data, tmp_path):
    one = {**COMPARED, "compare__methods": "[odm]", "compare__seeds": f"[{SEEDS[0]}]"}
    done = run_on_ranks(data, tmp_path / "two", **one)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compare: 2 methods x 1 seeds") == 1
    for name in ("joint", "odm"):
        found, expected = (result(folder, name, SEEDS[0]) for folder in (tmp_path / "two", finished))
        assert found[1] == expected[1]
        assert found[0]["test_loss"] == pytest.approx(expected[0]["test_loss"], rel=2e-5)
    assert row(read(tmp_path / "two/leaderboard.json"), "odm")["losses"]["average"]["error"] is None


# What is refused, left out, or fails


def test_a_refused_method_is_named_before_anything_runs(data, tmp_path, capsys):
    for methods, message in (
        ("[loss, odm]", "loss needs a capability of each domain's name, and safety has none"),
        ("[odm, regmix]", "regmix cannot learn from 1 proxy runs"),
    ):
        assert run(data, tmp_path / "run", **{**COMPARED, "compare__methods": methods}) == 2
        error = capsys.readouterr().err
        assert message in error and "out of compare.methods" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_by_default_all_that_the_data_allows(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "all_runs", lambda *_, **__: None)
    more = {"compare__methods": None, "compare__overrides__regmix__rounds": 5, "train__num_train_epochs": 2}
    assert run(data, tmp_path / "run", **{**COMPARED, **more}) == 0
    out = capsys.readouterr().out
    assert "compare: loss is left out: mixing.method: loss needs" in out and "regmix is left out" not in out
    listed = next(line for line in out.splitlines() if line.startswith("compare: 13 methods x 2 seeds"))
    assert ": joint, ideal, uniform, temperature, power_law, specific, random, regmix, " in listed
    # Of 3 domains with 1 revision: joint, uniform, temperature, odm, aioli 1 each; ideal, power_law, random, doge,
    # skillit 2; specific, doremi 3; regmix 5 of a quarter and 1. In all 23.25, with two seeds.
    assert "compare: up to 46 inner loops" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"compare__methods": "[jiont]"}, "compare.methods: there is no mixer 'jiont'; did you mean joint?"),
        ({"compare__seeds": 0}, "compare.seeds: '0': "),
        ({"compare__seeds": "[]"}, "compare.seeds: []: "),
        (
            {"compare__overrides__odm__round": 3},
            "unknown key compare.overrides.odm.round; did you mean compare.overrides.odm.rounds?",
        ),
        (
            {"compare__methods": None, "compare__overrides__loss__start": "contnue"},
            "compare.overrides.loss.start: 'contnue': input should be 'base' or 'continue'",
        ),
        (
            {"compare__methods": None, "compare__overrides__power_law__start": "continue"},
            "power_law: mixing.start: the rounds of power_law are no parts of one training run",
        ),
        ({"compare__overrides__odm__ratios": "{math: 2}"}, "compare.overrides.odm.ratios: is the same for all"),
        ({"compare__overrides__omd__rounds": 3}, "compare.overrides: there is no mixer 'omd'; did you mean odm?"),
        ({"compare__method": "[odm]"}, "unknown key compare.method; did you mean compare.methods?"),
    ],
)
def test_mistakes(data, tmp_path, capsys, more, message):
    assert run(data, tmp_path / "run", **{**COMPARED, **more}) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "run").exists()


def test_comparisons_and_runs_do_not_share_a_folder(finished, data, tmp_path, capsys):
    assert run(data, finished / "joint" / f"seed_{SEEDS[0]}", **COMPARED) == 2
    assert "holds something that is not a comparison" in capsys.readouterr().err
    assert run(data, finished, **{k: v for k, v in COMPARED.items() if not k.startswith(("stage", "compare"))}) == 2
    assert "holds something that is not a run" in capsys.readouterr().err


def test_a_run_that_fails_does_not_take_the_others_with_it(data, tmp_path, quick, monkeypatch, capsys):
    loop = compare.run_loop

    def diverges(this: Any) -> None:
        if this.config.mixing.method == "uniform":
            raise UserError("train.learning_rate: diverged")
        loop(this)

    monkeypatch.setattr(compare, "run_loop", diverges)
    one = {**COMPARED, "compare__methods": "[uniform, temperature]", "compare__seeds": 1, "data__max_examples": 12}
    assert run(data, tmp_path / "run", **one) == 2
    assert "1 run(s) failed" in capsys.readouterr().err
    content = read(tmp_path / "run/leaderboard.json")
    assert content["failed"] == {"uniform, seed 3": "train.learning_rate: diverged"}
    assert {found["row"] for found in content["rows"]} == {"joint", "temperature"}
    # Tried again when the same command is given again.
    monkeypatch.setattr(compare, "run_loop", loop)
    assert run(data, tmp_path / "run", **one) == 0
    content = read(tmp_path / "run/leaderboard.json")
    assert not content["failed"] and {found["row"] for found in content["rows"]} == {"joint", "temperature", "uniform"}


def test_restart_starts_over(finished, data, tmp_path, quick):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    one = {**COMPARED, "compare__methods": "[joint]", "compare__seeds": 1, "train__learning_rate": 1e-3}
    assert run(data, tmp_path / "run", **one, restart="true") == 0
    content = read(tmp_path / "run/leaderboard.json")
    assert {found["row"] for found in content["rows"]} == {"joint"} and (tmp_path / "run/notes.txt").is_file()
    assert result(tmp_path / "run", "joint", 3)[0] != result(finished, "joint", 3)[0]
    assert not (tmp_path / "run/odm/seed_3/config.yaml").exists(), "all of it"
