"""The search for the noise range, on models whose variances are known by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.evaluation.noise_range import candidates, make_spread, search
from lomdm_jax.orders import make_order
from tests import oracle

LENGTH, ROWS = 4, 400
NATS = {"block:4": (3.0, 1.0, 1.1, 0.2), "block:2": (0.5, 2.0)}


def model(name):
    """A table in which a token costs NATS[n - 1] where n positions of its block are masked."""
    generator = oracle.TableModel(LENGTH, 2, make_order(name, c1=1.0, c2=0.0, exponent=1.0))
    size = len(NATS[name])
    logits = np.zeros((3**LENGTH, LENGTH, 3))
    for z in itertools.product(range(3), repeat=LENGTH):
        masked = np.reshape(np.array(z) == 2, (-1, size)).sum(-1).repeat(size)
        nats = np.array([0.0, *NATS[name]])[masked]
        # p(0) = e^-nats; a block with nothing masked costs nothing, so any logit will do there.
        logits[generator.code(np.array(z)), :, 1] = np.log(np.expm1(nats) + (nats == 0))
    params = generator.init(jax.random.key(0))
    return generator, params | {"logits": jnp.asarray(logits, jnp.float32)}


def variance(name, low, high):
    """Of size * NATS[n - 1], where n - 1 = floor(size * u) for a uniform u in [low, high)."""
    size = len(NATS[name])
    edges = np.clip(np.arange(size + 1) / size, low, high)
    share, loss = np.diff(edges) / (high - low), size * np.array(NATS[name])
    return share @ loss**2 - (share @ loss) ** 2


def batch(padding=0):
    counted = np.arange(ROWS + padding)[:, None] < np.full(LENGTH, ROWS)
    return {"tokens": np.zeros((ROWS + padding, LENGTH), np.int32), "counted": counted}


def test_candidates_are_the_full_range_and_every_twentieth():
    found = candidates()
    assert found.shape == (64, 2) and found.dtype == np.float32 and (found[0] == [0, 1]).all()
    widths, counts = np.unique(np.round(20 * (found[1:, 1] - found[1:, 0])), return_counts=True)
    assert dict(zip(widths, counts, strict=True)) == {w: 21 - w for w in range(10, 19)}
    assert found.min() == 0 and found.max() == 1


@pytest.mark.parametrize("name", ["block:4", "block:2"])
@pytest.mark.parametrize("padding", [0, 100])
def test_spreads_are_the_exact_variances(name, padding):
    generator, params = model(name)
    found = jax.jit(make_spread(generator))(params, batch(padding), jax.random.key(0))
    exact = [variance(name, *pair) for pair in np.float64(candidates())]
    blocks = ROWS * LENGTH // len(NATS[name])
    # Stratified draws put every share within 1 / ROWS of what it should be.
    np.testing.assert_allclose(found / blocks, exact, atol=0.02 * max(exact))


def test_the_search_finds_the_best_range():
    """Two and three of four masked cost nearly the same: from 0.25 to 0.75."""
    generator, params = model("block:4")
    exact = [variance("block:4", *pair) for pair in np.float64(candidates())]
    best = candidates()[np.argmin(exact)]
    np.testing.assert_allclose(best, [0.25, 0.75])
    spread = jax.jit(make_spread(generator))
    found = search(spread, params, [batch(), batch()], key=jax.random.key(1))
    np.testing.assert_array_equal(found, best)


def test_equal_losses_leave_the_full_range():
    """A network that gives every token log 2: every block costs the same, whatever is masked."""
    generator, params = model("block:4")
    params["logits"] = jnp.zeros_like(params["logits"])
    found = search(jax.jit(make_spread(generator)), params, [batch()], key=jax.random.key(1))
    np.testing.assert_array_equal(found, [0, 1])
