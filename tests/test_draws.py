"""Rows drawn step by step: how many of each domain, which ones, and what they add up to."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideal.draws import Draws, allot, token_shares
from ideal.mixture import counts_of, row_order

TOKENS = {"short": np.array([1, 2, 1, 2, 3, 3]), "long": np.array([30, 50, 40])}


def test_allot_by_hand():
    """10 rows of (0.55, 0.25, 0.2): 5.5, 2.5, 2; one of the halves is left over, and is owed next time."""
    rows, carry = allot(10, np.array([0.55, 0.25, 0.2]), np.zeros(3))
    assert rows.tolist() == [6, 2, 2]
    np.testing.assert_allclose(carry, [-0.5, 0.5, 0], atol=1e-12)
    assert allot(10, np.array([0.55, 0.25, 0.2]), carry)[0].tolist() == [5, 3, 2]


def test_no_domain_gets_a_negative_number_and_the_last_no_remainder():
    """Seven domains, 3/4 of 8 rows on one: six and two of the others, never -3 of the last."""
    p = np.full(7, 0.25 / 6)
    p[0] = 0.75
    rows, carry = allot(8, p, np.zeros(7))
    assert rows.tolist() == [6, 1, 1, 0, 0, 0, 0]
    total = rows.copy()
    for _ in range(11):
        rows, carry = allot(8, p, carry)
        assert rows.min() >= 0 and rows.sum() == 8
        total += rows
    assert total.tolist() == [72, 4, 4, 4, 4, 4, 4]


probabilities = st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda p: sum(p) > 0.1)


@given(st.lists(st.tuples(probabilities, st.integers(1, 40)), min_size=1, max_size=5))
def test_what_is_owed_stays_bounded_and_adds_up_to_nothing(steps):
    """No domain is owed more than the n - 1 others can be ahead, a row each."""
    n = len(steps[0][0])
    carry = np.zeros(n)
    for given_p, total in steps:
        p = np.resize(np.array(given_p), n)
        p = p / p.sum() if p.sum() > 0 else np.full(n, 1 / n)
        rows, carry = allot(total, p, carry)
        assert rows.sum() == total and (rows >= 0).all() and (rows[p == 0] == 0).all()
        assert abs(carry.sum()) < 1e-9 and np.abs(carry[p > 0]).max() <= n


def test_token_shares_by_hand():
    np.testing.assert_allclose(token_shares(np.array([0.5, 0.5]), np.array([2.0, 40.0])), [1 / 21, 20 / 21])


@pytest.mark.parametrize("p", [[0.9, 0.1], [0.1, 0.9], [1.0, 0.0]])
def test_tokens_keep_to_the_budget_whatever_is_drawn(p):
    """Never off by more than half a mean row and the spread of the rows that a step drew."""
    draws = Draws(TOKENS, 100.0, seed=1, round=0)
    for step in range(1, 50):
        rows = draws.next(np.array(p))
        assert draws.tokens.sum() == sum(TOKENS[list(TOKENS)[d]] @ _seen(draws, d) for d in (0, 1))
        assert len(rows) >= 1
        assert abs(draws.tokens.sum() - 100 * step) <= 60
    shares = draws.drawn / draws.drawn.sum()
    np.testing.assert_allclose(shares, p, atol=1 / draws.drawn.sum())


def _seen(draws: Draws, domain: int) -> np.ndarray:
    name = list(TOKENS)[domain]
    return counts_of(row_order(1, name, len(TOKENS[name])), int(draws.drawn[domain]))


def test_rows_are_those_of_the_mixture_of_that_size():
    draws = Draws(TOKENS, 60.0, seed=1, round=0)
    seen = [row for _ in range(9) for row in draws.next(np.array([0.7, 0.3]))]
    for domain, tokens in enumerate(TOKENS.values()):
        counted = np.bincount([row for d, row in seen if d == domain], minlength=len(tokens))
        np.testing.assert_array_equal(counted, _seen(draws, domain))


def test_backwards_starts_with_what_others_use_last():
    draws = Draws(TOKENS, 6.0, seed=1, round=0, backwards=True)
    (first,) = {row for _, row in draws.next(np.array([1.0, 0.0]))} & {int(row_order(1, "short", 6)[-1])}
    assert first == row_order(1, "short", 6)[-1]
    assert int(row_order(1, "short", 6)[0]) not in {row for _, row in Draws(
        TOKENS, 2.0, seed=1, round=0, backwards=True).next(np.array([1.0, 0.0]))}  # fmt: skip


def test_restored_draws_continue():
    whole, killed = (Draws(TOKENS, 55.0, seed=3, round=2) for _ in range(2))
    p = np.array([0.3, 0.7])
    expected = [whole.next(p) for _ in range(6)]
    for step in range(6):
        assert killed.next(p) == expected[step]
        state = json.loads(json.dumps(killed.state()))
        killed = Draws(TOKENS, 55.0, seed=3, round=2)
        killed.restore(state)
