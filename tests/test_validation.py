"""The validation's numbers on hand-made cases, SOURCE against explicit unrolling, and its page from made-up runs."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests" / "influence")]

import validate_numbers as numbers  # noqa: E402
from tiny import World, make_world  # noqa: E402
from validate_content import Stored, content_of  # noqa: E402
from validate_estimates import DAMPINGS, FAMILIES, Mixed, Trail, family_matrices, family_of, label  # noqa: E402
from validate_influence import write_again, write_page  # noqa: E402
from validate_page import markdown, rendered, steps_in_words  # noqa: E402
from validate_runs import QUICK, Passes, Size  # noqa: E402
from validate_search import whole_runs  # noqa: E402
from validate_source import (  # noqa: E402
    Segment,
    clipped_rates,
    decay,
    effective_factor,
    response,
    source_products,
)

from ideal.errors import UserError  # noqa: E402
from ideal.influence import compute_influence  # noqa: E402
from ideal.influence.ekfac import Curvature  # noqa: E402

# The oracle


def test_a_changes_beta_is_what_rounding_left_of_it() -> None:
    assert numbers.relative_change([13, 10, 10], [10, 10, 10], 0) == pytest.approx(0.3)
    # With a fixed volume the others shrink: 13 : 20 as proportions of 30.
    assert numbers.relative_change(np.array([13, 10, 10]) * 30 / 33, [10, 10, 10], 0) == pytest.approx(0.3)


def test_central_differences_are_exact_for_a_quadratic_about_the_centre() -> None:
    def loss(beta: float) -> np.ndarray:
        return np.array([1 - 2 * beta + 5 * beta**2, 3 * beta])

    assert numbers.central_difference(loss(0.3), loss(-0.3), 0.3, -0.3) == pytest.approx([-2, 3])
    assert numbers.central_difference([1.2], [0.7], 0.3, -0.2) == pytest.approx([1.0])


def test_summaries_and_t_values() -> None:
    found = numbers.summary([[1.0, 4.0], [3.0, 4.0]])
    assert found.mean == pytest.approx([2, 4])
    assert found.error == pytest.approx([1, 0])
    assert found.t[0] == pytest.approx(2) and math.isnan(found.t[1])
    assert np.isnan(numbers.summary([[1.0]]).error).all()


def test_each_seed_is_left_out_of_its_own_target() -> None:
    assert numbers.others_mean([[1.0], [2.0], [6.0]]) == pytest.approx(np.array([[4.0], [3.5], [1.5]]))


def test_split_half_takes_each_way_to_halve_once() -> None:
    signal = np.array([1.0, 2.0, 4.0])
    assert numbers.split_half([signal, 2 * signal, 3 * signal, signal]) == pytest.approx(1)
    pairs: list[Any] = []

    def noted(left: np.ndarray, right: np.ndarray) -> float:
        pairs.append((left.tolist(), right.tolist()))
        return float(len(pairs))

    values = np.array([[1.0], [2.0], [4.0], [8.0]])
    assert numbers.split_half(values, noted) == pytest.approx(2)
    assert pairs == [([1.5], [6.0]), ([2.5], [5.0]), ([4.5], [3.0])]
    assert math.isnan(numbers.split_half([signal]))


def test_the_ceiling_is_the_root_of_the_whole_reliability() -> None:
    assert numbers.ceiling(0.5) == pytest.approx(math.sqrt(2 / 3))
    assert math.isnan(numbers.ceiling(-0.2))


# Correlations


def test_correlations() -> None:
    left, right = np.array([1.0, 2.0, 3.0, 7.0]), np.array([2.0, 1.0, 5.0, 6.0])
    assert numbers.pearson(left, right) == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert numbers.pearson(1e-12 * left, 1e-15 * right) == pytest.approx(np.corrcoef(left, right)[0, 1])
    assert numbers.spearman(left, right) == pytest.approx(0.8)
    assert numbers.spearman([1, 1, 2], [3, 3, 9]) == pytest.approx(1)
    assert math.isnan(numbers.pearson([0.3, 0.3, 0.3], left[:3]))
    assert numbers.row_wise([[1, 2], [1, 2]], [[1, 3], [3, 1]]) == pytest.approx(0)
    assert numbers.size_ratio([4.0, 8.0], [1.0, 2.0]) == pytest.approx(4)


def test_agreement_tells_own_effects_from_others() -> None:
    measured = np.array([[-3.0, -1.0], [-2.0, -4.0], [-1.0, 0.0]])
    off = numbers.off_diagonal(["math", "code", "both"], ["math", "code"])
    assert off.tolist() == [[False, True], [True, False], [True, True]]
    own_alone = np.where(off, 0.0, 10 * measured)
    found = numbers.agreement(own_alone, measured, np.ones(3) / 3, off)
    assert math.isnan(found["off_diagonal"]) and math.isnan(found["off_diagonal_spearman"])
    found = numbers.agreement(10 * measured, measured, np.ones(3) / 3, off)
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | {"size": 10.0})


def test_baselines_give_their_vector_and_no_fixed_effect_of_growing_all_alike() -> None:
    shares, losses, own = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0]), np.array([1.0, 2.0, 4.0])
    found = numbers.baselines(shares, losses, own)
    weights = np.array([0.25, 0.75])
    for name, expected in {"share x loss": shares * own, "loss": own, "1 / share": 1 / shares}.items():
        assert numbers.pearson(weights @ found[name], -expected) == pytest.approx(1)
    assert math.isnan(numbers.pearson(weights @ found["constant"], own))
    fixed = numbers.in_form(found["constant"], shares, "fixed")
    assert fixed.sum(axis=1) == pytest.approx([0, 0])
    assert numbers.pearson(weights @ fixed, shares) == pytest.approx(1)


def test_the_choice_is_by_the_worst_setting() -> None:
    table = {
        "one": {"a": np.array([0.9, 1.0]), "b": np.array([0.2, 0.3])},
        "two": {"a": np.array([0.7, 0.7]), "b": np.array([0.5, 0.7])},
        "undefined": {"a": np.array([1.0, 1.0]), "b": np.array([1.0, math.nan])},
    }
    assert numbers.chosen(table) == "two"
    assert numbers.worst_mean(table["undefined"]) == pytest.approx(0)
    assert numbers.best_baseline({"x": np.array([math.nan, math.nan]), "y": np.array([0.1, -0.1])}) == "y"


# SOURCE


def test_source_is_what_gradient_descent_on_a_quadratic_does() -> None:
    """d L_r / d beta_j after two segments, each of its own curvature, rate and domain gradients; one layer of 3 x 2.

    Domain losses are linear, L_j = <c_j, theta>, and a quadratic that no beta touches gives the curvature. Descent is
    linear in beta, so a difference over any step is the derivative.
    """
    random = np.random.default_rng(0)
    shares, n = np.array([0.7, 0.3]), 2
    references = torch.tensor(random.standard_normal((2, 3, 2)))
    phases = []
    for rate, steps in ((0.5e-3, 2000), (1e-3, 1500)):
        bases = [torch.tensor(np.linalg.qr(random.standard_normal((k, k)))[0]) for k in (3, 2)]
        eigenvalues = torch.tensor(random.uniform(0, 3, (3, 2)))
        eigenvalues[0, 0] = 0.0
        gradients = torch.tensor(random.standard_normal((n, 3, 2)))
        phases.append((rate, steps, Segment(Curvature(*bases, None), eigenvalues, rate * steps, gradients)))

    def losses(beta: np.ndarray) -> np.ndarray:
        theta = torch.zeros(3, 2, dtype=torch.float64)
        for rate, steps, segment in phases:
            pull = torch.einsum("n,noi->oi", torch.tensor(shares * (1 + beta)), segment.gradients_nOI)
            for _ in range(steps):
                bent = segment.curvature.rotate_back(segment.eigenvalues_OI * segment.curvature.rotate(theta))
                theta = theta - rate * (bent + pull)
        return torch.einsum("roi,oi->r", references, theta).numpy()

    expected = np.array([losses(np.eye(n)[j]) - losses(np.zeros(n)) for j in range(n)]).T
    found = -shares * source_products(references, [segment for _, _, segment in phases]).numpy()
    assert found == pytest.approx(expected, rel=2e-3)
    assert found[0, 0] != pytest.approx(expected[0, 1], rel=0.1)


def test_sources_functions_at_their_ends() -> None:
    eigenvalues = torch.tensor([0.0, 1e-14, 2.0, 1e6], dtype=torch.float64)
    assert response(eigenvalues, 3.0).tolist() == pytest.approx([3, 3, -math.expm1(-6) / 2, 1e-6])
    assert decay(eigenvalues, 3.0).tolist() == pytest.approx([1, 1, math.exp(-6), 0])


def test_adams_factor() -> None:
    moments = torch.tensor([[0.04, 0.01]]) * (1 - 0.9**3)  # 0.04 and 0.01 once corrected
    assert effective_factor(moments, 3, 0.9, 0.0, "mean") == pytest.approx(7.5)
    assert effective_factor(moments, 3, 0.9, 0.0, "energy") == pytest.approx(6)
    rates, norms = {1: 1.0, 2: 1.0, 3: 0.5, 4: 9.0}, {1: 9.0, 2: 4.0, 3: 0.5, 4: 1.0}
    assert clipped_rates(rates, norms, 1.0, 1, 3) == pytest.approx(0.25 + 0.5)
    assert clipped_rates(rates, norms, 0.0, 1, 3) == pytest.approx(1.5)


def test_a_segments_checkpoint_is_the_one_nearest_its_middle() -> None:
    trail = Trail({}, {}, 1.0, 8, {step: Path(str(step)) for step in (1, 2, 3, 4, 5, 6, 7, 8)})
    assert trail.bounds(4) == [(0, 2, 1), (2, 4, 3), (4, 6, 5), (6, 8, 7)]
    assert replace(trail, checkpoints={8: Path()}).bounds(2) == [(0, 4, 8), (4, 8, 8)]


# The estimators are the engine's


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_re_damped_matrices_are_the_engines(world: World, family: str) -> None:
    config, mixed = FAMILIES[family], Mixed(world.domains, world.references, 0)
    dampings = DAMPINGS[3:5]
    found = family_matrices(world.model, mixed, config, dampings)
    for damping in dampings:
        settings = replace(config, damping=damping)
        engine = compute_influence(world.model, world.domains, world.references, settings, 0)
        np.testing.assert_allclose(found[damping], engine.matrix, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(mixed.shares, engine.shares)


def test_names_of_estimators() -> None:
    for family in FAMILIES:
        assert family_of(label(family, 1e-4)) == family_of(label(family, 10.0)) == family_of(family) == family


# The page


DOMAINS, CAPABILITIES = ["math", "code", "safety"], ["math", "code", "safety", "both"]
TRUE = np.array([[-0.6, -0.1, 0.1], [-0.2, -0.9, 0.0], [0.1, 0.2, -0.3], [-0.3, -0.3, 0.2]])
SMALL = replace(QUICK, passes={"few passes": Passes(1.0, 1)}, seeds=(0, 1, 2))


def made_up(size: Size) -> Stored:
    """Runs whose losses follow TRUE, and two estimators: one that knows it, and one that knows nothing."""
    random = np.random.default_rng(1)
    oracle: dict[str, Any] = {}
    centres: dict[str, Any] = {}

    def row(tokens: np.ndarray, change: np.ndarray) -> dict[str, Any]:
        losses = dict(zip(CAPABILITIES, (2 + change + 0.005 * random.standard_normal(4)).tolist(), strict=True))
        shares = dict(zip(DOMAINS, (tokens / tokens.sum()).tolist(), strict=True))
        return {"shares": shares, "total_tokens": float(tokens.sum()), "reference_loss": losses, "test_loss": losses,
                "Q": float(np.mean(list(losses.values()))), "steps": 12,
                "solver": {"joint 1": {"residuals": [[0.5, 0.3], [0.2, 0.4]]}}}  # fmt: skip

    for setting in size.settings:
        for seed in size.every_seed:
            centres[setting.centre_key(seed)] = row(np.full(3, 50.0), np.zeros(4)) | {
                "estimates": {"oracle 0.1": (9 * TRUE).tolist(), "EK-FAC 0.1": random.standard_normal((4, 3)).tolist()}
            }
            for number, domain in enumerate(DOMAINS):
                for sign in (1, -1):
                    beta = 0.3 * sign * np.eye(3)[number]
                    moved = TRUE @ (beta if setting.volume == "free" else beta - beta.sum() / 3)
                    oracle[setting.key(domain, sign, seed)] = row(50 * (1 + beta), moved)
    return Stored(oracle, centres, DOMAINS, CAPABILITIES, np.ones(4) / 4)


def test_the_content_and_the_page_say_what_the_runs_say() -> None:
    stored = made_up(SMALL)
    content = content_of(stored, SMALL)
    assert content["choice"]["estimator"] == "oracle 0.1" and content["unfinished"] == []
    free = content["settings"]["skewed start, few passes, free volume"]
    assert np.array(free["oracle"]["matrix"]) == pytest.approx(TRUE, abs=0.05)
    assert free["estimators"]["oracle 0.1"]["off_diagonal"]["mean"] > 0.9
    assert free["estimators"]["oracle 0.1"]["size"]["mean"] == pytest.approx(9, rel=0.2)
    learnt = "surrogate with EK-FAC 0.1"
    assert learnt in free["estimators"], "shown,"
    assert learnt not in {row["estimator"] for row in content["choice"]["table"]}, "and no estimator to choose"
    assert free["residuals"] == pytest.approx({"joint 1": 0.4})
    assert free["verdict"]["mean"] and free["verdict"]["off_diagonal"]
    assert free["baselines"]["constant"]["vector"]["mean"] is None
    page = markdown({**content, "setup": ""}, "figures/validation.svg", {})
    assert "{" not in page.replace("{math", "") and "**oracle 0.1**" in page
    assert rendered(content).startswith(b"<?xml")


def test_a_page_is_written_again_from_its_numbers(tmp_path: Path) -> None:
    """The runs are not needed for it, and the search benchmarks' may have changed."""
    page = tmp_path / "validation.md"
    with pytest.raises(UserError, match=r"validation\.json is not there"):
        write_again(page)
    write_page(page, made_up(SMALL), SMALL)
    files = page, tmp_path / "figures" / "validation.svg"
    first = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    write_again(page)
    assert [file.read_bytes() for file in files] == first


def test_a_page_says_where_training_is_so_short_that_steps_count() -> None:
    content = content_of(made_up(SMALL), SMALL)
    assert steps_in_words(content) == "", "all runs there have as many"
    name = next(name for name, setting in content["settings"].items() if setting["volume"] == "fixed")
    content["settings"][name]["oracle_steps"] = [9, 10]
    assert "the inner loops took 9 to 10 optimizer steps" in steps_in_words(content)
    content["settings"][name]["oracle_steps"] = [240, 262]
    assert steps_in_words(content) == ""


def test_unfinished_seeds_are_left_out_and_said() -> None:
    stored = made_up(SMALL)
    setting = SMALL.settings[0]
    lost = dict(stored.oracle)
    del lost[setting.key("math", 1, 2)]
    content = content_of(replace(stored, oracle=lost), SMALL)
    assert content["unfinished"] == [setting.name]
    assert content["settings"][setting.name]["seeds"] == [0, 1]


def test_how_many_inner_loops_it_takes() -> None:
    assert Size().loops(5) == (2 * 5 * 8 * 11, 4 * 11)


def test_the_page_says_whether_whole_runs_reach_what_was_aimed_at() -> None:
    def row(regret: float, against: float | None = None) -> dict[str, float | None]:
        return {"regret": regret, "regret_error": 0.001, "against_rule": against, "against_rule_error": 0.001}

    at = {"ideal, surrogate": row(0.010, -0.003), "ideal, m = 0.15": row(0.019, 0.006), "loss": row(0.013)}
    later = {"ideal, surrogate": row(0.008, -0.0015), "ideal, m = 0.15": row(0.012, 0.0025), "loss": row(0.0095)}
    budgets = {b: {"rule": "loss", "rows": rows} for b, rows in (("3", at), ("5", later), ("8", later))}
    start = {"budgets": {"loops": budgets}, "curves": dict.fromkeys(at)}
    content = {
        "weights": {"math": 0.2, "code": 0.8}, "sweep": {"mixtures": 100, "q": 0.2},
        "starts": {"uniform": start, "loss": start},
    }  # fmt: skip
    found = whole_runs({"search_code.md": content})
    cells = "| 0.010 | **no** (0.019) | yes (0.012) | yes (loss: -0.003 ± 0.001) | **no** (loss: -0.002 ± 0.001) |"
    assert f"| code x 4, uniform start {cells}" in found and f"loss start {cells}" in found
    without = whole_runs({"search_math.md": {**content, "weights": {"math": 0.0, "code": 0.5, "safety": 0.5}}})
    assert "| math x 0, uniform start |" in without and "weighed: math 0, code 1, safety 1." in without
    assert "| **ideal, surrogate** | 0.010 ± 0.001 | 0.008 ± 0.001 | 0.008 ± 0.001 |" in found


def test_the_surrogates_first_step_takes_the_influences_proportions() -> None:
    """Whatever its size, since that is unknown before anything was retrained; and of a power law's own derivatives
    it makes something near them, drawn towards its prior."""
    shares, losses = np.array([0.5, 0.3, 0.2]), np.array([0.4, 1.5])
    exponents = np.array([[-0.3, 0.1, 0.0], [0.0, -0.2, -0.1]])
    true = losses[:, None] * (exponents - exponents.sum(axis=1, keepdims=True) * shares)
    found = numbers.first_step(70 * true, shares, losses, [0, None], "fixed")
    assert numbers.first_step(7 * true, shares, losses, [0, None], "fixed") == pytest.approx(found)
    assert found.sum(axis=1) == pytest.approx(0, abs=1e-12), "more of everything changes no share"
    assert numbers.pearson(found.ravel(), true.ravel()) > 0.95
    free = numbers.first_step(70 * (true + losses[:, None] * shares * -0.2), shares, losses, [0, None], "free")
    assert (free.sum(axis=1) < 0).all(), "more volume helps"
