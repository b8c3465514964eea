"""The surrogate against matrices written out, finite differences, known power laws and an emulated training bed."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy.optimize import minimize

from ideal.mixers import MIXERS, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.goal import Goal
from ideal.mixers.surrogate import (
    GROWTH,
    LARGEST_RADIUS,
    LEAST_RADIUS,
    RADIUS,
    SHRINKAGE,
    SMALLEST_SHARE,
    Model,
    Observed,
    best_round,
    condition,
    fit,
    lowest_point,
    next_radius,
    region_around,
    scales,
)
from ideal.mixers.surrogate_step import observed
from ideal.seeding import generator

# log L_r = c_r + sum_j a_rj log p_j (+ b_r log V): three capabilities, four domains, with transfer.
LEVELS = np.array([-1.0, 0.3, -0.5])
EXPONENTS = np.array([[-0.5, -0.1, 0.0, 0.05], [0.0, -0.4, -0.2, 0.1], [0.1, 0.0, -0.3, -0.05]])
VOLUME_EXPONENTS = np.array([-0.3, -0.2, -0.1])


def losses_at(volumes: np.ndarray, free: bool = False) -> np.ndarray:
    """[3] L_r of domains' volumes [4], written without any of the code under test."""
    shares = volumes / volumes.sum()
    total = VOLUME_EXPONENTS * np.log(volumes.sum()) if free else 0.0
    return np.exp(LEVELS + EXPONENTS @ np.log(shares) + total)


def slopes_at(volumes: np.ndarray, free: bool = False) -> np.ndarray:
    """[3, 4] d log L_r / d beta_j by central differences; centred is what a fixed total gives by itself."""
    step = 1e-5
    columns = []
    for j in range(len(volumes)):
        change = step * (np.arange(len(volumes)) == j)
        up, down = (losses_at(volumes * (1 + sign * change), free) for sign in (1, -1))
        columns.append((np.log(up) - np.log(down)) / (2 * step))
    return np.array(columns).T


def seen(volumes: np.ndarray, scale: float = 1.0, free: bool = False, error: float = 0.0) -> Observed:
    slopes = scale * slopes_at(volumes, free)
    shares = volumes / volumes.sum()
    volume = float(volumes.sum()) if free else None
    return Observed(shares, volume, losses_at(volumes, free), slopes, np.full(slopes.shape, error))


def random_shares(count: int, name: str = "shares") -> np.ndarray:
    return generator(3, name).dirichlet(np.full(4, 3.0), count)


def test_condition_is_ridge_regression_written_out():
    """The textbook's other form: precisions add up (Bishop 2006, 2.116 and 2.117), and the density of the targets."""
    draw = generator(0, "condition")
    design, targets = draw.normal(size=(5, 3)), draw.normal(size=5)
    roots = [draw.normal(size=(k, k)) for k in (5, 3)]
    noise, covariance = (root @ root.T + np.eye(len(root)) for root in roots)
    mean = draw.normal(size=3)
    found, spread, evidence = condition(design, targets, noise, mean, covariance)
    weight = np.linalg.inv(noise)
    expected = np.linalg.inv(np.linalg.inv(covariance) + design.T @ weight @ design)
    np.testing.assert_allclose(spread, expected, rtol=1e-10)
    pulled = design.T @ weight @ targets + np.linalg.inv(covariance) @ mean
    np.testing.assert_allclose(found, expected @ pulled, rtol=1e-10)
    total, off = noise + design @ covariance @ design.T, targets - design @ mean
    density = np.exp(-0.5 * off @ np.linalg.inv(total) @ off) / np.sqrt(np.linalg.det(2 * np.pi * total))
    assert evidence == pytest.approx(np.log(density), rel=1e-10)


@pytest.mark.parametrize("free", [False, True])
def test_derivatives_of_features_are_those_of_losses(free):
    volumes = np.array([0.5, 0.2, 0.4, 0.1])
    coefficients = np.column_stack([EXPONENTS, VOLUME_EXPONENTS]) if free else EXPONENTS
    this = seen(volumes, free=free)
    np.testing.assert_allclose(coefficients @ this.derivatives.T, this.slopes, atol=1e-9)
    np.testing.assert_allclose(LEVELS + coefficients @ this.features, np.log(this.losses), atol=1e-12)


def test_a_power_law_is_recovered_from_values_alone():
    """Exact values of 40 mixtures against the prior: least squares gives the law, and so does the model."""
    rounds = [replace(seen(p), slopes=None, errors=None) for p in random_shares(40)]
    model = fit(rounds, [None] * 3)
    np.testing.assert_allclose(model.mean[:, 1:], EXPONENTS, atol=0.01)
    assert (model.noise < 0.02).all(), "there is no noise in these values"
    np.testing.assert_array_equal(model.scale, 1.0)


def test_directions_are_recovered_from_one_rounds_influence():
    """One value tells no slope; one matrix tells all, but for the scale and what the prior pulls towards itself."""
    where = np.array([0.4, 0.3, 0.2, 0.1])
    model = fit([seen(where, scale=50.0)], [None] * 3)
    found = model.mean[:, 1:] @ seen(where).derivatives.T
    true = slopes_at(where)
    for row, expected in zip(found, true, strict=True):
        assert np.corrcoef(row, expected)[0, 1] > 0.98
    blind = fit([replace(seen(where), slopes=None, errors=None)], [None] * 3)
    assert np.abs(blind.mean[:, 1:] + 0.05).max() < 1e-3, "nothing but the prior's mean"


@pytest.mark.parametrize("factor", [4.0, 144.0])
@pytest.mark.parametrize("free", [False, True])
def test_the_scale_is_learnt_from_what_was_observed(factor, free):
    """Slopes 4 or 144 times too large: after ten large steps the factor is known to a fifth, in each capability."""
    volumes = random_shares(10) * (generator(1, "totals").uniform(0.5, 2, (10, 1)) if free else 1.0)
    kappa = scales([seen(v, scale=factor, free=free) for v in volumes])
    np.testing.assert_allclose(kappa, factor, rtol=0.2)


def test_before_any_change_the_scale_says_what_the_largest_slope_is_worth():
    where = np.array([0.4, 0.3, 0.2, 0.1])
    one, other = (scales([seen(where, scale=factor)]) for factor in (1.0, 1000.0))
    np.testing.assert_allclose(other, 1000 * one, rtol=1e-9)
    # Largest slopes of the rows by hand: a_j - p_j sum_k a_k, with sums -0.55, -0.5 and -0.25.
    largest = [0.5 - 0.4 * 0.55, 0.4 - 0.3 * 0.5, 0.3 - 0.2 * 0.25]
    np.testing.assert_allclose(one, np.median(largest) / 0.4, rtol=1e-6)


def test_without_influence_there_is_no_scale():
    zero = replace(seen(np.full(4, 0.25)), slopes=np.zeros((3, 4)))
    np.testing.assert_array_equal(scales([zero, zero]), 1.0)


def test_the_region_grows_shrinks_and_stays():
    assert next_radius(1.0, predicted=-0.2, observed=-0.15, noise=0.01) == GROWTH, "most of the fall was seen"
    assert next_radius(1.0, predicted=-0.2, observed=0.05, noise=0.01) == SHRINKAGE, "Q rose"
    assert next_radius(1.0, predicted=-0.2, observed=0.005, noise=0.01) == 1.0, "within the noise"
    assert next_radius(1.0, predicted=-0.2, observed=-0.05, noise=0.01) == 1.0, "a quarter of the fall"
    assert next_radius(LARGEST_RADIUS, -0.2, -0.3, 0.01) == LARGEST_RADIUS
    assert next_radius(LEAST_RADIUS, -0.2, 0.3, 0.01) == LEAST_RADIUS


def test_the_best_round_is_the_earliest_within_the_tie():
    assert best_round([1.0, 0.905, 0.9, 1.1], 0.01, [True] * 4) == 1
    assert best_round([1.0, 0.905, 0.9, 1.1], 0.0, [True] * 4) == 2


def test_the_region_is_a_box_above_the_floor():
    best = Observed(np.array([0.7, 0.28, 0.02]), 1.5, np.ones(1), None, None)
    region = region_around(best, np.log(2.0), 0.3)
    np.testing.assert_allclose(np.exp(region.lower), [0.35, 0.14, SMALLEST_SHARE, 1.5 / 1.3], rtol=1e-12)
    np.testing.assert_allclose(np.exp(region.upper), [1.0, 0.56, 0.04, 1.5 * 1.3], rtol=1e-12)
    poor = Observed(np.array([0.99, 0.01]), None, np.ones(1), None, None)
    assert np.exp(region_around(poor, 1.0, 0.3).lower[1]) == pytest.approx(0.01), "the start is never outside"


def certain(exponents: np.ndarray) -> Model:
    """A model that knows its exponents [R, K], all levels 0."""
    means = np.column_stack([np.zeros(len(exponents)), exponents])
    unknown = np.zeros((*means.shape, means.shape[1]))
    return Model(means, unknown, np.ones(len(means)), np.full(len(means), 0.05))


def test_the_lowest_point_by_hand():
    """p_1^-a with p_2^-b as two capabilities of weights u, v: at the optimum u a L_1 / p_1 = v b L_2 / p_2."""
    weights = np.array([0.25, 0.75])
    start = Observed(np.array([0.8, 0.2]), None, np.ones(2), None, None)
    model = certain(np.array([[-0.3, 0.0], [0.0, -0.5]]))
    point, _ = lowest_point(model, Goal(weights), start.features, region_around(start, 3.0, 0.1))
    shares, losses = np.exp(point), np.exp([-0.3 * point[0], -0.5 * point[1]])
    assert shares.sum() == pytest.approx(1, abs=1e-7)
    assert 0.25 * 0.3 * losses[0] / shares[0] == pytest.approx(0.75 * 0.5 * losses[1] / shares[1], rel=1e-4)
    near, _ = lowest_point(model, Goal(weights), start.features, region_around(start, 0.1, 0.1))
    assert np.exp(near[0]) == pytest.approx(1 - 0.2 * np.exp(0.1), rel=1e-6), "the box holds"


def test_what_is_uncertain_moves_less():
    """Two domains that promise the same: the one whose exponent is known worse gets less."""
    start = Observed(np.full(3, 1 / 3), None, np.ones(1), None, None)
    model = certain(np.array([[-0.3, -0.3, 0.0]]))
    point, _ = lowest_point(model, Goal(np.ones(1)), start.features, region_around(start, 1.5, 0.1))
    assert point[0] == pytest.approx(point[1], abs=1e-4)
    # log L is known where the run was: the level's error makes up for the exponent's there.
    error = 0.3 * np.array([-start.features[1], 0.0, 1.0, 0.0])
    model.covariance[0] = np.outer(error, error)
    point, _ = lowest_point(model, Goal(np.ones(1)), start.features, region_around(start, 1.5, 0.1))
    assert start.features[1] < point[1] < point[0] - 0.02


# The step


@dataclass
class Bed:
    """An emulated training bed: losses with a floor below the power law, noise, and influence with errors of its own.

    The surrogate's model does not hold exactly here, and the influence is `factor` times too large, and wrong by the
    same errors in every round.
    """

    seed: int
    factor: float = 40.0
    noise: float = 0.05
    floor: float = 0.1
    weights: np.ndarray = field(default_factory=lambda: np.full(3, 1 / 3))

    def __post_init__(self) -> None:
        self.draw = generator(self.seed, "bed")
        self.wrong = 0.1 * self.draw.normal(size=EXPONENTS.shape)

    def true(self, shares: np.ndarray) -> np.ndarray:
        return self.floor + losses_at(shares)

    def q(self, shares: np.ndarray) -> float:
        return float(self.weights @ self.true(shares))

    def round(self, number: int, ratios: np.ndarray, setup: Setup) -> RoundResult:
        volumes = ratios * setup.pool_tokens
        shares = volumes / volumes.sum()
        losses = self.true(shares) * np.exp(self.noise * self.draw.normal(size=3))
        slopes = slopes_at(shares) * (losses_at(shares) / self.true(shares))[:, None] + self.wrong
        slopes += 0.05 * self.draw.normal(size=slopes.shape) - 0.4 * shares  # more of all lowers all
        matrix = self.factor * slopes * losses[:, None]
        return RoundResult(number, setup.pool_sizes, ratios, shares, losses, self.weights, matrix, 0.02 * abs(matrix))

    def best(self) -> float:
        def q(logits: np.ndarray) -> float:
            shares = np.exp(logits - logits.max())
            return self.q(np.maximum(shares / shares.sum(), SMALLEST_SHARE))

        return float(minimize(q, np.zeros(4), method="Nelder-Mead", options={"maxiter": 4000}).fun)


SETUP = Setup(
    seed=0,
    domains=("a", "b", "c", "d"),
    capabilities=("a", "b", "c"),
    weights=np.full(3, 1 / 3),
    pool_sizes=np.full(4, 1000.0),
    pool_tokens=np.array([1e4, 2e4, 1e4, 3e4]),
    base_loss=None,
)
SKEWED = np.array([0.1, 0.05, 0.05, 0.3])


def play(
    bed: Bed,
    runs: int,
    setup: Setup = SETUP,
    ratios: np.ndarray = SKEWED,
    method: str = "ideal",
    **config: object,
) -> list[RoundResult]:
    mixer = MIXERS[method](MixingConfig(**{"budget": "fixed", **config}), setup)
    rounds: list[RoundResult] = []
    for number in range(runs):
        found = bed.round(number, ratios, setup)
        rounds.append(found if mixer.needs_influence else replace(found, influence=None))
        step = mixer.propose(rounds)
        assert step is not None and np.isfinite(step.ratios).all()
        ratios = step.ratios
    return rounds


def propose(rounds: list[RoundResult], setup: Setup = SETUP, **config: object) -> Step:
    mixer = MIXERS["ideal"](MixingConfig(**{"budget": "fixed", "step": "surrogate", **config}), setup)
    step = mixer.propose(rounds)
    assert step is not None
    return step


def regret(bed: Bed, rounds: list[RoundResult]) -> float:
    """Of the round that is best by the losses seen."""
    chosen = min(rounds, key=lambda found: float(bed.weights @ found.reference_loss))
    return bed.q(chosen.shares) - bed.best()


def test_three_runs_come_nearer_to_the_optimum_than_the_papers_three():
    """Twelve beds, paired, by more than 3 standard errors, whatever the paper's m; and nearer than its own start."""
    beds = range(12)
    learnt = np.array([regret(Bed(s), play(Bed(s), 3, step="surrogate")) for s in beds])
    for m in (0.15, 0.3, 0.6):
        paper = np.array([regret(Bed(s), play(Bed(s), 3, step="fixed", max_change=m)) for s in beds])
        gain = paper - learnt
        assert gain.mean() > 3 * gain.std(ddof=1) / len(beds) ** 0.5, m
        if m == 0.3:
            assert learnt.mean() < paper.mean() / 2
    start = np.array([regret(Bed(s), play(Bed(s), 1, step="surrogate")) for s in beds])
    assert learnt.mean() < start.mean() / 3


def test_without_influence_more_runs_do_what_fewer_do_with_it():
    """Twelve beds: power_law gains on its start in three runs, more in eight, and needs those for the surrogate's
    three."""
    beds = range(12)

    def mean(runs: int, method: str) -> float:
        return float(np.mean([regret(Bed(s), play(Bed(s), runs, method=method, step="surrogate")) for s in beds]))

    assert mean(8, "power_law") < mean(3, "power_law") < mean(1, "power_law")
    assert mean(3, "ideal") < mean(3, "power_law")


def test_power_law_keeps_the_total_and_says_what_it_predicts():
    rounds = play(Bed(2), 2, method="power_law", max_change=0.01)
    step = MIXERS["power_law"](MixingConfig(), SETUP).propose(rounds)
    assert step is not None and step.alpha is None
    assert step.ratios @ SETUP.pool_tokens == pytest.approx(rounds[0].ratios @ SETUP.pool_tokens, rel=1e-9)
    assert set(step.information["predicted"]["reference_loss"]) == set(SETUP.capabilities)
    assert step.information["scale"] == dict.fromkeys(SETUP.capabilities, 1.0)


def test_no_state_is_held():
    """A mixer made anew for every step proposes what one that lived through all rounds does."""
    rounds = play(Bed(1), 4, step="surrogate")
    again = [propose(rounds[: number + 1]) for number in range(4)]
    for step, following in zip(again, rounds[1:], strict=False):
        np.testing.assert_array_equal(step.ratios, following.ratios)


def test_a_fixed_total_stays_and_a_free_one_moves_by_m_at_most():
    rounds = play(Bed(2), 2, step="surrogate")
    before = rounds[0].ratios @ SETUP.pool_tokens
    assert propose(rounds).ratios @ SETUP.pool_tokens == pytest.approx(before, rel=1e-9)
    free = propose(rounds, budget="free", max_change=0.2)
    assert free.ratios @ SETUP.pool_tokens == pytest.approx(1.2 * before, rel=1e-6), "more of all lowers all losses"
    assert "total" in free.information["exponents"]["a"]


def test_the_volumes_own_effect_is_told_from_the_proportions():
    """Free volume, 12 exact rounds: b is the volume's, a the shares'."""
    totals = generator(1, "totals").uniform(0.5, 2, (12, 1))
    model = fit([seen(v, scale=20.0, free=True) for v in random_shares(12) * totals], [None] * 3)
    np.testing.assert_allclose(model.mean[:, -1], VOLUME_EXPONENTS, atol=0.03)
    np.testing.assert_allclose(model.mean[:, 1:-1], EXPONENTS, atol=0.06)


def test_a_domain_left_out_stays_out():
    ratios = np.array([0.1, 0.0, 0.05, 0.3])
    first = play(Bed(3), 1)[0]
    shares = ratios * SETUP.pool_tokens / (ratios @ SETUP.pool_tokens)
    matrix = np.where(ratios > 0, first.influence, 0.0)
    step = propose([replace(first, ratios=ratios, shares=shares, influence=matrix)])
    assert step.ratios[1] == 0 and (step.ratios[[0, 2, 3]] > 0).all() and np.isnan(step.beta[1])
    assert set(step.information["pull"]) == {"a", "c", "d"}


def test_a_capability_of_weight_0_moves_nothing():
    setup = replace(SETUP, weights=np.array([0.5, 0.5, 0.0]))
    rounds = [replace(r, weights=setup.weights) for r in play(Bed(4), 2, step="surrogate")]
    turned = [replace(r, influence=r.influence * np.array([[1.0], [1.0], [-3.0]])) for r in rounds]
    # Its slopes are in the common scale as all are, so that little may differ.
    np.testing.assert_allclose(propose(turned, setup).ratios, propose(rounds, setup).ratios, rtol=0.05)
    assert np.isfinite(list(propose(rounds, setup).information["predicted"]["reference_loss"].values())).all()


def test_capabilities_without_a_domain_and_domains_without_a_capability():
    """The names say which domain is a capability's own: a prior, never needed."""
    elsewhere = replace(SETUP, capabilities=("x", "y", "z"))
    rounds = play(Bed(5), 3, step="surrogate")
    for setup in (SETUP, elsewhere):
        step = propose(rounds, setup)
        assert bed_gain(Bed(5), step, rounds[0]) > 0.3


def bed_gain(bed: Bed, step: Step, first: RoundResult) -> float:
    """The part of the start's regret that a step takes away."""
    shares = step.ratios * SETUP.pool_tokens
    before, after, best = bed.q(first.shares), bed.q(shares / shares.sum()), bed.best()
    return (before - after) / (before - best)


def test_a_single_domain_has_nothing_to_choose():
    setup = replace(SETUP, domains=("a",), pool_sizes=np.ones(1), pool_tokens=np.array([1e4]))
    only = RoundResult(0, np.ones(1), np.ones(1), np.ones(1), np.ones(3), SETUP.weights, np.full((3, 1), -2.0))
    step = propose([only], setup)
    np.testing.assert_allclose(step.ratios, 1.0)
    assert "little is left" in step.information["advice"]


def test_what_the_step_says_of_itself():
    rounds = play(Bed(6), 3, step="surrogate")
    said = propose(rounds).information
    assert said["best_round"] in (1, 2)
    assert said["predicted"]["Q"] < said["predicted_at_best_round"]["Q"] == pytest.approx(
        np.mean(list(said["predicted_at_best_round"]["reference_loss"].values()))
    )
    assert said["expected_gain"] == pytest.approx(said["predicted_at_best_round"]["Q"] - said["predicted"]["Q"])
    assert 15 < np.median(list(said["scale"].values())) < 100, "the bed's is 40"
    assert said["radius"] != RADIUS, "two runs have been judged"
    assert said["advice"].startswith("another run is expected to lower Q by")


def test_an_unknown_error_of_an_entry_counts_as_the_entry():
    first = play(Bed(7), 1)[0]
    errors = np.where(np.eye(3, 4) > 0, np.nan, 0.0)
    found = observed([replace(first, influence_errors=errors)], SETUP, np.ones(4, dtype=bool), fixed=False)[0]
    expected = np.where(np.eye(3, 4) > 0, abs(first.influence) / first.reference_loss[:, None], 0.0)
    np.testing.assert_allclose(found.errors, expected)


def test_fixed_form_errors_of_independent_columns():
    """M_fixed = M F^T: each row's covariance is F diag(se^2) F^T."""
    first = play(Bed(8), 1)[0]
    found = observed([first], SETUP, np.ones(4, dtype=bool), fixed=True)[0]
    form = np.eye(4) - first.shares[:, None]
    for r in range(3):
        expected = np.sqrt(np.diag(form @ np.diag(first.influence_errors[r] ** 2) @ form.T)) / first.reference_loss[r]
        np.testing.assert_allclose(found.errors[r], expected, rtol=1e-12)
