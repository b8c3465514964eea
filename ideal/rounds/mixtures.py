"""A round's mixture: the start's, or the one that a step leads to."""

from typing import Any

import numpy as np

from ideal.mixers import RoundResult, Step
from ideal.mixture import Mixture, build_mixture, mixture_of_sizes
from ideal.rounds.run import Run, exists
from ideal.run_folder import RoundFolder, read_json, write_json
from ideal.training import RoundPlan

MANY_EPOCHS = 4
"""Passes over the same example beyond which repeats are worth little (Muennighoff et al. 2023)."""


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
