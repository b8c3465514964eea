"""RegMix: the sampler's distribution, the regression against refits, and that it finds an optimum that is there."""

import numpy as np
import pytest

from ideal.errors import UserError
from ideal.mixers import MixingConfig, RoundResult, Setup, Step
from ideal.mixers.regmix import (
    PENALTIES,
    STRENGTHS,
    RegMix,
    features,
    fit,
    held_out_predictions,
    proxy_shares,
    ranks,
    rounded,
    searched,
    spearman,
)

TOKENS = np.array([500.0, 600.0, 100.0])
START = np.array([0.5, 0.3, 0.2])
OPTIMUM = np.array([0.2, 0.5, 0.3])


def regmix(rounds: int = 40) -> RegMix:
    setup = Setup(3, ("a", "b", "c"), ("a", "b"), np.array([0.25, 0.75]), TOKENS / 5, TOKENS, None)
    return RegMix(MixingConfig(method="regmix", rounds=rounds), setup)


def run_of(mixer: RegMix, losses: np.ndarray | None = None) -> tuple[list[RoundResult], Step]:
    """All proxies and the step after them; losses: [N, R], else 1 and 2 times exp of sum (log(s / OPTIMUM))^2 / 10."""
    ratios = mixer.start(START * 1000 / TOKENS)
    rounds: list[RoundResult] = []
    while True:
        shares = ratios * TOKENS / (ratios @ TOKENS)
        away = (np.log((shares + 0.01) / (OPTIMUM + 0.01)) ** 2).sum() / 10
        found = np.array([1, 2]) * np.exp(away) if losses is None else losses[len(rounds)]
        weights = mixer.setup.weights
        rounds.append(RoundResult(len(rounds), TOKENS / 5, ratios, shares, found, weights, None))
        step = mixer.propose(rounds)
        ratios = step.ratios
        if len(rounds) == mixer.last_round():
            return rounds, step


def test_rounds_and_their_lengths():
    mixer = regmix(5)
    assert mixer.last_round() == 5 and not mixer.successive and not mixer.extends
    assert [mixer.length(number) for number in range(6)] == [0.25] * 5 + [1.0]
    assert [mixer.is_result(number) for number in range(6)] == [False] * 5 + [True]
    with pytest.raises(UserError, match="mixing.rounds: regmix .* at least 5, better 24 to 48"):
        regmix(4).start(np.ones(3))
    regmix(4).start(np.array([1.0, 0.0, 1.0]))


def test_it_finds_the_optimum_that_the_losses_have():
    """128 of 100,000 draws: a disc of a radius of about 0.02 if they were uniform; here they are rarer inside."""
    rounds, step = run_of(regmix())
    assert all(r.ratios @ TOKENS == pytest.approx(1000, rel=1e-9) for r in rounds)
    assert step.ratios @ TOKENS == pytest.approx(1000, rel=1e-9)
    np.testing.assert_allclose(step.ratios * TOKENS / 1000, OPTIMUM, atol=0.04)
    assert not step.warnings
    assert step.information["held_out_spearman"] == pytest.approx({"a": 1, "b": 1}, abs=0.01)
    # At the optimum Q = 0.25 * 1 + 0.75 * 2.
    assert step.information["predicted_proxy_Q"] == pytest.approx(1.75, abs=0.01)


def test_losses_without_a_pattern_are_warned_of():
    """With 40 proxies a correlation by chance has a standard deviation of 0.16: 0.5 is three of them.

    Below, anything goes: without a fold of high losses the mean predicted is lower, which alone ranks negatively.
    """
    _, step = run_of(regmix(), np.exp(np.random.default_rng(0).normal(1, 0.3, (40, 2))))
    assert step.information["held_out_spearman_of_Q"] < 0.5
    assert len(step.warnings) == 2 and "mixing.rounds" in step.warnings[1]


def test_a_domain_that_is_left_out_stays_out():
    start = np.array([0.6, 0.0, 0.4])
    assert (proxy_shares(start, 50, 0)[:, 1] == 0).all()
    assert (searched(start, 1000, np.random.default_rng(0))[:, 1] == 0).all()


def test_proxies_are_a_mixture_of_dirichlets_around_the_tempered_start():
    """Mean q, variance q (1 - q) E[1 / (s + 1)], where no bound of 15 times the start's share cuts."""
    count = 40_000
    shares = searched(START, count, np.random.default_rng(0))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-12)
    q = START**0.5 / (START**0.5).sum()
    variance = q * (1 - q) * (1 / (STRENGTHS + 1)).mean()
    np.testing.assert_allclose(shares.mean(0), q, atol=4.5 * np.sqrt(variance.max() / count))
    # A squared deviation is at most 1, so its mean's standard error is below 1 / sqrt(count).
    np.testing.assert_allclose(shares.var(0), variance, atol=4.5 * np.sqrt(variance.max() / count))


def test_bound_of_fifteen_times_the_start():
    start = np.array([0.96, 0.02, 0.02])
    shares = searched(start, 5000, np.random.default_rng(0))
    assert shares[:, 1:].max() <= 0.3 and shares[:, 1:].max() > 0.25 and shares[:, 0].max() > 0.9


def test_rounding_by_hand():
    """1e-4 is below 2e-4 and goes; the rest is scaled to 1 and rounded to multiples of 2e-4."""
    found = rounded(np.array([[0.5, 0.4999, 0.0001], [0.33325, 0.33335, 0.3334]]))
    # 0.5 / 0.9999 = 0.50005 and 0.49995: 2500.25 and 2499.75 steps; then 1666.25, 1666.75 and 1667.
    np.testing.assert_allclose(found, [[0.5, 0.5, 0], [0.3332, 0.3334, 0.3334]], rtol=1e-12)


def test_proxies_differ_and_depend_on_the_seed():
    proxies = proxy_shares(START, 40, 0)
    assert proxies.shape == (40, 3) and len(np.unique(proxies, axis=0)) == 40
    np.testing.assert_allclose(proxies.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(proxies, proxy_shares(START, 40, 0))
    assert not np.array_equal(proxies, proxy_shares(START, 40, 1))


def test_features_by_hand():
    """Shares that are 1 / 100 less than powers of e; one of zero has the logarithm of 1 / 100."""
    shares = np.array([[np.exp(-1) - 0.01, np.exp(-2) - 0.01, 0.0]])
    low = np.log(0.01)
    expected = [[-1, -2, low, 1, 2, -low, 4, -2 * low, low**2]]
    np.testing.assert_allclose(features(shares), expected, rtol=1e-12)


def sample(noise: float, count: int = 30) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(2)
    shares = draws.dirichlet(np.ones(3), count)
    logs = np.log(shares + 0.01)
    exact = 2 + logs @ [0.1, -0.2, 0.3] + 0.1 * logs[:, 0] * logs[:, 1]
    return shares, np.exp(exact + noise * draws.standard_normal(count))


def test_fit_is_the_ridge_optimum():
    shares, losses = sample(0.1)
    model = fit(shares, losses)
    inputs = (features(shares) - model.mean) / model.scale
    residuals = np.log(losses / model.predict(shares))
    assert abs(residuals.sum()) < 1e-10, "the intercept is free"
    np.testing.assert_allclose(inputs.T @ residuals, model.penalty * model.coefficients, atol=1e-9)


def test_fit_without_noise_is_exact():
    """The smallest penalty, 1e-4 per proxy, moves standardised coefficients of order 1 by little."""
    shares, losses = sample(0.0)
    np.testing.assert_allclose(fit(shares, losses).predict(shares), losses, rtol=0.02)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_penalty_is_the_one_of_least_error_when_each_proxy_is_left_out_and_all_is_fitted_again(noise):
    shares, losses = sample(noise)
    model = fit(shares, losses)
    inputs, logs = np.column_stack([np.ones(30), features(shares) / model.scale]), np.log(losses)

    def error(penalty: float) -> float:
        penalties, total = np.diag([0, *[penalty] * 9]), 0.0
        for left_out in range(30):
            rest = np.arange(30) != left_out
            a = inputs[rest].T @ inputs[rest] + penalties
            total += (logs[left_out] - inputs[left_out] @ np.linalg.solve(a, inputs[rest].T @ logs[rest])) ** 2
        return total

    assert model.penalty == pytest.approx(30 * PENALTIES[np.argmin([error(30 * p) for p in PENALTIES])])


def test_held_out_predictions_do_not_see_their_fold():
    shares, losses = sample(0.1, count=12)
    order = np.random.default_rng(0).permutation(12)
    plain = held_out_predictions(shares, losses, order)
    fold = np.array_split(order, 10)[0]
    changed = losses.copy()
    changed[fold] *= 100
    again = held_out_predictions(shares, changed, order)
    np.testing.assert_array_equal(again[fold], plain[fold])
    rest = np.setdiff1d(order, fold)
    assert (again[rest] != plain[rest]).all()


def test_spearman_by_hand():
    """1 - 6 sum d^2 / (N (N^2 - 1)) = 1 - 6 * 2 / 60."""
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    np.testing.assert_array_equal(ranks(np.array([5.0, 1, 5])), [1.5, 0, 1.5])
    assert spearman(np.ones(3), np.arange(3.0)) == 0
