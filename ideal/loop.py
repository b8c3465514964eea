"""The alternation: train on a mixture, evaluate, estimate influence, move the mixture, train again."""

import gc
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ideal.config import Config
from ideal.data import Data
from ideal.distributed import all_gather_objects, barrier, is_main, say, world_size
from ideal.errors import UserError
from ideal.evaluation import evaluate, weighted
from ideal.influence import DomainSample, Influence, compute_influence, fixed_form, objective
from ideal.influence.adaptive import DIRECTION_ERROR
from ideal.influence.matrix import Errors, matrix_errors, objective_errors, uncertain_signs
from ideal.mixers import MIXERS, Mixer, RoundResult, Setup, Step
from ideal.mixers.limits import Limits
from ideal.mixture import Mixture, build_mixture, mixture_of_sizes, round_half_up
from ideal.model import DTYPES, load_model, merge_adapters, shard
from ideal.online import Steering
from ideal.report import export_mixture, final_summary, load_run, render_report, round_table
from ideal.report.tables import duration
from ideal.run_folder import (
    RoundFolder,
    RunFolder,
    read_json,
    remove,
    write_atomically,
    write_json,
    write_json_lines,
)
from ideal.scores import Json, questions, score, summary
from ideal.training import Part, RoundPlan, train

MANY_EPOCHS = 4
"""Passes over the same example beyond which repeats are worth little (Muennighoff et al. 2023)."""
SCORES = "reference_score"
"""What an evaluation.json with scores holds."""
MEMORISED = 0.5
"""Training loss / reference loss below which training gradients say little about the reference loss."""


@dataclass
class Run:
    """Everything that the rounds share."""

    config: Config
    folder: RunFolder
    tokenizer: PreTrainedTokenizerBase
    data: Data
    ratios: np.ndarray
    """[n] the start ratios as the user gave them, in the order of data.pools."""
    arguments: TrainingArguments
    limits: Limits | None = None
    """of the ratios; None where no domain has one."""
    target: np.ndarray | None = None
    no_worse: np.ndarray | None = None
    """[R] the losses of mixing.target and mixing.no_worse; None where none are given."""
    warnings: list[str] = field(default_factory=list)

    @property
    def mixer(self) -> Mixer:
        """The configured method, with the base model's losses once they are known."""
        losses = None
        if self.folder.base_evaluation.is_file():
            losses = reference_losses(self, read_json(self.folder.base_evaluation))
        setup = Setup(
            seed=self.config.seed,
            domains=tuple(self.data.pools),
            capabilities=tuple(self.data.references),
            weights=self.weights,
            pool_sizes=np.array([len(pool) for pool in self.data.pools.values()], dtype=np.float64),
            pool_tokens=np.array([tokens.sum() for tokens in self.trained_tokens.values()], dtype=np.float64),
            base_loss=losses,
            served_by=self.data.served_by,
            limits=self.limits,
            target=self.target,
            no_worse=self.no_worse,
        )
        return MIXERS[self.config.mixing.method](self.config.mixing, setup)

    @property
    def weights(self) -> np.ndarray:
        """[R] w_r, sum 1."""
        return np.array([self.data.weights[name] for name in self.data.references])

    @property
    def size_limits(self) -> tuple[np.ndarray, np.ndarray] | None:
        """[n] least and [n] most examples of each domain; None where there is no limit."""
        pools = np.array([len(pool) for pool in self.data.pools.values()])
        return None if self.limits is None else self.limits.sizes(pools)

    @property
    def trained_tokens(self) -> dict[str, np.ndarray]:
        """Per domain, [pool] trained tokens of each example."""
        return {name: pool.trained_tokens for name, pool in self.data.pools.items()}

    def warn(self, text: str) -> None:
        """Says a warning once, and keeps it for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            say(f"warning: {text}")


def run_loop(run: Run) -> None:
    """All rounds, resumed behind the last finished phase; ends with the best round's model and the report."""
    base = evaluate_base(run, scored=run.config.evaluation.generate == "rounds")
    say(f"base model: Q {base['Q']:.4f} (mean reference loss, nats per trained token)")
    if base.get("score") is not None:
        say(f"base model: score {base['score']:.4f} (of its answers to the reference sets, 0 to 1)")
    mixer, results = run.mixer, list[RoundResult]()
    last = mixer.last_round()
    step: Step | None = None
    reason = end_in_words(mixer, last)
    for number in range(last + 1):
        here = run.folder.round(number)
        mixture = mixture_of_round(run, here, results, step)
        train_round(run, here, mixture, results)
        evaluation = evaluate_round(run, here)
        write_change(run, here, evaluation)
        mixture = as_drawn(run, here, mixture)
        stop = stop_reason(run, number)
        influence = None
        if mixer.needs_influence and number < last and not stop:
            influence = influence_of_round(run, here, mixture)
        results.append(result_of(run, number, mixture, evaluation, influence))
        step = mixer.propose(results) if number < last and not stop else None
        finish_round(run, here, step)
        if step is None:
            reason = stop or reason
            break
    finish_run(run, reason)


def end_in_words(mixer: Mixer, last: int) -> str:
    """Why a run ends that nothing stops before its last round."""
    if not mixer.moves():
        return f"{mixer.config.method} takes one round"
    return f"outer steps taken: {last} of {last}" if mixer.successive else f"{mixer.config.method} is through"


def evaluate_base(run: Run, scored: bool = False) -> Json:
    """The base model's losses, before any training, and its scores."""
    return evaluated(run, None, scored)


def evaluated(run: Run, here: RoundFolder | None, scored: bool) -> Json:
    """The content of a round's evaluation.json (None: the base model's), made where it is not there, or lacks scores.

    Written when everything is known, so that it is never half an evaluation.
    """
    path = run.folder.base_evaluation if here is None else here.evaluation
    if not is_evaluated(path, scored):
        description, number = ("base model", None) if here is None else (f"round {here.number}", here.number)
        with loaded_model(run, here) as model:
            content = read_json(path) if exists(path) else evaluate_model(run, model, description, number)
            if here is not None:
                check_losses(run, here, content)
            if scored:
                content |= score_model(run, model, description, here)
        write_json(path, content)
        barrier()
    return dict(read_json(path))


def is_evaluated(path: Path, scored: bool) -> bool:
    """Whether an evaluation.json is there, on all ranks alike, with scores if they are wanted."""
    return exists(path) and (not scored or SCORES in read_json(path))


def score_model(run: Run, model: torch.nn.Module, description: str, here: RoundFolder | None) -> Json:
    """What evaluation.json says of the model's answers, which go to answers.jsonl beside it."""
    config, started = run.config.evaluation, time.monotonic()
    lines = score(
        model,
        questions(run.data.scored, config.score_examples, run.config.seed),
        config,
        tokenizer=run.tokenizer,
        end_ids=run.data.end_ids,
        description=description,
    )
    write_json_lines(run.folder.base_answers if here is None else here.answers, lines)
    content = summary(lines, run.data.weights)
    values = {"seconds": time.monotonic() - started, **{key: content[key] for key in ("score", "score_test")}}
    for kind in ("reference", "test"):
        values |= {f"{kind} score {name}": found for name, found in content[f"{kind}_score"].items()}
    run.folder.log("scores", values, round=None if here is None else here.number)
    return content


def wants_scores(run: Run, number: int) -> bool:
    """Whether round `number`'s model is scored as soon as it is trained."""
    return run.config.evaluation.generate == "rounds" and run.mixer.is_result(number)


def mixture_of_round(run: Run, here: RoundFolder, results: list[RoundResult], step: Step | None) -> Mixture:
    """This round's mixture: as written before, else the start's or the one that the last step leads to."""
    if exists(here.mixture):
        mixture = mixture_of_sizes(run.trained_tokens, read_json(here.mixture), seed=run.config.seed)
        warn_of_repeats(run, mixture)
        return mixture
    if step is None:
        mixture = first_mixture(run)
    else:
        mixture = next_mixture(run, here.number, step)
    write_json(here.mixture, mixture_json(run, mixture))
    warn_of_repeats(run, mixture)
    return mixture


def mixture_json(run: Run, mixture: Mixture) -> dict[str, Any]:
    """The content of mixture.json, with the limits that domains have come to, by their keys, where there are any."""
    found: dict[str, Any] = mixture.to_json()
    if run.limits is None or run.size_limits is None:
        return found
    held = {}
    for index, (name, domain) in enumerate(mixture.domains.items()):
        given, (least, most) = run.data.domains[name], (bound[index] for bound in run.size_limits)
        if domain.size and given.pinned:
            held[name] = "pinned"
        elif domain.size and domain.size == least:
            held[name] = "least_ratio"
        elif domain.size and domain.size == most:
            held[name] = "most_ratio" if given.most_ratio == run.limits.most[index] else "most_repeats"
    return {**found, "held": held} if held else found


def given_mixture(run: Run) -> Mixture:
    """The mixture of the start ratios as the user gave them; its trained tokens are the volume to keep."""
    return build_mixture(run.trained_tokens, run.ratios, seed=run.config.seed, round=0)


def first_mixture(run: Run) -> Mixture:
    """Round 0's mixture: the given one, or the one of the same volume that the method starts from."""
    given = given_mixture(run)
    ratios = run.mixer.start(run.ratios)
    if np.array_equal(ratios, run.ratios):
        return given
    return build_mixture(
        run.trained_tokens,
        ratios,
        seed=run.config.seed,
        round=0,
        total_tokens=given.total_tokens,
        sizes=run.size_limits,
    )


def warn_of_repeats(run: Run, mixture: Mixture) -> None:
    """Warns of domains whose examples are seen so often in one round that it is worth little."""
    epochs = RoundPlan.of(mixture.total_rows, mixture.total_tokens, run.config.train).epochs
    for name, domain in mixture.domains.items():
        if domain.ratio > 1 and domain.ratio * epochs > MANY_EPOCHS:
            run.warn(
                f"{name}: each example is seen {domain.ratio * epochs:.1f} times in a round; "
                f"beyond about {MANY_EPOCHS}, repeats are worth little"
            )


def next_mixture(run: Run, number: int, step: Step) -> Mixture:
    """The mixture of round `number` that `step` leads to; where the method keeps the volume, that of the start."""
    total = given_mixture(run).total_tokens if run.mixer.keeps_volume else None
    return build_mixture(
        run.trained_tokens,
        step.ratios,
        seed=run.config.seed,
        round=number,
        beta=step.beta,
        total_tokens=total,
        sizes=run.size_limits,
    )


def train_round(run: Run, here: RoundFolder, mixture: Mixture, results: list[RoundResult]) -> None:
    """The inner loop after `results`, unless its model or everything that follows from it is there."""
    done = is_evaluated(here.evaluation, wants_scores(run, here.number))
    needs_model = not done or (needs_influence(run, here) and find_model(run, here) is None)
    if needs_model and not exists(here.model):
        train_model(run, here, mixture, results)


def model_of(run: Run, number: int, results: list[RoundResult]) -> Path:
    """The trained model of an earlier round; trained again first where it was not kept."""
    before = run.folder.round(number)
    if find_model(run, before) is None:
        train_model(run, before, mixture_of_round(run, before, [], None), results[:number])
    found = find_model(run, before)
    assert found is not None, "it has just been trained"
    return found


def part_of(run: Run, here: RoundFolder, mixture: Mixture, results: list[RoundResult]) -> Part | None:
    """Where this round stands in the one training run that mixing.start: continue makes of all; None: in none."""
    if run.config.mixing.start == "base":
        return None
    checkpoint = checkpoint_of(run, here.number - 1, results) if here.number else None
    done = sum(read_json(run.folder.round(number).training)["steps"] for number in range(here.number))
    length = run.mixer.length(here.number)
    steps = RoundPlan.of(mixture.total_rows, mixture.total_tokens, run.config.train, length).steps
    # Where the volume is free later parts may turn out longer or shorter; the schedule is then stretched to them.
    return Part(done, done + steps * (run.mixer.last_round() + 1 - here.number), checkpoint)


def checkpoint_of(run: Run, number: int, results: list[RoundResult]) -> Path:
    """The Trainer's checkpoint at the end of an earlier round; trained again first where it is gone."""
    before = run.folder.round(number)
    if not exists(before.checkpoints):
        train_model(run, before, mixture_of_round(run, before, [], None), results[:number])
    found = get_last_checkpoint(str(before.checkpoints))
    assert found is not None, "a part of a training run leaves one"
    return Path(found)


def train_model(run: Run, here: RoundFolder, mixture: Mixture, results: list[RoundResult]) -> None:
    """The inner loop after `results`, the rounds before."""
    mixer, part = run.mixer, part_of(run, here, mixture, results)
    say(f"round {here.number}: training on {mixture.total_rows:,} examples, {mixture.total_tokens:,} trained tokens")
    partial = here.path / "model.part"
    if is_main():
        remove(partial)
    barrier()
    lengths = [mixer.length(number) for number in range(here.number, mixer.last_round() + 1)]
    remaining = sum(lengths) / lengths[0]

    def on_step_time(seconds: float, steps: int) -> None:
        say(f"a step takes {seconds:.2f} s: about {duration(seconds * steps)} for this inner loop, "
            f"{duration(seconds * steps * remaining)} for all that remain, outer steps not counted")  # fmt: skip

    outcome = train(
        run.config.model,
        run.config.train,
        run.tokenizer,
        run.data.pools,
        mixture,
        folder=partial,
        checkpoints=here.checkpoints,
        seed=run.config.seed,
        log=lambda step, values: run.folder.log("train", values, round=here.number, step=step),
        on_step_time=on_step_time,
        length=mixer.length(here.number),
        part=part,
        steering=steering_of(run, here, results),
    )
    if is_main():
        write_json(here.training, {**asdict(outcome), "is_result": mixer.is_result(here.number)})
        remove(here.model)
        os.replace(partial, here.model)
        if part is None or here.number == mixer.last_round():
            remove(here.checkpoints)
        if here.number:
            remove(run.folder.round(here.number - 1).checkpoints)
    run.folder.log("train", {"seconds": outcome.seconds}, round=here.number, step=outcome.steps)
    barrier()


def steering_of(run: Run, here: RoundFolder, results: list[RoundResult]) -> Steering | None:
    """What steers this round's inner loop from within, if anything does."""
    controller = run.mixer.controller(here.number, results)
    if controller is None:
        return None
    reads = run.mixer.reads(here.number)
    for number in reads:
        model_of(run, number, results)
    return Steering(
        controller,
        run.data.references,
        run.data.weights,
        run.config.evaluation,
        run.config.influence.layers,
        (lambda: loaded_model(run, run.folder.round(reads[0]))) if reads else None,
    )


def as_drawn(run: Run, here: RoundFolder, mixture: Mixture) -> Mixture:
    """The mixture that a steered round turned out to be, as rows of one pass; `mixture` where none steered it.

    Only of rounds that may be the result: another one could be trained again from the mixture it started from.
    """
    observed = read_json(here.training).get("observed", {}) if exists(here.training) else {}
    if "rows" not in observed or not run.mixer.is_result(here.number):
        return mixture
    content = mixture.to_json()
    for name, rows in observed["rows"].items():
        content["domains"][name]["size"] = round_half_up(rows / observed["passes"])
    drawn = mixture_of_sizes(run.trained_tokens, content, seed=run.config.seed)
    write_json(here.mixture, mixture_json(run, drawn))
    warn_of_repeats(run, drawn)
    return drawn


def evaluate_round(run: Run, here: RoundFolder) -> Json:
    """The trained model's losses and scores."""
    evaluation = evaluated(run, here, wants_scores(run, here.number))
    worse = too_high(run, evaluation)
    if worse:
        run.warn(
            f"round {here.number}: {', '.join(worse)} came out worse than mixing.no_worse allows; the round is not the "
            "result unless no round keeps to it"
        )
    if here.training.is_file() and run.mixer.needs_influence:
        warn_if_memorised(run, here, evaluation["reference_loss"])
    return evaluation


def write_change(run: Run, here: RoundFolder, evaluation: dict[str, Any]) -> None:
    """change.json: how the losses and the objective changed since the round before, where its step predicted it."""
    before = run.folder.round(here.number - 1)
    if here.number == 0 or exists(here.change) or not exists(before.step):
        return
    said, then = read_json(before.step), read_json(before.evaluation)
    found = {
        name: change_of(then, after)
        for name, after in (("unscaled", said.get("unscaled")), ("predicted", said.get("predicted")),
                            ("observed", evaluation))
        if after is not None
    }  # fmt: skip
    if "predicted" in found:
        write_json(here.change, {"from_round": before.number, **found})


def change_of(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Differences of two evaluations: reference losses by capability, Q, and the objective where there is one."""
    old, new = before["reference_loss"], after["reference_loss"]
    found: dict[str, Any] = {"reference_loss": {name: new[name] - old[name] for name in old}}
    return found | {key: after[key] - before[key] for key in ("Q", "objective") if key in before}


def check_losses(run: Run, here: RoundFolder, evaluation: dict[str, Any]) -> None:
    """Raises UserError, and drops the model, where training has diverged."""
    losses = [*evaluation["reference_loss"].values(), *evaluation["test_loss"].values()]
    if not all(map(math.isfinite, losses)):
        if is_main():
            remove(here.model)
        raise UserError(
            f"train.learning_rate: after round {here.number} the losses are not finite: training has diverged; "
            "lower it, and start over with --restart true"
        )


def warn_if_memorised(run: Run, here: RoundFolder, reference: dict[str, float]) -> None:
    """Warns where the training loss is far below the reference losses of the same domains, by their shares."""
    domains = read_json(here.mixture)["domains"]
    share = {name: domain["share"] for name, domain in domains.items() if name in reference and domain["share"]}
    training_loss = read_json(here.training)["training_loss"]
    if training_loss is None or not share:
        return
    expected = sum(share[name] * reference[name] for name in share) / sum(share.values())
    if training_loss < MEMORISED * expected:
        run.warn(
            f"round {here.number}: the training loss ({training_loss:.3f}) is far below the reference loss of what it "
            f"trains on ({expected:.3f}); training gradients vanish there, and a domain's influence on its own "
            "capability can change its sign: train for fewer epochs"
        )


def evaluate_model(run: Run, model: torch.nn.Module, description: str, number: int | None) -> dict[str, Any]:
    """The losses in evaluation.json, of round `number` (None: the base model)."""
    losses = {}
    for kind, sets in (("reference", run.data.references), ("test", run.data.tests)):
        started = time.monotonic()
        losses[kind] = evaluate(
            model,
            sets,
            run.config.evaluation,
            pad_id=int(run.tokenizer.pad_token_id),
            description=f"{description}: {kind} losses",
        )
        run.folder.log(f"{kind} losses", {"seconds": time.monotonic() - started}, round=number)
    found = {
        "reference_loss": losses["reference"],
        "test_loss": losses["test"],
        "Q": weighted(losses["reference"], run.data.weights),
        "Q_test": weighted(losses["test"], run.data.weights),
    }
    if number is not None and run.config.mixing.objective != "mean":
        found["objective"] = run.mixer.goal.value(reference_losses(run, found))
    return found


def reference_losses(run: Run, evaluation: dict[str, Any]) -> np.ndarray:
    """[R] L_ref,r of an evaluation.json."""
    return np.array([evaluation["reference_loss"][name] for name in run.data.references])


def influence_of_round(run: Run, here: RoundFolder, mixture: Mixture) -> dict[str, Any]:
    """The content of influence.json, at this round's model."""
    if not exists(here.influence):
        with loaded_model(run, here) as model:
            weights = weights_at(run, here)
            influence = estimate_influence(run, model, mixture, weights)
        content = influence_json(run, influence, weights)
        here.write_influence_csv(influence.capabilities, influence.domains, influence.matrix, content["objective_free"])
        write_json(here.influence, content)
        run.folder.log("influence", {"seconds": sum(influence.seconds.values())}, round=here.number)
        barrier()
    return dict(read_json(here.influence))


def weights_at(run: Run, here: RoundFolder) -> np.ndarray:
    """[R] dF / dL_r of the objective F at a round's losses: w_r for the mean, whatever they are."""
    return run.mixer.goal.pull(reference_losses(run, read_json(here.evaluation)))


def estimate_influence(run: Run, model: torch.nn.Module, mixture: Mixture, weights: np.ndarray) -> Influence:
    """The influence of the mixture's domains at `model`. weights: [R] of the capabilities in the objective."""
    samples = {name: DomainSample(run.data.pools[name], domain.counts) for name, domain in mixture.domains.items()}
    influence = compute_influence(
        model, samples, run.data.references, run.config.influence, run.config.seed, weights=weights.tolist()
    )
    say(f"influence: {sampling_in_words(run, influence)}")
    return influence


def influence_json(run: Run, influence: Influence, weights: np.ndarray) -> dict[str, Any]:
    """The content of influence.json: what the engine found, w^T M in both forms, and standard errors by source."""
    config, budget = run.config.influence, run.config.mixing.budget
    fixed = fixed_form(influence.matrix, influence.shares)
    objectives = {"free": objective(influence.matrix, weights), "fixed": objective(fixed, weights)}
    errors = errors_of_forms(influence, weights)
    errors["alpha"] = errors[f"objective_{budget}"]
    known = np.isfinite(errors["alpha"].combined)
    doubtful = uncertain_signs(objectives[budget], errors["alpha"])
    content = {
        **asdict(influence),
        "matrix_fixed": fixed,
        "objective_free": objectives["free"],
        "objective_fixed": objectives["fixed"],
        "alpha": objectives[budget],
        "standard_errors": {name: found._asdict() for name, found in errors.items()},
        # Neither true nor false where the error is unknown.
        "uncertain": [bool(sign) if found else None for sign, found in zip(doubtful, known, strict=True)],
        "budget": budget,
        "sampling": sampling_in_words(run, influence),
        "damping": config.damping,
        "factors": config.factors,
        "weights": weights,
    }
    return {key: _plain(value) for key, value in content.items()}


def errors_of_forms(influence: Influence, weights: np.ndarray) -> dict[str, Errors]:
    """Standard errors of M [R, n] and of w^T M [n], each in its free and fixed form, by what they belong to."""
    covariances = influence.training_covariance, influence.reference_covariance
    return {
        "matrix": matrix_errors(*covariances),
        "matrix_fixed": matrix_errors(*covariances, influence.shares),
        "objective_free": objective_errors(*covariances, weights),
        "objective_fixed": objective_errors(*covariances, weights, influence.shares),
    }


def sampling_in_words(run: Run, influence: Influence) -> str:
    """How many of the mixture's sequences were used, and why so many."""
    gradients, curvature = (sum(found.values()) for found in (influence.sequences, influence.factor_sequences))
    text = f"{gradients:,} sequences of the mixture for the gradients, {curvature:,} for the covariances"
    if run.config.influence.sample_fraction == "auto":
        text += f", added until alpha's direction was known to {DIRECTION_ERROR:.0%} or there were no more"
    return text


def _plain(value: Any) -> Any:
    """Arrays as lists, and what is not a number as null: JSON knows no NaN."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def result_of(
    run: Run, number: int, mixture: Mixture, evaluation: dict[str, Any], influence: dict[str, Any] | None
) -> RoundResult:
    """What a mixer may know after a round."""
    matrix = errors = None
    if influence is not None:
        matrix = np.array(influence["matrix"], dtype=np.float64)
        of_entries = influence["standard_errors"]["matrix"]
        errors = Errors(*(np.array(of_entries[source], dtype=np.float64) for source in Errors._fields)).combined
    training = run.folder.round(number).training
    observed = read_json(training).get("observed", {}) if exists(training) else {}
    return RoundResult(
        round=number,
        pool_sizes=np.array([domain.pool for domain in mixture.domains.values()], dtype=np.float64),
        ratios=mixture.ratios,
        shares=mixture.shares,
        reference_loss=reference_losses(run, evaluation),
        weights=run.weights,
        influence=matrix,
        influence_errors=errors,
        observed=observed,
    )


def stop_reason(run: Run, number: int) -> str | None:
    """Why the run should end after round `number`, None if it should not."""
    # The parts of one training run are not to be compared before it is through: the model has trained for longer.
    if not run.mixer.successive or run.config.mixing.start == "continue":
        return None
    found = competing(run, range(number + 1))
    best = earliest_best(found, tie(run))
    assert best is not None
    if number - best < run.config.mixing.patience:
        return None
    if number not in found:
        return f"round {number} makes a capability worse than mixing.no_worse allows, as round {best} does not"
    this, other = f"{abs(found[number]):.4f}", f"{abs(found[best]):.4f}"
    if run.config.evaluation.choose_by == "score":
        return f"the score of round {number} ({this}) is not above round {best}'s ({other})"
    name = "Q" if run.config.mixing.objective == "mean" else "the objective"
    return f"{name} of round {number} ({found[number]:.4f}) is not below round {best}'s ({found[best]:.4f})"


def measure(run: Run, evaluation: Json) -> float:
    """What rounds are compared by, lower is better: Q, the objective where it is another, or the weighted score on the
    reference sets, negated."""
    if run.config.evaluation.choose_by == "score":
        return -float(evaluation["score"])
    return float(evaluation["objective"] if "objective" in evaluation else evaluation["Q"])


def tie(run: Run) -> float:
    """The relative difference of Q within which the earlier round counts as the better one; of scores, none."""
    return 0.0 if run.config.evaluation.choose_by == "score" else run.mixer.tie


def best_round(run: Run) -> int | None:
    """The evaluated round of the lowest measure, the earliest of those that are as good, among those that compete; None
    before there is one."""
    return earliest_best(competing(run, range(run.mixer.last_round() + 1)), tie(run))


def competing(run: Run, numbers: Iterable[int]) -> dict[int, float]:
    """The measures of the evaluated rounds among `numbers` that may be the result: their models may, and they keep to
    mixing.no_worse, unless none does."""
    mixer, found = run.mixer, dict[int, Json]()
    for number in numbers:
        evaluation = run.folder.round(number).evaluation
        if mixer.is_result(number) and evaluation.is_file():
            found[number] = read_json(evaluation)
    keeping = [number for number, evaluation in found.items() if not too_high(run, evaluation)]
    return {number: measure(run, found[number]) for number in keeping or found}


def too_high(run: Run, evaluation: Json) -> list[str]:
    """The capabilities whose losses are above what mixing.no_worse allows, noise included."""
    if run.config.mixing.no_worse is None:
        return []
    found, first = (reference_losses(run, e) for e in (evaluation, read_json(run.folder.round(0).evaluation)))
    above = found > run.mixer.ceilings(first)
    return [name for name, high in zip(run.data.references, above, strict=True) if high]


def earliest_best(found: dict[int, float], tie: float) -> int | None:
    """The first round whose measure is within `tie` (relative) of the lowest; None where there is none."""
    lowest = min(found.values(), default=0.0)
    return next((number for number, value in found.items() if value <= lowest + tie * abs(lowest)), None)


def needs_influence(run: Run, here: RoundFolder) -> bool:
    """Whether this round's influence is wanted and not there yet."""
    wanted = run.mixer.needs_influence and here.number < run.mixer.last_round()
    return wanted and stop_reason(run, here.number) is None and not exists(here.influence)


def find_model(run: Run, here: RoundFolder) -> Path | None:
    """Where a round's trained model lies: in its folder, or as the best one of a run that was finished."""
    if exists(here.model):
        return here.model
    moved = run.config.model.lora.rank == 0 and exists(run.folder.model) and exists(run.folder.mixture)
    if moved and read_json(run.folder.mixture)["round"] == here.number:
        return run.folder.model
    return None


def finish_round(run: Run, here: RoundFolder, step: Step | None) -> None:
    """Notes the step, renames the round's folder, prints its table, and drops models that nothing needs any more."""
    new = not exists(here.complete_path)
    if step is not None:
        for text in step.warnings:
            run.warn(text)
        if step.information and not exists(here.step):
            write_json(here.step, _plain(dict(step.information)))
    here.finish()
    barrier()
    best = best_round(run)
    if is_main():
        write_json(run.folder.state, {"finished": False, "round": here.number, "best_round": best,
                                      "warnings": run.warnings})  # fmt: skip
        if new:
            following = mixture_json(run, next_mixture(run, here.number + 1, step)) if step else None
            say("\n" + round_table(load_run(run.folder.path), here.number, following) + "\n")
        if run.config.keep_models == "final":
            drop_models(run, here.number, best)
    barrier()


def drop_models(run: Run, number: int, best: int | None) -> None:
    """Removes the models of the rounds before `number` but the best one's and those that a later round reads."""
    mixer = run.mixer
    needed = {before for later in range(number + 1, mixer.last_round() + 1) for before in mixer.reads(later)}
    for before in set(range(number)) - needed - {best}:
        remove(run.folder.round(before).model)


def finish_run(run: Run, reason: str) -> None:
    """The best round's mixture and model to the top of the folder, exports, report, and a last word."""
    best = best_round(run)
    assert best is not None, "a method's last round is a result"
    here = run.folder.round(best)
    if run.config.evaluation.generate == "end":
        evaluate_base(run, scored=True)
        evaluated(run, here, scored=True)
    source = find_model(run, here)
    if is_main():
        place_model(run, source)
        content = read_json(here.mixture)
        write_json(run.folder.mixture, content)
        counts = {
            name: domain.counts
            for name, domain in mixture_of_sizes(run.trained_tokens, content, seed=run.config.seed).domains.items()
        }
        export_mixture(run.folder.path, run.data.pools, counts)
        write_json(run.folder.state, {"finished": True, "reason": reason, "best_round": best,
                                      "warnings": run.warnings})  # fmt: skip
        render_report(run.folder.path)
        say(f"finished: {reason}\n\n{final_summary(load_run(run.folder.path))}")
    barrier()


def place_model(run: Run, source: Path | None) -> None:
    """Puts the best round's model at output_dir/model, loadable by itself, and keeps or drops the others."""
    keep_all = run.config.keep_models == "all"
    if source is not None and source != run.folder.model:
        if run.config.model.lora.rank:
            write_atomically(run.folder.model, lambda p: merge_adapters(run.config.model, source, run.tokenizer, p))
        elif keep_all:
            write_atomically(run.folder.model, lambda part: _link_tree(source, part))
        else:
            remove(run.folder.model)
            os.replace(source, run.folder.model)
    if not keep_all:
        for path in run.folder.path.glob("round_*/model"):
            remove(path)


def _link_tree(source: Path, target: Path) -> None:
    """A copy that takes no room where the file system can link."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link)


@contextmanager
def loaded_model(run: Run, here: RoundFolder | None) -> Iterator[torch.nn.Module]:
    """The base model (None) or a round's, on this process's device, gone afterwards.

    Not wrapped in DDP; its weights are sharded where training shards them.
    """
    checkpoint = None if here is None else find_model(run, here)
    dtype = run.config.train.compute_dtype or DTYPES[run.config.model.dtype]
    free_device_memory()  # of what the inner loop held
    model = load_model(run.config.model, checkpoint, dtype)
    if run.arguments.fsdp and world_size() > 1:
        shard(model, run.arguments.device)
    else:
        model.to(run.arguments.device)  # type: ignore[arg-type]
    try:
        yield model
    finally:
        del model
        free_device_memory()


def free_device_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def exists(path: Path) -> bool:
    """Whether rank 0 sees `path`: all ranks must decide alike, and rank 0 writes."""
    return bool(all_gather_objects(path.exists())[0])
