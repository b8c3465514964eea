"""From main.py's block and the command line to a run or one of its stages."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
import yaml

from ideal import demo
from ideal.config import Command, Config, dump, flat, help_text, read_command
from ideal.data import CapabilityConfig, Data, load_data
from ideal.data.inspection import SetReport, report_table, show_example
from ideal.distributed import barrier, is_main, say, together, world_size
from ideal.errors import UserError
from ideal.loop import (
    Run,
    estimate_influence,
    evaluate_base,
    first_mixture,
    given_mixture,
    influence_json,
    loaded_model,
    run_loop,
)
from ideal.machine import PlanConfig, machine_of
from ideal.mixers import MIXERS
from ideal.mixture import Mixture
from ideal.model import checkpoint_config, load_tokenizer
from ideal.plan import CannotPlan, DataSizes, long_text, make_plan, short_text
from ideal.report import export_mixture, final_summary, load_run, render_report
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
    run = prepare(config, folder, arguments)
    # Only now: a command that is refused neither deletes a run nor leaves a folder that would refuse the mended one.
    together(lambda: folder.lock() if is_main() else None)
    if command.restart and is_main():
        folder.clear()
    folder.claim(dump(command.config), header(), [data_row(report) for report in run.data.reports])
    {"run": run_loop, "influence": influence_stage, "mix": mix_stage}[command.stage](run)
    return None


def check_folder(folder: RunFolder, command: Command) -> None:
    """Raises UserError where output_dir holds something else."""
    if command.restart:
        folder.check_restart()
        return
    if command.stage != "run" and folder.state.is_file():
        raise UserError(f"output_dir: {folder.path} holds a run of the loop; name another folder for this stage")
    folder.check(dump(command.config), flat, MIXERS[command.config.mixing.method].extends)


def header() -> str:
    """What made config.yaml, as comments."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"# {now}, torch {torch.__version__}, transformers {transformers.__version__}\n"


def with_demo(config: Config) -> Config:
    """The configuration with the embedded demo's model and data where none are given."""
    if not config.is_demo:
        return config
    parts = demo.prepare(Path("runs") / "demo_data")
    capabilities = {
        path.name: CapabilityConfig(reference=str(path / "reference.jsonl"), test=str(path / "test.jsonl"))
        for path in sorted(parts.capabilities.iterdir())
    }
    capabilities |= config.data.capabilities
    return replace(
        config,
        model=replace(config.model, name_or_path=str(parts.base_model)),
        data=replace(config.data, domains=str(parts.domains), capabilities=capabilities),
    )


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


def load_run_data(config: Config, folder: RunFolder, arguments: transformers.TrainingArguments) -> tuple[Run, Mixture]:
    """Tokenizer, data and the first mixture, checked."""
    together(lambda: checkpoint_config(config.model))
    tokenizer = together(lambda: load_tokenizer(config.model))
    data = load_data(config.data, tokenizer, config.seed)
    ratios = together(lambda: start_ratios(config, data))
    run = Run(config, folder, tokenizer, data, ratios, arguments)
    together(lambda: check_mixture(given_mixture(run)))
    return run, together(lambda: first_mixture(run))


def data_sizes(run: Run, mixture: Mixture) -> DataSizes:
    """What a plan needs to know of the data."""
    counts = {name: domain.counts for name, domain in mixture.domains.items()}
    return DataSizes.of(run.data.pools, counts, run.data.references, run.data.tests)


def what_it_takes(config: Config, sizes: DataSizes) -> str:
    """The plan in short, on rank 0. Raises UserError for what the outer step would refuse."""
    if not is_main():
        return ""
    try:
        return short_text(config, sizes, make_plan(config, sizes, world_size(), None))
    except CannotPlan as error:
        return f"what it takes is not known before: {error}"


def data_row(report: SetReport) -> dict[str, Any]:
    """One set's line of data.json, flat."""
    row = {key: value for key, value in asdict(report).items() if isinstance(value, str | int)}
    row["dropped"] = "; ".join(f"{d.count} {d.reason}" for d in report.dropped)
    copies = {**report.copies_across, **report.copies_measured}
    row["copies_elsewhere"] = "; ".join(f"{count} in {label}" for label, count in copies.items() if count)
    return {**row, "set": report.label}


def start_ratios(config: Config, data: Data) -> np.ndarray:
    """[n] the start ratios, from mixing.ratios (a mapping or a mixture.json) over data.domains.NAME.ratio.

    Raises UserError for a domain that does not exist, an unreadable file, or ratios that are all zero.
    """
    given = config.mixing.ratios or {}
    if isinstance(given, str):
        given = read_ratios(Path(given))
    for name in given:
        if name not in data.pools:
            raise UserError(f"mixing.ratios: there is no domain {name!r}; there are {', '.join(data.pools)}")
    ratios = np.array([given.get(name, data.ratios[name]) for name in data.pools], dtype=np.float64)
    if not ratios.any():
        raise UserError("mixing.ratios: all are zero, so there is nothing to train on")
    return ratios


def read_ratios(path: Path) -> dict[str, float]:
    """The ratios in a mixture.json."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        ratios = {name: float(entry["ratio"]) for name, entry in content["domains"].items()}
    except FileNotFoundError:
        raise UserError(f"mixing.ratios: no file {path}") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"mixing.ratios: {path} is no mixture.json (domains with a ratio each)") from None
    for name, ratio in ratios.items():
        if not (math.isfinite(ratio) and ratio >= 0):
            raise UserError(f"mixing.ratios: {path}: the ratio of {name} is {ratio}; it must be 0 or more")
    return ratios


def check_mixture(mixture: Mixture) -> None:
    """Raises UserError where only one domain is trained on: there is nothing to mix."""
    used = [name for name, domain in mixture.domains.items() if domain.size]
    if len(used) < 2:
        raise UserError(f"mixing.ratios: only {', '.join(used)} has examples in the mixture; two domains are needed")


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
        influence = estimate_influence(run, model, mixture)
    content = influence_json(run, influence)
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
