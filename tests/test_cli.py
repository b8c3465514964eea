"""Bad input ends with one line and exit status 2, before anything expensive, and harms nothing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import pytest
from miniature import arguments, files, make_data, python, read, run, run_on_ranks, start, torchrun


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "domains")


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "domains"))


def empty(data: Path) -> dict[str, Any]:
    (data / "math/train.jsonl").write_text("")
    return {}


def no_content(data: Path) -> dict[str, Any]:
    (data / "math/train.jsonl").write_text('{"question": "1 plus 1", "answer": ""}\n' * 20)
    return {}


def malformed(data: Path) -> dict[str, Any]:
    lines = (data / "math/train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-5]
    (data / "math/train.jsonl").write_text("\n".join(lines) + "\n")
    return {}


def unknown_columns(data: Path) -> dict[str, Any]:
    (data / "math/train.jsonl").write_text('{"alpha": "1", "beta": "2"}\n' * 20)
    return {}


def one_domain(data: Path) -> dict[str, Any]:
    shutil.rmtree(data / "math")
    shutil.rmtree(data / "safety")
    return {}


def few_references(data: Path) -> dict[str, Any]:
    lines = (data / "math/reference.jsonl").read_text().splitlines()
    (data / "math/reference.jsonl").write_text("\n".join(lines[:3]) + "\n")
    return {}


def few_to_hold_out(data: Path) -> dict[str, Any]:
    (data / "math/reference.jsonl").unlink()
    return {}


def no_tokenizer(data: Path) -> dict[str, Any]:
    model = data.parent / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(miniature.BASE_MODEL / name, model)
    return {"model__name_or_path": model}


def foreign_folder(data: Path) -> dict[str, Any]:
    (data.parent / "output").mkdir()
    (data.parent / "output/thesis.txt").write_text("years of work")
    return {}


def foreign_folder_restarted(data: Path) -> dict[str, Any]:
    return {**foreign_folder(data), "restart": "true"}


def output_is_a_file(data: Path) -> dict[str, Any]:
    (data.parent / "output").write_text("years of work")
    return {}


def broken_mixture(data: Path) -> dict[str, Any]:
    (data.parent / "mixture.json").write_text("[1, 2]")
    return {"mixing__ratios": data.parent / "mixture.json"}


def options(**given: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda data: given


BAD = {
    "missing folder": (
        options(data__domains="/nowhere/at/all"),
        r"data\.domains: there is no folder /nowhere/at/all",
    ),
    "missing file": (
        options(data__domains="{a: /nowhere/a.jsonl, b: /nowhere/b.jsonl}"),
        r"data\.domains\.a.*: .*/nowhere/a\.jsonl",
    ),
    "empty domain": (empty, r"data\.domains\.math\.train: .*math"),
    "nothing usable": (no_content, r"data\.domains\.math\.train: no usable example among the 20 rows"),
    "malformed row": (malformed, r"math/train\.jsonl.*(line|row|:) ?7"),
    "unknown columns": (unknown_columns, r"data\.domains\.math\.train: .*alpha, beta"),
    "cut to nothing": (options(data__max_length=4), r"data\.max_length"),
    "single domain": (
        one_domain,
        r"data\.domains: at least two domains are needed to mix, there is only reasoning",
    ),
    "single domain by ratios": (
        options(mixing__ratios="{math: 0, reasoning: 1, safety: 0}"),
        r"mixing\.ratios: only reasoning",
    ),
    "no ratio": (
        options(mixing__ratios="{math: 0, reasoning: 0, safety: 0}"),
        r"mixing\.ratios: all are zero",
    ),
    "ratio of no domain": (
        options(mixing__ratios="{maths: 1}"),
        r"mixing\.ratios: there is no domain 'maths'",
    ),
    "no mixture.json": (options(mixing__ratios="/nowhere.json"), r"mixing\.ratios: no file /nowhere\.json"),
    "broken mixture.json": (broken_mixture, r"mixing\.ratios: .*mixture\.json"),
    "few references": (few_references, r"data\.domains\.math\.reference: 3 usable examples .* too few"),
    "few to hold out": (few_to_hold_out, r"data\.domains\.math\.reference: none is given"),
    "no tokenizer": (no_tokenizer, r"model\.name_or_path: .* has no tokenizer"),
    "no model": (options(model__name_or_path="/nowhere/model"), r"model\.name_or_path: .*/nowhere/model"),
    "foreign folder": (foreign_folder, r"output_dir: .*output exists and holds something that is not a run"),
    "restart of a foreign folder": (foreign_folder_restarted, r"restart: .*output holds no run"),
    "output is a file": (output_is_a_file, r"output_dir: "),
    "indivisible batch": (
        options(train__global_batch_size=10, train__per_device_train_batch_size=4),
        r"train\.global_batch_size: 10 is not a multiple",
    ),
    "max_steps in free volume": (options(train__max_steps=3), r"mixing\.budget: free has no meaning"),
    "no layers": (options(influence__layers="['*.nothing']"), r"influence\.layers: "),
    "no such method": (options(mixing__method="idael"), r"mixing\.method: .*did you mean ideal\?"),
    "nothing to report": (options(stage="report"), r"output_dir: .* holds no run"),
    "no config": (options(config="/nowhere.yaml"), r"config: no file /nowhere\.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, case, capfd):
    spoil, pattern = BAD[case]
    given = spoil(data)
    before = files(tmp_path)
    assert run(data, tmp_path / "output", **given) == 2
    error = capfd.readouterr().err.strip()
    assert re.match(rf"error: .*{pattern}", error), error
    assert "\n" not in error and "\r" not in error, "one line"
    assert files(tmp_path) == before, "no run is left behind, and no file of others is touched"


def test_a_run_survives_bad_input(data, tmp_path, capfd, monkeypatch):
    """The same command with broken data: the finished run stays, and goes on once the data are mended."""
    miniature.quick(monkeypatch)
    few = {"data__max_examples": 16, "mixing__method": "joint"}
    output = tmp_path / "output"
    assert run(data, output, **few) == 0
    before = files(output)
    for change in (
        {"model__name_or_path": "/nowhere"},
        {"data__domains": "/nowhere"},
        {"train__global_batch_size": 9},
    ):
        assert run(data, output, **{**few, **change}) == 2
        assert files(output) == before
        # Not even a restart deletes a run for a command that cannot run itself.
        assert run(data, output, **{**few, **change}, restart="true") == 2
        assert read(output / "mixture.json") and (output / "model/model.safetensors").is_file()
        assert files(output) == before
    capfd.readouterr()
    assert run(data, output, **few) == 0


def test_exit_status_of_a_real_process(data, tmp_path):
    done = start(python() + arguments(data, tmp_path / "output", trian__learning_rate=1))
    assert done.returncode == 2
    assert done.stderr == "error: unknown key trian.learning_rate; did you mean train.learning_rate?\n"
    assert not (tmp_path / "output").exists()


def test_under_torchrun_rank_0_alone_says_it(data, tmp_path):
    done = start(torchrun() + arguments(data, tmp_path / "output", train__learning_rat=1))
    assert_said_once(done.stderr, "unknown key train.learning_rat; did you mean train.learning_rate?")
    assert done.returncode != 0 and not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"train__use_cpu": "false"},
            "train.use_cpu: the Trainer sees 1 process(es) where torchrun started 2",
        ),
        ({"data__max_length": 4}, "data.max_length"),
    ],
)
def test_of_two_ranks_one_says_it(data, tmp_path, given, message):
    done = run_on_ranks(data, tmp_path / "output", **given)
    assert_said_once(done.stderr, message)
    assert done.returncode == 2 and not (tmp_path / "output" / "config.yaml").exists()


def assert_said_once(stderr: str, message: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    # torchrun's own word on a rank that failed follows.
    assert "Traceback" not in stderr.split("torch/distributed")[0]


def test_help_needs_no_data(capsys):
    from ideal.cli import main
    from main import ARGUMENTS

    assert main(ARGUMENTS, ["--help"]) == 0
    assert "--mixing.max_change" in capsys.readouterr().out


def test_data_report_is_kept(good, tmp_path, monkeypatch, capsys):
    miniature.quick(monkeypatch, plan=True)
    assert run(good, tmp_path / "run", mixing__rounds=0, data__max_length=24) == 0
    out = capsys.readouterr().out
    rows = {row["set"]: row for row in json.loads((tmp_path / "run/data.json").read_text())}
    assert rows["math"]["rows"] == rows["math"]["kept"] == miniature.POOL
    assert "first example of reasoning (> trained, | masked)" in out and "inner loops: 1 of" in out
