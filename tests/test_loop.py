"""The whole loop in miniature: its files, its resumes after real kills, its stages, one process and two."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import psutil
import pytest
import torch
import transformers
import yaml
from miniature import DOMAINS, POOL, arguments, files, python, read, run, run_on_ranks, start, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from ideal import training
from ideal.config import read_command
from ideal.data import load_data
from ideal.mixture import training_rows
from ideal.rounds import inner_loops
from ideal.rounds.choice import earliest_best
from ideal.rounds.evaluating import evaluate_model
from main import ARGUMENTS

FIXED = {"mixing__budget": "fixed", "mixing__rounds": 2, "mixing__patience": 3, "keep_models": "all"}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two outer steps on two real processes."""
    output = tmp_path_factory.mktemp("finished") / "run"
    done = start(torchrun() + arguments(data, output, **FIXED))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished: outer steps taken: 2 of 2" in done.stdout
    return output


def losses(run_folder: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(run_folder.glob("round_*/evaluation.json"))]


def mixtures(run_folder: Path) -> list[dict[str, Any]]:
    return [read(path) for path in sorted(run_folder.glob("round_*/mixture.json"))]


def assert_same_run(found: Path, expected: Path, tolerance: float = 2e-5) -> None:
    """The same mixtures to the row, the same losses to float32's rounding."""
    assert mixtures(found) == [
        {
            **m,
            "domains": {
                n: {**d, "beta": pytest.approx(d["beta"], abs=1e-3)} for n, d in m["domains"].items()
            },
        }
        for m in mixtures(expected)
    ]
    one, other = losses(found), losses(expected)
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for kind in ("reference_loss", "test_loss"):
            assert a[kind] == pytest.approx(b[kind], rel=tolerance)
    assert read(found / "mixture.json")["round"] == read(expected / "mixture.json")["round"]


# What a run leaves behind


def test_files_of_a_run(finished):
    for name in ("config.yaml", "metrics.jsonl", "state.json", "data.json", "mixture.json", "report.html",
                 "base/evaluation.json", "export", "figures", "model"):  # fmt: skip
        assert (finished / name).exists(), name
    assert sorted(path.name for path in finished.glob("round_*")) == ["round_00", "round_01", "round_02"]
    assert not [path for path in finished.rglob("*.part")], "temporary names are gone"
    assert not [path for path in finished.rglob("checkpoints")]
    for path in finished.rglob("*.json"):
        read(path)
    for path in (finished / "round_00", finished / "round_01"):
        assert {"mixture.json", "evaluation.json", "influence.csv", "influence.json", "model"} <= {
            entry.name for entry in path.iterdir()
        }
    assert not (finished / "round_02" / "influence.json").exists(), "the last round has no step"
    state = read(finished / "state.json")
    assert state["finished"] and state["best_round"] == read(finished / "mixture.json")["round"]


def test_mixtures_of_a_run(finished):
    rounds = mixtures(finished)
    for number, mixture in enumerate(rounds):
        assert mixture["round"] == number and list(mixture["domains"]) == list(DOMAINS)
        assert sum(d["share"] for d in mixture["domains"].values()) == pytest.approx(1)
        assert abs(mixture["total_tokens"] - rounds[0]["total_tokens"]) <= 20, "a fixed volume"
        betas = [d["beta"] for d in mixture["domains"].values()]
        assert (max(map(abs, betas)) > 0.01) == (number > 0)
    assert all(d == {**d, "pool": POOL, "size": POOL, "ratio": 1.0} for d in rounds[0]["domains"].values())
    assert rounds[1]["domains"] != rounds[0]["domains"] and rounds[2]["domains"] != rounds[1]["domains"]


def test_alpha_follows_from_influence(finished):
    content = read(finished / "round_00" / "influence.json")
    matrix, shares = np.array(content["matrix"]), np.array(content["shares"])
    domains = read(finished / "round_00" / "mixture.json")["domains"].values()
    np.testing.assert_allclose(shares, [d["share"] for d in domains])
    alpha = matrix.mean(0)
    np.testing.assert_allclose(content["alpha"], alpha - shares * alpha.sum(), rtol=1e-9)


def test_the_fixed_step_follows_from_influence(data, tmp_path, quick):
    """The paper's step by hand from round 0's influence.json leads to round 1's beta."""
    few = {**FIXED, "mixing__step": "fixed", "mixing__rounds": 1, "data__max_examples": 16}
    assert run(data, tmp_path / "run", **few) == 0
    content = read(tmp_path / "run/round_00/influence.json")
    alpha, shares = np.array(content["alpha"]), np.array(content["shares"])
    grown = 1 - 0.15 * alpha / abs(alpha).max()
    after = mixtures(tmp_path / "run")[1]["domains"].values()
    np.testing.assert_allclose([d["beta"] for d in after], grown / (shares @ grown) - 1, rtol=1e-9)


def test_evaluations_of_a_run(finished):
    for path in [finished / "base/evaluation.json", *finished.glob("round_*/evaluation.json")]:
        content = read(path)
        assert set(content) == {"reference_loss", "test_loss", "Q", "Q_test"}
        assert list(content["reference_loss"]) == list(DOMAINS)
        assert list(content["test_loss"]) == ["math", "reasoning"]
        assert content["Q"] == pytest.approx(np.mean(list(content["reference_loss"].values())))
        assert content["Q_test"] is None, "safety counts and has no test set"
    start_q = read(finished / "base/evaluation.json")["Q"]
    assert all(loss["Q"] < 0.8 * start_q for loss in losses(finished)), "training must have trained"


def test_influence_csv(finished):
    for number in (0, 1):
        with (finished / f"round_{number:02d}" / "influence.csv").open() as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["capability", *DOMAINS]
        assert [row[0] for row in rows[1:]] == [*DOMAINS, "objective"]
        table = np.array([[float(value) for value in row[1:]] for row in rows[1:]])
        np.testing.assert_allclose(table[-1], table[:-1].mean(0), rtol=1e-6)
        content = read(finished / f"round_{number:02d}" / "influence.json")
        np.testing.assert_allclose(table[:-1], content["matrix"], rtol=1e-6)
        assert np.isfinite(table).all()


def test_metrics(finished):
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert {"time", "round", "phase", "step", "values"} == set(events[0])
    assert {event["round"] for event in events if "loss" in event["values"]} == {0, 1, 2}


def test_final_model_loads_and_is_the_best_rounds(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert tokenizer.chat_template
    best = AutoModelForCausalLM.from_pretrained(
        finished / f"round_{read(finished / 'state.json')['best_round']:02d}" / "model"
    )
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, best.state_dict()[name])
    question = [{"role": "user", "content": "2 plus 2"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=2).shape[1] > prompt["input_ids"].shape[1]


def test_export_holds_the_final_mixture(finished):
    rows = (finished / "export" / "mixture.jsonl").read_text().splitlines()
    assert len(rows) == sum(d["size"] for d in read(finished / "mixture.json")["domains"].values())


# The same command again


def test_the_same_command_again_changes_nothing(finished, data):
    before = {k: v for k, v in files(finished).items() if k != "config.yaml"}
    done = run_on_ranks(data, finished, **FIXED)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("this run is finished") == 1
    assert {k: v for k, v in files(finished).items() if k != "config.yaml"} == before


def test_a_run_with_capabilities_of_their_own_goes_on(data, tmp_path, quick, capsys):
    """A mapping among the keys, whose default is an empty one."""
    few = {"mixing__method": "joint", "data__max_examples": 16}
    few["data__capabilities__more__reference"] = str(data / "math" / "reference.jsonl")
    for _ in range(2):
        assert run(data, tmp_path / "run", **few) == 0, capsys.readouterr().err
    assert "this run is finished" in capsys.readouterr().out


def test_one_process_gives_the_same(finished, data, tmp_path, quick):
    assert run(data, tmp_path / "run", **FIXED) == 0
    assert_same_run(tmp_path / "run", finished)
    for number in (0, 1):
        two, one = (
            np.array(read(p / f"round_{number:02d}/influence.json")["matrix"])
            for p in (finished, tmp_path / "run")
        )
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=2e-3 * abs(two).max())


@pytest.mark.parametrize("moment", ["mixture.json", "model"])
def test_killed_in_round_1_and_resumed(finished, data, tmp_path, moment, quick):
    """SIGKILL to all processes: nobody can tidy up."""
    output = tmp_path / "run"
    watched = output / "round_01.part" / moment
    command = (torchrun() if moment == "model" else python()) + arguments(data, output, **FIXED)
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=miniature.ROOT,
    )
    deadline = time.monotonic() + 120
    while not watched.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    # torchrun's workers have sessions of their own: orphaned, they would go on and keep the folder's lock.
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        victim.kill()
    process.wait()
    assert not (output / "round_02").exists() and (output / "round_00").is_dir()
    before = (output / "round_00" / "evaluation.json").stat().st_mtime_ns
    assert run(data, output, **FIXED) == 0
    assert (output / "round_00" / "evaluation.json").stat().st_mtime_ns == before, "finished phases stay"
    assert_same_run(output, finished)
    assert not [path for path in output.rglob("*.part")]


def test_killed_after_every_single_file(data, tmp_path, quick, monkeypatch):
    """Each attempt dies behind its next new file; in the end all is as if there had been no interruption."""

    class Killed(BaseException):
        pass

    rename, seen = os.replace, set[tuple[str, bytes]]()

    def rename_and_die(source: Any, target: Any) -> None:
        rename(source, target)
        path = Path(target)
        if tmp_path / "killed" in path.parents and path.name != "config.yaml":
            # Others than state.json are written once, or again with the same meaning.
            this = (path.name, path.read_bytes() if path.name == "state.json" else bytes(path.parent))
            if this not in seen:
                seen.add(this)
                raise Killed

    few = {"data__max_examples": 16, "mixing__budget": "fixed"}
    assert run(data, tmp_path / "whole", **few) == 0
    monkeypatch.setattr(os, "replace", rename_and_die)
    attempts = 0
    while attempts < 60:
        attempts += 1
        try:
            assert run(data, tmp_path / "killed", **few) == 0
            break
        except Killed:
            continue
    assert 12 < attempts < 60
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert {"mixture.json", "model", "evaluation.json", "influence.json", "state.json"} <= {
        n for n, _ in seen
    }
    assert sorted(files(tmp_path / "killed")) == sorted(files(tmp_path / "whole"))


def test_more_rounds_continue(finished, data, tmp_path, quick, capsys):
    shutil.copytree(finished, tmp_path / "run")
    before = {
        k: v
        for k, v in files(tmp_path / "run").items()
        if k.startswith(("round_00", "round_01", "round_02/e"))
    }
    assert run(data, tmp_path / "run", **{**FIXED, "mixing__rounds": 3}) == 0
    after = files(tmp_path / "run")
    assert {k: after[k] for k in before} == before
    assert (tmp_path / "run/round_02/influence.json").is_file() and (tmp_path / "run/round_03").is_dir()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["mixing"]["rounds"] == 3
    capsys.readouterr()
    assert run(data, tmp_path / "run", **FIXED) == 2
    assert "mixing.rounds (3 -> 2)" in capsys.readouterr().err, "downwards is another run"


def test_other_configurations_are_refused_and_harm_nothing(finished, data, capsys):
    before = files(finished)
    for change, named in [
        ({"train__learning_rate": 1e-4}, "train.learning_rate (0.003 -> 0.0001)"),
        ({"mixing__budget": "free"}, "mixing.budget (fixed -> free)"),
        ({"seed": 3}, "seed (0 -> 3)"),
    ]:
        assert run(data, finished, **{**FIXED, **change}) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: output_dir: ") and error.count("\n") == 1 and named in error
        assert "--restart true" in error
    assert files(finished) == before


def test_what_may_change(finished, data):
    change = {"train__logging_steps": 3, "train__per_device_train_batch_size": 2, "train__report_to": "none"}
    assert run(data, finished, **{**FIXED, **change}) == 0


def test_restart_starts_over_and_touches_nothing_else(data, tmp_path, quick, capsys):
    few = {"data__max_examples": 16, "mixing__method": "joint"}
    assert run(data, tmp_path / "run", **few) == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    first = losses(tmp_path / "run")
    other = {**few, "train__learning_rate": 1e-3}
    assert run(data, tmp_path / "run", **other) == 2
    assert losses(tmp_path / "run") == first
    assert run(data, tmp_path / "run", **other, restart="true") == 0
    assert losses(tmp_path / "run") != first
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# Variants


# So that the mixture stays as it is, for a comparison with one undivided inner loop.
STILL = {
    "mixing__step": "fixed", "mixing__max_change": 1e-9, "mixing__start": "continue", "mixing__budget": "fixed",
    "data__max_examples": 16,
}  # fmt: skip


def training_log(folder: Path) -> list[tuple[int, float, float]]:
    """(step, learning rate, loss) of every logged step."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], e["values"]["learning_rate"], e["values"]["loss"]) for e in events if "loss" in e["values"]]


@pytest.mark.parametrize("lora", [0, 4])
def test_continue_is_one_training_run(data, tmp_path, quick, monkeypatch, lora):
    """Three parts of an epoch each: rates, losses and weights are those of three epochs in one inner loop."""

    def same_orders(mixture, seed, epoch):
        """Round 2's first epoch is shuffled as round 0's third."""
        return training_rows(replace(mixture, round=0), seed, mixture.round + epoch)

    monkeypatch.setattr(training, "training_rows", same_orders)
    few = {**STILL, "train__num_train_epochs": 3, "train__logging_steps": 1, "model__lora__rank": lora}
    assert run(data, tmp_path / "parts", **few, mixing__rounds=2, keep_models="all") == 0
    assert run(data, tmp_path / "whole", **few, mixing__method="joint") == 0
    parts, whole = (np.array(training_log(tmp_path / name)) for name in ("parts", "whole"))
    assert len(whole) == 18
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert [read(path)["steps"] for path in sorted(tmp_path.glob("parts/round_*/training.json"))] == [6, 6, 6]
    assert losses(tmp_path / "parts")[2]["Q"] == pytest.approx(losses(tmp_path / "whole")[0]["Q"], rel=1e-6)
    assert not [*tmp_path.rglob("checkpoints")]


def test_continue_resumes_within_and_between_parts(data, tmp_path, quick, monkeypatch):
    """Killed in the second part, with its checkpoint lost the second time: the same run as without."""
    few = {**STILL, "mixing__max_change": 0.3, "mixing__rounds": 2, "train__num_train_epochs": 3}
    assert run(data, tmp_path / "whole", **few) == 0
    for name, lost in (("killed", False), ("lost", True)):
        folder = tmp_path / name
        with monkeypatch.context() as patch:
            calls = []

            def train_once(*args, calls=calls, **more):
                calls.append(1)
                if len(calls) > 1:
                    raise KeyboardInterrupt
                return training.train(*args, **more)

            patch.setattr(inner_loops, "train", train_once)
            assert run(data, folder, **few) == 130
        kept = [*folder.glob("round_00/checkpoints/checkpoint-*/optimizer.*")]
        assert kept
        if lost:
            shutil.rmtree(folder / "round_00/checkpoints")
        assert run(data, folder, **few) == 0
        assert_same_run(folder, tmp_path / "whole")


def test_continue_on_two_processes(data, tmp_path, quick):
    """Optimizer and schedule go on there as on one."""
    few = {**STILL, "mixing__max_change": 0.3, "train__num_train_epochs": 2, "train__logging_steps": 1}
    few["train__per_device_train_batch_size"] = 4
    done = run_on_ranks(data, tmp_path / "two", **few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(data, tmp_path / "one", **few) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    one, two = (np.array(training_log(tmp_path / name)) for name in ("one", "two"))
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-6)
    np.testing.assert_allclose(two[:, 2], one[:, 2], rtol=1e-4)


def test_continue_cannot_be_extended(data, tmp_path, quick, capsys):
    assert run(data, tmp_path / "run", **STILL, mixing__rounds=1) == 0
    assert run(data, tmp_path / "run", **STILL, mixing__rounds=2) == 2
    assert "mixing.rounds (1 -> 2)" in capsys.readouterr().err


def test_the_surrogate_goes_on_as_if_it_had_not_been_interrupted(data, tmp_path, quick, capsys):
    """All of its memory is in the rounds' files: two runs of the same command in turn are one."""
    few = {**FIXED, "mixing__step": "surrogate", "data__max_examples": 16, "mixing__patience": 5}
    assert run(data, tmp_path / "whole", **few) == 0
    assert run(data, tmp_path / "grown", **{**few, "mixing__rounds": 1}) == 0
    assert run(data, tmp_path / "grown", **few) == 0
    assert_same_run(tmp_path / "grown", tmp_path / "whole")
    said = capsys.readouterr().out
    assert said.count("\nOutlook: another run is expected to lower Q by") == 6, "after 3 steps, and at 3 ends"
    advice = [read(tmp_path / name / "state.json")["advice"] for name in ("whole", "grown")]
    assert advice[0] == advice[1] and "from training noise alone" in advice[0]
    steps = [read(path) for path in sorted((tmp_path / "whole").glob("round_*/step.json"))]
    assert steps == [read(path) for path in sorted((tmp_path / "grown").glob("round_*/step.json"))]
    assert len(steps) == 2 and list(steps[0]["predicted"]["reference_loss"]) == list(DOMAINS)
    totals = [m["total_tokens"] for m in mixtures(tmp_path / "whole")]
    assert max(totals) - min(totals) <= 60
    assert run(data, tmp_path / "on", **few, mixing__start="continue") == 2
    assert "mixing.start: the surrogate compares rounds that each start from" in capsys.readouterr().err


WISHES = {
    "mixing__budget": "fixed",
    "mixing__no_worse": "start",
    "mixing__patience": 5,
    "data__domains__math__pinned": "true",
    "data__domains__reasoning__most_ratio": 1.05,
    "data__max_examples": 20,
}


@pytest.mark.parametrize("step", ["fixed", "surrogate"])
def test_what_the_user_asks_for_is_kept_to_and_said(data, tmp_path, quick, capsys, step):
    """Limits and no_worse, in two runs of the same command in turn."""
    wishes = {**WISHES, "mixing__step": step}
    assert run(data, tmp_path / "run", **wishes) == 0
    assert run(data, tmp_path / "run", **{**wishes, "mixing__rounds": 2}) == 0
    said = capsys.readouterr().out
    for mixture in mixtures(tmp_path / "run"):
        sizes = {name: domain["size"] for name, domain in mixture["domains"].items()}
        assert sizes["math"] == 20 and sizes["reasoning"] <= 21
        assert mixture["held"]["math"] == "pinned"
    assert "At a limit: math (pinned)" in said and "predicted  observed" in said
    evaluations = losses(tmp_path / "run")
    for number in (1, 2):
        change = read(tmp_path / f"run/round_{number:02d}/change.json")
        before, after = evaluations[number - 1 : number + 1]
        assert change["from_round"] == number - 1
        assert change["observed"]["Q"] == pytest.approx(after["Q"] - before["Q"])
        predicted = read(tmp_path / f"run/round_{number - 1:02d}/step.json")["predicted"]
        assert change["predicted"]["reference_loss"]["math"] == pytest.approx(
            predicted["reference_loss"]["math"] - before["reference_loss"]["math"]
        )
    best, first = read(tmp_path / "run/mixture.json")["round"], evaluations[0]["reference_loss"]
    assert all(loss <= first[name] * 1.02 for name, loss in evaluations[best]["reference_loss"].items())
    assert read(tmp_path / "run/state.json")["finished"]


def test_what_cannot_be_kept_to_is_refused_before_training(data, tmp_path, quick, capsys):
    (tmp_path / "losses.json").write_text('{"reference_loss": {"math": 1.0}}')
    refused = {
        "data.domains.math.most_ratio: 0.5 is below the start ratio, 1": {"data__domains__math__most_ratio": 0.5},
        "data.domains.math.most_repeats: 2 is below the start ratio, 1 times 3": {
            "data__domains__math__most_repeats": 2, "train__num_train_epochs": 3},
        "mixing.no_worse: there is no capability 'chess'": {"mixing__no_worse": "{chess: 1}"},
        "mixing.no_worse: no file": {"mixing__no_worse": "nowhere.json"},
        "mixing.target: gives no loss for reasoning": {
            "mixing__objective": "worst", "mixing__target": tmp_path / "losses.json"},
    }  # fmt: skip
    for message, keys in refused.items():
        assert run(data, tmp_path / "run", **keys) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run/base").exists()


def test_the_worst_capability_chooses_the_round(data, tmp_path, quick):
    few = {"mixing__objective": "worst", "mixing__budget": "fixed", "data__max_examples": 16}
    assert run(data, tmp_path / "run", **few) == 0
    base = read(tmp_path / "run/base/evaluation.json")
    assert "objective" not in base
    found = losses(tmp_path / "run")
    for loss in found:
        distances = [loss["reference_loss"][name] / base["reference_loss"][name] - 1 for name in DOMAINS]
        assert max(distances) - 0.05 * np.log(3) <= loss["objective"] <= max(distances)
    objectives = [loss["objective"] for loss in found]
    assert read(tmp_path / "run/mixture.json")["round"] == int(np.argmin(objectives))
    influence = read(tmp_path / "run/round_00/influence.json")
    assert not np.allclose(influence["weights"], 1 / 3), "alpha is the objective's derivative"


def test_a_round_within_the_tie_of_the_best_is_kept_if_it_is_earlier():
    losses_of_rounds = {0: 1.0, 1: 0.905, 2: 0.9, 3: 1.1}
    assert [earliest_best(losses_of_rounds, tie) for tie in (0.0, 0.01, 0.2)] == [2, 1, 0]
    assert earliest_best({}, 0.01) is None


@pytest.mark.parametrize("method", ["joint", "uniform"])
def test_methods_that_never_move(data, tmp_path, quick, method):
    ratios = "{math: 0.25, reasoning: 1, safety: 0.75}"
    assert run(data, tmp_path / "run", mixing__method=method, mixing__ratios=ratios, mixing__rounds=2) == 0
    assert run(data, tmp_path / "mix", stage="mix", mixing__ratios=ratios) == 0
    given, mixture = read(tmp_path / "mix/mixture.json"), read(tmp_path / "run/mixture.json")
    if method == "joint":
        assert mixture == given
    else:
        sizes = [d["size"] for d in mixture["domains"].values()]
        assert sizes != [6, 24, 18]
        # Each domain's tokens are right to half of its longest example.
        longest = max(row["longest"] for row in read(tmp_path / "run/data.json"))
        assert abs(mixture["total_tokens"] - given["total_tokens"]) <= 3 * longest / 2
    assert [path.name for path in (tmp_path / "run").glob("round_*")] == ["round_00"]
    assert not (tmp_path / "run/round_00/influence.json").exists()
    assert read(tmp_path / "run/state.json")["finished"]


def test_specific_tries_each_domain_alone(data, tmp_path, monkeypatch, capsys):
    miniature.quick(monkeypatch, plan=True)
    few = {"data__max_examples": 16, "mixing__method": "specific"}
    assert run(data, tmp_path / "run", **few) == 0
    out = capsys.readouterr().out
    assert "inner loops: 3 of" in out and "Best of 3 results" in out and "specific is through" in out
    alone = [[d["share"] for d in m["domains"].values()] for m in mixtures(tmp_path / "run")]
    np.testing.assert_array_equal(alone, np.eye(3))
    q = [loss["Q"] for loss in losses(tmp_path / "run")]
    # Trained alone, a domain does best on its own capability.
    own = [loss["reference_loss"][name] for loss, name in zip(losses(tmp_path / "run"), DOMAINS, strict=True)]
    assert own == [min(loss["reference_loss"][name] for loss in losses(tmp_path / "run")) for name in DOMAINS]
    assert f"Mean Q of all 3 on the reference sets: {np.mean(q):.4f}" in out
    assert read(tmp_path / "run/state.json")["best_round"] == int(np.argmin(q))
    assert not [*(tmp_path / "run").glob("round_*/model")]
    assert run(data, tmp_path / "run", stage="report", **few) == 0
    capsys.readouterr()
    assert run(data, tmp_path / "run", **few, mixing__rounds=3) == 2
    assert "mixing.rounds (1 -> 3)" in capsys.readouterr().err
    assert run(data, tmp_path / "on", **few, mixing__start="continue") == 2
    assert "mixing.start: the rounds of specific are no parts of one training run" in capsys.readouterr().err


def test_random_draws_go_on_whatever_they_give(data, tmp_path, quick, capsys):
    few = {"data__max_examples": 16, "mixing__method": "random"}
    assert run(data, tmp_path / "run", **few, mixing__rounds=1) == 0
    first = mixtures(tmp_path / "run")
    assert run(data, tmp_path / "run", **few, mixing__rounds=2) == 0
    found = mixtures(tmp_path / "run")
    assert found[:2] == first and len(found) == 3, "patience does not end it"
    assert "Best of 3 results" in capsys.readouterr().out
    totals = [m["total_tokens"] for m in found]
    # Each domain's tokens are right to half of its longest example.
    longest = max(row["longest"] for row in read(tmp_path / "run/data.json"))
    assert max(totals) - min(totals) <= 3 * longest


def test_loss_starts_from_the_base_models_losses(data, tmp_path, quick):
    few = {"mixing__method": "loss", "mixing__rounds": 1}
    assert run(data, tmp_path / "run", **few) == 0
    base = read(tmp_path / "run/base/evaluation.json")["reference_loss"]
    first, then = mixtures(tmp_path / "run")
    for mixture, by in ((first, base), (then, losses(tmp_path / "run")[0]["reference_loss"])):
        for name, domain in mixture["domains"].items():
            # Right to half of an example of at most 64 tokens.
            expected = by[name] / sum(by.values())
            assert abs(domain["share"] - expected) * mixture["total_tokens"] <= 64
    assert run(data, tmp_path / "mix", stage="mix", **few) == 0
    assert read(tmp_path / "mix/mixture.json")["domains"] == first["domains"]
    assert run(data, tmp_path / "ideal", mixing__first="loss", mixing__rounds=1, mixing__budget="fixed") == 0
    begun = mixtures(tmp_path / "ideal")
    assert begun[0]["domains"] == first["domains"] != begun[1]["domains"]


def test_regmix_trains_short_proxies_and_keeps_the_last_round(data, tmp_path, capsys, monkeypatch):
    miniature.quick(monkeypatch, plan=True)

    def worse_and_worse(run: Any, model: Any, description: str, number: int | None) -> dict[str, Any]:
        """Every proxy has a lower Q than the result, which is kept all the same."""
        return {**evaluate_model(run, model, description, number), "Q": float(number or 0)}

    monkeypatch.setattr("ideal.rounds.evaluating.evaluate_model", worse_and_worse)
    few = {"mixing__method": "regmix", "data__max_examples": 16}
    assert run(data, tmp_path / "run", **few, mixing__rounds=4) == 2
    assert "mixing.rounds: regmix cannot learn from 4 proxy runs" in capsys.readouterr().err
    assert run(data, tmp_path / "run", **few, mixing__rounds=5) == 0
    out = capsys.readouterr().out
    assert "inner loops: 1 of 6 steps, 5 of 2 steps" in out and "Result: round 5." in out
    training = [read(path) for path in sorted((tmp_path / "run").glob("round_*/training.json"))]
    rows = [sum(d["size"] for d in m["domains"].values()) for m in mixtures(tmp_path / "run")]
    steps = [math.ceil(math.ceil(count / 8) * part) for count, part in zip(rows, [0.25] * 5 + [1], strict=True)]
    assert [(t["steps"], t["is_result"]) for t in training] == list(zip(steps, [False] * 5 + [True], strict=True))
    assert read(tmp_path / "run/mixture.json")["round"] == read(tmp_path / "run/state.json")["best_round"] == 5
    step = read(tmp_path / "run/round_04/step.json")
    assert list(step["held_out_spearman"]) == list(DOMAINS) and not (tmp_path / "run/round_03/step.json").exists()
    shares = [d["share"] for d in read(tmp_path / "run/mixture.json")["domains"].values()]
    total = read(tmp_path / "run/mixture.json")["total_tokens"]
    longest = max(row["longest"] for row in read(tmp_path / "run/data.json"))
    # Each domain's tokens are right to half of its longest example, and so is the total they are divided by, to three.
    np.testing.assert_allclose(shares, list(step["shares"].values()), atol=2 * longest / total)
    assert run(data, tmp_path / "run", stage="report", **few, mixing__rounds=5) == 0


def test_lora_run_ends_with_a_plain_model(data, tmp_path, quick):
    few = {"model__lora__rank": 4, "influence__layers": "['*.mlp.*_proj']", "train__learning_rate": 1e-2}
    assert run(data, tmp_path / "run", **few) == 0
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "model.safetensors" in names and not [name for name in names if "adapter" in name]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(miniature.BASE_MODEL)
    assert type(model) is type(base) and model.state_dict().keys() == base.state_dict().keys()
    moved = [n for n, p in base.state_dict().items() if not torch.equal(p, model.state_dict()[n])]
    assert moved and all("_proj" in name for name in moved)
    # Merging keeps the evaluated losses.
    after = {"model__name_or_path": tmp_path / "run/model", "mixing__rounds": 0, "train__learning_rate": 0}
    assert run(data, tmp_path / "again", **after) == 0
    best = losses(tmp_path / "run")[read(tmp_path / "run/state.json")["best_round"]]
    again = read(tmp_path / "again/base/evaluation.json")
    assert again["reference_loss"] == pytest.approx(best["reference_loss"], rel=1e-4)


def test_keep_models(data, tmp_path, quick):
    few = {"data__max_examples": 16}
    assert run(data, tmp_path / "final", **few) == 0
    assert not [*(tmp_path / "final").glob("round_*/model")]
    assert (tmp_path / "final/model/model.safetensors").is_file()
    assert run(data, tmp_path / "all", **few, keep_models="all") == 0
    assert len([*(tmp_path / "all").glob("round_*/model/model.safetensors")]) == 2


def test_bad_round_is_not_kept(data, tmp_path, quick):
    """The first round without a lower Q ends the run, and the best one stays."""
    few = {"data__max_examples": 16, "train__num_train_epochs": 8, "train__learning_rate": 3e-2}
    few |= {"mixing__rounds": 4, "mixing__step": "fixed", "mixing__max_change": 0.9, "mixing__patience": 1}
    assert run(data, tmp_path / "run", **few) == 0
    q = [loss["Q"] for loss in losses(tmp_path / "run")]
    assert len(q) < 5 and q[-1] > min(q), "the case must be one of getting worse"
    state = read(tmp_path / "run/state.json")
    assert state["best_round"] == int(np.argmin(q)) == read(tmp_path / "run/mixture.json")["round"]
    assert re.search(r"Q of round \d .* is not below round \d", state["reason"])


# Stages


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512,
         "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
CHECKPOINTS = {
    "llama": (None, "*.mlp.*_proj"),
    # Fused projections of queries, keys and values; biases; MLP and attention side by side.
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL, intermediate_size=40), "gpt_neox.layers.*.mlp"),
    # Fused gate and up projections.
    "phi3": (transformers.Phi3Config(**SMALL, intermediate_size=40, num_key_value_heads=1), "*.mlp.*_proj"),
    # Learned positions, tied embeddings, biases.
    "opt": (transformers.OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24), "*.fc?"),
}


def checkpoint(config: transformers.PretrainedConfig | None, folder: Path) -> Path:
    """A model of random weights with the demo's tokenizer; None: the demo's."""
    if config is None:
        return miniature.BASE_MODEL
    tokenizer = AutoTokenizer.from_pretrained(miniature.BASE_MODEL)
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gradient_products(model: Path, layers: str, words: list[str]) -> np.ndarray:
    """[R, n] -s_j <g_r, g_j> by autograd on the model's weights, one sequence at a time."""
    config = read_command(ARGUMENTS, words).config
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tracked = [
        module.weight
        for name, module in loaded.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(fnmatchcase(part, layers) for part in (name, name.rpartition(".")[0]))
    ]
    sets = load_data(config.data, AutoTokenizer.from_pretrained(model), config.seed)

    def gradient(examples: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, int]:
        """[weights] of the mean loss, and trained tokens."""
        total, tokens = torch.zeros(sum(weight.numel() for weight in tracked), dtype=torch.float64), 0
        for number in range(len(examples)):
            ids, labels = (torch.tensor(examples[number][key])[None] for key in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            loss = loaded(input_ids=ids, labels=labels).loss * count
            total += torch.cat([one.flatten() for one in torch.autograd.grad(loss, tracked)])
            tokens += count
        return total / tokens, tokens

    pools = [gradient(pool) for pool in sets.pools.values()]
    shares = torch.tensor([tokens for _, tokens in pools]) / sum(tokens for _, tokens in pools)
    rows = torch.stack([gradient(rows)[0] for rows in sets.references.values()])
    return (-shares * (rows @ torch.stack([found for found, _ in pools]).T)).numpy()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_stage_influence(data, tmp_path, quick, kind):
    config, layers = CHECKPOINTS[kind]
    settings = {"model__name_or_path": checkpoint(config, tmp_path / "model"), "influence__sample_fraction": 1.0}
    settings |= {"influence__layers": f"['{layers}']", "stage": "influence"}
    assert run(data, tmp_path / "plain", **settings, influence__factors="identity") == 0
    expected = gradient_products(settings["model__name_or_path"], layers, arguments(data, tmp_path / "plain"))
    found = np.array(read(tmp_path / "plain/influence.json")["matrix"])
    # The bound that a float32 matrix is held to everywhere.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert run(data, tmp_path / "run", **settings) == 0
    content = read(tmp_path / "run/influence.json")
    assert np.array(content["matrix"]).shape == (3, 3) and (tmp_path / "run/influence.csv").is_file()
    assert np.isfinite(content["matrix"]).all() and content["factors"] == "ekfac"
    assert not [*(tmp_path / "run").glob("round_*")] and not (tmp_path / "run/model").exists()


def test_stage_mix_and_its_mixture_as_start(data, tmp_path, quick):
    ratios = "{math: 0.5, reasoning: 1.25, safety: 2}"
    assert run(data, tmp_path / "mix", stage="mix", mixing__ratios=ratios) == 0
    mixture = read(tmp_path / "mix/mixture.json")
    assert [d["size"] for d in mixture["domains"].values()] == [12, 30, 48]
    rows = (tmp_path / "mix/export/mixture.jsonl").read_text().splitlines()
    assert len(rows) == 90
    options = {"mixing__ratios": tmp_path / "mix/mixture.json", "mixing__rounds": 0}
    assert run(data, tmp_path / "run", **options) == 0
    assert read(tmp_path / "run/round_00/mixture.json")["domains"] == mixture["domains"]


def test_stage_report(finished, data, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    (tmp_path / "run/report.html").unlink()
    shutil.rmtree(tmp_path / "run/figures")
    before = files(tmp_path / "run")
    assert run(data, tmp_path / "run", stage="report") == 0
    again = (tmp_path / "run/report.html").read_text()
    assert len(again) == pytest.approx(len(page), rel=0.05)
    after = files(tmp_path / "run")
    assert {name: after[name] for name in before} == before, "only the report is written"


@pytest.mark.parametrize("stage", ["influence", "mix"])
def test_stages_leave_a_loops_run_alone(finished, data, stage, capsys):
    before = files(finished)
    assert run(data, finished, **FIXED, stage=stage) == 2
    assert capsys.readouterr().err.startswith("error: output_dir: ")
    assert files(finished) == before
