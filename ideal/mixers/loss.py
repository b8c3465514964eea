"""Shares by reference loss: the rule without gradients that any use of gradients has to beat."""

from collections.abc import Sequence

import numpy as np

from ideal.errors import UserError
from ideal.mixers.base import Mixer, RoundResult, Setup, Step


class BeginsByLoss(Mixer):
    """A mixer whose round 0 may have its token shares by the base model's losses (mixing.first: loss)."""

    first_by_loss = True

    @property
    def needs_base_loss(self) -> bool:
        """As mixing.first says."""
        return self.config.first == "loss"

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] the ratios given, or those by the base model's losses. Raises UserError for a domain that serves no
        capability."""
        if not self.needs_base_loss:
            return ratios
        key = "mixing.method" if self.config.method == "loss" else "mixing.first"
        rows = capabilities_served(self.setup, ratios, key)
        if self.setup.base_loss is None:
            return ratios
        return self.with_shares(shares_by_loss(self.setup.base_loss, self.setup.weights, rows), ratios)


class Loss(BeginsByLoss):
    """Token shares in proportion to w_r L_r, summed over the capabilities that the domain serves: that of its name, and
    those without a domain of their own that name it (data.capabilities.NAME.domain).

    First by the base model's losses, then after every round by its model's. Source: none that we know of; the
    simplest way to give more to what is known less.
    """

    continues = True

    @property
    def needs_base_loss(self) -> bool:
        """Always."""
        return True

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """The shares that the last round's losses give."""
        last = rounds[-1]
        rows = capabilities_served(self.setup, last.ratios, "mixing.method")
        return self.step_to(shares_by_loss(last.reference_loss, last.weights, rows), last)


def capabilities_served(setup: Setup, ratios: np.ndarray, key: str) -> list[list[int]]:
    """[n] the capabilities that each domain serves; none for a domain that stays out.

    Raises UserError, which names the `key` that asked for `loss`, where one serves none, or where none of them has a
    weight.
    """
    serving = [setup.served_by.get(name, name) for name in setup.capabilities]
    rows: list[list[int]] = []
    for name, ratio in zip(setup.domains, ratios, strict=True):
        if ratio > 0 and name not in serving:
            raise UserError(
                f"{key}: loss needs a capability of each domain's name, and {name} has none; "
                f"give data.domains.{name}.reference, or set {key} to something else"
            )
        rows.append([r for r, by in enumerate(serving) if by == name] if ratio > 0 else [])
    if not any(setup.weights[r] for found in rows for r in found):
        raise UserError(f"{key}: loss has nothing to go by: the weights of the domains' capabilities are all 0")
    return rows


def shares_by_loss(losses: np.ndarray, weights: np.ndarray, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """[n] sum of w_r L_r over the capabilities r in rows[j] of domain j, all divided by their sum.

    losses, weights: [R] per trained token, w_r.
    """
    pull = np.array([sum(weights[r] * losses[r] for r in found) for found in rows])
    return pull / pull.sum()
