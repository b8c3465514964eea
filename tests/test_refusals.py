"""Mistakes that once went through in silence, or ended in a traceback."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ideal.config import read_command
from ideal.errors import UserError
from ideal.preparation import read_ratios
from ideal.run_folder import RunFolder, read_json


@pytest.mark.parametrize(
    ("text", "line"),
    [("seed: 1\nseed: 2\n", "line 2.*'seed' is given twice"), ("mixing: 3\n", "mixing: 3 in .* is not a mapping")],
)
def test_a_file_that_would_lose_something(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=line):
        read_command({}, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(("key", "value"), [("train.learning_rate", "nan"), ("train.learning_rate", "-1"),
                                            ("influence.damping", "inf")])  # fmt: skip
def test_numbers_that_are_none(key: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^{key}"):
        read_command({}, [f"--{key}", value])


@pytest.mark.parametrize("ratio", [-1, math.nan, math.inf])
def test_ratios_of_a_file(tmp_path: Path, ratio: float) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"domains": {"math": {"ratio": ratio}}}).replace("NaN", ".nan"))
    with pytest.raises(UserError, match="mixing.ratios"):
        read_ratios(tmp_path / "m.json")


def test_a_broken_file_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{bro")
    with pytest.raises(UserError, match="state.json is broken"):
        read_json(tmp_path / "state.json")


def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    mine = RunFolder(tmp_path)
    mine.lock()
    code = f"import pathlib, ideal.run_folder as r; r.RunFolder(pathlib.Path({str(tmp_path)!r})).lock()"
    root = Path(__file__).parent.parent
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert other.returncode and "another run is working in" in other.stderr
