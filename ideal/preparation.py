"""From a configuration to a run that can start: its data loaded, everything that can be refused checked."""

import json
import math
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import PreTrainedTokenizerBase

from ideal import demo
from ideal.config import Command, Config, check_scorers, dump, flat, validate
from ideal.data import CapabilityConfig, Data, load_data
from ideal.data.config import DomainConfig
from ideal.data.inspection import SetReport
from ideal.data.loading import resolve_capabilities, resolve_domains
from ideal.distributed import is_main, together, world_size
from ideal.errors import UserError
from ideal.mixers import MIXERS
from ideal.mixers.limits import Limits
from ideal.mixture import Mixture
from ideal.model import checkpoint_config, load_tokenizer
from ideal.online import Steering
from ideal.plan import CannotPlan, DataSizes, make_plan, short_text
from ideal.rounds.mixtures import first_mixture, given_mixture
from ideal.rounds.run import Run
from ideal.run_folder import RunFolder
from ideal.scores import cannot_isolate, questions
from ideal.scoring.sandbox import CannotIsolate, probe
from ideal.scoring.scorers import SCORERS
from ideal.training import RoundPlan, steered_rows


def check_folder(folder: RunFolder, command: Command) -> None:
    """Raises UserError where output_dir holds something else."""
    if command.restart:
        folder.check_restart()
        return
    if command.stage != "run" and folder.state.is_file():
        raise UserError(f"output_dir: {folder.path} holds a run of the loop; name another folder for this stage")
    mixing = command.config.mixing
    # More rounds would make the parts of one training run shorter, the finished ones too.
    extends = MIXERS[mixing.method].extends and mixing.start == "base"
    # The other fractions came when this one was a tenth by itself, and were 1.
    unknown = flat(dump(validate({"influence": {"factor_fraction": 0.1}})))
    folder.check(dump(command.config), flat, extends, unknown)


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
        path.name: CapabilityConfig(
            reference=str(path / "reference.jsonl"), test=str(path / "test.jsonl"), scorer=demo.SCORERS[path.name]
        )
        for path in sorted(parts.capabilities.iterdir())
    }
    capabilities |= config.data.capabilities
    domains: dict[str, str | DomainConfig] = {
        name: replace(domain, scorer=demo.SCORERS[name])
        for name, domain in resolve_domains(replace(config.data, domains=str(parts.domains))).items()
    }
    whole = replace(
        config,
        model=replace(config.model, name_or_path=str(parts.base_model)),
        data=replace(config.data, domains=domains, capabilities=capabilities),
    )
    if config.evaluation.generate != "never":
        check_scorers(whole)
    return whole


def check_isolation(config: Config) -> None:
    """Raises UserError where a scorer runs code, and this machine cannot isolate it."""
    capabilities = resolve_capabilities(config.data, resolve_domains(config.data)).values()
    used = [SCORERS[given.scorer] for given in capabilities if given.scorer]
    if config.evaluation.generate == "never" or not any(scorer.needs_code for scorer in used):
        return
    try:
        probe()
    except CannotIsolate as error:
        raise cannot_isolate(error) from None


def what_scores_take(config: Config, data: Data) -> str:
    """How many answers there will be; empty without any."""
    if config.evaluation.generate == "never":
        return ""
    asked = questions(data.scored, config.evaluation.score_examples, config.seed)
    sets = len({question.capability for question in asked})
    models = {"end": "the base model and the result", "rounds": "the base model and every round's"}
    return (
        f"scores: {models[config.evaluation.generate]}, each on {len(asked):,} rows of {sets} capabilities, with "
        f"answers of at most {config.evaluation.max_new_tokens} tokens"
    )


def load_run_data(config: Config, folder: RunFolder, arguments: transformers.TrainingArguments) -> tuple[Run, Mixture]:
    """Tokenizer, data and the first mixture, checked."""
    together(lambda: checkpoint_config(config.model))
    tokenizer = together(lambda: load_tokenizer(config.model))
    return checked_run(config, folder, arguments, tokenizer, load_data(config.data, tokenizer, config.seed))


def checked_run(
    config: Config,
    folder: RunFolder,
    arguments: transformers.TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
) -> tuple[Run, Mixture]:
    """The run on loaded data and its first mixture. Raises UserError for what the data or the method does not allow."""
    ratios = together(lambda: start_ratios(config, data))
    run = Run(config, folder, tokenizer, data, ratios, arguments)
    together(lambda: check_mixture(given_mixture(run)))
    run = together(lambda: with_demands(run))
    mixture = together(lambda: first_mixture(run))
    together(lambda: check_steering(run, mixture))
    return run, mixture


def check_steering(run: Run, mixture: Mixture) -> None:
    """Raises UserError where what steers round 0 from within would refuse it."""
    controller = run.mixer.controller(0, [])
    if controller is not None:
        steering = Steering(controller, run.data.references, run.data.weights, run.config.evaluation, [])
        plan = RoundPlan.of(mixture.total_rows, mixture.total_tokens, run.config.train)
        steered_rows(steering, run.data.pools, mixture, plan, run.tokenizer, run.config.seed)


def with_demands(run: Run) -> Run:
    """The run with what the user asks of its mixtures and losses, checked."""
    mixing, data = run.config.mixing, run.data
    no_worse = None if mixing.no_worse == "start" else mixing.no_worse
    found = replace(
        run,
        limits=limits_of(run, given_mixture(run)),
        no_worse=named_losses("mixing.no_worse", no_worse, data),
        target=named_losses("mixing.target", mixing.target, data),
    )
    if found.target is not None:
        for name, value in zip(data.references, found.target, strict=True):
            if data.weights[name] and not math.isfinite(value):
                raise UserError(f"mixing.target: gives no loss for {name}; give one for every capability with a weight")
    return found


def limits_of(run: Run, given: Mixture) -> Limits | None:
    """The domains' limits as ratios; None where there are none. given: the start's mixture.

    Raises UserError where the start lies outside, or where nothing may move.
    """
    domains = [run.data.domains[name] for name in run.data.pools]
    if not any(domain.limits or domain.pinned for domain in domains):
        return None
    epochs = RoundPlan.of(given.total_rows, given.total_tokens, run.config.train).epochs
    least, most = np.zeros(len(domains)), np.full(len(domains), np.inf)
    for index, (name, domain, ratio) in enumerate(zip(run.data.pools, domains, run.ratios, strict=True)):
        bounds = {"least_ratio": (1.0, 1), "most_ratio": (1.0, -1), "most_repeats": (1 / epochs, -1)}
        for key, value in domain.limits.items():
            unit, sign = bounds[key]
            if sign * (value * unit - ratio) > 1e-9:
                side = "above" if sign > 0 else "below"
                shown = f"{ratio:g}" if key != "most_repeats" else f"{ratio:g} times {epochs:g} epochs"
                raise UserError(
                    f"data.domains.{name}.{key}: {value:g} is {side} the start ratio, {shown}; start within the limits"
                )
        most[index] = min(domain.most_ratio or np.inf, (domain.most_repeats or np.inf) / epochs)
        least[index] = domain.least_ratio or 0.0
        if domain.pinned or ratio == 0:
            least[index] = most[index] = ratio
    if not (least < most).any():
        raise UserError("data.domains: every domain is pinned, so there is nothing to mix")
    return Limits(least, most)


def named_losses(key: str, given: dict[str, float] | str | None, data: Data) -> np.ndarray | None:
    """[R] losses by capability from a mapping or another run's evaluation.json; inf for those that it leaves out.

    Raises UserError for an unknown name, or for a file that holds no loss of these capabilities.
    """
    if given is None:
        return None
    if isinstance(given, str):
        given = read_losses(key, Path(given))
        if not given.keys() & data.references.keys():
            raise UserError(f"{key}: the file has {', '.join(given)}; the run has {', '.join(data.references)}")
    else:
        for name in given:
            if name not in data.references:
                raise UserError(f"{key}: there is no capability {name!r}; there are {', '.join(data.references)}")
    return np.array([given.get(name, np.inf) for name in data.references])


def read_losses(key: str, path: Path) -> dict[str, float]:
    """The reference losses in an evaluation.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        losses = {name: float(loss) for name, loss in content["reference_loss"].items()}
    except FileNotFoundError:
        raise UserError(f"{key}: no file {path}") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{key}: {path} is no evaluation.json (reference_loss by capability)") from None
    if not all(math.isfinite(loss) and loss > 0 for loss in losses.values()):
        raise UserError(f"{key}: {path} holds a loss that is not above 0")
    return losses


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
    """One set's line of data.json, flat; what it is scored by only where it is."""
    row = {key: value for key, value in asdict(report).items() if isinstance(value, str | int)}
    row["dropped"] = "; ".join(f"{d.count} {d.reason}" for d in report.dropped)
    if report.scorer:
        row["cannot_be_scored"] = "; ".join(f"{d.count} {d.reason}" for d in report.unscorable)
    else:
        del row["scorer"]
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
