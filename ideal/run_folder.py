"""The files of a run: where they lie, written atomically, fingerprinted, resumed.

Only this module knows the paths. Every file appears whole under its name or not at all, so what is there tells
which phases are finished, and the same command continues behind the last one.
"""

import csv
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import yaml

from ideal.distributed import is_main, say
from ideal.errors import UserError

# Keys that may differ when a run is continued: they change neither the mixture nor the training.
MAY_CHANGE = frozenset(
    {
        "keep_models",
        "output_dir",
        "evaluation.batch_size",
        "influence.batch_size",
        "influence.memory_budget",
        "influence.pair_budget",
        *(
            f"train.{name}"
            for name in (
                "report_to", "run_name", "project", "logging_steps", "logging_strategy", "logging_first_step",
                "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "save_strategy", "save_steps",
                "save_total_limit", "per_device_train_batch_size", "dataloader_num_workers",
                "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
            )
        ),
    }
)  # fmt: skip
GROWS = "mixing.rounds"
LOCK = ".lock"
BENCHMARKS = "benchmarks.json"
"""Of a run's result, beside the run; scripts/evaluate.sh writes it."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file or folder under a temporary name, then renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    remove(part)
    write(part)
    remove(path)
    os.replace(part, path)


def remove(path: Path) -> None:
    """Removes a file or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, on rank 0 alone."""
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, on rank 0 alone."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a JSON value per line, atomically, on rank 0 alone."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UserError where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"output_dir: {path} is broken; remove it to have it made again, or --restart true") from None


class RoundFolder:
    """One round's files: in round_NN.part until the round is complete, then in round_NN."""

    def __init__(self, run: Path, number: int) -> None:
        self.number = number
        self.complete_path = run / f"round_{number:02d}"
        self.part_path = run / f"round_{number:02d}.part"

    @property
    def path(self) -> Path:
        """Where the files are now."""
        return self.complete_path if self.complete_path.is_dir() else self.part_path

    @property
    def mixture(self) -> Path:
        """mixture.json"""
        return self.path / "mixture.json"

    @property
    def evaluation(self) -> Path:
        """evaluation.json"""
        return self.path / "evaluation.json"

    @property
    def answers(self) -> Path:
        """answers.jsonl: what the model answered, where evaluation.generate asked for it."""
        return self.path / "answers.jsonl"

    @property
    def influence(self) -> Path:
        """influence.json"""
        return self.path / "influence.json"

    @property
    def step(self) -> Path:
        """step.json: what the step after this round rests on, where a method says so."""
        return self.path / "step.json"

    @property
    def change(self) -> Path:
        """change.json: what the step before predicted of the losses, and what was observed."""
        return self.path / "change.json"

    @property
    def training(self) -> Path:
        """training.json: steps, training loss, seconds, what a controller left, whether the model may be the result."""
        return self.path / "training.json"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's own checkpoints while the inner loop runs."""
        return self.path / "checkpoints"

    def write_influence_csv(self, capabilities: list[str], domains: list[str], rows: Any, objective: Any) -> None:
        """influence.csv: M in its free form, a row per capability; w^T M as the row "objective"."""
        write_text(self.path / "influence.csv", influence_csv(capabilities, domains, rows, objective))

    def finish(self) -> None:
        """Renames the folder once everything of the round is in it."""
        if is_main() and self.part_path.is_dir():
            os.replace(self.part_path, self.complete_path)


def influence_csv(capabilities: list[str], domains: list[str], rows: Any, objective: Any) -> str:
    """M [R, n] and w^T M [n] as CSV text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["capability", *domains])
    for name, row in zip([*capabilities, "objective"], [*rows, objective], strict=True):
        writer.writerow([name, *(f"{value:.9g}" for value in row)])
    return text.getvalue()


class RunFolder:
    """The folder `output_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.state = path / "state.json"
        self.data = path / "data.json"
        self.mixture = path / "mixture.json"
        self.model = path / "model"
        self.base_evaluation = path / "base" / "evaluation.json"
        self.base_answers = path / "base" / "answers.jsonl"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = None

    def round(self, number: int) -> RoundFolder:
        """Round `number`'s folder."""
        return RoundFolder(self.path, number)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.state.is_file() and bool(read_json(self.state).get("finished"))

    def log(self, phase: str, values: Mapping[str, Any], *, round: int | None = None, step: int | None = None) -> None:
        """Adds one event to metrics.jsonl, on rank 0 alone."""
        if is_main():
            event = {"time": time.time(), "round": round, "phase": phase, "step": step, "values": {**values}}
            self.path.mkdir(parents=True, exist_ok=True)
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def check(
        self,
        config: dict[str, Any],
        flat: Callable[[dict[str, Any]], dict[str, Any]],
        extends: bool = True,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Raises UserError where the folder holds another configuration's run, or what no run wrote.

        extends: whether mixing.rounds may be more than before.
        defaults: by dotted key, what a key had that the version which began the run did not know yet.
        """
        nearest = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UserError(f"output_dir: {self.path} cannot be made: {nearest} is no folder that can be written")
        if self.config.is_file():
            self._compare(config, flat, extends, defaults)
        elif self.path.exists() and (not self.path.is_dir() or self._foreign()):
            raise UserError(
                f"output_dir: {self.path} exists and holds something that is not a run; name another folder"
            )

    def _foreign(self) -> bool:
        return any(path.name != LOCK for path in self.path.iterdir())

    def lock(self) -> None:
        """Makes the folder this process's own until it ends. Raises UserError where another run has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a")
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output_dir: another run is working in {self.path}; wait for it or name another") from None
        except OSError as error:
            # Some network file systems know no locks; a run there is as safe as without.
            say(f"note: {self.path} cannot be locked against a second run ({error.strerror})")

    def missing(self) -> list[str]:
        """Of a finished run: the files that should be there and are not."""
        last = read_json(self.state)["best_round"]
        rounds = [self.round(number) for number in range(last + 1)]
        wanted = [self.mixture, self.model, *(r.evaluation for r in rounds), *(r.mixture for r in rounds)]
        return [str(path.relative_to(self.path)) for path in wanted if not path.exists()]

    def grows(self, config: dict[str, Any]) -> bool:
        """Whether `config` asks for more outer steps than the run that is here did."""
        before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        return bool(before["mixing"]["rounds"] < config["mixing"]["rounds"])

    def claim(self, config: dict[str, Any], header: str, data: list[dict[str, Any]]) -> None:
        """Writes config.yaml and data.json; a finished run that may now take more outer steps is open again."""
        if is_main() and self.finished and self.grows(config):
            write_json(self.state, {**read_json(self.state), "finished": False})
        write_text(self.config, header + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_json(self.data, data)

    def _compare(
        self,
        config: dict[str, Any],
        flat: Callable[[dict[str, Any]], dict[str, Any]],
        extends: bool,
        defaults: Mapping[str, Any],
    ) -> None:
        try:
            before = flat(yaml.safe_load(self.config.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, AttributeError):
            raise UserError(f"output_dir: {self.config} cannot be read; name another folder") from None
        # A mapping that was given stands there by its entries, not by its own key.
        given = {key[:end] for key in before for end, letter in enumerate(key) if letter == "."}
        unknown = {key: value for key, value in defaults.items() if key not in given}
        now, before = flat(config), {**unknown, **before}
        changed = [
            f"{key} ({before.get(key, 'not set')} -> {now.get(key, 'not set')})"
            for key in dict.fromkeys([*before, *now])
            if key not in MAY_CHANGE and before.get(key) != now.get(key)
            and not (extends and key == GROWS and now.get(key, 0) > before.get(key, 0))
        ]  # fmt: skip
        if changed:
            shown = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise UserError(
                f"output_dir: {self.path} holds a run of another configuration: {shown}. "
                "Name another output_dir, or start over with --restart true"
            )

    def check_restart(self) -> None:
        """Raises UserError where the folder holds something, and that is not a run."""
        if self.config.is_file() or not self.path.exists():
            return
        if not self.path.is_dir() or self._foreign():
            raise UserError(f"restart: {self.path} holds no run (no config.yaml), so nothing there is deleted")

    def clear(self) -> None:
        """Removes the run in the folder, and nothing else. Raises UserError where there is none."""
        self.check_restart()
        ours = ["base", "export", "figures", "model", "model.part", "round_*", "*.json", "metrics.jsonl"]
        for pattern in [*ours, "influence.csv", "report.html", "config.yaml"]:
            for path in self.path.glob(pattern):
                remove(path)
