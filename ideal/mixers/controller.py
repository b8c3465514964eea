"""What steers an inner loop from within: measurements of a step in, the next step's mixture out. Arrays only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np


@dataclass(frozen=True)
class SteeredRound:
    """The inner loop that a controller steers, for the n domains that take part (those of ratio 0 stay out).

    steps: its optimizer steps. domains, capabilities: [n], [R] names. weights: [R] w_r, sum 1.
    rows, shares: [n] each domain's part of the rows and of the trained tokens of the mixture it starts from.
    mean_tokens: [n] trained tokens per row of each pool. vocabulary: the number of different tokens.
    """

    steps: int
    domains: tuple[str, ...]
    capabilities: tuple[str, ...]
    weights: np.ndarray
    rows: np.ndarray
    shares: np.ndarray
    mean_tokens: np.ndarray
    vocabulary: int

    @property
    def count(self) -> int:
        """n."""
        return len(self.domains)


@dataclass(frozen=True)
class StepStatistics:
    """What an optimizer step measured on its rows, over all ranks.

    rows, tokens: [n] rows and trained tokens of each domain. losses: [n] their summed loss (nats).
    """

    rows: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray

    @property
    def mean_losses(self) -> np.ndarray:
        """[n] loss per trained token; nan where a domain has none in this step."""
        return np.divide(self.losses, self.tokens, out=np.full(len(self.tokens), np.nan), where=self.tokens > 0)


@dataclass(frozen=True)
class Measurement:
    """What is measured on a step's rows before the step, over all ranks, where a controller asks for it.

    tokens: [n] trained tokens of each domain.
    excess: [n] sum over them of max(loss - the reference model's loss, 0), where asked for.
    alignment, norms: [n] <g_j, g_V> of the gradients of the mean losses, each clipped to norm 1, and the norms of
        the g_j so clipped; 0 where a domain has no token. Where asked for.
    rate: the step's learning rate as a part of the highest.
    """

    tokens: np.ndarray
    excess: np.ndarray | None
    alignment: np.ndarray | None
    norms: np.ndarray | None
    rate: float


class Controller:
    """Steers one inner loop from within: sees what each optimizer step measured, sets what the next one draws.

    A controller runs identically on all ranks, in float64. Per step the inner loop asks, in this order:
    `wants_losses` (and if so hands `evaluated` the reference losses), `probabilities`, then after drawing the rows
    `measured` (where `measures` says so) and `loss_weights`, and after the step `observe`.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that a killed inner loop needs again: numbers and arrays."""
    measures: ClassVar[Literal["nothing", "excess", "alignment"]] = "nothing"
    """What is measured on each step's rows before the step."""
    backwards: ClassVar[bool] = False
    """Whether rows are drawn from the end of each domain's order."""
    round: SteeredRound

    def begin(self, round: SteeredRound) -> None:
        """Called once before the first step; a resumed inner loop calls `restore` after it."""
        self.round = round

    def wants_losses(self, step: int) -> bool:
        """Whether `step` (from 1) is to be preceded by an evaluation on the reference sets."""
        return False

    def evaluated(self, step: int, losses: np.ndarray) -> None:
        """Takes the reference losses [R] before `step`."""

    def probabilities(self) -> np.ndarray:
        """[n] of the next step's rows, sum 1."""
        return self.round.rows

    def measured(self, measurement: Measurement) -> None:
        """Takes what was measured on the rows of the step to come."""

    def loss_weights(self) -> np.ndarray:
        """[n] by which the domains' losses are multiplied in the step to come."""
        return np.ones(self.round.count)

    def observe(self, statistics: StepStatistics) -> None:
        """Takes what the step measured."""

    def observed(self) -> dict[str, Any]:
        """What the round leaves for `Mixer.propose` and for training.json, JSON-able, domains by name."""
        raise NotImplementedError

    def by_name(self, values: np.ndarray) -> dict[str, float]:
        """[n] numbers of the domains, by name: orders differ between programs, names do not."""
        return dict(zip(self.round.domains, map(float, values), strict=True))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, JSON-able and exact."""
        return {name: np.asarray(getattr(self, name)).tolist() for name in self.STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""
        for name in self.STATE:
            value = state[name]
            setattr(self, name, np.array(value, dtype=np.float64) if isinstance(value, list) else value)
