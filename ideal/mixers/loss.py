"""Shares by reference loss: the rule without gradients that any use of gradients has to beat."""

from collections.abc import Sequence

import numpy as np

from ideal.errors import UserError
from ideal.mixers.base import Mixer, RoundResult, Setup, Step


class Loss(Mixer):
    """Token shares in proportion to w_r L_r, r being the capability of the domain's name.

    First by the base model's losses, then after every round by its model's. Source: none that we know of; the
    simplest way to give more to what is known less.
    """

    needs_base_loss = True

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] ratios by the base model's losses. Raises UserError for a domain without a capability of its name."""
        rows = own_capabilities(self.setup, ratios)
        if self.setup.base_loss is None:
            return ratios
        return self.with_shares(shares_by_loss(self.setup.base_loss, self.setup.weights, rows), ratios)

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The shares that the last round's losses give."""
        last = rounds[-1]
        rows = own_capabilities(self.setup, last.ratios)
        return self.step_to(shares_by_loss(last.reference_loss, last.weights, rows), last)


def own_capabilities(setup: Setup, ratios: np.ndarray) -> list[int | None]:
    """[n] the capability of each domain's name; None for a domain that stays out.

    Raises UserError where there is none, or where none of them has a weight.
    """
    rows: list[int | None] = []
    for name, ratio in zip(setup.domains, ratios, strict=True):
        if ratio > 0 and name not in setup.capabilities:
            raise UserError(
                f"mixing.method: loss needs a capability of each domain's name, and {name} has none; "
                f"give data.domains.{name}.reference, or choose another method"
            )
        rows.append(setup.capabilities.index(name) if ratio > 0 else None)
    if not any(setup.weights[row] for row in rows if row is not None):
        raise UserError("mixing.method: loss has nothing to go by: the weights of the domains' capabilities are all 0")
    return rows


def shares_by_loss(losses: np.ndarray, weights: np.ndarray, rows: Sequence[int | None]) -> np.ndarray:
    """[n] w_r L_r / sum, with r = rows[j] for domain j; 0 where that is None.

    losses, weights: [R] per trained token, w_r.
    """
    pull = np.array([0.0 if row is None else weights[row] * losses[row] for row in rows])
    return pull / pull.sum()
