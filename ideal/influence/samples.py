"""Which sequences stand for a domain or a capability, and how much each counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ideal.seeding import generator

LEAST_SEQUENCES = 32
"""A domain is never sampled down to fewer sequences than this."""


class Examples(Protocol):
    """A set of encoded examples; `ideal.data.ExampleSet` is one."""

    @property
    def positions(self) -> np.ndarray:
        """[rows] index of the last trained label: the positions before it carry statistics."""

    @property
    def trained_tokens(self) -> np.ndarray:
        """[rows] labels that are not masked."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]:
        """`input_ids` and `labels`, lists of int of the same length; labels[i] is input_ids[i] or -100."""


@dataclass(frozen=True)
class DomainSample:
    """One domain as the mixture has it."""

    examples: Examples
    counts: np.ndarray
    """[rows] how often each example stands in the mixture; 0: it does not."""


@dataclass(frozen=True)
class SequenceSet:
    """Sequences that stand for a domain or a capability, [m]."""

    name: str
    examples: Examples
    rows: np.ndarray
    """[m] which of the examples."""
    repeats: np.ndarray
    """[m] how often each stands in the set."""
    total: float
    """Trained tokens of all the set's rows, repeats included: T_j."""
    population: int | None
    """Rows that `rows` were drawn from; None: a reference set, itself a sample of its capability."""
    slots: np.ndarray
    """[m] the sequences' numbers, which a part of the set keeps."""
    scale: float = 1.0
    """What a repeat counts."""

    @property
    def tokens(self) -> np.ndarray:
        """[m] trained tokens."""
        return self.examples.trained_tokens[self.rows]

    @property
    def weights(self) -> np.ndarray:
        """[m] how much each sequence counts."""
        return self.repeats * self.scale

    @property
    def positions(self) -> float:
        """The positions that go with the weights."""
        return float(self.weights @ self.examples.positions[self.rows])

    @property
    def seen(self) -> float:
        """The trained tokens in these sequences, repeats included."""
        return float(self.repeats @ self.tokens)

    @property
    def whole(self) -> bool:
        """Whether all of a population is here, which leaves no sampling error."""
        return len(self.rows) == self.population

    def part(self, pick: np.ndarray) -> "SequenceSet":
        """Some of the sequences, by their place [k]; each keeps its weight and its slot."""
        return replace(self, rows=self.rows[pick], repeats=self.repeats[pick], slots=self.slots[pick])

    def without(self, other: "SequenceSet") -> "SequenceSet":
        """The sequences whose slots are not `other`'s."""
        return self.part(np.flatnonzero(~np.isin(self.slots, other.slots)))

    def rescaled(self) -> "SequenceSet":
        """The same sequences, standing for the whole set: the weighted trained tokens are its total."""
        return replace(self, scale=self.total / self.seen if self.seen else 0.0)


def draw_domain(name: str, domain: DomainSample, fraction: float, seed: int) -> SequenceSet:
    """Rows of the mixture without replacement, in random order, each counted as often as the mixture has it."""
    tokens = domain.examples.trained_tokens
    assert len(domain.counts) == len(tokens), f"{name}: counts of {len(domain.counts)} rows for {len(tokens)}"
    rows = np.flatnonzero((domain.counts > 0) & (tokens > 0))
    population = len(rows)
    wanted = min(population, max(LEAST_SEQUENCES, math.ceil(fraction * population)))
    if wanted < population:
        rows = np.sort(generator(seed, name, "influence").choice(rows, wanted, replace=False))
    # In random order, so that any first part of them is a random sample too.
    rows = generator(seed, name, "order").permutation(rows)
    repeats = domain.counts[rows].astype(np.float64)
    total = float(domain.counts @ tokens)
    return SequenceSet(name, domain.examples, rows, repeats, total, population, np.arange(wanted))


def whole_reference(name: str, examples: Examples) -> SequenceSet:
    """All rows of a reference set that have a trained token."""
    tokens = examples.trained_tokens
    rows = np.flatnonzero(tokens > 0)
    return SequenceSet(name, examples, rows, np.ones(len(rows)), float(tokens.sum()), None, np.arange(len(rows)))


def how_many(sets: Sequence[SequenceSet]) -> int:
    """Sequences in all of them."""
    return sum(len(chosen.rows) for chosen in sets)
