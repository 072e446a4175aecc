"""Samplers against the exact distribution of a tiny model, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lomdm_jax.orders.schedule import Power
from lomdm_jax.sampling.ancestral import Ancestral, even_progress
from lomdm_jax.sampling.driver import draw_tokens, generate
from lomdm_jax.sampling.race import Race
from tests import oracle

MODEL = oracle.TableModel(length=3, vocab=2)
PARAMS = MODEL.init(jax.random.key(0))
SEQUENCES = oracle.sequences(3, 2)
ROWS = 20_000


@functools.cache
def exact():
    """p(x) of every sequence, float64 [8]."""
    p = np.array([jnp.exp(oracle.log_p(MODEL, PARAMS, x)) for x in SEQUENCES], np.float64)
    return p / p.sum()


@functools.partial(jax.jit, static_argnums=0)
def run(chooser, tokens, given, key):
    return generate(key, MODEL.reverse(PARAMS), chooser, tokens, given, mask_id=2)


def draw(chooser, seed=0, rows=ROWS):
    nothing = jnp.zeros((rows, 3), jnp.int32)
    return run(chooser, nothing, nothing > 0, jax.random.key(seed))


def tile(row, rows):
    return jnp.tile(jnp.array(row), (rows, 1))


def counts(samples):
    return np.bincount(np.asarray(samples.tokens_BL) @ [4, 2, 1], minlength=8)


def distance(samples):
    """Total variation from the exact distribution."""
    return 0.5 * np.abs(counts(samples) / len(samples.tokens_BL) - exact()).sum()


def test_exact_race_has_the_models_distribution():
    samples = draw(Race(reveal=1, length=3))
    assert stats.chisquare(counts(samples), ROWS * exact()).pvalue > 1e-3
    assert int(samples.calls) == 3
    np.testing.assert_array_equal(
        np.sort(samples.revealed_BL, axis=-1), np.tile([1, 2, 3], (ROWS, 1))
    )


def test_the_chi_square_test_can_fail():
    """Three positions at once are independent given nothing: another distribution."""
    samples = draw(Race(reveal=3, length=3))
    assert int(samples.calls) == 1
    assert stats.chisquare(counts(samples), ROWS * exact()).pvalue < 1e-6


@pytest.mark.parametrize("even", [True, False])
def test_ancestral_converges_to_the_model(even):
    """The distance falls as steps grow, to that of sampling noise for the even grid."""
    far, middle, near = (distance(draw(Ancestral(steps, even))) for steps in (1, 8, 128))
    assert far > middle > near
    if even:
        found = counts(draw(Ancestral(128, even), rows=5000))
        assert stats.chisquare(found, 5000 * exact()).pvalue > 1e-3


def test_even_progress_reveals_the_expected_number():
    key = jax.random.key(3)
    exponents = jnp.exp(jax.random.uniform(key, (50, 40), minval=-4.0, maxval=1.0))
    masked = jax.random.bernoulli(jax.random.key(4), 0.5, (50, 40))
    log_t, schedule = jnp.linspace(-300.0, 0.0, 50), Power(jnp.log(exponents))
    log_s = even_progress(schedule, masked, log_t, jnp.int32(5))
    revealed = 1 - jnp.exp(exponents * (log_s - log_t)[:, None])
    np.testing.assert_allclose(jnp.sum(revealed * masked, -1), jnp.sum(masked, -1) / 5, rtol=2e-3)


def test_the_linear_grid_leaves_small_exponents_to_the_last_step():
    """e = 0.05, 256 steps: still masked at the last step with probability 256^-0.05 = 0.76."""
    tiny = oracle.TableModel(3, 2)
    params = tiny.init(jax.random.key(1), low=0.0499, high=0.0501)
    nothing = jnp.zeros((2000, 3), jnp.int32)
    chooser = Ancestral(256, even=False)
    reverse = tiny.reverse(params)
    sample = jax.jit(lambda k: generate(k, reverse, chooser, nothing, nothing > 0, mask_id=2))
    share = np.mean(sample(jax.random.key(0)).revealed_BL == 256)
    assert share == pytest.approx(256**-0.05, abs=0.03)


def test_given_positions_stay_and_cost_no_calls():
    tokens, given = (
        jnp.tile(jnp.array([0, 1, 0]), (64, 1)),
        jnp.tile(jnp.array([0, 1, 1]) > 0, (64, 1)),
    )
    for chooser in (Race(1, 3), Ancestral(8, True), Ancestral(8, False)):
        samples = run(chooser, tokens, given, jax.random.key(0))
        assert (samples.tokens_BL[:, 1] == 1).all() and (samples.tokens_BL[:, 2] == 0).all()
        assert (samples.revealed_BL[:, 1:] == 0).all() and (samples.revealed_BL[:, 0] > 0).all()
    assert int(run(Race(1, 3), tokens, given, jax.random.key(0)).calls) == 1


def test_conditional_distribution_of_an_infill():
    """With the ends given, the middle follows the network's token probabilities."""
    tokens, given = (
        jnp.tile(jnp.array([1, 0, 0]), (ROWS, 1)),
        jnp.tile(jnp.array([1, 0, 1]) > 0, (ROWS, 1)),
    )
    middle = run(Race(1, 3), tokens, given, jax.random.key(2)).tokens_BL[:, 1]
    logits = PARAMS["logits"][MODEL.code(jnp.array([1, 2, 0])), 1, :2]
    expected = ROWS * np.asarray(jax.nn.softmax(logits), np.float64)
    expected *= ROWS / expected.sum()
    assert stats.chisquare(np.bincount(middle, minlength=2), expected).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_neighbours():
    chooser = Race(1, 3)
    alone, together = draw(chooser, rows=3), draw(chooser, rows=11)
    np.testing.assert_array_equal(alone.tokens_BL, together.tokens_BL[:3])
    np.testing.assert_array_equal(alone.revealed_BL, together.revealed_BL[:3])


def test_token_draws_follow_the_probabilities():
    logits = jnp.log(jnp.array([0.9, 0.09, 0.009, 0.001]))
    keys = jax.random.split(jax.random.key(0), 100)
    drawn = draw_tokens(keys, jnp.tile(logits, (100, 4000, 1)))
    found = np.bincount(np.asarray(drawn).ravel(), minlength=4)
    expected = 400_000 * np.asarray(jnp.exp(logits), np.float64)
    assert stats.chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-3
