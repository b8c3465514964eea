"""The methods' runs of scripts/search_benchmark.py: which there are, and doing what is missing of them.

Each is an ordinary run of main.py, so a benchmark that was stopped goes on where it was, also within a run.
"""

import contextlib
import gc
import io
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from search_regret import Curves, chosen, curve_of

from ideal.cli import main as ideal_main
from ideal.compare.leaderboard import numbers_of
from ideal.distributed import progress
from ideal.errors import UserError
from ideal.report.files import Json, load_run
from main import ARGUMENTS

JOINT, FIRST, BY_LOSS = "joint", "uniform", "loss"
"""The method whose run is the unit of cost; the start that what does not depend on the start is run from; and the start
that the rule `loss` gives, from which only some methods are run that go on step after step."""
STEPPING = (
    "ideal", "ideal, m = 0.15", "ideal, m = 0.3", "ideal, surrogate", "ideal, joint solve", "ideal, one run",
    "power_law",
)  # fmt: skip
FROM_LOSS = (JOINT, "ideal", "ideal, surrogate", "power_law")
SOLVER = {
    "solver": "cg", "fisher": "sampled", "damping": 1.0, "sample_fraction": 0.5, "solver_iterations": 10,
    "batch_size": 250,
}  # fmt: skip
"""The joint solve of docs/validation.md: its size, and the damping at which it comes nearest to a solution."""
TUNING_SEEDS = (50, 51)
NEVER = 1000
"""A patience that never ends a run: what a budget holds is asked for each budget, not by the method."""
RUNS_PER_PROCESS = 12
"""After which a worker is replaced by a fresh one: figures and models leave memory behind."""
TUNED: Mapping[str, tuple[str, Sequence[float]]] = {
    "ideal": ("max_change", (0.15, 0.3, 0.6)),
    "ideal, one run": ("max_change", (0.15, 0.3, 0.6)),
    "regmix": ("proxy_length", (0.25, 0.125)),
    "temperature": ("temperature", (2, 4, 8)),
    "skillit": ("rounds", (2, 4, 8)),
    "aioli": ("rounds", (2, 1, 4)),
}
"""By row, its documented constant and at most three settings of it, the default first. The others have none that a
budget does not set: odm, loss, random, specific, uniform and joint none at all, doremi and doge their rounds."""


@dataclass(frozen=True)
class Size:
    """How large the benchmark is.

    loops: inner loops of the longest runs. tuning_loops: those at which values of a constant are compared.
    starts: those to run from, FIRST among them. methods: rows to run besides joint; none: all.
    more: further arguments of main.py, for all runs.
    """

    seeds: Sequence[int] = tuple(range(5))
    loops: int = 10
    tuning_loops: int = 5
    starts: Sequence[str] = (FIRST,)
    methods: Sequence[str] = ()
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Setting:
    """A method with its keys.

    row: its name in tables; the settings of one row are what the method does with different budgets.
    keys: of the section mixing, or of another one that they name (influence.solver).
    starts: those that it is run from. shared: it keeps nothing of the start but its volume, so that its runs from
    FIRST count for all starts.
    """

    name: str
    row: str
    keys: Mapping[str, Any]
    starts: Sequence[str]
    shared: bool = False

    def run_from(self) -> Sequence[str]:
        """The starts that there are runs from."""
        return [FIRST] if self.shared else self.starts


def settings_of(starts: Sequence[str], loops: int, tuned: Mapping[str, float]) -> list[Setting]:
    """All methods within `loops` inner loops. tuned: by row, its constant's value; the default where it has none."""

    def constant(row: str) -> dict[str, float]:
        return {TUNED[row][0]: tuned.get(row, TUNED[row][1][0])} if row in TUNED else {}

    def setting(row: str, name: str = "", method: str = "", **keys: Any) -> Setting:
        shared = row in ("uniform", "loss", "random", "specific", "skillit")
        # From equal sizes, temperature stays where it is: that is joint.
        own = [start for start in starts if row != "temperature" or start != FIRST]
        own = [start for start in own if start != BY_LOSS or shared or row in FROM_LOSS]
        return Setting(name or row, row, {"method": method or row, **constant(row), **keys}, own, shared)

    found = [
        setting(JOINT),
        setting("ideal", rounds=loops - 1, step="fixed"),
        # The paper's m, and the demo's, beside the one that tuning takes.
        *(
            setting(f"ideal, m = {m:g}", f"ideal_{m:g}", "ideal", rounds=min(8, loops) - 1, step="fixed", max_change=m)
            for m in (0.15, 0.3)
        ),
        setting("ideal, surrogate", "ideal_surrogate", "ideal", rounds=loops - 1, step="surrogate"),
        # The solver as the validation has it: the same rows, iterations and damping. Dear, so of few rounds.
        setting(
            "ideal, joint solve", "ideal_joint", "ideal", rounds=min(5, loops) - 1, step="surrogate",
            **{f"influence.{key}": value for key, value in SOLVER.items()},
        ),
        # Two steps within one training run, the demo's own number.
        setting("ideal, one run", "ideal_continue", "ideal", rounds=2, step="fixed", start="continue"),
        setting("power_law", rounds=loops - 1),
        setting("loss", rounds=loops - 1),
        setting("random", rounds=loops - 1),
        setting("uniform"),
        setting("temperature"),
        setting("specific"),
        setting("odm"),
        setting("aioli"),
        setting("skillit"),
        setting("doremi", rounds=1),
        setting("doge", rounds=1),
    ]
    length = constant("regmix")["proxy_length"]
    for within in sorted({min(5, loops), loops}):
        proxies = round((within - 1) / length)
        found.append(setting("regmix", f"regmix_{proxies}", rounds=proxies))
    return found


@dataclass(frozen=True)
class Task:
    """One run: where it lies, and its arguments."""

    folder: Path
    arguments: Sequence[str]


def _open() -> None:
    gc.freeze()  # the imported libraries: the loop collects after each model


def _do(task: Task) -> tuple[Task, int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = ideal_main(ARGUMENTS, task.arguments)
    return task, status, said.getvalue()[-2000:]


class Runs:
    """The benchmark's runs below a folder."""

    def __init__(self, output: Path, starts: Mapping[str, Mapping[str, float]], size: Size, processes: int) -> None:
        self.output, self.starts, self.size, self.processes = output, starts, size, processes

    def place(self, group: str, setting: Setting, start: str, seed: int) -> Path:
        """A run's folder."""
        return self.output / group / (FIRST if setting.shared else start) / setting.name / f"seed_{seed}"

    def task(self, group: str, setting: Setting, start: str, seed: int) -> Task:
        """A run's task."""
        folder = self.place(group, setting, start, seed)
        keys = {
            "output_dir": str(folder),
            "seed": seed,
            "train.disable_tqdm": "true",
            "train.per_device_train_batch_size": 16,  # one process takes a whole step at a time: a fifth faster
            "mixing.ratios": json.dumps(dict(self.starts[start])),
            "mixing.budget": "fixed",
            "mixing.patience": NEVER,
            **{key if "." in key else f"mixing.{key}": value for key, value in setting.keys.items()},
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        return Task(folder, [*words, *self.size.more])

    def do(self, tasks: Sequence[Task], title: str) -> None:
        """Does what is missing of them. Raises UserError for one that fails, with the last it said."""
        # Finished ones too: main.py says so at once, and refuses where it was another run.
        os.environ["OMP_NUM_THREADS"] = "1"  # the workers inherit it
        with (
            multiprocessing.get_context("spawn").Pool(self.processes, _open, (), RUNS_PER_PROCESS) as pool,
            progress(len(tasks), title, unit="run") as bar,
        ):
            for task, status, said in pool.imap_unordered(_do, tasks):
                if status:
                    raise UserError(f"the run in {task.folder} failed: {said}")
                bar.update()

    def settings(self, loops: int, tuned: Mapping[str, float]) -> list[Setting]:
        """Of the methods that take part."""
        found = settings_of(list(self.starts), loops, tuned)
        return [s for s in found if not self.size.methods or s.row in (JOINT, *self.size.methods)]

    def tune(self, rows: Sequence[str]) -> list[Json]:
        """What each value of each row's constant came to with the tuning seeds, by reference Q; and which is taken."""
        tasks = {(row, value): self.tuning_tasks(row, value) for row in rows for value in TUNED[row][1]}
        self.do([task for found in tasks.values() for task in found], "tuning")
        table = []
        for row in rows:
            values = {value: [result_q(task.folder) for task in tasks[row, value]] for value in TUNED[row][1]}
            means = [{"value": value, "mean": float(np.mean(found))} for value, found in values.items()]
            table.append({"row": row, "constant": TUNED[row][0], "taken": chosen(values), "Q": means})
        return table

    def tuning_tasks(self, row: str, value: float) -> list[Task]:
        """The runs that one value of a row's constant is judged by."""
        settings = self.settings(self.size.tuning_loops, {row: value})
        return [
            self.task(f"tuning/{row}_{value:g}", setting, start, seed)
            for setting in settings
            if setting.row == row
            for start in setting.run_from()
            for seed in TUNING_SEEDS
        ]

    def reported(self, settings: Sequence[Setting]) -> None:
        """All runs with the reported seeds, all methods of a seed before the next seed; joint first, as the unit."""
        tasks = [
            self.task("runs", setting, start, seed)
            for seed in self.size.seeds
            for setting in settings
            for start in setting.run_from()
        ]
        self.do(tasks, "methods")

    def curves(self, settings: Sequence[Setting], start: str) -> tuple[dict[str, list[Curves]], list[str]]:
        """By row, the curves of its settings from a start; and the settings that lack a seed, which are left out."""
        joint = {
            seed: numbers_of(load_run(folder), JOINT, seed)
            for seed in self.size.seeds
            if finished(folder := self.place("runs", Setting(JOINT, JOINT, {}, ()), start, seed))
        }
        rows, unfinished = dict[str, list[Curves]](), list[str]()
        for setting in settings:
            if start not in setting.starts:
                continue
            folders = {seed: self.place("runs", setting, start, seed) for seed in self.size.seeds}
            if all(seed in joint and finished(folder) for seed, folder in folders.items()):
                found = {seed: curve_of(load_run(folder), joint[seed], seed) for seed, folder in folders.items()}
                rows.setdefault(setting.row, []).append(found)
            else:
                unfinished.append(setting.name)
        return rows, unfinished


def result_q(folder: Path) -> float:
    """Q on the reference sets of a finished run's result."""
    best = load_run(folder).best
    assert best is not None, "the run is finished"
    return float(best.evaluation["Q"])


def finished(folder: Path) -> bool:
    """Whether a run came to its end."""
    return bool(load_run(folder).state.get("finished"))
