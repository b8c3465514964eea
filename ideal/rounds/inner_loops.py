"""A round's inner loop: what it starts from, what steers it, what it leaves."""

import os
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from ideal.distributed import barrier, is_main, say
from ideal.mixers import RoundResult
from ideal.mixture import Mixture, mixture_of_sizes, round_half_up
from ideal.online import Steering
from ideal.report.tables import duration
from ideal.rounds.evaluating import is_evaluated, wants_scores
from ideal.rounds.influencing import needs_influence
from ideal.rounds.mixtures import mixture_json, mixture_of_round, warn_of_repeats
from ideal.rounds.models import find_model, loaded_model
from ideal.rounds.run import Run, exists
from ideal.run_folder import RoundFolder, read_json, remove, write_json
from ideal.training import Part, RoundPlan, train


def train_round(run: Run, here: RoundFolder, mixture: Mixture, results: list[RoundResult]) -> None:
    """The inner loop after `results`, unless its model or everything that follows from it is there."""
    done = is_evaluated(here.evaluation, wants_scores(run, here.number))
    needs_model = not done or (needs_influence(run, here) and find_model(run, here) is None)
    if needs_model and not exists(here.model):
        train_model(run, here, mixture, results)


def keep_model(run: Run, number: int, results: list[RoundResult]) -> None:
    """Trains an earlier round's model again where it was not kept."""
    before = run.folder.round(number)
    if find_model(run, before) is None:
        train_model(run, before, mixture_of_round(run, before, [], None), results[:number])


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
        keep_model(run, number, results)
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
