"""Which models are evaluated on which tasks, and what is written: benchmarks.json, the report, the leaderboard.

    RUN/benchmarks.json           of the result, RUN/model, beside the run's other files; its report shows it
    COMPARISON/METHOD/seed_S/...  the same for every run; leaderboard.* shows means over seeds
    MODEL/benchmarks.json         of a model folder by itself
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ideal.benchmarks.harness import Tasks, Wanted, has_chat_template, run_tasks
from ideal.compare.writing import JSON_FILE, refresh_leaderboard
from ideal.distributed import barrier, is_main, say
from ideal.errors import UserError
from ideal.report import load_run, render_report
from ideal.report.files import Json
from ideal.run_folder import BENCHMARKS, RunFolder, read_json, write_json


@dataclass(frozen=True)
class Target:
    """A model to evaluate."""

    model: Path
    results: Path
    """benchmarks.json"""
    run: Path | None
    """The run that it is the result of."""


def targets_of(place: Path) -> list[Target]:
    """The models that a path stands for: a model folder, a run's result, or every result of a comparison.

    Raises UserError where there is none, or where a run's model is not there.
    """
    if (place / JSON_FILE).is_file():
        runs = sorted(path for path in place.glob("*/seed_*") if RunFolder(path).finished)
        if not runs:
            raise UserError(f"{place} holds a comparison without a finished run")
        return [target_of_run(run, "make the comparison with --keep_models all") for run in runs]
    if (place / "state.json").is_file():
        if not RunFolder(place).finished:
            raise UserError(f"{place} holds a run that is not finished: the same command continues it")
        return [target_of_run(place, "start it over")]
    if not (place / "config.json").is_file():
        raise UserError(f"{place} is no model's folder (config.json), no run and no comparison (--stage compare)")
    return [Target(place, place / BENCHMARKS, None)]


def target_of_run(run: Path, hint: str) -> Target:
    """The result of a finished run. hint: what to do where its model was deleted."""
    model = RunFolder(run).model
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not there any more; {hint}")
    return Target(model, run / BENCHMARKS, run)


def fingerprint(model: Path) -> str:
    """A hash of all files of a model's folder but the results themselves: weights, configuration, tokenizer."""
    whole = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.is_file() and path.name != BENCHMARKS):
        with path.open("rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def results_so_far(target: Target) -> Json:
    """benchmarks.json's content; without tasks where there is none, or where it is of another model."""
    best = load_run(target.run).best if target.run is not None else None
    fresh: Json = {"model": fingerprint(target.model), "round": None if best is None else best.number, "tasks": {}}
    if not target.results.is_file():
        return fresh
    before = read_json(target.results)
    return before if before.get("model") == fresh["model"] else fresh


def evaluate_models(places: Sequence[Path], wanted: Wanted) -> None:
    """Evaluates every model on every task that it has no result of yet, and shows the results where they belong.

    Raises UserError before any model is loaded for whatever cannot be done.
    """
    targets = [target for place in places for target in targets_of(place)]
    tasks = Tasks(wanted)
    # Decided for all before anything is written: every process must come to the same list.
    work = []
    for target in targets:
        found, chat = results_so_far(target), has_chat_template(target.model)
        missing = [task for task in wanted.tasks if not is_finished(found, task, tasks.settings(task, chat))]
        work.append((target, found, chat, missing))
    for task, chat in dict.fromkeys((task, chat) for _, _, chat, missing in work for task in missing):
        tasks.load(task, chat)
    for target, found, chat, missing in work:
        done = [task for task in wanted.tasks if task not in missing]
        say(f"{target.model}: finished: {', '.join(done) or 'none'}; to do: {', '.join(missing) or 'none'}")
        if missing:
            for task, result in run_tasks(target.model, tasks, missing, chat, say):
                if result is not None and is_main():
                    found["tasks"][task] = result
                    write_json(target.results, found)
                    say(f"{target.model}: {task} {result['score']:.4f} ({result['metric']}, {result['rows']} rows)")
        barrier()
        if target.run is not None and is_main():
            render_report(target.run)
        say(f"in {target.results}")
    if is_main():
        for place in dict.fromkeys(places):
            if (place / JSON_FILE).is_file():
                refresh_leaderboard(place)
                say(f"in {place}: leaderboard.html, .md, .csv, .json")


def is_finished(found: Json, task: str, settings: Json) -> bool:
    """Whether there is a result of `task` that was made with these settings."""
    before = found["tasks"].get(task, {}).get("settings", {})
    return all(before.get(key) == value for key, value in settings.items()) and bool(before)
