"""IDEAL's step (arXiv 2505.12762): every domain's volume moves against its influence."""

from collections.abc import Sequence

from ideal.mixers.base import RoundResult, Step
from ideal.mixers.loss import BeginsByLoss
from ideal.mixers.paper_step import paper_step
from ideal.mixers.surrogate_step import TIE, surrogate_step


class Ideal(BeginsByLoss):
    """alpha = w^T M, centred when the volume is fixed; beta by the paper's rule, or the next mixture by a surrogate."""

    needs_influence = True
    continues = True
    has_budget = True

    @property
    def tie(self) -> float:
        """The surrogate's own, where it chooses."""
        return TIE if self.config.step == "surrogate" else 0.0

    def advice(self, rounds: Sequence[RoundResult]) -> str | None:
        """The surrogate's."""
        return self.propose(rounds).information["advice"] if self.config.step == "surrogate" else None

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The surrogate's step from all rounds, or the paper's from the last round's influence matrix."""
        fixed, demands = self.config.budget == "fixed", self.demands(rounds[0])
        if self.config.step == "surrogate":
            return surrogate_step(rounds, self.setup, self.goal, demands, fixed, self.config.max_change)
        # A continued model has trained for longer: its losses say nothing about what the mixture did to them.
        known = rounds if self.config.start == "base" else rounds[-1:]
        return paper_step(known, self.setup, self.goal, demands, fixed, self.config.max_change)
