"""influence.json's content against one big covariance of all entries of M, and in the state of knowing nothing."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ideal.config import Config
from ideal.influence import Influence
from ideal.rounds.influencing import influence_json

CAPABILITIES, DOMAINS = ["a", "b"], ["x", "y", "z"]
WEIGHTS, SHARES = np.array([0.7, 0.3]), np.array([0.5, 0.3, 0.2])
SOURCES = ("training", "reference")


def found(known: bool = True) -> Influence:
    rng = np.random.default_rng(0)
    matrix, columns, rows = rng.normal(size=(2, 3)), rng.normal(size=(3, 2, 4)), rng.normal(size=(2, 3, 4))
    return Influence(
        domains=DOMAINS,
        capabilities=CAPABILITIES,
        matrix=matrix,
        training_covariance=0.01 * columns @ columns.mT if known else np.full((3, 2, 2), np.nan),
        reference_covariance=0.01 * rows @ rows.mT if known else np.full((2, 3, 3), np.nan),
        shares=SHARES,
        layers={"down": matrix},
        dropped_layers=["up"],
        first_position_share={"down": float("nan")},
        sequences=dict.fromkeys(DOMAINS, 400),
        factor_sequences=dict.fromkeys(DOMAINS, 40),
        sketch_fraction=0.25,
        eigenvalue_sequences=dict.fromkeys(DOMAINS, 90),
        tokens=dict.fromkeys(DOMAINS, 5000),
        reference_sequences=dict.fromkeys(CAPABILITIES, 64),
        reference_tokens=dict.fromkeys(CAPABILITIES, 700),
        solver={},
        seconds={"matrix": 0.1},
    )


def content(influence: Influence, budget: str = "free", fraction: float | str = 0.5) -> dict:
    """Through JSON, which refuses NaN."""
    config = Config()
    config.mixing.budget = budget  # type: ignore[assignment]
    config.influence.sample_fraction = fraction  # type: ignore[assignment]
    run = SimpleNamespace(config=config)
    return json.loads(json.dumps(influence_json(run, influence, WEIGHTS), allow_nan=False))  # type: ignore[arg-type]


def entries_covariance(influence: Influence, source: str) -> np.ndarray:
    """[6, 6] of M's entries, row by row."""
    whole = np.zeros((2, 3, 2, 3))
    for j in range(3):
        for r in range(2):
            if source == "training":
                whole[:, j, :, j] = influence.training_covariance[j]
            else:
                whole[r, :, r, :] = influence.reference_covariance[r]
    return whole.reshape(6, 6)


@pytest.mark.parametrize("budget", ["free", "fixed"])
def test_numbers_and_their_errors(budget):
    influence = found()
    got = content(influence, budget)
    centring = np.eye(3) - np.outer(SHARES, np.ones(3))
    # Each as a linear map of M's entries.
    maps = {
        "matrix": np.eye(6),
        "matrix_fixed": np.kron(np.eye(2), centring),
        "objective_free": np.kron(WEIGHTS, np.eye(3)),
        "objective_fixed": np.kron(WEIGHTS, centring),
    }
    maps["alpha"] = maps[f"objective_{budget}"]
    assert list(got["standard_errors"]) == list(maps)
    for name, linear in maps.items():
        np.testing.assert_allclose(np.ravel(got[name]), linear @ influence.matrix.ravel(), rtol=1e-12)
        for source in SOURCES:
            variance = np.diag(linear @ entries_covariance(influence, source) @ linear.T)
            np.testing.assert_allclose(
                np.ravel(got["standard_errors"][name][source]), np.sqrt(variance), rtol=1e-10, atol=1e-12
            )
    both = np.hypot(*(got["standard_errors"]["alpha"][source] for source in SOURCES))
    assert got["uncertain"] == [abs(alpha) <= 1.96 * error for alpha, error in zip(got["alpha"], both, strict=True)]
    assert {True, False} == set(content(influence, "free")["uncertain"])
    assert got["budget"] == budget and got["damping"] == 0.1 and got["seconds"] == {"matrix": 0.1}


def test_nothing_is_said_of_signs_without_errors():
    got = content(found(known=False))
    assert got["uncertain"] == [None] * 3
    assert got["standard_errors"]["alpha"] == {source: [None] * 3 for source in SOURCES}
    assert got["first_position_share"] == {"down": None} and np.isfinite(got["alpha"]).all()


def test_how_many_sequences_were_used():
    sums = " (their positions added up to 25% as many sums)"
    said = "1,200 sequences of the mixture for the gradients, 120 for the covariances{}, 270 for the eigenvalues"
    assert content(found())["sampling"] == said.format(sums)
    assert content(replace(found(), sketch_fraction=1.0))["sampling"] == said.format("")
    assert "until alpha's direction was known to 10%" in content(found(), fraction="auto")["sampling"]
