"""Fixed orders under the general bound: the identities that make them one family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lomdm_jax.objectives import make_objective
from lomdm_jax.objectives.corruption import stratified_uniforms
from lomdm_jax.objectives.nelbo import Batch
from lomdm_jax.orders import make_order
from lomdm_jax.sampling.ancestral import Ancestral
from lomdm_jax.sampling.best import Best
from tests import oracle

LENGTH, VOCAB = 4, 2
PARAMS = oracle.TableModel(LENGTH, VOCAB).init(jax.random.key(0))
X = np.array([1, 0, 0, 1], np.int32)
FIXED = ["mdm", "cosine", "ar", "r2l", "block:1", "block:2", "block:4", "permutation:3"]


def model(name):
    return oracle.TableModel(LENGTH, VOCAB, make_order(name, c1=1.0, c2=0.0, exponent=1.0))


def chain_rule(order):
    """-log p of X when positions are revealed one by one in this order, straight from the table."""
    z, total = np.full(LENGTH, VOCAB), 0.0
    for position in order:
        code = int(oracle.TableModel(LENGTH, VOCAB).code(z))
        logits = PARAMS["logits"][code, position, :VOCAB]
        total -= float(jax.nn.log_softmax(logits)[X[position]])
        z[position] = X[position]
    return total


def by_quadrature(name):
    """The continuous-time bound: the integral over t of sum q(mask) A CE, window by window.

    Inside a window the integrand is a polynomial in t, which Gauss-Legendre integrates exactly.
    """
    generator = model(name)
    states = oracle.states_of(generator, PARAMS, X)
    node, weight = np.polynomial.legendre.leggauss(12)
    total = 0.0
    for window in range(LENGTH):
        for t, w in zip((window + (node + 1) / 2) / LENGTH, weight / (2 * LENGTH), strict=True):
            log_t = jnp.full(len(states.mask), np.log(t))
            log_m = states.forward.log_mask(log_t)
            q = jnp.prod(jnp.where(states.mask, jnp.exp(log_m), -jnp.expm1(log_m)), -1)
            rate = jnp.exp(states.forward.log_velocity(log_t))
            cost = jnp.sum(jnp.where(states.mask & (q[:, None] > 0), rate * states.nll, 0), -1)
            total += w * float(q @ cost)
    return total


def rows(count, key):
    """`count` rows of X, stratified as one global batch."""
    tokens = jnp.tile(jnp.asarray(X), (count, 1))
    time_key, row_key = jax.random.split(key)
    uniform = stratified_uniforms(time_key, jnp.arange(count), count)
    return Batch(tokens, jnp.ones_like(tokens, bool), jax.random.split(row_key, count), uniform)


def estimates(name, estimator, count, key):
    objective = make_objective(
        estimator, mask_id=VOCAB, samples=2, eps=1e-4, reconstruction_share=1 / 8
    )
    batch = rows(count, key)
    forward = model(name).forward(PARAMS, batch.tokens_BL)
    return objective.estimate(batch, forward, model(name).reverse(PARAMS)).terms


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ar", range(4)),
        ("block:1", range(4)),
        ("r2l", range(3, -1, -1)),
        ("permutation:3", np.argsort(np.random.default_rng(3).permutation(4))),
    ],
)
def test_the_bound_of_one_position_at_a_time_is_the_chain_rule(name, order):
    """By closed form, by quadrature over t, and as the model's own -log p."""
    exact = chain_rule(order)
    closed = oracle.closed_form(oracle.states_of(model(name), PARAMS, X))
    assert float(closed.main) == pytest.approx(exact, rel=1e-5)
    assert by_quadrature(name) == pytest.approx(exact, rel=1e-4)
    assert -float(oracle.log_p(model(name), PARAMS, X)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["mdm", "block:2", "block:4", "cosine"])
def test_closed_form_is_the_integral(name):
    closed = oracle.closed_form(oracle.states_of(model(name), PARAMS, X))
    assert by_quadrature(name) == pytest.approx(float(closed.main), rel=1e-4)


def test_one_block_of_everything_is_masked_diffusion():
    """Not only the bound: the schedules agree at every time."""
    scores, log_t = jnp.zeros((3, LENGTH)), jnp.log(jnp.array([0.1, 0.5, 1.0]))
    block, mdm = (model(name).order.schedule(scores) for name in ("block:4", "mdm"))
    np.testing.assert_allclose(block.log_mask(log_t), mdm.log_mask(log_t), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        block.log_velocity(log_t), mdm.log_velocity(log_t), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", FIXED)
def test_p_sums_to_one_and_the_bound_is_above(name):
    everything = oracle.sequences(LENGTH, VOCAB)
    log_p = [oracle.log_p(model(name), PARAMS, x) for x in everything]
    assert float(jnp.sum(jnp.exp(jnp.stack(log_p)))) == pytest.approx(1, abs=1e-5)
    closed = oracle.closed_form(oracle.states_of(model(name), PARAMS, X))
    nll = -float(oracle.log_p(model(name), PARAMS, X))
    assert float(closed.main) >= nll - 1e-5
    assert float(closed.order) == 0 and float(closed.clock) == 0


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("estimator", ["continuous", "order"])
def test_estimates_are_unbiased(name, estimator):
    draw = jax.jit(lambda key: jnp.mean(sum(estimates(name, estimator, 256, key))))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 200)), np.float64)
    exact = float(oracle.closed_form(oracle.states_of(model(name), PARAMS, X)).main)
    error = drawn.std(ddof=1) / np.sqrt(len(drawn))
    assert abs(drawn.mean() - exact) < 4 * error + 1e-5  # the latter for rounding


@pytest.mark.parametrize("name", ["ar", "r2l", "permutation:3"])
def test_the_time_free_estimate_of_a_permutation_has_no_variance(name):
    """One row for each number of masked positions gives -log p itself."""
    terms = estimates(name, "order", LENGTH, jax.random.key(0))
    exact = -float(oracle.log_p(model(name), PARAMS, X))
    np.testing.assert_allclose(terms.main.mean(axis=1), exact, rtol=1e-5)


def draw(name, chooser, count=8000):
    nothing = jnp.zeros((count, LENGTH), jnp.int32)
    generator = model(name)
    sampler, keys = oracle.sampler(generator, chooser), jax.random.split(jax.random.key(2), count)
    return jax.jit(lambda *inputs: sampler(*inputs))(PARAMS, keys, nothing, nothing > 0)


def p_value(name, samples):
    everything = oracle.sequences(LENGTH, VOCAB)
    p = np.array([jnp.exp(oracle.log_p(model(name), PARAMS, x)) for x in everything], np.float64)
    found = np.bincount(np.asarray(samples.tokens_BT) @ [8, 4, 2, 1], minlength=len(p))
    return stats.chisquare(found, found.sum() * p / p.sum()).pvalue


@pytest.mark.parametrize("name", FIXED)
def test_the_race_samples_every_order_exactly(name):
    assert p_value(name, draw(name, Best("race"))) > 1e-3


def test_the_race_completes_a_group_before_the_next():
    """Three at a time on blocks of two: a block per call; on single positions: one by one."""
    blocks = draw("block:2", Best("race", 3), 50)
    assert int(blocks.calls) == 2 and (blocks.revealed_BT == jnp.array([1, 1, 2, 2])).all()
    assert (draw("r2l", Best("race", 3), 50).revealed_BT == jnp.array([4, 3, 2, 1])).all()
    assert int(draw("mdm", Best("race", 3), 50).calls) == 2


@pytest.mark.parametrize("grid", ["even", "linear"])
def test_ancestral_steps_follow_the_windows(grid):
    """With a step per position a fixed order is followed to the letter, so sampling is exact."""
    samples = draw("r2l", Ancestral(LENGTH, grid))
    if grid == "linear":
        assert (samples.revealed_BT == jnp.array([4, 3, 2, 1])).all()
        assert p_value("r2l", samples) > 1e-3
    assert (jnp.diff(samples.revealed_BT, axis=-1) <= 0).all()
    assert int(draw("r2l", Best("race"), 4).calls) == LENGTH


def test_cosine_velocity_is_the_derivative_and_small_times_are_exact():
    schedule = model("cosine").order.schedule(jnp.zeros((1, LENGTH)))
    for t in (1e-5, 0.01, 0.3, 0.9):
        slope = jax.jvp(lambda t: schedule.log_mask(jnp.log(t)), (jnp.array([t]),), (jnp.ones(1),))[
            1
        ]
        np.testing.assert_allclose(
            jnp.exp(schedule.log_velocity(jnp.log(jnp.array([t])))), slope, rtol=2e-3
        )
    far = schedule.log_mask(jnp.array([-200.0]))
    np.testing.assert_allclose(far, np.log(np.pi / 2) - 200, rtol=1e-6)
