"""From main.py's block and the command line to a run or one of its stages."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch.distributed as dist
import transformers

from ideal.compare.stage import compare_stage
from ideal.config import Command, Config, dump, help_text, read_command
from ideal.data.inspection import report_table, show_example
from ideal.distributed import barrier, is_main, say, together, world_size
from ideal.errors import UserError
from ideal.loop import run_loop
from ideal.machine import PlanConfig, machine_of
from ideal.mixture import Mixture
from ideal.plan import long_text, make_plan
from ideal.preparation import (
    check_folder,
    check_isolation,
    data_row,
    data_sizes,
    header,
    load_run_data,
    what_it_takes,
    what_scores_take,
    with_demo,
)
from ideal.report import export_mixture, final_summary, load_run, render_report
from ideal.rounds.evaluating import evaluate_base
from ideal.rounds.influencing import estimate_influence, influence_json
from ideal.rounds.mixtures import first_mixture
from ideal.rounds.models import loaded_model
from ideal.rounds.run import Run
from ideal.run_folder import RunFolder, influence_csv, write_json, write_text
from ideal.training import training_arguments

SECONDS_BEFORE_OTHERS_SPEAK = 20
"""torchrun ends all ranks when one has failed: rank 0 must have said its line, and then no other needs to."""


def main(defaults: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Runs what `argv` asks for over main.py's `defaults`; the exit status: 2 after a user's mistake."""
    if "--help" in argv or "-h" in argv:
        if is_main():
            print(help_text(defaults))
        return 0
    quiet_libraries()
    try:
        execute(read_command(defaults, argv))
    except UserError as error:
        if not is_main():
            time.sleep(SECONDS_BEFORE_OTHERS_SPEAK)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("interrupted; the same command continues behind the last finished phase", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def quiet_libraries() -> None:
    """One talker: libraries' notes and bars would hide ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()


def execute(command: Command) -> None:
    """The stage that the command asks for."""
    folder = RunFolder(Path(command.config.output_dir))
    if command.stage == "report":
        return report_stage(folder)
    if command.stage == "compare":
        return compare_stage(command)
    config = with_demo(command.config)
    # Also starts the process group, which everything after it uses.
    arguments = training_arguments(config.train, folder.path / "checkpoints", config.seed)
    if command.stage == "plan":
        return plan_stage(config, command.plan, folder, arguments)
    together(lambda: check_folder(folder, command))
    over = folder.finished and not command.restart and not folder.grows(dump(command.config))
    if command.stage == "run" and over:
        say(f"{folder.path}: this run is finished (--restart true starts over)\n")
        say(final_summary(load_run(folder.path)) if is_main() else "")
        for name in folder.missing():
            say(f"warning: {name} is not there any more")
        return None
    if command.stage == "run":
        together(lambda: check_isolation(config))
    run = prepare(config, folder, arguments)
    if command.stage == "run" and (text := what_scores_take(config, run.data)):
        say(f"{text}\n")
    # Only now: a command that is refused neither deletes a run nor leaves a folder that would refuse the mended one.
    together(lambda: folder.lock() if is_main() else None)
    if command.restart and is_main():
        folder.clear()
    folder.claim(dump(command.config), header(), [data_row(report) for report in run.data.reports])
    {"run": run_loop, "influence": influence_stage, "mix": mix_stage}[command.stage](run)
    return None


def prepare(config: Config, folder: RunFolder, arguments: transformers.TrainingArguments) -> Run:
    """Loads tokenizer and data, checks them, and says what there is and what the run will take."""
    run, mixture = load_run_data(config, folder, arguments)
    data = run.data
    say(report_table(data.reports, data.notes) + "\n")
    for name, pool in data.pools.items():
        say(f"first example of {name} (> trained, | masked):\n{show_example(pool, 0, run.tokenizer, 300)}\n")
    sizes = data_sizes(run, mixture)
    say(together(lambda: what_it_takes(config, sizes)) + "\n")
    return run


def plan_stage(
    config: Config, wanted: PlanConfig, folder: RunFolder, arguments: transformers.TrainingArguments
) -> None:
    """`--stage plan`: what the run would take; writes nothing."""
    run, mixture = load_run_data(config, folder, arguments)
    sizes = data_sizes(run, mixture)

    def text() -> str:
        if not is_main():
            return ""
        plan = make_plan(config, sizes, wanted.processes or world_size(), machine_of(wanted))
        return long_text(config, sizes, plan)

    say(together(text))


def mixture_of_stage(run: Run) -> Mixture:
    """Round 0's mixture, for a stage that runs no loop."""
    if run.mixer.needs_base_loss:
        evaluate_base(run)
    return first_mixture(run)


def influence_stage(run: Run) -> None:
    """`--stage influence`: the matrix of the given model on the given data, no training."""
    mixture = mixture_of_stage(run)
    with loaded_model(run, None) as model:
        influence = estimate_influence(run, model, mixture, run.weights)
    content = influence_json(run, influence, run.weights)
    write_json(run.folder.path / "influence.json", content)
    names = (influence.capabilities, influence.domains)
    table = influence_csv(*names, influence.matrix, content["objective_free"])
    write_text(run.folder.path / "influence.csv", table)
    if is_main():
        say(f"influence M[r, j] = dL_r / dbeta_j, free form; negative: more of j lowers r's loss\n\n{table}")
        say(f"in {run.folder.path}: influence.csv, influence.json")
    barrier()


def mix_stage(run: Run) -> None:
    """`--stage mix`: the mixture that the given ratios give, as mixture.json and as data."""
    mixture = mixture_of_stage(run)
    write_json(run.folder.mixture, mixture.to_json())
    if is_main():
        export_mixture(run.folder.path, run.data.pools, {n: d.counts for n, d in mixture.domains.items()})
        for name, domain in mixture.to_json()["domains"].items():
            say(f"{name}: {domain['size']:,} of {domain['pool']:,} examples, share {domain['share']:.3f}")
        say(f"in {run.folder.path}: mixture.json, export/")
    barrier()


def report_stage(folder: RunFolder) -> None:
    """`--stage report`: the page and the figures again, from the run's files."""
    if not folder.config.is_file():
        raise UserError(f"output_dir: {folder.path} holds no run to report on")
    if is_main():
        say(f"wrote {render_report(folder.path)}")
