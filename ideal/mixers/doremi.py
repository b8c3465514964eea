"""DoReMi (Xie et al. 2023, "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", arXiv 2305.10429).

A reference model is trained on the start's mixture. A proxy is then trained by group distributionally robust
optimisation: domains where it lags behind the reference gain weight. The weights' mean over the proxy's training is
the mixture of the final model. Iterated, the final model is the next reference.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ideal.draws import token_shares
from ideal.mixers.base import Mixer, RoundResult, Step
from ideal.mixers.controller import Controller, Measurement, SteeredRound

STEP_SIZE = 1.0
"""eta, of the weights' update."""
SMOOTHING = 1e-3
"""eps, the uniform part of the weights."""
ONE_HOT = 0.9
"""A weight above which nearly all else is left out."""
UNSETTLED = 0.1
"""L1 distance between weights that should agree above which they do not."""


def mean_excess(excess: np.ndarray, tokens: np.ndarray, before: np.ndarray) -> np.ndarray:
    """[n] lambda_d = mean over d's trained tokens of max(l_proxy - l_reference, 0) (Algorithm 1, step 2).

    excess: [n] those sums, clipped token by token. tokens: [n]. before: [n] what a domain without tokens keeps.
    """
    return np.divide(excess, tokens, out=before.astype(np.float64), where=tokens > 0)


def updated(weights: np.ndarray, scores: np.ndarray, step_size: float, smoothing: float) -> np.ndarray:
    """[n] alpha <- (1 - eps) softmax(log alpha + eta lambda) + eps / n (Algorithm 1, step 2)."""
    heat = np.log(weights) + step_size * scores
    moved = np.exp(heat - heat.max())
    return (1 - smoothing) * moved / moved.sum() + smoothing / len(weights)


class DoremiController(Controller):
    """Trains the proxy: rows of all domains alike, losses weighted by alpha.

    weights: [n] alpha. mean: [n] of all alphas so far. scores: [n] lambda.
    """

    STATE = ("weights", "mean", "scores", "counted")
    measures = "excess"
    backwards = True  # the proxy begins with the rows that the reference has seen last or never

    def begin(self, round: SteeredRound) -> None:
        """alpha is the start's shares of trained tokens, lambda ln(vocabulary): that of a model that knows nothing."""
        super().begin(round)
        self.weights = self.mean = round.shares
        self.scores, self.counted = np.full(round.count, np.log(round.vocabulary)), 1

    def probabilities(self) -> np.ndarray:
        """[n] uniform: the weights act on the losses, so that every domain is measured in every step."""
        return np.full(self.round.count, 1 / self.round.count)

    def measured(self, measurement: Measurement) -> None:
        """Moves alpha before the step that it weights, and averages it."""
        assert measurement.excess is not None
        self.scores = mean_excess(measurement.excess, measurement.tokens, self.scores)
        self.weights = updated(self.weights, self.scores, STEP_SIZE, SMOOTHING)
        self.counted += 1
        self.mean = self.mean + (self.weights - self.mean) / self.counted

    def loss_weights(self) -> np.ndarray:
        """[n] alpha_d / q_d with q the tokens' shares as drawn: the proxy trains on sum_d alpha_d L_d."""
        return self.weights / token_shares(self.probabilities(), self.round.mean_tokens)

    def observed(self) -> dict[str, Any]:
        """The mean, which is the output, the last weights and the last excess losses."""
        return {
            "shares": self.by_name(self.mean),
            "last_weights": self.by_name(self.weights),
            "excess_loss": self.by_name(self.scores),
        }


class Doremi(Mixer):
    """Reference, proxy, final model, which is the reference of the next proxy: 2 x mixing.rounds + 1 inner loops."""

    successive = False

    def last_round(self) -> int:
        """Two rounds for each revision of the mixture."""
        return 2 * self.config.rounds

    def is_result(self, number: int) -> bool:
        """A proxy is trained for its weights alone."""
        return number % 2 == 0

    def reads(self, number: int) -> Sequence[int]:
        """A proxy's reference is the model before it."""
        return () if self.is_result(number) else (number - 1,)

    def controller(self, number: int, rounds: Sequence[RoundResult]) -> Controller | None:
        """The proxy's."""
        return None if self.is_result(number) else DoremiController()

    def propose(self, rounds: Sequence[RoundResult]) -> Step:
        """After a reference its own mixture once more, for the proxy; after a proxy its output."""
        last = rounds[-1]
        if self.is_result(last.round):
            return Step(last.ratios, np.zeros(len(last.ratios)))
        outputs = [found.observed for found in rounds if not self.is_result(found.round)]
        found = outputs[-1]["shares"]
        shares = np.array([found.get(name, 0.0) for name in self.setup.domains])
        return self.step_to(shares, last, information={"shares": found}, warnings=complaints(outputs))


def complaints(outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What users of DoReMi complain about, where it shows. outputs: what each proxy left (`observed`)."""
    found = []
    shares = outputs[-1]["shares"]
    name, largest = max(shares.items(), key=lambda pair: pair[1])
    if largest > ONE_HOT and len(shares) > 1:
        found.append(
            f"doremi gives {name} {largest:.0%} of the trained tokens: the proxy lags behind its reference there and "
            "nowhere else, as when the reference has memorised that domain; compare with its reference loss"
        )
    late = distance(outputs[-1]["last_weights"], shares)
    if late > UNSETTLED:
        found.append(
            f"doremi's last weights are {late:.2f} (L1) away from their mean, which is its output: they had not "
            "settled, so another seed or a longer run may give others"
        )
    if len(outputs) > 1 and (moved := distance(shares, outputs[-2]["shares"])) > UNSETTLED:
        found.append(
            f"doremi's weights moved by {moved:.2f} (L1) from one proxy to the next: raise mixing.rounds until they "
            "stay, and compare seeds before trusting them"
        )
    return found


def distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """L1, of shares by domain."""
    return sum(abs(share - other[name]) for name, share in one.items())
