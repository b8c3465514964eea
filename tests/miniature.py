"""Whole runs in seconds, for test_loop.py and test_cli.py: three small domains in three formats.

The model is the demo's. Runs go through main.py's own block, in this process (torch is imported
already), on two ranks of their own, or as a person starts them.
"""

import csv
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import processes
import pytest

from ideal.cli import main as ideal_main
from ideal.demo import BASE_MODEL
from ideal.demo.domains import Example, draw
from ideal.seeding import generator
from main import ARGUMENTS

ROOT = Path(__file__).parents[1]
POOL, REFERENCE, TEST = 24, 10, 8
DOMAINS = ("math", "reasoning", "safety")


def _write(path: Path, name: str, examples: Iterable[Example]) -> None:
    match name:
        case "math":
            rows: list[Any] = [{"question": e.prompt, "answer": e.answer} for e in examples]
            path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "reasoning":
            rows = [
                {
                    "messages": [
                        {"role": "user", "content": e.prompt},
                        {"role": "assistant", "content": e.answer},
                    ]
                }
                for e in examples
            ]
            path.with_suffix(".json").write_text(json.dumps(rows))
        case _:
            with path.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(["prompt", "completion"])
                writer.writerows([e.prompt, e.answer] for e in examples)


def make_data(folder: Path) -> Path:
    """A sub-folder per domain; safety has no test set."""
    for name in DOMAINS:
        (folder / name).mkdir(parents=True)
        drawn = iter(draw(name, POOL + REFERENCE + TEST, generator(1, name), set()))
        for role, count in (("train", POOL), ("reference", REFERENCE), ("test", TEST)):
            examples = [next(drawn) for _ in range(count)]
            if (name, role) != ("safety", "test"):
                _write(folder / name / role, name, examples)
    return folder


def arguments(data: Path, output: Path, **more: Any) -> list[str]:
    """The command line of a run; `more` with __ for dots."""
    settings = {
        "model__name_or_path": BASE_MODEL,
        "data__domains": data,
        "output_dir": output,
        "train__global_batch_size": 8,
        "train__learning_rate": 3e-3,
        "train__disable_tqdm": "true",
        "mixing__rounds": 1,
        **more,
    }
    return [
        word
        for key, value in settings.items()
        if value is not None
        for word in (f"--{key.replace('__', '.')}", str(value))
    ]


def run(data: Path, output: Path, **more: Any) -> int:
    """A run in this process; its exit status."""
    return ideal_main(ARGUMENTS, arguments(data, output, **more))


def quick(monkeypatch: pytest.MonkeyPatch, *, plan: bool = False) -> None:
    """Leaves out of runs in this process what takes long and is tested elsewhere: the report's figures, and the plan
    (on two ranks too: test_loop.py's first run).

    plan: whether it is wanted all the same.
    """
    monkeypatch.setattr("ideal.loop.render_report", lambda folder: folder / "report.html")
    if not plan:
        monkeypatch.setattr("ideal.cli.what_it_takes", lambda config, sizes: "")
    gc.freeze()  # the imported libraries: the loop collects after each model


def run_on_ranks(data: Path, output: Path, **more: Any) -> "subprocess.CompletedProcess[str]":
    """A quick run on two ranks."""
    return processes.attempt(_run_and_exit, arguments(data, output, **more), ranks=2)


def _run_and_exit(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        sys.exit(ideal_main(ARGUMENTS, words))


def python() -> list[str]:
    """One process, as a person starts it."""
    return [sys.executable, str(ROOT / "main.py")]


def torchrun() -> list[str]:
    """Two processes, as a person starts them."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, str(ROOT / "main.py")]


def start(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Runs a command from the repository's folder to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=dict(os.environ), **options
    )


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder` with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def read(path: Path) -> Any:
    """A JSON file, strict: no NaN."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path}: {text} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)
