"""Mixtures: sizes, nesting, even repeats, shares, fixed volume, for any pools and ratios."""

import json
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ideal.mixture import (
    Mixture,
    build_mixture,
    counts_of,
    mixture_of_sizes,
    round_half_up,
    row_order,
    size_for_tokens,
    training_rows,
)

tokens = st.lists(st.integers(1, 60), min_size=1, max_size=40).map(np.array)
pools = st.lists(tokens, min_size=2, max_size=5).map(lambda sets: {f"d{i}": t for i, t in enumerate(sets)})
ratio = st.floats(0, 4.5, allow_subnormal=False)
seeds = st.integers(0, 2**31)


def ratios_for(data: st.DataObject, trained: dict[str, np.ndarray]) -> np.ndarray:
    """[n] ratios, at least one of them positive."""
    several = st.lists(ratio, min_size=len(trained), max_size=len(trained))
    return np.array(data.draw(several.filter(lambda r: max(r) > 0.01)))


def check_repeats(mixture: Mixture) -> None:
    for domain in mixture.domains.values():
        assert domain.counts.max() - domain.counts.min() <= 1


@given(st.data(), pools, seeds)
def test_sizes_are_ratio_times_pool(data, trained, seed):
    ratios = ratios_for(data, trained)
    mixture = build_mixture(trained, ratios, seed=seed, round=0)
    for asked, (name, domain) in zip(ratios, mixture.domains.items(), strict=True):
        wanted = asked * len(trained[name])
        assert abs(domain.size - wanted) <= 0.5 or (domain.size == 1 and 0 < wanted < 0.5)
        assert (domain.size == 0) == (asked == 0), "a positive ratio keeps an example, zero keeps none"
        assert domain.size == domain.counts.sum() and domain.pool == len(trained[name])
        assert domain.trained_tokens == sum(
            int(count) * int(t) for count, t in zip(domain.counts, trained[name], strict=True)
        )
    check_repeats(mixture)


@given(st.data(), pools, seeds)
def test_shares_are_of_trained_tokens(data, trained, seed):
    mixture = build_mixture(trained, ratios_for(data, trained), seed=seed, round=0)
    assert abs(mixture.shares.sum() - 1) < 1e-12
    total = sum(d.trained_tokens for d in mixture.domains.values())
    assert mixture.total_tokens == total
    np.testing.assert_allclose(mixture.shares, [d.trained_tokens / total for d in mixture.domains.values()])


@given(tokens, st.tuples(ratio, ratio).map(sorted), seeds, st.integers(0, 9))
def test_a_larger_ratio_keeps_all_that_a_smaller_one_had(trained, two, seed, number):
    """Nested: an example is never given up while its domain grows, whatever the round."""
    small, large = (
        build_mixture({"a": trained, "b": trained}, np.array([r, 1.0]), seed=seed, round=i * number)
        for i, r in enumerate(two)
    )
    assert (small.domains["a"].counts <= large.domains["a"].counts).all()
    assert (small.domains["b"].counts == 1).all() and (large.domains["b"].counts == 1).all()


@given(st.data(), pools, seeds)
def test_rows_follow_from_seed_and_domain_alone(data, trained, seed):
    """The same rows again, whatever the other domains, their order, and the round."""
    ratios = ratios_for(data, trained)
    first = build_mixture(trained, ratios, seed=seed, round=0)
    again = build_mixture(dict(reversed(trained.items())), ratios[::-1], seed=seed, round=7)
    for name, domain in first.domains.items():
        assert (domain.counts == again.domains[name].counts).all()


def test_seeds_and_domains_draw_different_rows():
    drawn = [row_order(seed, name, 50).tolist() for seed in (0, 1) for name in ("math", "code")]
    assert len(set(map(tuple, drawn))) == 4
    assert all(sorted(order) == list(range(50)) for order in drawn)


def test_every_row_is_as_likely_as_any_other():
    counts = sum(counts_of(row_order(seed, "math", 10), 3) for seed in range(3000))
    assert counts.sum() == 9000
    # 900 +- 25 each.
    assert (abs(counts - 900) < 125).all()


@given(st.data(), pools, seeds, st.integers(1, 20000))
def test_fixed_volume_keeps_tokens_within_half_an_example_per_domain(data, trained, seed, total):
    ratios = ratios_for(data, trained)
    mixture = build_mixture(trained, ratios, seed=seed, round=1, total_tokens=total)
    wanted = ratios * np.array([t.sum() for t in trained.values()])
    wanted = total * wanted / wanted.sum()
    for target, asked, (name, domain) in zip(wanted, ratios, mixture.domains.items(), strict=True):
        within = abs(domain.trained_tokens - target) <= trained[name].max() / 2 + 1e-6
        assert within or (domain.size == 1 and asked > 0), "one example is kept at least"
        assert (domain.size == 0) == (asked == 0)
    check_repeats(mixture)


@given(tokens, st.floats(0, 3000), seeds)
def test_size_for_tokens_is_the_nearest(trained, target, seed):
    order = row_order(seed, "x", len(trained))
    size = size_for_tokens(order, trained, target)

    def reached(n: int) -> int:
        return int(counts_of(order, n) @ trained)

    assert abs(reached(size) - target) <= abs(reached(size + 1) - target) + 1e-6
    assert size == 0 or abs(reached(size) - target) <= abs(reached(size - 1) - target) + 1e-6


@given(st.data(), pools, seeds)
def test_mixture_json_leads_to_the_same_rows(data, trained, seed):
    ratios = ratios_for(data, trained)
    beta = np.linspace(-0.1, 0.1, len(trained))
    mixture = build_mixture(trained, ratios, seed=seed, round=3, beta=beta)
    content = json.loads(json.dumps(mixture.to_json()))
    assert content["round"] == 3 and content["total_tokens"] == mixture.total_tokens
    assert list(content["domains"]) == list(trained)
    for name, entry in content["domains"].items():
        assert set(entry) == {"pool", "size", "ratio", "share", "beta"}
        assert entry["ratio"] == entry["size"] / entry["pool"]
        assert entry["beta"] == mixture.beta[name]
    back = mixture_of_sizes(trained, content, seed=seed)
    assert back.to_json() == mixture.to_json()
    for name, domain in mixture.domains.items():
        assert (back.domains[name].counts == domain.counts).all()


def test_change_from_nothing_is_null():
    """JSON knows neither nan nor infinity; a domain that is left out has no rows, no tokens and no share."""
    trained = {"a": np.ones(30, dtype=int), "b": np.ones(30, dtype=int)}
    beta = np.array([0.5, np.nan])
    mixture = build_mixture(trained, np.array([1.5, 0.0]), seed=0, round=1, beta=beta, total_tokens=45)
    entries = mixture.to_json()["domains"]
    assert entries["a"] == {"pool": 30, "size": 45, "ratio": 1.5, "share": 1.0, "beta": 0.5}
    assert entries["b"] == {"pool": 30, "size": 0, "ratio": 0.0, "share": 0.0, "beta": None}
    assert mixture_of_sizes(trained, mixture.to_json(), seed=0).to_json() == mixture.to_json()


@given(st.data(), pools, seeds)
def test_ratios_of_a_mixture_json_give_the_same_sizes(data, trained, seed):
    """As --mixing.ratios FILE: size / pool must not lose an example to rounding."""
    mixture = build_mixture(trained, ratios_for(data, trained), seed=seed, round=0)
    again = build_mixture(trained, mixture.ratios, seed=seed, round=0)
    assert [d.size for d in again.domains.values()] == [d.size for d in mixture.domains.values()]


@settings(max_examples=50)
@given(st.data(), pools, seeds)
def test_training_rows_hold_each_example_as_often_as_counted(data, trained, seed):
    mixture = build_mixture(trained, ratios_for(data, trained), seed=seed, round=2)
    for epoch in range(2):
        rows = Counter(training_rows(mixture, seed, epoch))
        expected = {
            (name, row): int(count)
            for name, domain in mixture.domains.items()
            for row, count in enumerate(domain.counts)
            if count
        }
        assert rows == expected


def test_order_depends_on_seed_round_and_epoch():
    trained = {"a": np.ones(30, dtype=int), "b": np.ones(30, dtype=int)}

    def order(seed: int, number: int, epoch: int) -> list[tuple[str, int]]:
        return training_rows(build_mixture(trained, np.ones(2), seed=0, round=number), seed, epoch)

    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1)]
    assert len({tuple(o) for o in orders}) == 4
    assert order(0, 0, 0) == orders[0]
    halves = [name for name, _ in orders[0]]
    assert 5 < halves[:30].count("a") < 25, "domains are shuffled together"


def test_halves_round_up():
    assert [round_half_up(v) for v in (0.5, 1.5, 2.5, 2.4999, 3.0)] == [1, 2, 3, 2, 3]


def test_sizes_keep_to_limits_and_the_others_make_up_for_it():
    """Half of b's tokens are in 1 or in 9 of its rows; it is to have 5, and a's even rows make up for the tokens."""
    trained = {"a": np.full(40, 5), "b": np.concatenate([np.full(9, 2), [82]])}
    free = build_mixture(trained, np.array([0.5, 0.5]), seed=3, round=1, total_tokens=150)
    assert free.domains["b"].size != 5, "the case must be one that needs the limit"
    bounds = np.array([0.0, 5.0]), np.array([np.inf, 5.0])
    held = build_mixture(trained, np.array([0.5, 0.5]), seed=3, round=1, total_tokens=150, sizes=bounds)
    assert held.domains["b"].size == 5 and abs(held.total_tokens - 150) <= 2.5
    few = np.zeros(2), np.array([np.inf, 3.0])
    assert build_mixture(trained, np.array([0.5, 0.5]), seed=3, round=1, sizes=few).domains["b"].size == 3
