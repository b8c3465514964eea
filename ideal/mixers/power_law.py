"""The surrogate's step without influence: what the losses of all rounds say by themselves."""

from collections.abc import Sequence

from ideal.mixers.base import RoundResult, Step
from ideal.mixers.loss import BeginsByLoss
from ideal.mixers.surrogate_step import TIE, surrogate_step


class PowerLaw(BeginsByLoss):
    """The next mixture by power laws in the shares, fitted to every reference loss of all rounds.

    The model, its prior (a capability gains most from the domain of its name, or the one that it names) and the region
    are those of `mixing.step: surrogate` (ideal/mixers/surrogate.py, with its sources); only the influence is missing,
    so a round costs no outer step. The first step goes by the prior and one round's losses.
    """

    @property
    def tie(self) -> float:
        """As with the surrogate."""
        return TIE

    def advice(self, rounds: Sequence[RoundResult]) -> str:
        """As with the surrogate."""
        return str(self.propose(rounds).information["advice"])

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The step to the lowest expected Q, or what else the goal is, near the best round."""
        demands = self.demands(rounds[0])
        return surrogate_step(rounds, self.setup, self.goal, demands, True, self.config.max_change)
