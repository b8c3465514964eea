"""Each domain alone: what one data set can do."""

from collections.abc import Sequence

import numpy as np

from ideal.errors import UserError
from ideal.mixers.base import Mixer, RoundResult, Step


class Specific(Mixer):
    """One domain at a time, each with the start's trained tokens (the one-domain SFT of arXiv 2505.12762's table)."""

    successive = False
    extends = False
    keeps_limits = False

    def last_round(self) -> int:
        """One round per domain, whatever mixing.rounds is."""
        return len(self.setup.domains) - 1

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] the first domain alone. Raises UserError where a domain is left out: it has a round too."""
        for name, ratio in zip(self.setup.domains, ratios, strict=True):
            if ratio == 0:
                raise UserError(
                    f"mixing.ratios: {self.config.method} trains on each domain, and {name} is 0; leave {name} out of "
                    "data.domains"
                )
        return self.with_shares(alone(0, len(ratios)), ratios)

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The next domain alone."""
        return self.step_to(alone(len(rounds), len(self.setup.domains)), rounds[-1])


def alone(domain: int, domains: int) -> np.ndarray:
    """[domains] share 1 for one domain, 0 for the others."""
    return np.eye(domains)[domain]
