"""Skill-it (Chen et al. 2023, "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language
Models", arXiv 2307.14430).

Short inner loops on one domain each show which domain teaches what. A last one then draws most from the domains that
teach what is still poor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ideal.draws import token_shares
from ideal.mixers.base import RoundResult, Step
from ideal.mixers.controller import Controller, SteeredRound
from ideal.mixers.specific import Specific

STEP_SIZE = 0.2
"""eta."""
WINDOW = 3
"""w, how many evaluations count."""


def graph_of(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """[n, R] A[i, j] = (L_j(0) - L_j(H)) / L_j(0): the relative drop of capability j after training on domain i.

    before: [R] losses of the base model. after: [n, R] those after training on each domain alone.
    """
    return (before - after) / before


def mixture_of(graph: np.ndarray, losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[n] p_i proportional to exp(eta sum_j A[i, j] S_j), from uniform each time.

    losses: [R] S_j. weights: [R] w_j, sum 1; a capability counts R w_j times, once if all weigh the same.
    """
    heat = STEP_SIZE * graph @ (len(weights) * weights * losses)
    chosen = np.exp(heat - heat.max())
    return chosen / chosen.sum()


class SkillitController(Controller):
    """Draws rows by the graph and the losses of the last evaluations.

    graph: by domain, by capability: A. revisions: how often the mixture follows an evaluation.
    """

    STATE = ("recorded", "mixture")

    def __init__(self, graph: dict[str, dict[str, float]], revisions: int) -> None:
        self.graph, self.revisions = graph, revisions

    def begin(self, round: SteeredRound) -> None:
        """The mixture of the graph alone, as if all losses were 1."""
        super().begin(round)
        # By name: orders of domains and of losses differ.
        self.matrix = np.array([[self.graph[i][j] for j in round.capabilities] for i in round.domains])
        self.mixture = mixture_of(self.matrix, np.ones(len(round.capabilities)), round.weights)
        self.recorded = np.zeros((0, len(round.capabilities)))

    def wants_losses(self, step: int) -> bool:
        """After each of revisions + 1 equal parts of the steps but the last."""
        length = -(-self.round.steps // (self.revisions + 1))
        return step > 1 and (step - 1) % length == 0

    def evaluated(self, step: int, losses: np.ndarray) -> None:
        """Revises the mixture by the sum of the last evaluations."""
        self.recorded = np.vstack([self.recorded.reshape(-1, len(losses)), losses])[-WINDOW:]
        self.mixture = mixture_of(self.matrix, self.recorded.sum(0), self.round.weights)

    def probabilities(self) -> np.ndarray:
        """[n] of the next step's rows."""
        return self.mixture

    def observed(self) -> dict[str, Any]:
        """The graph and the last probabilities."""
        return {"graph": self.graph, "probabilities": self.by_name(self.mixture)}


class Skillit(Specific):
    """A short inner loop on each of the n domains alone, 1 / n of the steps each, then the steered one."""

    def last_round(self) -> int:
        """n: the rounds before it train on one domain each."""
        return len(self.setup.domains)

    def length(self, number: int) -> float:
        """All the single domains' rounds take as long as one inner loop."""
        return 1.0 if self.is_result(number) else 1 / len(self.setup.domains)

    def is_result(self, number: int) -> bool:
        """The others are trained for the graph alone."""
        return number == self.last_round()

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller | None:
        """The last round's."""
        if not self.is_result(number):
            return None
        graph = {
            domain: dict(zip(self.setup.capabilities, map(float, row), strict=True))
            for domain, row in zip(self.setup.domains, self.graph(rounds), strict=True)
        }
        return SkillitController(graph, self.config.rounds)

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The next domain alone; after the last one the mixture of the graph."""
        last, number = rounds[-1], len(rounds)
        if self.is_result(number):
            graph = self.graph(rounds)
            rows = mixture_of(graph, np.ones(graph.shape[1]), self.setup.weights)
            shares = token_shares(rows, self.setup.pool_tokens / self.setup.pool_sizes)
            return self.step_to(shares, last, information={"graph": graph.tolist()})
        return super().propose(rounds)

    def graph(self, rounds: Sequence[RoundResult]) -> np.ndarray:
        """[n, R] of the single domains' rounds."""
        assert self.setup.base_loss is not None, "the base model is evaluated before round 0"
        return graph_of(self.setup.base_loss, np.array([found.reference_loss for found in rounds]))
