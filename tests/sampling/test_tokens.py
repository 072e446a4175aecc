"""Token draws: the filters by hand, and frequencies with the tail included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lomdm_jax.sampling.tokens import Filter, draw_tokens, entropy, independent

P = np.array([0.4, 0.3, 0.2, 0.1])
LOGITS = jnp.log(jnp.array([P, P[::-1]]))[None]


@pytest.mark.parametrize(
    ("filter", "kept"),
    [
        (Filter(), 4),
        (Filter(top_k=2), 2),
        (Filter(top_k=9), 4),
        (Filter(top_p=0.39), 1),
        (Filter(top_p=0.41), 2),
        (Filter(top_p=0.71), 3),
        (Filter(top_k=3, top_p=0.7), 2),  # 4/9 + 3/9 cross it
        (Filter(temperature=0.5, top_p=0.8), 2),  # 16/30 + 9/30
        (Filter(temperature=0), 1),
        (Filter(top_p=1e-9), 1),
    ],
)
def test_a_filter_keeps_the_likeliest(filter, kept):
    p = np.where(np.sort(P)[-kept] <= P, P ** (1 / (filter.temperature or 1)), 0)
    for row, expected in zip(jax.nn.softmax(filter(LOGITS))[0], (p, p[::-1]), strict=True):
        np.testing.assert_allclose(row, expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_a_nucleus_is_that_of_the_sorted_probabilities(top_p):
    """With equal logits, infinite ones, and both zeros; sums in float64, none of them near."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 101)).astype(np.float32) * 4
    logits[1] = np.round(logits[1])
    logits[2, ::2] = -np.inf
    logits[3, :50], logits[3, 50:] = 0.0, -0.0
    found = np.asarray(Filter(top_p=top_p)(jnp.asarray(logits)[None]))[0]
    for row, kept in zip(logits.astype(np.float64), found > -np.inf, strict=True):
        share = np.exp(row - row.max())
        above = np.array([share[row > one].sum() for one in row]) / share.sum()
        assert np.abs(above - top_p).min() > 1e-7
        np.testing.assert_array_equal(kept, (above < top_p) & (row > -np.inf))


@pytest.mark.parametrize(
    "p",
    [
        [1.0],
        [0.9, 0.09, 0.009, 0.001],
        [0.2, 0, 0.1, 0, 0, 0, 0, 0.3, 0, 0.15, 0.25],  # in groups of four, one cut short
        [0, 0, 0, 0, 0.6, 0.4, 0, 0],  # a group, of three, of which nothing may be drawn
    ],
)
def test_draws_follow_the_probabilities(p):
    p = np.array(p)
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = draw_tokens(keys, jnp.tile(jnp.log(p), (100, 4000, 1)))
    found = np.bincount(np.asarray(drawn).ravel(), minlength=len(p))
    assert len(found) == len(p) and not found[p == 0].any()
    if len(p) > 1:
        assert stats.chisquare(found[p > 0], 400_000 * p[p > 0]).pvalue > 1e-3


def test_a_tail_is_drawn_as_often_as_it_should():
    """Three tokens of 3e-6 each; benchmarks/precision.py goes further, where it takes minutes."""
    rounds, size, p = 10, 400_000, np.array([1 - 9e-6, 3e-6, 3e-6, 3e-6])
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (1, size, 1))
    count = jax.jit(lambda key: jnp.bincount(draw_tokens(key[None], logits)[0], length=4))
    found = sum(np.asarray(count(key)) for key in jax.random.split(jax.random.key(1), rounds))
    expected = rounds * size * np.array([p[0], p[1:].sum()])
    assert expected[1] == 36
    assert stats.chisquare([found[0], found[1:].sum()], expected).pvalue > 1e-3


def test_entropies_and_what_independence_loses():
    log_p = jnp.log(jnp.array([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]]]))
    found = entropy(log_p)
    np.testing.assert_allclose(found[0], np.log(2) * np.array([1, 0, 1.5]), rtol=1e-6)
    for budget, kept in ((0.0, [1, 1, 0]), (0.7, [1, 1, 1]), (0.6, [1, 1, 0])):
        np.testing.assert_array_equal(independent(found, budget)[0], np.array(kept) > 0)
    same = np.log(2) * jnp.array([[1.0, 0.0, 1.0, 1.0]])
    for budget, kept in ((0.0, 2), (np.log(2) * 1.001, 3), (np.log(2) * 2.001, 4)):
        assert independent(same, budget).sum() == kept
