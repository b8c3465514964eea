"""`--stage compare`: every method with every seed, one ordinary run after the other, and their leaderboard.

    output_dir/METHOD/seed_S        a run, as the same configuration with this method and seed makes it
    output_dir/joint_as_METHOD/...  the control: joint, scaled to the volume of a method's result that grew
    output_dir/leaderboard.*        rewritten after each run
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ideal.compare.leaderboard import CONTROL, JOINT, RunNumbers, leaderboard, mean_of_tries, numbers_of
from ideal.compare.writing import JSON_FILE, clear_leaderboard, console_tables, write_leaderboard
from ideal.config import Command, Config, dump, of_method
from ideal.data import Data, load_data
from ideal.data.inspection import report_table
from ideal.distributed import all_gather_objects, barrier, is_main, say, together
from ideal.errors import UserError
from ideal.loop import run_loop
from ideal.mixers import MIXERS
from ideal.model import checkpoint_config, load_tokenizer
from ideal.preparation import (
    check_folder,
    check_isolation,
    checked_run,
    data_row,
    data_sizes,
    header,
    what_it_takes,
    with_demo,
)
from ideal.report import load_run
from ideal.rounds.run import exists
from ideal.run_folder import RunFolder, read_json, remove, write_json
from ideal.training import training_arguments

BASE_PHASES = ("reference losses", "test losses", "scores")
"""Events of metrics.jsonl without a round: what was measured of the base model."""


@dataclass
class Comparison:
    """What the runs share, and what they have come to so far."""

    command: Command
    folder: RunFolder
    seeds: list[int]
    tokenizer: PreTrainedTokenizerBase | None = None
    loaded: dict[int, Data] = field(default_factory=dict)
    """The data of the seed that was used last: held-out cuts differ between seeds."""
    runs: dict[tuple[str, int], RunNumbers] = field(default_factory=dict)
    """By row and seed."""
    beside: dict[str, str] = field(default_factory=dict)
    """Rows that no method of their own made, by the row they stand beside: controls, means of tries."""
    failed: dict[str, str] = field(default_factory=dict)

    def config(self, method: str, row: str, seed: int) -> Config:
        """Of one run. Raises UserError where it does not fit the method."""
        changes = self.command.compare.overrides.get(method, {})
        return of_method(self.command.config, method, seed, str(self.place(row, seed)), changes)

    def place(self, row: str, seed: int) -> Path:
        """A run's folder."""
        return self.folder.path / row / f"seed_{seed}"

    def data(self, config: Config) -> tuple[PreTrainedTokenizerBase, Data]:
        """Tokenizer and data, loaded once for all runs of a seed."""
        if config.seed not in self.loaded:
            together(lambda: checkpoint_config(config.model))
            self.tokenizer = self.tokenizer or together(lambda: load_tokenizer(config.model))
            self.loaded = {config.seed: load_data(config.data, self.tokenizer, config.seed)}
        assert self.tokenizer is not None
        return self.tokenizer, self.loaded[config.seed]

    def write(self, methods: Sequence[str]) -> None:
        """The leaderboard of what there is, on rank 0."""
        if is_main():
            runs, expected = list(self.runs.values()), len(methods) * len(self.seeds)
            content = leaderboard(runs, self.beside, self.failed, expected)
            made_by = {**asdict(self.command.compare), "seeds": self.seeds}
            write_leaderboard(self.folder.path, {**content, "compare": made_by})
        barrier()


def compare_stage(command: Command) -> None:
    """Runs what is missing of a comparison. Raises UserError before anything runs for a method that is refused."""
    folder = RunFolder(Path(command.config.output_dir))
    together(lambda: check_output(folder.path, command.restart))
    comparison = Comparison(command, folder, command.compare.seed_list(command.config.seed))
    # Also starts the process group, which everything after it uses.
    training_arguments(command.config.train, folder.path, command.config.seed)
    loops = allowed_methods(comparison)
    methods = list(loops)
    together(lambda: folder.lock() if is_main() else None)
    if command.restart and is_main():
        for path in folder.path.glob("*/seed_*"):
            RunFolder(path).clear()
        clear_leaderboard(folder.path)
    barrier()
    seeds = len(comparison.seeds)
    say(f"compare: {len(methods)} methods x {seeds} seeds in {folder.path}: {', '.join(methods)}")
    say(f"compare: up to {seeds * sum(loops.values()):,.0f} inner loops, and what the methods do besides\n")
    # What is there already first, so that the leaderboard never shows less than it did.
    all_runs(comparison, methods, start=False)
    say(f"compare: {sum(row in methods for row, _ in comparison.runs)} of {len(methods) * seeds} runs are finished")
    comparison.write(methods)
    all_runs(comparison, methods, start=True)
    say("\n" + console_tables(folder.path) if is_main() else "")
    if comparison.failed:
        first = "; ".join(f"{name}: {text}" for name, text in comparison.failed.items())
        raise UserError(f"compare: {len(comparison.failed)} run(s) failed, all others are in {folder.path}: {first}")


def check_output(path: Path, restart: bool) -> None:
    """Raises UserError where output_dir holds something else than a comparison."""
    if path.exists() and not path.is_dir():
        raise UserError(f"output_dir: {path} is no folder")
    if (path / JSON_FILE).is_file() or not path.exists() or not [p for p in path.iterdir() if p.name != ".lock"]:
        return
    hint = ", and nothing there is deleted" if restart else ""
    raise UserError(f"output_dir: {path} holds something that is not a comparison{hint}; name another folder")


def allowed_methods(comparison: Comparison) -> dict[str, float]:
    """joint, then the methods that were asked for, or all that nothing refuses, each with its number of inner loops.

    Says which are left out, and why.
    Raises UserError where one that was asked for, or joint, is refused.
    """
    asked = comparison.command.compare.methods
    seed = comparison.seeds[0]
    first = with_demo(comparison.config(JOINT, JOINT, seed))
    together(lambda: check_isolation(first))
    tokenizer, data = comparison.data(first)
    say(report_table(data.reports, data.notes) + "\n")
    loops = {}
    for method in dict.fromkeys([JOINT, *(asked or MIXERS)]):
        try:
            config = comparison.config(method, method, seed)
            folder = RunFolder(comparison.place(method, seed))
            arguments = training_arguments(config.train, folder.path / "checkpoints", seed)
            run, mixture = checked_run(with_demo(config), folder, arguments, tokenizer, data)
            if run.mixer.needs_influence:
                sizes = data_sizes(run, mixture)
                together(lambda run=run, sizes=sizes: what_it_takes(run.config, sizes))  # type: ignore[misc]
        except UserError as error:
            if method == JOINT or asked is not None or method in comparison.command.compare.overrides:
                hint = "" if method == JOINT else f"; or leave {method} out of compare.methods"
                raise UserError(f"{method}: {error}{hint}") from None
            say(f"compare: {method} is left out: {error}")
            continue
        mixer = run.mixer
        loops[method] = sum(mixer.length(number) for number in range(mixer.last_round() + 1))
    return loops


def all_runs(comparison: Comparison, methods: Sequence[str], *, start: bool) -> None:
    """Every run in turn, all methods of a seed before the next seed; `start`: else only those that are finished."""
    for seed in comparison.seeds:
        for method in methods:
            before = len(comparison.runs) + len(comparison.failed)
            done = one_run(comparison, method, method, seed, start=start)
            if done is not None:
                add_control(comparison, method, done, start=start)
            if start and len(comparison.runs) + len(comparison.failed) > before:
                comparison.write(methods)


def one_run(
    comparison: Comparison, row: str, method: str, seed: int, factor: float = 1.0, *, start: bool
) -> RunNumbers | None:
    """What the run of a row and seed came to; None where it failed, or is not finished and not to be started.

    factor: by which joint's ratios of this seed are multiplied.
    """
    if (row, seed) in comparison.runs:
        return comparison.runs[row, seed]
    config = comparison.config(method, row, seed)
    if factor != 1:
        ratios = {name: ratio * factor for name, ratio in comparison.runs[JOINT, seed].ratios.items()}
        config = replace(config, mixing=replace(config.mixing, ratios=ratios))
    folder = RunFolder(comparison.place(row, seed))
    command = replace(comparison.command, config=config, stage="run", restart=False)
    try:
        together(lambda: check_folder(folder, command))
    except UserError:
        # A control follows from another run: where that one has changed, its control is made again.
        if row == method:
            raise
        together(lambda: folder.clear() if is_main() else None)
    if not (exists(folder.state) and folder.finished and not folder.grows(dump(config))):
        if not start:
            return None
        say(f"\ncompare: {row}, seed {seed}\n")
        try:
            run_here(comparison, config, folder)
        except UserError as error:
            if method == JOINT:
                raise
            comparison.failed[f"{row}, seed {seed}"] = str(error)
            say(f"compare: {row}, seed {seed} failed: {error}")
            return None
    if config.keep_models == "final" and is_main():
        for path in (folder.model, folder.path / "export"):
            remove(path)
    found = all_gather_objects(rows_of(folder, row, seed) if is_main() else None)[0]
    assert found is not None, "rank 0 has read them"
    for numbers in found:
        comparison.runs[numbers.row, seed] = numbers
        if numbers.row != row:
            comparison.beside[numbers.row] = row
    return found[0]


def rows_of(folder: RunFolder, row: str, seed: int) -> list[RunNumbers]:
    """The numbers of a finished run, and those of the mean of its tries where it kept the best of several."""
    run = load_run(folder.path)
    numbers = numbers_of(run, row, seed)
    mean = mean_of_tries(run, numbers)
    return [numbers] if mean is None else [numbers, mean]


def run_here(comparison: Comparison, config: Config, folder: RunFolder) -> None:
    """An ordinary run of the loop, as `--stage run` makes it."""
    whole = with_demo(config)
    tokenizer, data = comparison.data(whole)
    arguments = training_arguments(config.train, folder.path / "checkpoints", config.seed)
    run, _ = checked_run(whole, folder, arguments, tokenizer, data)
    together(lambda: folder.lock() if is_main() else None)
    folder.claim(dump(config), header(), [data_row(report) for report in data.reports])
    together(lambda: share_base(comparison, config, folder) if is_main() else None)
    run_loop(run)


def share_base(comparison: Comparison, config: Config, folder: RunFolder) -> None:
    """Gives a run what joint's run of the same seed measured of the same base model, with the seconds that it took.

    So every method's cost holds the same seconds for it, and a comparison spends them once per seed. Nothing is taken
    where anything but the mixing differs, or where the run has measured the base model itself.
    """
    joint = RunFolder(comparison.place(JOINT, config.seed))
    own = {"mixing", "output_dir"}
    if joint.path == folder.path or folder.base_evaluation.is_file() or not joint.finished:
        return
    theirs, ours = (dump(each) for each in (comparison.config(JOINT, JOINT, config.seed), config))
    if any(theirs[key] != ours[key] for key in theirs.keys() - own):
        return
    for event in map(json.loads, joint.metrics.read_text(encoding="utf-8").splitlines()):
        if event["round"] is None and event["phase"] in BASE_PHASES:
            folder.log(event["phase"], event["values"])
    if joint.base_answers.is_file():
        folder.base_answers.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(joint.base_answers, folder.base_answers)  # evaluation.json, written last, makes it count
    write_json(folder.base_evaluation, read_json(joint.base_evaluation))


def add_control(comparison: Comparison, method: str, done: RunNumbers, *, start: bool) -> None:
    """joint with all start ratios times the factor by which `method`'s result outgrew it, with the same seed.

    Where it did not grow, joint's own run is the control of that seed. Methods that keep the volume have none.
    """
    config = comparison.config(method, method, done.seed)
    if not MIXERS[method].has_budget or config.mixing.budget == "fixed" or (JOINT, done.seed) not in comparison.runs:
        return
    joint, row = comparison.runs[JOINT, done.seed], f"{CONTROL}{method}"
    comparison.beside[row] = method
    if done.tokens > joint.tokens:
        one_run(comparison, row, JOINT, done.seed, done.tokens / joint.tokens, start=start)
    else:
        comparison.runs[row, done.seed] = replace(joint, row=row)
