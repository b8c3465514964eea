"""What a report reads: the files of a run, in whatever state the run is."""

import csv
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ideal.mixers import MIXERS, Mixer

Json = dict[str, Any]


@dataclass(frozen=True)
class RoundFiles:
    """What one round left behind; an empty dictionary where a file is missing."""

    number: int
    mixture: Json = field(default_factory=dict)
    """round, total_tokens (trained tokens), domains: name -> pool, size, ratio, share, beta (led here); held: name ->
    the limit that it has come to."""
    evaluation: Json = field(default_factory=dict)
    """reference_loss and test_loss per capability (mean loss per trained token), Q, Q_test; where the model has been
    scored, reference_score, test_score and their standard errors per capability, score, score_test."""
    influence: Json = field(default_factory=dict)
    """domains, capabilities, matrix [R, n] (free form), matrix_fixed, alpha, standard_errors and more."""
    change: Json = field(default_factory=dict)
    """from_round, and predicted, observed and perhaps unscaled changes: reference_loss per capability, Q."""
    step: Json = field(default_factory=dict)
    """What the next mixture rests on, where the method says more: advice, predicted and others."""
    training: Json = field(default_factory=dict)
    """steps, training_loss, seconds, observed, is_result (whether its model may be the run's result)."""
    free_objective: dict[str, float] = field(default_factory=dict)
    """dQ/dbeta per domain in the free form (influence.csv's row "objective")."""


@dataclass(frozen=True)
class RunFiles:
    """The files of one run (missing ones are empty), and what follows from them alone."""

    folder: Path
    config: Json = field(default_factory=dict)
    state: Json = field(default_factory=dict)
    base: Json = field(default_factory=dict)
    rounds: list[RoundFiles] = field(default_factory=list)
    mixture: Json = field(default_factory=dict)
    metrics: list[Json] = field(default_factory=list)
    data_reports: list[Json] = field(default_factory=list)
    benchmarked: Json = field(default_factory=dict)
    """benchmarks.json: what public benchmarks gave, and of which round's model."""
    unreadable: list[str] = field(default_factory=list)
    """Files that are there but cannot be parsed, relative to `folder`."""

    def round(self, number: int) -> RoundFiles:
        """The round of this number; an empty one if it left nothing."""
        return next((r for r in self.rounds if r.number == number), RoundFiles(number))

    def setting(self, key: str) -> Any:
        """The configuration's value at a dotted key, None if it has none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def domains(self) -> list[str]:
        """All domains, in the configuration's order."""
        found = [list(r.mixture.get("domains", {})) for r in self.rounds]
        found += [list(self.mixture.get("domains", {}))]
        found += [list(r.influence.get("domains", [])) for r in self.rounds]
        return _merge(found)

    @property
    def capabilities(self) -> list[str]:
        """All capabilities, in the order in which they were evaluated."""
        evaluations = [self.base, *(r.evaluation for r in self.rounds)]
        found = [list(e.get("reference_loss") or {}) for e in evaluations]
        found += [list(r.influence.get("capabilities", [])) for r in self.rounds]
        return _merge(found)

    @property
    def has_tests(self) -> bool:
        """Whether any capability has a test set."""
        return any(e.get("test_loss") for e in [self.base, *(r.evaluation for r in self.rounds)])

    @property
    def has_scores(self) -> bool:
        """Whether any model was scored."""
        return any(e.get("reference_score") for e in [self.base, *(r.evaluation for r in self.rounds)])

    @property
    def by_score(self) -> bool:
        """Whether rounds are compared by their score, and not by Q."""
        return self.setting("evaluation.choose_by") == "score"

    @property
    def measure(self) -> str:
        """What rounds are compared by, in words."""
        worst = self.setting("mixing.objective") == "worst"
        name = "the score" if self.by_score else "the worst capability" if worst else "Q"
        kept_to = ", among those that keep to mixing.no_worse" if self.setting("mixing.no_worse") else ""
        return f"{name} on the reference sets{kept_to}"

    @property
    def evaluated(self) -> list[RoundFiles]:
        """The rounds whose model was evaluated."""
        return [r for r in self.rounds if number(r.evaluation.get("Q")) is not None]

    @property
    def results(self) -> list[RoundFiles]:
        """The evaluated rounds whose model may be the run's result."""
        return [r for r in self.evaluated if r.training.get("is_result", True)]

    @property
    def best(self) -> RoundFiles | None:
        """The round that the run kept, or the best result so far as the run says; without a word of it the best by
        `measure` (the earliest of equal ones)."""
        chosen: Any = self.mixture.get("round", self.state.get("best_round"))
        kept = self.round(-1 if chosen is None else chosen)
        if number(kept.evaluation.get("Q")) is not None:
            return kept

        def order(this: RoundFiles) -> tuple[float, int]:
            by = -(number(this.evaluation.get("score")) or 0.0) if self.by_score else this.evaluation["Q"]
            return by, this.number

        return min(self.results, key=order, default=None)

    @property
    def benchmarks(self) -> dict[str, Json]:
        """What public benchmarks gave, by task, where they are of the round that is the best now."""
        same = self.best is not None and self.benchmarked.get("round") == self.best.number
        return dict(self.benchmarked.get("tasks", {})) if same else {}

    @property
    def method(self) -> type[Mixer]:
        """The run's mixer; the interface's own answers for one that is not known here."""
        return MIXERS.get(str(self.setting("mixing.method")), Mixer)

    @property
    def fixed_budget(self) -> bool:
        """Whether the run kept its total of trained tokens."""
        return not self.method.has_budget or self.setting("mixing.budget") == "fixed"


def load_run(folder: Path) -> RunFiles:
    """Reads the files of the run in `folder` (DESIGN: files of a run); missing ones are left empty."""
    unreadable: list[str] = []

    def read(path: Path, parse: Callable[[str], Any], kind: type) -> Any:
        if not path.is_file():
            return kind()
        try:
            value = parse(path.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError, OSError):
            value = None
        if isinstance(value, kind):
            return value
        unreadable.append(str(path.relative_to(folder)))
        return kind()

    # A folder under a temporary name is a round that is still being written.
    numbered = [(int(m[1]), p) for p in folder.glob("round_*") if (m := re.fullmatch(r"round_(\d+)", p.name))]
    rounds = [
        RoundFiles(
            number=index,
            mixture=read(path / "mixture.json", json.loads, dict),
            evaluation=read(path / "evaluation.json", json.loads, dict),
            influence=read(path / "influence.json", json.loads, dict),
            change=read(path / "change.json", json.loads, dict),
            step=read(path / "step.json", json.loads, dict),
            training=read(path / "training.json", json.loads, dict),
            free_objective=read(path / "influence.csv", _objective_row, dict),
        )
        for index, path in sorted(numbered)
    ]
    reports = read(folder / "data.json", json.loads, list)
    return RunFiles(
        folder=folder,
        config=read(folder / "config.yaml", yaml.safe_load, dict),
        state=read(folder / "state.json", json.loads, dict),
        base=read(folder / "base" / "evaluation.json", json.loads, dict),
        rounds=rounds,
        mixture=read(folder / "mixture.json", json.loads, dict),
        metrics=read(folder / "metrics.jsonl", _events, list),
        data_reports=[r for r in reports if isinstance(r, dict)],
        benchmarked=read(folder / "benchmarks.json", json.loads, dict),
        unreadable=unreadable,
    )


def load_answers(run: RunFiles, round_number: int | None) -> list[Json]:
    """The lines of a round's answers.jsonl (None: the base model's); empty where there is none, or it is broken."""
    path = run.folder / ("base" if round_number is None else f"round_{round_number:02d}") / "answers.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        return []


def number(value: Any) -> float | None:
    """`value` as a finite number, None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under a temporary name in the same folder, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _merge(lists: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))


def _objective_row(text: str) -> dict[str, float]:
    header, *rows = csv.reader(text.splitlines())
    found = [row for row in rows if row and row[0] == "objective"]
    # "objective" is the last row: a capability may have the same name.
    return dict(zip(header[1:], map(float, found[-1][1:]), strict=True)) if found else {}


def _events(text: str) -> list[Json]:
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the line that was being written when the run was stopped
            continue
        if isinstance(event, dict):
            events.append(event)
    return events
