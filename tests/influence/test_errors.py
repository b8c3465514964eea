"""The engine's standard errors against what they claim: how far a subsample's matrix is from that of all data.

Real engine, trained model. A domain has 300 sequences, many repeated in the mixture, in three disjoint subsamples of
100, again and again in another order. A capability is a source of 8000 rows in 200 disjoint reference sets of 40.

The errors take the factors as known, so the first two tests keep them the same throughout. The last one lets every
subsample estimate its own, from all its sequences or as by default: the intervals still hold. With bases and
eigenvalues of the same third of the sequences (32 of 100) they did not: the matrix was 10% larger as a whole, entries
were covered 59 to 97 times in 100, and centred alpha 91 to 92 times. (They fit these sequences too well, and other
gradients too badly.) That is the part which the errors leave out.
"""

from dataclasses import replace

import numpy as np
import pytest
from tiny import Rows, toy_rows

from ideal.influence import DomainSample, InfluenceConfig, compute_influence, engine, fixed_form, objective, selection
from ideal.influence.matrix import NORMAL_95, matrix_errors, objective_errors
from ideal.influence.samples import SequenceSet

DOMAINS, CAPABILITIES = ("up", "down", "noise"), ("up", "down", "either")
WEIGHTS = np.array([0.5, 0.3, 0.2])
POOL, SIZE = 300, 100
REFERENCE_ROWS, SETS = 40, 200
FACTOR_ROWS = 32
FORMS = ("M", "M fixed", "alpha", "alpha fixed")


@pytest.fixture(scope="module")
def mixture():
    """Per domain, all its rows; each stands in the mixture once, twice or three times."""
    counts = 1 + np.arange(POOL) % 3
    return {kind: DomainSample(toy_rows(kind, POOL, 77), counts) for kind in DOMAINS}


def subset(name, domain, rows):
    """Those rows as a sample of all the domain's, drawn without replacement."""
    total = float(domain.counts @ domain.examples.trained_tokens)
    repeats = domain.counts[rows].astype(float)
    return SequenceSet(name, domain.examples, rows, repeats, total, len(domain.counts), np.arange(len(rows)))


@pytest.fixture
def estimate(world, mixture, monkeypatch):
    """The engine on rows that the test chooses: per domain, which; None: all."""
    chosen = {}
    monkeypatch.setattr(engine, "draw_domain", lambda name, *_: chosen[name])

    def run(rows, references, factors="ekfac", factor_fraction=1.0):
        for kind, domain in mixture.items():
            chosen[kind] = subset(kind, domain, np.arange(POOL) if rows is None else rows[kind])
        # No kept pairs: a slot of the factors below is another sequence than the same slot of the gradients.
        config = InfluenceConfig(
            factors=factors, factor_fraction=factor_fraction, error_sequences=SIZE, batch_size=SIZE, pair_budget=0
        )
        return compute_influence(world.model, mixture, references, config, seed=0)

    return run


@pytest.fixture
def estimate_with_known_factors(estimate, mixture, monkeypatch):
    """The same with factors that are always those of the same sequences, the first of each domain.

    K-FAC, since EK-FAC's factors and gradients come from one pass: they could not be of different sequences.
    """
    factors = [subset(kind, domain, np.arange(FACTOR_ROWS)).rescaled() for kind, domain in mixture.items()]
    monkeypatch.setattr(selection, "factor_parts", lambda *_: factors)
    return lambda rows, references: estimate(rows, references, factors="kfac")


def disjoint(orders):
    """Per draw, the rows of every domain: random orders of them, each cut into disjoint parts."""
    rng = np.random.default_rng(0)
    for _ in range(orders):
        shuffled = {kind: rng.permutation(POOL) for kind in DOMAINS}
        for start in range(0, POOL, SIZE):
            yield {kind: rows[start : start + SIZE] for kind, rows in shuffled.items()}


def values_of(found):
    """Per form, the estimates."""
    alpha = objective(found.matrix, WEIGHTS)
    forms = found.matrix, fixed_form(found.matrix, found.shares), alpha, fixed_form(alpha, found.shares)
    return dict(zip(FORMS, forms, strict=True))


def errors_of(found):
    """Per form, their errors."""
    covariances = found.training_covariance, found.reference_covariance
    errors = (
        matrix_errors(*covariances),
        matrix_errors(*covariances, found.shares),
        objective_errors(*covariances, WEIGHTS),
        objective_errors(*covariances, WEIGHTS, found.shares),
    )
    return dict(zip(FORMS, errors, strict=True))


def intervals(draws, truth, column):
    """Per form, how often the 95% intervals of every number cover the truth, and their width over the true one.

    Args:
        draws: what the engine found on every subsample.
        truth: what it finds on all data.
        column: "training" or "reference".
    """
    found = {}
    for form, expected in values_of(truth).items():
        values = np.array([values_of(draw)[form] for draw in draws])
        errors = np.array([getattr(errors_of(draw)[form], column) for draw in draws])
        covered = np.mean(np.abs(values - expected) <= NORMAL_95 * errors, axis=0)
        found[form] = covered, errors.mean(axis=0) / np.sqrt(np.mean((values - expected) ** 2, axis=0))
    return found


def check(draws, truth, column):
    """Coverage of 90 to 98 in 100, widths within 25%; for one number, two standard errors of its coverage more."""
    for form, (covered, width) in intervals(draws, truth, column).items():
        assert 0.90 <= covered.mean() <= 0.98, (form, covered)
        more = 2 * np.sqrt(np.array([0.90 * 0.10, 0.98 * 0.02]) / len(draws))
        assert covered.min() >= 0.90 - more[0] and covered.max() <= 0.98 + more[1], (form, covered)
        assert np.abs(width - 1).max() < 0.25 and abs(width.mean() - 1) < 0.1, (form, width)


def test_training_errors(estimate_with_known_factors):
    """120 subsamples: a spread is known to 6%. A third of each domain, so that the finite population counts."""
    references = {kind: toy_rows(kind, 9, 1077) for kind in CAPABILITIES}
    truth = estimate_with_known_factors(None, references)
    assert np.abs(truth.training_covariance).max() == 0
    draws = [estimate_with_known_factors(rows, references) for rows in disjoint(40)]
    check(draws, truth, "training")


def test_reference_errors(estimate):
    """200 reference sets: a spread is known to 5%. All sets are capabilities of one matrix."""
    rows = {kind: toy_rows(kind, SETS * REFERENCE_ROWS, 1077) for kind in CAPABILITIES}
    sets = {
        (kind, number): Rows(rows[kind].rows[number * REFERENCE_ROWS : (number + 1) * REFERENCE_ROWS])
        for number in range(SETS)
        for kind in CAPABILITIES
    }
    found = estimate(None, {f"{kind} {number}": rows for (kind, number), rows in sets.items()})
    draws = [three(found, start) for start in range(0, len(sets), len(CAPABILITIES))]
    # A mean gradient per token is the sets' means by their tokens, and M is linear in it.
    tokens = np.reshape([rows.trained_tokens.sum() for rows in sets.values()], (SETS, len(CAPABILITIES)))
    matrix = np.einsum("dr,drj->rj", tokens / tokens.sum(axis=0), [draw.matrix for draw in draws])
    check(draws, replace(draws[0], matrix=matrix), "reference")


def three(found, start):
    """The matrix of three of the capabilities alone."""
    rows = slice(start, start + len(CAPABILITIES))
    return replace(
        found,
        matrix=found.matrix[rows],
        training_covariance=found.training_covariance[:, rows, rows],
        reference_covariance=found.reference_covariance[rows],
    )


@pytest.mark.parametrize("factor_fraction", [1.0, None])
def test_factors_of_the_subsample_itself(estimate, factor_fraction):
    """45 subsamples, each with its own factors, of all positions or as by default: 90 to 98 in 100, within 25%.

    Of one number the coverage is known to 4.5 in 100. With all positions errors are a little wide, since a gradient
    that is large by chance meets a curvature that is, too. By default bases come from a quarter as many sums, and
    eigenvalues from 32 of 100 sequences; what that adds is too little to be seen here.
    """
    references = {kind: toy_rows(kind, 40, 1077) for kind in CAPABILITIES}
    truth = estimate(None, references)
    draws = [estimate(rows, references, factor_fraction=factor_fraction) for rows in disjoint(15)]
    eigenvalues, sums = (32, 0.25) if factor_fraction is None else (SIZE, 1.0)
    assert set(draws[0].eigenvalue_sequences.values()) == {eigenvalues} and draws[0].sketch_fraction == sums
    for form, (covered, width) in intervals(draws, truth, "training").items():
        print(f"{form}: covered {covered.mean():.3f}, widths {width.min():.2f} to {width.max():.2f}")
        assert 0.90 <= covered.mean() <= 0.98 and covered.min() >= 0.90 - 2 * 0.045, (form, covered)
        assert np.abs(width - 1).max() < 0.25, (form, width)
