"""What influence.json says at a round's model."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ideal.distributed import barrier, say
from ideal.influence import DomainSample, Influence, compute_influence, fixed_form, objective
from ideal.influence.adaptive import DIRECTION_ERROR
from ideal.influence.matrix import Errors, matrix_errors, objective_errors, uncertain_signs
from ideal.mixture import Mixture
from ideal.rounds.choice import stop_reason
from ideal.rounds.models import loaded_model
from ideal.rounds.run import Run, exists, plain, reference_losses
from ideal.run_folder import RoundFolder, read_json, write_json


def needs_influence(run: Run, here: RoundFolder) -> bool:
    """Whether this round's influence is wanted and not there yet."""
    wanted = run.mixer.needs_influence and here.number < run.mixer.last_round()
    return wanted and stop_reason(run, here.number) is None and not exists(here.influence)


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
    return {key: plain(value) for key, value in content.items()}


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
    used = influence.sequences, influence.factor_sequences, influence.eigenvalue_sequences
    gradients, covariances, eigenvalues = (sum(found.values()) for found in used)
    text = f"{gradients:,} sequences of the mixture for the gradients, {covariances:,} for the covariances"
    if influence.sketch_fraction < 1:
        text += f" (their positions added up to {influence.sketch_fraction:.0%} as many sums)"
    text += f", {eigenvalues:,} for the eigenvalues"
    if run.config.influence.sample_fraction == "auto":
        text += f", added until alpha's direction was known to {DIRECTION_ERROR:.0%} or there were no more"
    return text
