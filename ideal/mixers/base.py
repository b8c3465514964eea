"""What every mixer is: what is known after a round in, the next ratios out. Arrays only, no models, no files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ideal.mixers.controller import Controller
from ideal.mixers.goal import Goal
from ideal.mixers.limits import Demands, Limits, hold_total
from ideal.settings import STRICT


@dataclass
class MixingConfig:
    """`mixing.*`: how the next mixture follows from a round."""

    __pydantic_config__ = STRICT

    method: str = "ideal"
    """which mixer (docs/methods.md): ideal (influence); joint (sizes as they are), uniform, temperature, loss (shares
    by reference loss); power_law (a model of all rounds' losses), specific (each domain alone), random (several draws),
    regmix (regression on short runs); doremi, doge (weights learned by a proxy); odm, skillit, aioli (revised while the
    model trains)"""
    rounds: Annotated[int, Field(ge=0)] = 2
    """how often the mixture is revised, so R + 1 inner loops, round_00 to round_RR; ideal, loss, power_law: steps;
    random: further draws; regmix: proxy runs; joint, uniform, temperature: never; specific: once per domain; doremi,
    doge: proxies in turn; skillit, aioli: revisions within the last inner loop; odm: after every step"""
    step: Literal["surrogate", "fixed"] = "surrogate"
    """ideal's rule for the next mixture; surrogate: the best point of a model of all rounds' losses and influence
    (docs/methods.md); fixed: the paper's, beta = -m alpha / max |alpha|"""
    max_change: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """m: the largest relative change of a domain's volume in one fixed step; of the total in one of the surrogate's"""
    budget: Literal["free", "fixed"] = "free"
    """ideal's total; free: it may grow or shrink (paper); fixed: trained tokens stay the same, as with all others"""
    max_total: Annotated[float, Field(ge=1)] | None = None
    """the most trained tokens that a free budget may come to, as a multiple of round 0's; none: no cap"""
    objective: Literal["mean", "worst"] = "mean"
    """what the rounds are chosen by, and what ideal lowers; mean: Q, the weighted mean reference loss; worst: a soft
    maximum of the capabilities' relative distances to mixing.target (docs/methods.md)"""
    target: dict[str, Annotated[float, Field(gt=0)]] | str | None = None
    """for worst: each capability's reference loss to compare with, or an evaluation.json of another run (the best that
    is known for each); none: the base model's, so that the capability that gains least counts"""
    no_worse: dict[str, Annotated[float, Field(gt=0)]] | str | None = None
    """reference losses that no capability may end above, by more than mixing.noise: a mapping by capability, an
    evaluation.json of another run, or `start` (round 0's); ideal's steps avoid it, and the result is chosen by it"""
    noise: Annotated[float, Field(ge=0)] = 0.02
    """the relative difference of a reference loss between two training runs that counts as noise for mixing.no_worse"""
    start: Literal["base", "continue"] = "base"
    """base: each inner loop is a training run of its own from the base model (paper); continue: all rounds are one
    training run, each an equal part of the steps that train.* asks for, with an outer step in between (ideal, loss)"""
    ratios: dict[str, Annotated[float, Field(ge=0)]] | str | None = None
    """start ratios (size / pool) by domain, or a mixture.json; none: each domain's data.domains.NAME.ratio"""
    first: Literal["given", "loss"] = "given"
    """round 0's mixture for ideal and power_law; given: the start ratios; loss: as many trained tokens, shared out by
    the base model's reference losses, as the method loss does"""
    patience: Annotated[int, Field(ge=1)] = 2
    """stop after this many rounds in a row without a lower Q (or higher score: evaluation.choose_by) than the best
    before; ideal, loss and power_law"""
    proxy_length: Annotated[float, Field(gt=0, le=1)] = 0.25
    """the part of an inner loop's optimizer steps that a proxy run of regmix takes"""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """temperature's T: sizes in proportion to the start's sizes to the power 1/T; 1: joint, large: uniform"""


@dataclass(frozen=True)
class Setup:
    """What is known before round 0, for n domains and R capabilities.

    seed: the run's. domains, capabilities: [n], [R] their names, in the order of all arrays.
    weights: [R] w_r, sum 1.
    pool_sizes, pool_tokens: [n] examples and trained tokens of each pool.
    base_loss: [R] L_ref,r of the base model per trained token; None before it is evaluated.
    served_by: the domain that serves a capability, for those that name another than their own.
    limits: of the ratios; None where no domain has one.
    target, no_worse: [R] the losses that mixing.target and mixing.no_worse give; None where they give none
        (`start` is known after round 0), inf in no_worse for a capability that is left out.
    """

    seed: int
    domains: tuple[str, ...]
    capabilities: tuple[str, ...]
    weights: np.ndarray
    pool_sizes: np.ndarray
    pool_tokens: np.ndarray
    base_loss: np.ndarray | None
    served_by: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None
    target: np.ndarray | None = None
    no_worse: np.ndarray | None = None


@dataclass(frozen=True)
class RoundResult:
    """What is known after a round, for n domains and R capabilities.

    pool_sizes, ratios, shares: [n] examples per pool, size / pool, s_j.
    reference_loss, weights: [R] L_ref,r per trained token, w_r (sum 1).
    influence: [R, n] M in its free form; None where the mixer asks for none.
    influence_errors: [R, n] standard errors of M, from the sampling of sequences and of reference rows together; nan
        where one is unknown, None where there are none.
    observed: what the round's controller left (`Controller.observed`); empty without one.
    """

    round: int
    pool_sizes: np.ndarray
    ratios: np.ndarray
    shares: np.ndarray
    reference_loss: np.ndarray
    weights: np.ndarray
    influence: np.ndarray | None
    influence_errors: np.ndarray | None = None
    observed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """The change that a mixer proposes.

    ratios, beta: [n] the next ratios, the relative changes that lead there (nan: from or to nothing).
    alpha: [n] dQ/dbeta as used (centred with a fixed volume), where the mixer has one.
    information: JSON-able, what the step rests on, for the round's step.json.
    warnings: what a user should know before trusting the step, one line each.
    """

    ratios: np.ndarray
    beta: np.ndarray
    alpha: np.ndarray | None = field(default=None)
    information: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()


class Mixer:
    """The interface. A new mixer is one file with one subclass and one line in `ideal/mixers/__init__.py`.

    A mixer holds no state: everything follows from the configuration, the setup and the rounds so far, so a run
    that was killed continues as if it had not been.
    """

    needs_influence: ClassVar[bool] = False
    first_by_loss: ClassVar[bool] = False
    """Whether mixing.first may be loss."""
    has_budget: ClassVar[bool] = False
    """Whether mixing.budget is this method's business; all others hold the start's trained tokens."""
    keeps_limits: ClassVar[bool] = True
    """Whether its mixtures keep to the domains' limits: not where it draws row by row, or trains on one alone."""
    whole_gradients: ClassVar[bool] = False
    """Whether a controller measures gradients, which train.fsdp does not allow."""
    successive: ClassVar[bool] = True
    """Whether each round is meant to be better than the one before, and mixing.patience may end the run; if not, rounds
    are tries that stand beside each other."""
    continues: ClassVar[bool] = False
    """Whether rounds may be parts of one training run (mixing.start: continue): each mixture is for the model as it is
    now."""
    extends: ClassVar[bool] = True
    """Whether a finished run may go on with more mixing.rounds: what a round is for does not depend on how many
    there are."""

    def __init__(self, config: MixingConfig, setup: Setup) -> None:
        self.config, self.setup = config, setup

    @classmethod
    def moves(cls) -> bool:
        """Whether this method ever changes its mixture after a round."""
        return cls.propose is not Mixer.propose

    @property
    def needs_base_loss(self) -> bool:
        """Whether `start` follows from `setup.base_loss`."""
        return False

    @property
    def tie(self) -> float:
        """The relative difference of Q within which the earlier round is kept as the better one."""
        return 0.0

    @property
    def keeps_volume(self) -> bool:
        """Whether every round holds the start's trained tokens; ratios then say in which proportion."""
        return not self.has_budget or self.config.budget == "fixed"

    @property
    def goal(self) -> Goal:
        """What the rounds are chosen by; for `worst` with the base model's losses as target where none is given."""
        if self.config.objective == "mean":
            return Goal(self.setup.weights)
        target = self.setup.base_loss if self.setup.target is None else self.setup.target
        assert target is not None, "the base model is evaluated before any round"
        return Goal(self.setup.weights, target)

    def ceilings(self, first: np.ndarray) -> np.ndarray:
        """[R] what each L_r may be at most by mixing.no_worse, noise included; inf where there is no such limit.

        first: [R] round 0's losses.
        """
        given = first if self.config.no_worse == "start" else self.setup.no_worse
        return np.full(len(first), np.inf) if given is None else given * (1 + self.config.noise)

    def demands(self, first: RoundResult) -> Demands:
        """What the next mixture must keep to. first: round 0."""
        limits, n = self.setup.limits, len(self.setup.domains)
        return Demands(
            np.zeros(n) if limits is None else limits.least,
            np.full(n, np.inf) if limits is None else limits.most,
            self.ceilings(first.reference_loss),
            (self.config.max_total or np.inf) * float(first.ratios @ self.setup.pool_tokens),
        )

    def last_round(self) -> int:
        """The number of the last round, when nothing stops the run before; rounds count from 0."""
        return self.config.rounds if self.moves() else 0

    def length(self, number: int) -> float:
        """The part of an inner loop's optimizer steps that round `number` takes."""
        return 1 / (self.last_round() + 1) if self.config.start == "continue" else 1.0

    def is_result(self, number: int) -> bool:
        """Whether round `number`'s model may be the run's result."""
        return True

    def reads(self, number: int) -> Sequence[int]:
        """The earlier rounds whose trained models round `number`'s controller reads; they are kept until then."""
        return ()

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller | None:
        """What steers round `number`'s inner loop, after `rounds`; None: its mixture is drawn as it is."""
        return None

    def start(self, ratios: np.ndarray) -> np.ndarray:
        """[n] the ratios of round 0, from the ones the user gave [n].

        Also asked before the base model is evaluated (`setup.base_loss` None), for what the run will take: a
        method that needs those losses then answers `ratios`. A domain of ratio 0 stays out. Unless the answer
        is `ratios` itself, only its proportions count: the total is that of `ratios`.
        """
        return ratios

    def propose(self, rounds: Sequence[RoundResult]) -> Step | None:
        """The step after the last of `rounds`; None when this method never changes its mixture."""
        return None

    def advice(self, rounds: Sequence[RoundResult]) -> str | None:
        """Whether another round after `rounds` is worth its cost, in words; None where this method cannot say."""
        return None

    def with_shares(self, shares: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """[n] the ratios that have token shares [n] and the volume of `ratios` [n], brought within the limits."""
        tokens, limits = self.setup.pool_tokens, self.setup.limits
        if limits is None:
            return ratios_of_shares(shares, ratios @ tokens, tokens)
        return hold_total(shares, limits.least * tokens, limits.most * tokens, ratios @ tokens) / tokens

    def step_to(self, shares: np.ndarray, last: RoundResult, **more: Any) -> Step:
        """The step from `last` to token shares [n] with the same volume; `more`: the Step's other fields."""
        ratios = self.with_shares(shares, last.ratios)
        return Step(ratios, relative_change(last.ratios, ratios), **more)


def ratios_of_shares(shares: np.ndarray, total_tokens: float, pool_tokens: np.ndarray) -> np.ndarray:
    """[n] ratios (size / pool) that give `total_tokens` trained tokens in these shares [n] (any positive sum).

    Exact but for rounding to examples; a share of 0 is a ratio of 0.
    """
    return shares / shares.sum() * total_tokens / pool_tokens


def relative_change(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """[n] new / old - 1; nan where a domain comes from nothing or goes to nothing, which is no change of a volume."""
    both = (old > 0) & (new > 0)
    return np.where(both, new / np.where(both, old, 1), np.nan) - 1
