"""What every mixer is: what is known after a round in, the next ratios out. Arrays only, no models, no files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from ideal.settings import STRICT


@dataclass
class MixingConfig:
    """`mixing.*`: how the next mixture follows from a round."""

    __pydantic_config__ = STRICT

    method: str = "ideal"
    """which mixer: ideal (influence), joint (sizes as they are), uniform (as many examples of every domain)"""
    rounds: Annotated[int, Field(ge=0)] = 2
    """outer steps R: R + 1 inner loops, round_00 to round_RR"""
    max_change: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """m: the largest relative change of a domain's volume in one outer step"""
    step: Literal["fixed"] = "fixed"
    """the rule that turns influence into beta; fixed: the paper's, beta = -m alpha / max |alpha|"""
    budget: Literal["free", "fixed"] = "free"
    """free: the total may grow or shrink (paper); fixed: trained tokens stay the same"""
    start: Literal["base", "continue"] = "base"
    """each inner loop starts from the base model (paper), or continues from the last round's"""
    ratios: dict[str, Annotated[float, Field(ge=0)]] | str | None = None
    """start ratios (size / pool) by domain, or a mixture.json; none: each domain's data.domains.NAME.ratio"""
    patience: Annotated[int, Field(ge=1)] = 1
    """stop after this many rounds in a row without a lower Q than the best before"""


@dataclass(frozen=True)
class RoundResult:
    """What is known after a round, for n domains and R capabilities.

    pool_sizes, ratios, shares: [n] examples per pool, size / pool, s_j.
    reference_loss, weights: [R] L_ref,r per trained token, w_r (sum 1).
    influence: [R, n] M in its free form; None where the mixer asks for none.
    """

    round: int
    pool_sizes: np.ndarray
    ratios: np.ndarray
    shares: np.ndarray
    reference_loss: np.ndarray
    weights: np.ndarray
    influence: np.ndarray | None


@dataclass(frozen=True)
class Step:
    """The change that a mixer proposes.

    ratios, beta: [n] the next ratios, the relative changes that lead there.
    alpha: [n] dQ/dbeta as used (centred with a fixed volume), where the mixer has one.
    """

    ratios: np.ndarray
    beta: np.ndarray
    alpha: np.ndarray | None = field(default=None)


class Mixer:
    """The interface. A new mixer is one file with one subclass and one line in `ideal/mixers/__init__.py`."""

    needs_influence: ClassVar[bool] = False

    def __init__(self, config: MixingConfig) -> None:
        self.config = config

    @classmethod
    def moves(cls) -> bool:
        """Whether this method ever changes its mixture after a round."""
        return cls.propose is not Mixer.propose

    def start(self, ratios: np.ndarray, pool_sizes: np.ndarray) -> np.ndarray:
        """[n] the ratios of round 0, from the ones the user gave and the pools' sizes [n]."""
        return ratios

    def propose(self, rounds: Sequence[RoundResult]) -> Step | None:
        """The step after the last of `rounds`; None when this method never changes its mixture."""
        return None
