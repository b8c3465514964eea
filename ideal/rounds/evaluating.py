"""What evaluation.json says of a round's model or of the base model, and change.json of what was predicted."""

import math
import time
from pathlib import Path
from typing import Any

import torch

from ideal.distributed import barrier, is_main
from ideal.errors import UserError
from ideal.evaluation import evaluate, weighted
from ideal.rounds.choice import too_high
from ideal.rounds.models import loaded_model
from ideal.rounds.run import Run, exists, reference_losses
from ideal.run_folder import RoundFolder, read_json, remove, write_json, write_json_lines
from ideal.scores import Json, questions, score, summary

SCORES = "reference_score"
"""What an evaluation.json with scores holds."""
MEMORISED = 0.5
"""Training loss / reference loss below which training gradients say little about the reference loss."""


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
