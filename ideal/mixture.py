"""Ratios -> sizes -> which examples, how often -> token shares.

Sizes are always ratio x the domain's own pool, and every choice of rows goes through one random order per
(seed, domain): the first rows of that order, again and again when the ratio exceeds 1. So successive mixtures
are nested, repeats are spread evenly (every example k times, the remainder without replacement), and no
example is lost for good by resampling what was resampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ideal.seeding import generator


@dataclass(frozen=True)
class DomainMixture:
    """One domain's part of a mixture.

    counts: [rows of the pool] how often each example stands in the mixture.
    trained_tokens: trained tokens of those examples, repeats counted.
    """

    counts: np.ndarray
    trained_tokens: int

    @property
    def pool(self) -> int:
        """Examples in the pool."""
        return len(self.counts)

    @property
    def size(self) -> int:
        """Examples in the mixture, repeats counted."""
        return int(self.counts.sum())

    @property
    def ratio(self) -> float:
        """size / pool."""
        return self.size / self.pool


@dataclass(frozen=True)
class Mixture:
    """What one inner loop trains on.

    beta: per domain, the relative change that led here; None where it came from nothing or went to nothing.
    """

    round: int
    domains: dict[str, DomainMixture]
    beta: dict[str, float | None]

    @property
    def total_tokens(self) -> int:
        """Trained tokens of one epoch."""
        return sum(domain.trained_tokens for domain in self.domains.values())

    @property
    def total_rows(self) -> int:
        """Examples of one epoch."""
        return sum(domain.size for domain in self.domains.values())

    @property
    def ratios(self) -> np.ndarray:
        """[n] size / pool per domain."""
        return np.array([domain.ratio for domain in self.domains.values()])

    @property
    def shares(self) -> np.ndarray:
        """[n] s_j: each domain's part of the trained tokens, sum 1."""
        return np.array([domain.trained_tokens for domain in self.domains.values()]) / self.total_tokens

    def to_json(self) -> dict[str, Any]:
        """The content of mixture.json."""
        shares = self.shares.tolist()
        return {
            "round": self.round,
            "total_tokens": self.total_tokens,
            "domains": {
                name: {
                    "pool": domain.pool,
                    "size": domain.size,
                    "ratio": domain.ratio,
                    "share": share,
                    "beta": self.beta[name],
                }
                for (name, domain), share in zip(self.domains.items(), shares, strict=True)
            },
        }


def row_order(seed: int, domain: str, pool: int) -> np.ndarray:
    """[pool] the random order in which a domain's examples enter its mixtures; the same in every round."""
    return generator(seed, domain, "mixture").permutation(pool)


def counts_of(order: np.ndarray, size: int) -> np.ndarray:
    """[pool] how often each example stands among `size` examples taken along `order`, round and round."""
    passes, remainder = divmod(size, len(order))
    counts = np.full(len(order), passes, dtype=np.int64)
    counts[order[:remainder]] += 1
    return counts


def size_for_tokens(order: np.ndarray, trained_tokens: np.ndarray, target: float) -> int:
    """The number of examples along `order` whose trained tokens come nearest to `target`.

    trained_tokens: [pool] per example. The result is off by at most half of one example's tokens.
    """
    per_pass = int(trained_tokens.sum())
    passes, remainder = divmod(target, per_pass)
    reached = np.concatenate([[0], np.cumsum(trained_tokens[order])])
    return int(passes) * len(order) + int(np.argmin(np.abs(reached - remainder)))


def sizes_for_total(
    orders: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    wanted: np.ndarray,
    total: float,
    least: np.ndarray,
    most: np.ndarray,
) -> np.ndarray:
    """[n] the numbers of examples whose trained tokens are in the proportions `wanted` [n] and add up to `total`.

    Examples along an order do not hold even parts of the pool's tokens: a size that comes out beyond its limit is set
    to it, and the others make up for the difference. orders, tokens: per domain, [pool]. least, most: [n] examples.
    """
    sizes, open_ = np.zeros(len(wanted)), wanted > 0
    while open_.any():
        for i in np.flatnonzero(open_).tolist():
            share = wanted[i] / wanted[open_].sum()
            sizes[i] = size_for_tokens(orders[i], tokens[i], max(total, 0) * share)
        beyond = open_ & ((sizes < least) | (sizes > most))
        if not beyond.any():
            break
        sizes[beyond] = np.clip(sizes, least, most)[beyond]
        total -= sum(counts_of(orders[i], int(sizes[i])) @ tokens[i] for i in np.flatnonzero(beyond).tolist())
        open_ &= ~beyond
    return sizes


def build_mixture(
    trained_tokens: Mapping[str, np.ndarray],
    ratios: np.ndarray,
    *,
    seed: int,
    round: int,
    beta: np.ndarray | None = None,
    total_tokens: int | None = None,
    sizes: tuple[np.ndarray, np.ndarray] | None = None,
) -> Mixture:
    """The mixture that `ratios` [n] (in the order of `trained_tokens`) give.

    trained_tokens: per domain, [pool] trained tokens of each example.
    beta: [n] the changes that led here, nan where there is none.
    total_tokens: with a fixed volume, the trained tokens that the mixture must hold; the ratios then only say
        in which proportion, and sizes follow from tokens, each domain within half an example. Without it,
        size = ratio x pool, rounded. A domain with a positive ratio keeps at least one example.
    sizes: [n] least and [n] most examples of each domain (inf: no limit).
    """
    names = list(trained_tokens)
    tokens = [trained_tokens[name] for name in names]
    orders = [row_order(seed, name, len(trained_tokens[name])) for name in names]
    least, most = (np.zeros(len(names)), np.full(len(names), np.inf)) if sizes is None else sizes
    ratios = np.asarray(ratios, dtype=np.float64)
    if total_tokens is None:
        found = np.clip([round_half_up(r * len(pool)) for r, pool in zip(ratios, tokens, strict=True)], least, most)
    else:
        wanted = ratios * [int(pool.sum()) for pool in tokens]
        found = sizes_for_total(orders, tokens, wanted, total_tokens, least, most)
    domains = {}
    for name, order, pool, size, ratio in zip(names, orders, tokens, found, ratios, strict=True):
        counts = counts_of(order, max(int(size), 1) if ratio > 0 else 0)
        domains[name] = DomainMixture(counts, int(counts @ pool))
    steps = np.zeros(len(names)) if beta is None else beta
    changes = [None if np.isnan(step) else float(step) for step in steps]
    return Mixture(round, domains, dict(zip(names, changes, strict=True)))


def mixture_of_sizes(trained_tokens: Mapping[str, np.ndarray], content: Mapping[str, Any], *, seed: int) -> Mixture:
    """The mixture that a mixture.json of the same data describes, row for row."""
    domains = {}
    for name, tokens in trained_tokens.items():
        counts = counts_of(row_order(seed, name, len(tokens)), int(content["domains"][name]["size"]))
        domains[name] = DomainMixture(counts, int(counts @ tokens))
    return Mixture(content["round"], domains, {name: content["domains"][name]["beta"] for name in trained_tokens})


def round_half_up(value: float) -> int:
    """Nearest integer, halves up (Python's rounds halves to even, which would make sizes jump by two)."""
    return int(np.floor(value + 0.5))


def training_rows(mixture: Mixture, seed: int, epoch: int) -> list[tuple[str, int]]:
    """One epoch's (domain, row of its pool) in the order they are trained on, all domains shuffled together."""
    entries = [
        (name, int(row))
        for name, domain in mixture.domains.items()
        for row in np.repeat(np.arange(domain.pool), domain.counts)
    ]
    return [entries[i] for i in generator(seed, mixture.round, epoch, "training order").permutation(len(entries))]
