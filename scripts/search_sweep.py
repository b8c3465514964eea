"""The reference sweep of scripts/search_benchmark.py: where the demo's best mixture lies, and how good it is.

First mixtures over the whole simplex, then generations near the best so far, one run each; then fewer and fewer of
the best with more and more seeds. What the one that wins is worth is measured with seeds that had no part in that.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from demo_bench import Bench, Job, Results, Workers

from ideal.compare.leaderboard import mean_and_error
from ideal.evaluation import weighted
from ideal.seeding import generator

PICKING, FRESH = 10_000, 20_000
"""First seeds of the runs that pick the best mixture, and of those that measure it; no method's run uses either."""
MOST_SEEDS = 20
"""Seeds set aside for each mixture while it is picked."""
WIDEST, NARROWEST = 0.8, 0.25
"""Standard deviation of log p around the centre in the first generation, and in the last."""
PARENTS = 6
"""How many of the best mixtures a generation's centre is the mean of."""
VALUE = "Q_test"
"""What the best is picked by: regret is measured on it."""
ANYWHERE = "random"
"""First word of the mixtures that are drawn from the whole simplex."""
SMALLEST = 1e-4
"""A share below it counts as this much in a logarithm."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """How many runs the sweep takes.

    random: mixtures uniform over the simplex. generations: of `children` mixtures each, near the best so far.
    rounds: (mixtures, further seeds of each) while picking. fresh: seeds that measure the best.
    """

    random: int = 50
    generations: int = 5
    children: int = 20
    rounds: Sequence[tuple[int, int]] = ((24, 2), (8, 3), (4, 6))
    fresh: int = 20

    @property
    def runs(self) -> int:
        """All of them; the one mixture more is the last generation's centre."""
        screened = self.random + self.generations * self.children + 1
        return screened + sum(count * seeds for count, seeds in self.rounds) + self.fresh


SMALLER = Plan(generations=3, rounds=((12, 2), (4, 3), (2, 6)))
"""With other weights, where the mixtures over the whole simplex are known already: still more than 100 mixtures."""


@dataclass(frozen=True)
class Best:
    """The best mixture known.

    shares: by domain, of trained tokens. picked: its mean test Q while it was picked, which flatters it.
    q, error: mean test Q over `seeds` fresh seeds and its standard error. deviation: of one run.
    """

    name: str
    shares: dict[str, float]
    picked: float
    q: float
    error: float
    deviation: float
    seeds: int


def centre_of(shares: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """[n] the normalised geometric mean of the `count` rows of shares [N, n] whose values [N] are lowest."""
    best = shares[np.argsort(values, kind="stable")[:count]]
    mean = np.exp(np.log(np.maximum(best, SMALLEST)).mean(0))
    return mean / mean.sum()


def around(centre: np.ndarray, spread: float, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, n] shares whose logarithms are normal around those of `centre` [n], up to normalisation."""
    drawn = centre * np.exp(spread * random.standard_normal((count, len(centre))))
    return drawn / drawn.sum(1, keepdims=True)


def picking(rows: Iterable[Row]) -> dict[str, list[float]]:
    """By mixture, the values of its runs but those with fresh seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["seed"] < FRESH:
            found.setdefault(mixture_of_key(row["key"]), []).append(row[VALUE])
    return found


def ranked(found: Mapping[str, Sequence[float]]) -> list[str]:
    """The mixtures by their mean, the lowest first, among those that have the most seeds: the others have lost."""
    most = max(map(len, found.values()))
    return sorted((name for name in found if len(found[name]) == most), key=lambda name: np.mean(found[name]))


def best_of(rows: Sequence[Row]) -> Best:
    """The best mixture of a whole sweep."""
    found = picking(rows)
    name = ranked(found)[0]
    fresh = [row for row in rows if mixture_of_key(row["key"]) == name and row["seed"] >= FRESH]
    values = np.array([row[VALUE] for row in fresh])
    mean, error = mean_and_error(values)
    return Best(
        name=name,
        shares=fresh[0]["shares"],
        picked=float(np.mean(found[name])),
        q=mean,
        error=error,
        deviation=error * math.sqrt(len(values)),
        seeds=len(values),
    )


def mixture_of_key(key: str) -> str:
    """A run's mixture; its key is MIXTURE/SEED."""
    return key.rsplit("/", 1)[0]


def reweighed(rows: Iterable[Row], weights: Mapping[str, float]) -> list[Row]:
    """The runs of another sweep that do not depend on its weights, with Q by these `weights` of capabilities."""
    return [
        {**row, "Q": weighted(row["reference_loss"], weights), "Q_test": weighted(row["test_loss"], weights)}
        for row in rows
        if row["key"].startswith(f"{ANYWHERE} ") and row["seed"] < FRESH
    ]


def stored(rows: Sequence[Row]) -> tuple[bytes, str]:
    """The sweep as a file, sorted by key and without what differs from machine to machine, and its sha256."""
    kept = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    lines = [json.dumps(row) + "\n" for row in sorted(kept, key=lambda row: row["key"])]
    content = "".join(lines).encode()
    return content, hashlib.sha256(content).hexdigest()


class Sweep:
    """Does what is missing of the sweep; what is tried follows from the plan and from what was found, nothing else."""

    def __init__(self, bench: Bench, total_tokens: int, results: Results, plan: Plan, workers: Workers) -> None:
        self.bench, self.total, self.results, self.plan, self.workers = bench, total_tokens, results, plan, workers
        self.shares: dict[str, np.ndarray] = {}
        self.keys: list[str] = []
        """Of the runs so far. A resumed sweep finds later ones in the results too: what came next knew none of them."""

    def run(self) -> Best:
        """All of it."""
        n, plan = len(self.bench.domains), self.plan
        drawn = generator(0, "search sweep").dirichlet(np.ones(n), plan.random)
        self.screen({f"{ANYWHERE} {i}": p for i, p in enumerate(drawn)})
        for number, spread in enumerate(np.geomspace(WIDEST, NARROWEST, plan.generations)):
            children = around(self.centre(), spread, plan.children, generator(0, "search sweep", number))
            self.screen({f"near {number}.{i}": p for i, p in enumerate(children)})
        self.screen({"centre": self.centre()})
        for count, more in plan.rounds:
            found = picking(self.rows)
            self.do([(name, len(found[name]) + i) for name in ranked(found)[:count] for i in range(more)])
        best = ranked(picking(self.rows))[0]
        self.do([(best, FRESH + i) for i in range(plan.fresh)])
        return best_of(self.rows)

    @property
    def rows(self) -> list[Row]:
        """Of the runs so far."""
        return [self.results.found[key] for key in self.keys]

    def centre(self) -> np.ndarray:
        """[n] of the best mixtures so far, one run each."""
        found = picking(self.rows)
        return centre_of(
            np.array(list(self.shares.values())), np.array([found[name][0] for name in self.shares]), PARENTS
        )

    def screen(self, shares: Mapping[str, np.ndarray]) -> None:
        """One run of each new mixture, shares [n] by name."""
        self.shares |= shares
        self.do([(name, 0) for name in shares])

    def do(self, runs: Iterable[tuple[str, int]]) -> None:
        """Runs of (mixture, which of its seeds, or a fresh one)."""
        jobs = []
        for name, number in runs:
            # No two mixtures share a seed, so that none wins by the examples that one seed draws.
            seed = number if number >= FRESH else PICKING + MOST_SEEDS * list(self.shares).index(name) + number
            ratios = self.bench.ratios_of_shares(self.shares[name])
            by_domain = dict(zip(self.bench.domains, ratios.tolist(), strict=True))
            jobs.append(Job(f"{name}/{seed}", by_domain, seed, self.total))
        self.workers.do(jobs, self.results)
        self.keys += [job.key for job in jobs]
