"""Rows drawn step by step, for inner loops whose mixture changes while they run.

A step is given the probabilities of the domains' rows, and holds as many rows as its trained tokens need: the
budget of tokens is that of a mixture that does not change. Within a domain rows come along the order in which they
enter mixtures, round and round, so that what was drawn is a mixture of known sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ideal.mixture import round_half_up, row_order
from ideal.seeding import generator


def allot(total: int, probabilities: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] rows of each domain that add up to `total`, and [n] what each is owed then.

    carry: [n] what each domain was owed before, in rows, sum 0. By largest remainder, one row after the other to
    the domain that is owed most; so a domain whose part of a step is below one row gets its rows all the same, in
    some of the steps. A domain of probability 0 gets none, and what it was owed goes to the others.
    """
    possible = probabilities > 0
    owed = np.where(possible, total * probabilities + carry, 0.0)
    owed[possible] += (total - owed.sum()) / possible.sum()
    rows = np.zeros(len(probabilities), dtype=np.int64)
    for _ in range(total):
        neediest = int(np.argmax(np.where(possible, owed - rows, -np.inf)))
        rows[neediest] += 1
    return rows, owed - rows


def token_shares(probabilities: np.ndarray, mean_tokens: np.ndarray) -> np.ndarray:
    """[n] the parts of the trained tokens when rows are drawn with `probabilities` [n].

    mean_tokens: [n] trained tokens per row of each domain.
    """
    tokens = probabilities * mean_tokens
    return tokens / tokens.sum()


@dataclass
class Draws:
    """What has been drawn so far, for n domains.

    trained_tokens: per domain, [pool] trained tokens of each row. tokens_per_step: the budget of a step.
    backwards: rows come from the end of each domain's order, so that another inner loop's rows come last.
    drawn: [n] rows of each domain. tokens: [n] their trained tokens. carry: [n] rows each domain is owed.
    """

    trained_tokens: Mapping[str, np.ndarray]
    tokens_per_step: float
    seed: int
    round: int
    backwards: bool = False
    steps: int = 0
    drawn: np.ndarray = field(init=False)
    tokens: np.ndarray = field(init=False)
    carry: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.trained_tokens)
        self.drawn, self.tokens = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.carry = np.zeros(count)
        self._orders = [row_order(self.seed, name, len(rows)) for name, rows in self.trained_tokens.items()]
        if self.backwards:
            self._orders = [order[::-1] for order in self._orders]

    def fresh(self) -> "Draws":
        """The same draws from their beginning."""
        return Draws(self.trained_tokens, self.tokens_per_step, self.seed, self.round, self.backwards)

    @property
    def mean_tokens(self) -> np.ndarray:
        """[n] trained tokens per row of each pool."""
        return np.array([rows.mean() for rows in self.trained_tokens.values()])

    def next(self, probabilities: np.ndarray) -> list[tuple[int, int]]:
        """(domain, row of its pool) of the next step in the order of training; at least one row."""
        owed = (self.steps + 1) * self.tokens_per_step - self.tokens.sum()
        total = max(1, round_half_up(float(owed / (probabilities @ self.mean_tokens))))
        counts, self.carry = allot(total, probabilities, self.carry)
        rows = []
        for domain, (name, count) in enumerate(zip(self.trained_tokens, counts.tolist(), strict=True)):
            order = self._orders[domain]
            taken = order[(self.drawn[domain] + np.arange(count)) % len(order)]
            self.drawn[domain] += count
            self.tokens[domain] += int(self.trained_tokens[name][taken].sum())
            rows += [(domain, int(row)) for row in taken]
        self.steps += 1
        # Shuffled, so that all ranks and micro-batches see all domains.
        return [rows[i] for i in generator(self.seed, self.round, self.steps, "step").permutation(len(rows))]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, JSON-able."""
        arrays = {"drawn": self.drawn, "tokens": self.tokens, "carry": self.carry}
        return {"steps": self.steps, **{name: array.tolist() for name, array in arrays.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.steps = int(state["steps"])
        self.drawn, self.tokens = np.array(state["drawn"]), np.array(state["tokens"])
        self.carry = np.array(state["carry"], dtype=np.float64)
