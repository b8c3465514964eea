"""Files appear whole or not at all, and only a run's own are ever removed."""

import json
from pathlib import Path

import pytest
import yaml

from ideal.config import Command, dump, flat, read_command
from ideal.errors import UserError
from ideal.preparation import check_folder
from ideal.run_folder import RunFolder, influence_csv, read_json, write_atomically, write_json
from main import ARGUMENTS


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.config.write_text(
        yaml.safe_dump({"seed": 0, "mixing": {"rounds": 1}, "train": {"report_to": "none"}})
    )
    return folder


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"round": 1})
    with pytest.raises(TypeError):
        write_json(path, {"round": object()})
    assert read_json(path) == {"round": 1}

    def fail(part: Path) -> None:
        part.write_text("half of")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert read_json(path) == {"round": 1}


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "model"

    def write(name: str) -> None:
        def make(part: Path) -> None:
            part.mkdir()
            (part / name).write_text(name)

        write_atomically(path, make)

    write("old")
    write("new")
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_clear_removes_a_runs_files_alone(folder):
    for name in ("base", "round_00", "round_01.part", "model", "figures", "export", "mine"):
        (folder.path / name).mkdir()
        (folder.path / name / "file").write_text("x")
    for name in ("state.json", "mixture.json", "metrics.jsonl", "report.html", "thesis.txt"):
        (folder.path / name).write_text("{}")
    folder.clear()
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["mine", "thesis.txt"]


def test_clear_refuses_foreign_folders(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(tmp_path).clear()
    assert (tmp_path / "model").is_dir() and (tmp_path / "data.json").is_file()
    RunFolder(tmp_path / "nothing yet").clear()


def test_check(folder, tmp_path):
    same = {"seed": 0, "mixing": {"rounds": 1}, "train": {"report_to": "none"}}
    folder.check(same, flat)
    folder.check({**same, "mixing": {"rounds": 2}}, flat)
    with pytest.raises(UserError, match=r"mixing\.rounds \(1 -> 2\)"):
        folder.check({**same, "mixing": {"rounds": 2}}, flat, extends=False)
    folder.check({**same, "train": {"report_to": "wandb"}}, flat)
    # A key that was not known yet when the run began had its default.
    folder.check({**same, "new": {"key": 1}}, flat, defaults={"new.key": 1})
    with pytest.raises(UserError, match="new.key"):
        folder.check({**same, "new": {"key": 2}}, flat, defaults={"new.key": 1})
    # One that was given as a mapping was known, and is not at its default.
    known = {"mixing.rounds": 2, "mixing": {}, "train": {}}
    folder.check(same, flat, defaults=known)
    with pytest.raises(UserError, match=r"train\.report_to|mixing\.rounds \(1 -> not set\)"):
        folder.check({**same, "mixing": {}}, flat, defaults=known)
    with pytest.raises(UserError, match=r"seed \(0 -> 1\)\."):
        folder.check({**same, "seed": 1}, flat)
    with pytest.raises(UserError, match=r"mixing\.rounds \(1 -> 0\)"):
        folder.check({**same, "mixing": {"rounds": 0}}, flat)
    with pytest.raises(UserError, match=r"train\.warmup_steps \(not set -> 3\)"):
        folder.check({**same, "train": {"report_to": "none", "warmup_steps": 3}}, flat)
    (tmp_path / "other").mkdir()
    RunFolder(tmp_path / "other").check(same, flat)
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(UserError, match="not a run"):
        RunFolder(tmp_path / "other").check(same, flat)


def test_a_folder_from_before_covariances_came_from_sums(tmp_path):
    """A tenth was the default, and neither sums nor fewer eigenvalues were known: K-FAC and the demo still are that."""

    def at(*arguments: str) -> Command:
        return read_command(ARGUMENTS, ["--output_dir", str(tmp_path), *arguments])

    def older(command: Command, factor_fraction: float) -> None:
        tree = dump(command.config)
        del tree["influence"]["sketch_fraction"], tree["influence"]["eigenvalue_fraction"]
        tree["influence"]["factor_fraction"] = factor_fraction
        folder.config.write_text(yaml.safe_dump(tree))

    folder, own = RunFolder(tmp_path), ("--model.name_or_path=model", "--data.domains=data")
    kfac, ekfac = at(*own, "--influence.factors=kfac"), at(*own)
    for command, fraction in ((kfac, 0.1), (at(), 1.0)):
        older(command, fraction)
        check_folder(folder, command)
    older(ekfac, 0.1)
    with pytest.raises(UserError, match=r"influence\.factor_fraction \(0\.1 -> 1\.0\)"):
        check_folder(folder, ekfac)
    check_folder(folder, at(*own, "--influence.factor_fraction=0.1"))


def test_round_is_renamed_when_complete(folder):
    here = folder.round(3)
    write_json(here.mixture, {})
    assert here.mixture == folder.path / "round_03.part" / "mixture.json"
    here.finish()
    here.finish()
    assert here.mixture == folder.path / "round_03" / "mixture.json" and here.mixture.is_file()


def test_log_is_one_object_per_line(folder):
    folder.log("train", {"loss": 1.5}, round=0, step=3)
    folder.log("influence", {"seconds": 2.0}, round=0)
    events = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(e["phase"], e["round"], e["step"]) for e in events] == [("train", 0, 3), ("influence", 0, None)]
    assert events[0]["values"] == {"loss": 1.5}


def test_influence_csv_quotes_names():
    text = influence_csv(["a,b"], ["x", "y"], [[1.0, -2e-12]], [1.0, -2e-12])
    assert text == 'capability,x,y\n"a,b",1,-2e-12\nobjective,1,-2e-12\n'
