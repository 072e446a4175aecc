"""Schedules and races against their definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.errors import UserError
from lomdm_jax.orders import learned, make_order, race
from lomdm_jax.orders.schedule import (
    Power,
    Walk,
    Weights,
    log_mask_probability,
    unmask_probability,
)
from tests import oracle

EXPONENTS = jnp.array([[0.05, 0.7, 2.0]])


def test_power_schedule_is_t_to_the_exponent():
    schedule, t = Power(jnp.log(EXPONENTS)), jnp.array([0.3])
    np.testing.assert_allclose(jnp.exp(schedule.log_mask(jnp.log(t))), 0.3**EXPONENTS, rtol=1e-6)
    slope = jax.jvp(lambda t: schedule.log_mask(jnp.log(t)), (t,), (jnp.ones(1),))[1]
    np.testing.assert_allclose(jnp.exp(schedule.log_velocity(jnp.log(t))), slope, rtol=1e-6)


def test_unmask_probability_is_exact_where_t_underflows():
    """t = e^-400 is zero in float32, its logarithm is not."""
    probability = unmask_probability(
        Power(jnp.log(EXPONENTS)), jnp.array([-400.0]), jnp.array([-401.0])
    )
    np.testing.assert_allclose(probability, 1 - np.exp(-np.asarray(EXPONENTS)), rtol=1e-4)
    last = unmask_probability(Power(jnp.log(EXPONENTS)), jnp.array([-400.0]), jnp.array([-jnp.inf]))
    assert (last == 1).all()


def test_mask_probabilities_sum_to_one():
    masks = jnp.asarray(oracle.masks(3))
    schedule, log_t = Power(jnp.log(jnp.tile(EXPONENTS, (8, 1)))), jnp.full(8, jnp.log(0.4))
    log_q = log_mask_probability(schedule, log_t, masks, jnp.ones_like(masks))
    assert jnp.exp(log_q).sum() == pytest.approx(1, abs=1e-6)


def test_the_score_is_finite_at_the_ends():
    def score(exponents, log_t):
        masks = jnp.array([[True, True, False]])
        targets = jnp.array([[True, True, False]])
        return log_mask_probability(Power(jnp.log(exponents)), log_t, masks, targets).sum()

    for log_t in (0.0, -1e-7, -50.0):
        assert jnp.isfinite(jax.grad(score)(EXPONENTS, jnp.array([log_t]))).all()


def test_norm_sig_keeps_exponents_positive_with_mean_c1():
    scores = jnp.array([[-100.0, -100.0, 100.0, 100.0, -100.0]])
    exponents = jnp.exp(learned.lomdm(scores, 0.7, 0.65).log_exponents)
    assert exponents.min() > 0
    assert exponents.mean() == pytest.approx(0.7, abs=1e-6)


def test_a_common_shift_of_the_scores_changes_nothing():
    """Uncentred, a shift by 30 saturates every sigmoid and leaves no order and no gradient."""
    scores = jnp.array([[0.3, -1.0, 2.0, 0.5]])

    def first(scores):
        return learned.lomdm(scores, 0.7, 0.65).log_exponents[0, 0]

    assert first(scores + 30) == pytest.approx(float(first(scores)), abs=1e-5)
    gradient = jax.grad(first)(scores + 30)
    np.testing.assert_allclose(gradient, jax.grad(first)(scores), rtol=1e-4)
    assert jnp.abs(gradient).max() > 0.01


def test_centred_scores_reach_all_that_the_papers_formula_does():
    """Shift the sigmoids by m until their logits have mean zero: the same NormSig."""
    rng = np.random.default_rng(0)
    for scores in rng.normal(rng.normal(0, 3, (50, 1)), 2.0, (50, 6)):
        squashed = 1 / (1 + np.exp(-scores))
        low, high = -squashed.min(), 1 - squashed.max()
        for _ in range(200):
            middle = (low + high) / 2
            shifted = squashed + middle
            logits = np.log(shifted) - np.log1p(-shifted)
            low, high = (middle, high) if logits.mean() < 0 else (low, middle)
        assert abs(logits.mean()) < 1e-6
        found = learned.norm_sig(jnp.asarray(logits, jnp.float32))
        np.testing.assert_allclose(found, squashed - squashed.mean(), atol=2e-5)


@pytest.mark.parametrize(("c1", "c2"), [(0.65, 0.7), (0.5, 0.5), (0.7, -0.1)])
def test_c1_must_exceed_c2(c1, c2):
    with pytest.raises(UserError, match=rf"c1 is {c1} and order.c2 is {c2}"):
        make_order("lomdm", c1=c1, c2=c2, exponent=1.0).check(4)


def test_unknown_order_and_bad_exponent():
    with pytest.raises(UserError, match="'zigzag', which is no order"):
        make_order("zigzag", c1=1, c2=0, exponent=1)
    with pytest.raises(UserError, match=r"order.exponent is 0.0"):
        make_order("mdm", c1=1, c2=0, exponent=0.0).check(4)


@pytest.mark.parametrize("neighbours", [None, jnp.array([[0.0, -1.0], [2.0, 0.5]])])
def test_order_probabilities_sum_to_one_and_match_draws(neighbours):
    log_w = jnp.log(jnp.array([1.0, 0.2, 3.0]))
    orders = jnp.array(list(itertools.permutations(range(3))))
    everyone, nobody = jnp.ones((6, 3), bool), jnp.zeros((6, 3), bool)
    weights = Weights(log_w, jnp.zeros(3, jnp.int32), neighbours)
    log_q = race.prefix_log_probability(weights, race.invert(orders), everyone, nobody)
    assert jnp.exp(log_q).sum() == pytest.approx(1, abs=1e-6)
    many = Weights(*(jnp.tile(a, (60_000, 1)) for a in weights[:2]), neighbours)
    drawn = race.race_ranks(jax.random.key(0), many, jnp.ones((60_000, 3), bool))
    counts = [(drawn == rank).all(-1).mean() for rank in race.invert(orders)]
    error = np.sqrt(np.exp(log_q) / 60_000)
    assert (np.abs(np.array(counts) - np.exp(log_q)) < 4 * error).all()


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_walk_is_the_chain_of_its_states(mirrored):
    """By hand: w = 1 each, and a revealed neighbour on the left (the edge too) doubles a rate; or
    on the right, with everything mirrored."""
    table = jnp.log(jnp.array([[1.0, 1.0], [2.0, 2.0]]))
    table = table.T if mirrored else table
    weights = Weights(jnp.zeros(3), jnp.zeros(3, jnp.int32), table)
    everyone, nobody = jnp.ones(3, bool), jnp.zeros(3, bool)
    for order, expected in {(0, 1, 2): 2 / 4 * 2 / 3, (1, 0, 2): 1 / 4 * 2 / 4}.items():
        rank = race.invert(jnp.array(order))
        rank = rank[::-1] if mirrored else rank
        log_q = race.prefix_log_probability(weights, rank, everyone, nobody)
        assert jnp.exp(log_q) == pytest.approx(expected, rel=1e-5)


def test_the_first_reveals_of_a_walk_are_those_of_the_whole():
    weights = Weights(jnp.zeros((50, 6)), jnp.zeros((50, 6), jnp.int32), jnp.eye(2))
    targets, keys = jnp.arange(6) % 3 > 0, jax.random.split(jax.random.key(0), 50)
    targets = jnp.tile(targets, (50, 1))
    whole = race.row_ranks(keys, weights, targets)
    first = race.row_ranks(keys, weights, targets, reveals=3)
    np.testing.assert_array_equal(first, jnp.where(whole < 2 + 3, whole, 6))


def test_a_walk_reveals_only_targets_and_has_no_time():
    targets = jnp.tile(jnp.array([True, False, True, False]), (100, 1))
    flat = Walk(jnp.zeros((100, 4)), jnp.zeros((2, 2)))
    ranks = race.race_ranks(jax.random.key(1), flat.weights(), targets)
    assert (jnp.sort(ranks, -1) == jnp.arange(4)).all()
    assert (ranks[:, 1::2] < 2).all() and (ranks[:, ::2] >= 2).all()
    with pytest.raises(UserError, match="time-free"):
        flat.log_mask(jnp.zeros(100))


def test_positions_out_of_the_race_come_first():
    targets = jnp.array([True, False, True, False])
    weights = Weights(jnp.zeros((500, 4)), jnp.zeros((500, 4), jnp.int32))
    ranks = race.race_ranks(jax.random.key(1), weights, jnp.tile(targets, (500, 1)))
    assert (ranks[:, 1::2] < 2).all() and (ranks[:, ::2] >= 2).all()


def test_prefix_probability_ignores_what_is_masked_and_has_a_finite_gradient():
    rank, targets = jnp.array([2, 0, 1]), jnp.ones(3, bool)

    def log_q(log_w, n):
        weights = Weights(log_w, jnp.zeros(3, jnp.int32))
        return race.prefix_log_probability(weights, rank, targets, rank >= 3 - n)

    log_w = jnp.log(jnp.array([1.0, 2.0, 5.0]))
    assert log_q(log_w, 3) == 0
    assert log_q(log_w, 2) == pytest.approx(np.log(2 / 8))
    assert log_q(log_w, 1) == pytest.approx(np.log(2 / 8 * 5 / 6))
    assert jnp.isfinite(jax.grad(log_q)(log_w, 1)).all()
