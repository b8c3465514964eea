"""From the stored runs to the content of validation.json: the oracle, every correlation, the choice, the verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from validate_numbers import (
    MEASURES,
    Array,
    agreement,
    baselines,
    best_baseline,
    ceiling,
    central_difference,
    chosen,
    first_step,
    in_form,
    off_diagonal,
    others_mean,
    pearson,
    relative_change,
    split_half,
    summary,
    worst_mean,
)
from validate_runs import Setting, Size

from ideal.compare.leaderboard import exceeds, mean_and_error
from ideal.report.files import Json

MEAN_AIM, WORST_AIM, OFF_AIM = 0.90, 0.80, 0.70
"""Least mean and worst seed of the vector's Pearson correlation, and least mean of the off-diagonal one."""
LOSSES = ("reference_loss", "test_loss")
SURROGATE = "surrogate with"
IN_SURROGATE = ("EK-FAC 0.1", "joint 1")
"""Estimators that the surrogate's first step is also shown with: the default, and the joint solve."""
SIGNIFICANT = 2.0
"""|t| from which an entry of the oracle counts as measured."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """What retraining did in one setting, per seed.

    matrix: [S, R, n] dL_r / dbeta_j of the reference losses; test: of the test losses.
    """

    matrix: Array
    test: Array


@dataclass(frozen=True)
class Stored:
    """The finished runs by key."""

    oracle: Mapping[str, Row]
    centres: Mapping[str, Row]
    domains: list[str]
    capabilities: list[str]
    weights: Array
    """[R], sum 1."""

    @property
    def off(self) -> np.ndarray:
        """[R, n] entries that are not a domain's own."""
        return off_diagonal(self.capabilities, self.domains)

    def complete(self, setting: Setting, seeds: Sequence[int]) -> list[int]:
        """Those of the seeds whose runs are all there."""
        return [seed for seed in seeds if all(key in self.oracle for key in self._keys(setting, seed))
                and setting.centre_key(seed) in self.centres]  # fmt: skip

    def _keys(self, setting: Setting, seed: int) -> list[str]:
        return [setting.key(domain, sign, seed) for domain in self.domains for sign in (1, -1)]

    def steps(self, setting: Setting, seeds: Sequence[int]) -> tuple[int, int]:
        """The fewest and the most optimizer steps of the oracle's inner loops."""
        found = [self.oracle[key]["steps"] for seed in seeds for key in self._keys(setting, seed)]
        return min(found), max(found)

    def measured(self, setting: Setting, seeds: Sequence[int]) -> Measured:
        """The oracle of these seeds, which must be complete."""
        matrices = [np.array([self._derivatives(setting, seed, kind) for seed in seeds]) for kind in LOSSES]
        return Measured(*matrices)

    def _derivatives(self, setting: Setting, seed: int, kind: str) -> Array:
        """[R, n]"""
        centre = tokens_of(self.centres[setting.centre_key(seed)], self.domains)
        columns = []
        for number, domain in enumerate(self.domains):
            up, down = (self.oracle[setting.key(domain, sign, seed)] for sign in (1, -1))
            betas = [relative_change(tokens_of(row, self.domains), centre, number) for row in (up, down)]
            above, below = ([row[kind].get(name, np.nan) for name in self.capabilities] for row in (up, down))
            columns.append(central_difference(above, below, *betas))
        return np.array(columns).T

    def predictions(self, setting: Setting, seed: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """[R, n] in the setting's form, of the estimators and of the baselines."""
        centre = self.centres[setting.centre_key(seed)]
        shares = np.array([centre["shares"][name] for name in self.domains])
        losses = centre["reference_loss"]
        own = [self.domains.index(name) if name in self.domains else None for name in self.capabilities]
        of_capabilities = [losses[name] for name in self.capabilities]
        plain = baselines(shares, of_capabilities, [losses[name] for name in self.domains])
        learnt = {
            f"{SURROGATE} {name}": first_step(centre["estimates"][name], shares, of_capabilities, own, setting.volume)
            for name in IN_SURROGATE
            if name in centre["estimates"]
        }
        return (
            {name: in_form(matrix, shares, setting.volume) for name, matrix in centre["estimates"].items()} | learnt,
            {name: in_form(matrix, shares, setting.volume) for name, matrix in plain.items()},
        )


def tokens_of(row: Row, domains: Sequence[str]) -> Array:
    """[n] trained tokens of one pass, by domain."""
    return np.array([row["shares"][name] * row["total_tokens"] for name in domains])


@dataclass(frozen=True)
class Compared:
    """One setting with some seeds: the oracle, and each prediction of each seed against the other seeds' oracle."""

    seeds: list[int]
    measured: Measured
    estimators: dict[str, dict[str, Array]]
    """By name and measure, [S]."""
    baselines: dict[str, dict[str, Array]]
    vectors: dict[str, Array]
    """By estimator or baseline, [S, n] w^T M."""
    matrices: dict[str, Array]
    """By estimator, [S, R, n]."""


def compared(stored: Stored, setting: Setting, seeds: Sequence[int]) -> Compared | None:
    """None with fewer than two complete seeds."""
    seeds = stored.complete(setting, seeds)
    if len(seeds) < 2:
        return None
    measured = stored.measured(setting, seeds)
    found = [stored.predictions(setting, seed) for seed in seeds]
    tables, vectors, matrices = [], dict[str, Array](), dict[str, Array]()
    for kind in (0, 1):
        names = [name for name in found[0][kind] if all(name in each[kind] for each in found)]
        stacked = {name: np.array([each[kind][name] for each in found]) for name in names}
        tables.append({name: _agreements(stored, stack, measured.matrix) for name, stack in stacked.items()})
        vectors |= {name: np.einsum("r,srj->sj", stored.weights, stack) for name, stack in stacked.items()}
        matrices |= stacked
    return Compared(list(seeds), measured, tables[0], tables[1], vectors, matrices)


def _agreements(stored: Stored, predicted: Array, measured: Array) -> dict[str, Array]:
    pairs = zip(predicted, others_mean(measured), strict=True)
    each = [agreement(one, other, stored.weights, stored.off) for one, other in pairs]
    return {measure: np.array([found[measure] for found in each]) for measure in MEASURES}


def choice(stored: Stored, size: Size) -> Json:
    """The estimator, and how every one did with the choosing seeds, of the settings that have them. Without such seeds
    it is the one that the size names."""
    if not size.choosing:
        return {"estimator": size.estimator, "seeds": [], "table": []}
    every = {setting.name: compared(stored, setting, size.choosing) for setting in size.settings}
    found = {name: each for name, each in every.items() if each is not None}
    first, *others = (each.estimators for each in found.values())
    names = [name for name in first if not name.startswith(SURROGATE) and all(name in other for other in others)]
    table = {
        estimator: {name: each.estimators[estimator]["vector"] for name, each in found.items()} for estimator in names
    }
    ranked = sorted(names, key=lambda name: -worst_mean(table[name]))
    return {
        "estimator": chosen(table),
        "seeds": list(size.choosing),
        "table": [
            {
                "estimator": estimator,
                "worst": worst_mean(table[estimator]),
                "settings": {name: mean_of(values) for name, values in table[estimator].items()},
            }
            for estimator in ranked
        ],
    }


def mean_of(values: Array) -> float | None:
    """The mean over seeds, None where any is undefined."""
    return clean(float(np.mean(values)))


def clean(value: float) -> float | None:
    """A number as JSON knows it."""
    return value if math.isfinite(value) else None


def plain(values: Array) -> Any:
    """An array as JSON knows it."""
    return [plain(value) for value in values] if np.ndim(values) else clean(float(values))


def oracle_content(stored: Stored, found: Compared) -> Json:
    """The measured derivatives with their spread, t values and reliability."""
    matrix, off = found.measured.matrix, stored.off
    vector = np.einsum("r,srj->sj", stored.weights, matrix)
    test = np.einsum("r,srj->sj", stored.weights, found.measured.test)
    entries, sums = summary(matrix), summary(vector)
    reliability = {
        "vector": split_half(vector),
        "off_diagonal": split_half(matrix[:, off]),
        "matrix": split_half(matrix),
    }
    known = np.abs(entries.t) > SIGNIFICANT
    return {
        "matrix": plain(entries.mean),
        "error": plain(entries.error),
        "t": plain(entries.t),
        "vector": plain(sums.mean),
        "vector_error": plain(sums.error),
        "vector_t": plain(sums.t),
        "test_vector": plain(summary(test).mean),
        "reference_and_test": clean(pearson(vector.mean(axis=0), test.mean(axis=0))),
        "reliability": {name: clean(value) for name, value in reliability.items()},
        "ceiling": {name: clean(ceiling(value)) for name, value in reliability.items()},
        "measured": float(known.mean()),
        "measured_off_diagonal": float(known[off].mean()),
    }


def correlations(table: Mapping[str, Mapping[str, Array]]) -> Json:
    """By name and measure, the mean over seeds, its standard error, and the worst seed."""
    content: Json = {}
    for name, measures in table.items():
        content[name] = {}
        for measure, values in measures.items():
            mean, error = mean_and_error(values)
            content[name][measure] = {
                "mean": clean(mean),
                "error": clean(error),
                "worst": clean(float(np.min(values))),
                "seeds": plain(values),
            }
    return content


def residuals(centres: Sequence[Row]) -> dict[str, float]:
    """By joint estimator, the largest residual at its end, on average over seeds."""
    return {
        name: float(np.mean([max(row["solver"][name]["residuals"][-1]) for row in centres]))
        for name in centres[0]["solver"]
        if all(name in row["solver"] for row in centres)
    }


def verdict(found: Compared, estimator: str) -> Json:
    """Whether the estimator meets each aim in a setting; an undefined number meets none."""
    own = found.estimators[estimator]
    rival = best_baseline({name: values["vector"] for name, values in found.baselines.items()})
    difference, error = mean_and_error(own["vector"] - found.baselines[rival]["vector"])
    return {
        "baseline": rival,
        "baseline_mean": mean_of(found.baselines[rival]["vector"]),
        "difference": clean(difference),
        "difference_error": clean(error),
        "mean": bool(own["vector"].mean() >= MEAN_AIM),
        "worst": bool(own["vector"].min() >= WORST_AIM),
        "off_diagonal": bool(own["off_diagonal"].mean() >= OFF_AIM),
        "beats_baseline": bool(difference > 0 and exceeds(difference, error)),
    }


AIMS = {
    "mean": f"mean Pearson of the vector at least {MEAN_AIM:.2f}",
    "worst": f"its worst seed at least {WORST_AIM:.2f}",
    "off_diagonal": f"off-diagonal Pearson at least {OFF_AIM:.2f}",
    "beats_baseline": "better than the best gradient-free baseline by more than 2 standard errors",
}


def content_of(stored: Stored, size: Size) -> Json:
    """All that the page shows. Settings without two complete seeds are named as unfinished."""
    chosen_by = choice(stored, size)
    estimator = chosen_by["estimator"]
    settings: Json = {}
    unfinished = []
    for setting in size.settings:
        found = compared(stored, setting, size.seeds)
        if found is None or len(found.seeds) < len(size.seeds):
            unfinished.append(setting.name)
        if found is None:
            continue
        centres = [stored.centres[setting.centre_key(seed)] for seed in found.seeds]
        settings[setting.name] = {
            "seeds": found.seeds,
            "start": setting.start,
            "passes": setting.passes,
            "volume": setting.volume,
            "steps": float(np.mean([row["steps"] for row in centres])),
            "oracle_steps": stored.steps(setting, found.seeds),
            "Q": plain(np.array([row["Q"] for row in centres])),
            "oracle": oracle_content(stored, found),
            "estimators": correlations(found.estimators),
            "baselines": correlations(found.baselines),
            "residuals": residuals(centres),
            "predicted": plain(found.vectors[estimator]),
            "predicted_matrix": plain(found.matrices[estimator].mean(axis=0)),
            "verdict": verdict(found, estimator),
        }
    return {
        "domains": stored.domains,
        "capabilities": stored.capabilities,
        "weights": plain(stored.weights),
        "seeds": list(size.seeds),
        "beta": size.beta,
        "segments": size.segments,
        "passes": {name: {"scale": each.scale, "epochs": each.epochs} for name, each in size.passes.items()},
        "runs": {"oracle": len(stored.oracle), "centres": len(stored.centres)},
        "choice": chosen_by,
        "settings": settings,
        "unfinished": unfinished,
    }
