"""Whole trajectories against enumeration, for every kind of pass that a network makes."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.evaluation.trajectories import calls, importance_bound, make_trajectories
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.orders.race import reveal_log_probabilities
from tests import oracle
from tests.networks import noisy

LENGTH, VOCAB = 4, 2
DRAWS = 4096  # trajectories of one text
X = np.array([1, 0, 0, 1], np.int32)


class Table(oracle.TableModel):
    """The free table as the evaluation sees it."""

    one_pass = "state"


@functools.cache
def network(name, layout="own"):
    """A tiny network with random parameters, those of its order included."""
    config = default_config()
    config.model.update(width=8, layers=1, heads=2, cond_dim=4, head_layers=0, layout=layout)
    config.order.name, config.data.length = name, LENGTH

    shapes = jax.eval_shape(lambda: init_params(config, VOCAB + 1, jax.random.key(0)))
    params = noisy(shapes, 0.5)
    for pointer in {"prior_head", "posterior_head"} & set(params):  # tables count thirty times
        params[pointer] = jax.tree.map(lambda a: a / 3, params[pointer])
        params[pointer] |= {t: params[pointer][t] / 15 for t in ("position", "distance")}
        params[pointer]["neighbours"] /= 15
    return make_generator(config, VOCAB + 1, VOCAB), params


@functools.cache
def table():
    model = Table(LENGTH, VOCAB)
    return model, model.init(jax.random.key(0))


MODELS = {
    "table": table,
    "lomdm": lambda: network("lomdm"),
    "walk": lambda: network("walk"),
    "genmd4": lambda: network("genmd4"),
    "ar": lambda: network("ar"),
    "block:2": lambda: network("block:2"),
    "lomdm-ranked": lambda: network("lomdm-ranked"),
    "mdm, ranked": lambda: network("mdm", "ranked"),
    "walk, ranked": lambda: network("walk", "ranked"),
}


@functools.cache
def drawing(name):
    return jax.jit(make_trajectories(MODELS[name]()[0]))


def batch_of(x, targets=None, **more):
    """The same text in every row."""
    tokens = jnp.tile(jnp.asarray(x), (DRAWS, 1))
    counted = jnp.ones(LENGTH, bool) if targets is None else jnp.asarray(targets)
    rows = {"tokens": tokens, "counted": jnp.tile(counted, (DRAWS, 1))}
    return rows | {key: jnp.tile(jnp.asarray(a), (DRAWS, 1)) for key, a in more.items()}


def draw(name, x=X, targets=None, seed=0, **more):
    """DRAWS trajectories of x, on the host, and what each adds to the bound."""
    batch = batch_of(x, targets, **more)
    found = drawing(name)(MODELS[name]()[1], batch, jnp.arange(DRAWS), jax.random.key(seed))
    found = jax.device_get(found)
    return found, found.cost_BL.sum(-1, dtype=np.float64)


class Exact(NamedTuple):
    bound: float
    clock: float
    log_p: float


class Compiled:
    """A model whose passes are compiled, for an enumeration in plain steps."""

    def __init__(self, generator):
        self.mask_id, self.forward = generator.mask_id, jax.jit(generator.forward)
        self.call = jax.jit(lambda params, *args: generator.reverse(params)(*args))

    def reverse(self, params):
        return functools.partial(self.call, params)


@functools.cache
def compiled(name):
    generator, params = MODELS[name]()
    return Compiled(generator), params


def state_by_state(name, x=X, start=-1):
    """The exact bound of what the subset `start` masks, by enumeration of the states."""
    generator, params = compiled(name)
    found = oracle.closed_form(oracle.states_of(generator, params, x), start)
    log_p = oracle.log_p(generator, params, x, start)
    return Exact(*map(float, (found.main + found.order, found.clock, log_p)))


def near(values, wanted):
    """Whether the mean of independent values is `wanted` within four of its standard errors."""
    return abs(values.mean() - wanted) < 4 * values.std(ddof=1) / np.sqrt(len(values)) + 1e-5


@pytest.mark.parametrize("name", ["table", "lomdm", "walk", "genmd4", "ar", "block:2"])
def test_the_mean_is_the_bound_and_the_mean_weight_is_the_likelihood(name):
    found, cost = draw(name)
    exact = state_by_state(name)
    assert near(cost, exact.bound) and near(np.exp(-cost), np.exp(exact.log_p))
    if name not in ("block:2", "ar"):  # which have no clock
        assert near(found.clock_BL.sum(-1, dtype=np.float64), exact.clock)
    assert exact.bound >= -exact.log_p - 1e-5


RANKS = np.argsort(list(itertools.permutations(range(LENGTH)))).astype(np.int32)


def order_by_order(name, x=X):
    """As `state_by_state`, on the ranked layout: a pass for every order there is."""
    generator, params = MODELS[name]()
    everyone = jnp.ones(RANKS.shape, bool)

    @jax.jit
    def costs(params, x_BL):
        z = jnp.full(x_BL.shape, VOCAB)
        tokens, backward = generator.reverse(params)(z[None], None, x_BL, jnp.asarray(RANKS)[None])
        forward = generator.forward(params, x_BL).weights()
        prior = forward
        if forward.moves is not None:
            prior = jax.tree.map(lambda a: a[0], backward.weights())
        each = (reveal_log_probabilities(w, jnp.asarray(RANKS), everyone) for w in (forward, prior))
        return tokens.costs(x_BL[None], everyone[None])[0][0], *each

    x_BL = jnp.tile(jnp.asarray(x), (len(RANKS), 1))
    found = jax.device_get(costs(params, x_BL))
    nll, log_q, log_p = (a.sum(-1, dtype=np.float64) for a in found)
    cost = nll + log_q - log_p
    return Exact(np.exp(log_q) @ cost, 0.0, np.log(np.exp(log_q) @ np.exp(-cost)))


@pytest.mark.parametrize("name", ["lomdm-ranked", "mdm, ranked", "walk, ranked"])
def test_on_the_ranked_layout_too(name):
    found, cost = draw(name)
    exact = order_by_order(name)
    assert near(cost, exact.bound) and near(np.exp(-cost), np.exp(exact.log_p))
    assert exact.bound > -exact.log_p + 1e-3 and not found.clock_BL.any()
    excess = (found.log_q_BL - found.log_p_BL).sum(-1)
    assert (np.abs(excess).max() > 0.1) == (name == "lomdm-ranked")


@pytest.mark.parametrize("name", ["table", "lomdm", "walk", "lomdm-ranked"])
def test_the_likelihoods_of_all_completions_of_what_is_given_sum_to_one(name):
    """Of the positions 0 and 2 given the others, so that no order of the latter knows the text."""
    targets, total, variance = np.array([True, False, True, False]), 0.0, 0.0
    for number, (first, third) in enumerate(itertools.product(range(VOCAB), repeat=2)):
        x = np.array([first, X[1], third, X[3]], np.int32)
        found, cost = draw(name, x, targets, seed=number)
        weights = np.exp(-cost)
        total, variance = total + weights.mean(), variance + weights.var(ddof=1) / DRAWS
        assert not any(a[:, ~targets].any() for a in found[2:])
        assert (found.rank_BL[:, ~targets] < 2).all() and (found.rank_BL[:, targets] >= 2).all()
        if name in ("table", "lomdm", "walk"):
            exact = state_by_state(name, x, start=0b0101)
            assert near(cost, exact.bound) and near(weights, np.exp(exact.log_p))
    assert abs(total - 1) < 4 * np.sqrt(variance) + 1e-5 and variance < 4e-4


def test_what_is_said_of_a_position_is_of_the_state_before_its_reveal():
    found, _ = draw("table")
    model, params = MODELS["table"]()
    for row, place in itertools.product(range(20), range(LENGTH)):
        mask = found.rank_BL[row] >= found.rank_BL[row, place]
        code = int(model.code(np.where(mask, VOCAB, X)))
        p = np.asarray(jax.nn.softmax(params["logits"][code][place, :VOCAB]))
        shares = np.where(mask, np.exp(params["reverse"][code]), 0.0)
        shares = shares[shares > 0] / shares.sum()
        assert found.entropy_BL[row, place] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-5)
        assert found.confidence_BL[row, place] == pytest.approx(p.max(), abs=1e-5)
        assert found.nll_BL[row, place] == pytest.approx(-np.log(p[X[place]]), abs=1e-5)
        expected = -(shares * np.log(shares)).sum()
        assert found.order_entropy_BL[row, place] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["block:2", "lomdm-ranked", "walk, ranked"])
def test_the_entropy_of_the_choice_is_the_mean_of_what_the_choice_costs(name):
    """Under the model's own order, so weighted by p / q; position by position of the order."""
    found, _ = draw(name)
    weight = np.exp((found.log_p_BL - found.log_q_BL).sum(-1, dtype=np.float64))
    assert near(weight, 1.0)
    place = np.argsort(found.rank_BL)
    cost, entropy = (
        np.take_along_axis(a, place, -1) * weight[:, None]
        for a in (-found.log_p_BL, found.order_entropy_BL)
    )
    for step in range(LENGTH):
        assert near(cost[:, step] - entropy[:, step], 0.0)
    assert entropy[:, 0].mean() > 0.3


@pytest.mark.parametrize("name", ["table", "block:2", "mdm, ranked"])
def test_draws_depend_on_the_key_and_the_index_only(name):
    whole, _ = draw(name)
    index = jnp.roll(jnp.arange(DRAWS), 7)
    other = drawing(name)(MODELS[name]()[1], batch_of(X), index, jax.random.key(0))
    np.testing.assert_array_equal(other.rank_BL, np.roll(whole.rank_BL, 7, axis=0))
    np.testing.assert_allclose(other.nll_BL, np.roll(whole.nll_BL, 7, axis=0), atol=1e-5)
    few = {key: a[:64] for key, a in batch_of(X).items()}
    first = drawing(name)(MODELS[name]()[1], few, jnp.arange(64), jax.random.key(0))
    np.testing.assert_array_equal(first.rank_BL, whole.rank_BL[:64])
    third = drawing(name)(MODELS[name]()[1], few, jnp.arange(64), jax.random.key(1))
    assert (np.asarray(third.rank_BL) != whole.rank_BL[:64]).any()


@pytest.mark.parametrize("name", ["ar", "block:2", "lomdm-ranked"])
def test_pads_that_are_absent_change_nothing_whatever_they_hold(name):
    targets = np.arange(LENGTH) < 2
    more = {"segments": np.int32(~targets), "absent": ~targets}
    ours, theirs = (
        draw(name, np.where(targets, X, pad).astype(np.int32), targets, **more)[0] for pad in (0, 1)
    )
    np.testing.assert_array_equal(ours.rank_BL, theirs.rank_BL)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_pads_cost_nothing_but_are_revealed():
    pads = np.array([False, False, False, True])
    found, _ = draw("table", X, ~pads, padding=pads)
    assert found.targets_BL.all() and not found.nll_BL[:, 3].any()
    assert found.log_q_BL[:, 3].any() and found.nll_BL[:, 2].all()


@pytest.mark.parametrize(("name", "targets"), [("table", 4), ("table", 2), ("block:2", 4)])
def test_the_network_runs_as_often_as_is_said(name, targets):
    generator, params = MODELS[name]()
    made = []

    class Counting(NamedTuple):
        inner: object
        one_pass: str
        mask_id: int = VOCAB

        def forward(self, *args):
            return self.inner.forward(*args)

        def reverse(self, params):
            def call(*args):
                jax.debug.callback(lambda: made.append(1))
                return self.inner.reverse(params)(*args)

            return call

    counting = Counting(generator, generator.one_pass)
    batch = {key: a[:2] for key, a in batch_of(X, np.arange(LENGTH) < targets).items()}
    jax.jit(make_trajectories(counting))(params, batch, jnp.arange(2), jax.random.key(0))
    jax.effects_barrier()
    assert len(made) == calls(generator, LENGTH, targets)


def test_more_trajectories_give_a_lower_bound_down_to_the_likelihood():
    costs, counts = draw("table")[1], (1, 4, 16, 64, DRAWS)
    exact = state_by_state("table")
    bounds = [importance_bound(-costs.reshape(count, -1)) for count in counts]
    means = [bound.mean() for bound, _ in bounds]
    assert means[0] == pytest.approx(costs.mean(), abs=1e-9)
    assert means == sorted(means, reverse=True) and means[0] - means[2] > 0.01
    (last,), (error,) = bounds[-1]
    assert error < 0.04 and abs(last + exact.log_p) < 4 * error
    assert abs(means[2] + exact.log_p) < 0.3 * (exact.bound + exact.log_p)


def test_the_error_of_the_bound_is_the_spread_over_its_draws():
    bound, error = importance_bound(-draw("table")[1].reshape(64, -1))
    assert np.sqrt(np.mean(error**2)) == pytest.approx(bound.std(ddof=1), rel=0.25)
    assert np.isnan(importance_bound(np.zeros((1, 3)))[1]).all()
