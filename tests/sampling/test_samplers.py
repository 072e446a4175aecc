"""Samplers against the exact distribution of a tiny model, and against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lomdm_jax.orders.schedule import Power
from lomdm_jax.sampling.ancestral import Ancestral, _remasking, even_progress
from lomdm_jax.sampling.best import SCORES, Best
from lomdm_jax.sampling.driver import row_keys
from lomdm_jax.sampling.tokens import Filter
from tests import oracle

LENGTH, MASK = 3, 2
MODEL = oracle.TableModel(length=LENGTH, vocab=2)
PARAMS = MODEL.init(jax.random.key(0))
SEQUENCES = oracle.sequences(LENGTH, 2)
ROWS = 10_000
PLAIN = Filter()


class Options(dict):
    """Of `oracle.sampler`, hashable."""

    def __hash__(self):
        return hash(tuple(self.items()))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(chooser, options, params, tokens, given, keys):
    return oracle.sampler(MODEL, chooser, **options)(params, keys, tokens, given)


def draw(chooser, seed=0, rows=ROWS, params=PARAMS, given=None, **options):
    """Samples from nothing, or around a row with None where nothing is given."""
    row = given or [None] * options.get("length", LENGTH)
    tokens = jnp.tile(jnp.array([token or 0 for token in row]), (rows, 1))
    known = jnp.tile(jnp.array([token is not None for token in row]), (rows, 1))
    keys = row_keys(jax.random.key(seed), jnp.arange(rows))
    return jax.device_get(run(chooser, Options(options), params, tokens, known, keys))


def counts(samples):
    tokens = samples.tokens_BT
    powers = 2 ** np.arange(tokens.shape[-1])[::-1]
    return np.bincount(tokens @ powers, minlength=2 ** tokens.shape[-1])


def fits(samples, p):
    """The p-value of the samples under these probabilities of all sequences."""
    p = np.asarray(p, np.float64)
    return stats.chisquare(counts(samples), len(samples.tokens_BT) * p / p.sum()).pvalue


@functools.cache
def exact():
    """p(x) of every sequence under the race, float64 [8]."""
    p = np.array([jnp.exp(oracle.log_p(MODEL, PARAMS, x)) for x in SEQUENCES], np.float64)
    return p / p.sum()


def by_policy(policy, length=LENGTH, filter=PLAIN, params=PARAMS):
    """p(x) of every sequence when `policy` chooses one position at a time, float64.

    policy: from a state, a tuple with 2 for masked, and its token probabilities [L, 2] to the
      position. The network sees the last three tokens up to the position where it is longer.
    """

    @functools.cache
    def tokens(window):
        logits = params["logits"][MODEL.code(jnp.array(window))][:, :2]
        return np.asarray(jax.nn.softmax(logits)), np.asarray(jax.nn.softmax(filter(logits)))

    states = {(MASK,) * length: 1.0}
    for _ in range(length):
        after = {}
        for state, mass in states.items():
            place, start = policy(state, lambda start, s=state: tokens(s[start : start + LENGTH]))
            for token, p in enumerate(tokens(state[start : start + LENGTH])[1][place - start]):
                new = (*state[:place], token, *state[place + 1 :])
                after[new] = after.get(new, 0.0) + mass * p
        states = after
    return np.array([states.get(tuple(x), 0.0) for x in oracle.sequences(length, 2)])


def greedy(by):
    def policy(state, look):
        p = look(0)[0]
        entropy = -(p * np.log(p)).sum(-1)
        rate = np.asarray(PARAMS["reverse"][MODEL.code(jnp.array(state))])
        score = {
            "velocity": rate,
            "confidence": p.max(-1),
            "margin": np.abs(p[:, 0] - p[:, 1]),
            "entropy": -entropy,
        }
        masked = np.array(state) == MASK
        return int(np.argmax(np.where(masked, score[by], -np.inf))), 0

    return policy


def test_exact_race_has_the_models_distribution():
    samples = draw(Best("race"))
    assert fits(samples, exact()) > 1e-3
    assert int(samples.calls) == 3 and (samples.calls_B == 3).all()
    np.testing.assert_array_equal(
        np.sort(samples.revealed_BT, axis=-1), np.tile([1, 2, 3], (ROWS, 1))
    )


def test_the_chi_square_test_can_fail():
    """Three positions at once are independent given nothing: another distribution."""
    samples = draw(Best("race", reveal=3))
    assert int(samples.calls) == 1
    assert fits(samples, exact()) < 1e-6


@pytest.mark.parametrize("by", SCORES[1:])
def test_a_greedy_order_has_the_distribution_of_its_policy(by):
    samples = draw(Best(by))
    assert fits(samples, by_policy(greedy(by))) > 1e-3
    assert fits(samples, exact()) < 1e-6, "it is not that of the race"


@pytest.mark.parametrize("by", SCORES)
def test_fewer_positions_per_call_come_nearer_to_one_at_a_time(by):
    expected = exact() if by == "race" else by_policy(greedy(by))
    far, near = (
        0.5 * np.abs(counts(draw(Best(by, reveal))) / ROWS - expected).sum() for reveal in (3, 1)
    )
    assert far > 5 * near


def test_a_threshold_reveals_what_passes_it_and_one_always():
    """By hand, with the token probabilities of the empty state."""
    p = np.asarray(jax.nn.softmax(PARAMS["logits"][-1, :, :2]))
    entropy, lead = -(p * np.log(p)).sum(-1), np.abs(p[:, 0] - p[:, 1])
    for by, score in (("confidence", p.max(-1)), ("margin", lead), ("entropy", -entropy)):
        bound = (np.sort(score)[1] - 1e-4) * (-1 if by == "entropy" else 1)
        first = draw(Best(by, 3, float(bound))).revealed_BT == 1
        assert (first == (score >= np.sort(score)[1])).all() and first[0].sum() == 2
    samples = draw(Best("confidence", 3, 1.0))
    assert int(samples.calls) == 3, "nothing passes, so one at a time"


def test_a_bound_on_the_dependence_reveals_fewer():
    p = np.asarray(jax.nn.softmax(PARAMS["logits"][-1, :, :2]))
    entropy = np.sort(-(p * np.log(p)).sum(-1))
    for budget, number in ((entropy[0] - 1e-3, 1), (entropy[0] + 1e-3, 2)):
        samples = draw(Best("entropy", 3, dependence=float(budget)))
        assert ((samples.revealed_BT == 1).sum(-1) == number).all()


@pytest.mark.parametrize("grid", ["even", "linear", "cosine"])
def test_ancestral_converges_to_the_model(grid):
    """The distance falls as steps grow, to that of sampling noise for the even grid."""
    far, near = (
        0.5 * np.abs(counts(draw(Ancestral(steps, grid))) / ROWS - exact()).sum()
        for steps in (4, 128)
    )
    assert far > 2 * near
    if grid == "even":
        assert fits(draw(Ancestral(128, grid), seed=1), exact()) > 1e-3


def test_what_reveals_nothing_costs_no_call():
    """As many calls as steps that reveal something, in every row for itself."""
    samples = draw(Ancestral(128, "linear"))
    steps = [len(set(row[row > 0])) for row in samples.revealed_BT]
    np.testing.assert_array_equal(samples.calls_B, steps)
    assert samples.calls_B.max() <= 3 < samples.revealed_BT.max()
    alone = draw(Ancestral(128, "linear"), rows=1)
    assert int(alone.calls) == alone.calls_B[0] <= 3


def test_even_progress_reveals_the_expected_number():
    key = jax.random.key(3)
    exponents = jnp.exp(jax.random.uniform(key, (50, 40), minval=-4.0, maxval=1.0))
    masked = jax.random.bernoulli(jax.random.key(4), 0.5, (50, 40))
    log_t, schedule = jnp.linspace(-300.0, 0.0, 50), Power(jnp.log(exponents))
    log_s = even_progress(schedule, masked, log_t, jnp.int32(5))
    revealed = 1 - jnp.exp(exponents * (log_s - log_t)[:, None])
    np.testing.assert_allclose(jnp.sum(revealed * masked, -1), jnp.sum(masked, -1) / 5, rtol=2e-3)


def test_the_linear_grid_leaves_small_exponents_to_the_last_step():
    """e = 0.05, 128 steps: still masked at the last step with probability 128^-0.05 = 0.78."""
    params = MODEL.init(jax.random.key(1), low=0.0499, high=0.0501)
    samples = draw(Ancestral(128, "linear"), params=params)
    assert np.mean(samples.revealed_BT == 128) == pytest.approx(128**-0.05, abs=0.02)


def consistent(key):
    """A table that holds the true conditionals of a distribution over sequences, equal rates; and
    that distribution."""
    p = jax.nn.softmax(1.5 * jax.random.normal(key, (8,)))
    states = np.array(list(np.ndindex(3, 3, 3)))[:, ::-1]  # in the order of `code`
    fits = ((states[:, None] == SEQUENCES) | (states[:, None] == MASK)).all(-1)
    joint = fits * np.asarray(p)
    ones = (joint @ SEQUENCES) / joint.sum(-1, keepdims=True)
    probability = np.stack([1 - ones, ones, np.zeros_like(ones)], -1)
    zeros = jnp.zeros((27, 3))
    logits = jnp.log(jnp.asarray(probability, jnp.float32))
    return {"logits": logits, "reverse": zeros, "forward": zeros}, np.asarray(p)


def test_masking_again_converges_to_the_distribution():
    params, p = consistent(jax.random.key(5))
    far, near = (
        0.5 * np.abs(counts(draw(chooser, params=params)) / ROWS - p).sum()
        for chooser in (Ancestral(16, "linear", 0.5), Ancestral(128, "linear", 0.5))
    )
    assert far > 2 * near and near < 0.025
    samples = draw(Ancestral(16, "linear", 0.5), params=params)
    assert samples.calls_B.mean() > 6, "what is masked again is revealed again"
    assert (samples.tokens_BT != MASK).all() and samples.revealed_BT.max() <= 16
    given = draw(Ancestral(16, "linear", 0.5), params=params, given=[1, None, 0])
    assert (given.tokens_BT[:, ::2] == [1, 0]).all() and (given.revealed_BT[:, ::2] == 0).all()


def test_with_remasking_as_many_positions_are_masked_as_without():
    log_t, log_s = jnp.log(jnp.array([0.9, 0.5, 0.1])), jnp.log(jnp.array([0.6, 0.4, 0.01]))
    schedule = Power(jnp.log(jnp.array([[0.3, 1.0, 2.0]] * 3)))
    hide, reveal = _remasking(schedule, log_t, log_s, 0.7)
    m_t, m_s = (jnp.exp(schedule.log_mask(log)) for log in (log_t, log_s))
    np.testing.assert_allclose((1 - m_t) * hide + m_t * (1 - reveal), m_s, rtol=1e-5)
    assert (hide > 0).all() and (reveal <= 1).all()


CHOOSERS = (Best("race"), Best("confidence", 2, 0.6), Ancestral(16, "linear", 0.5))


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_given_positions_stay_and_cost_no_calls(chooser):
    samples = draw(chooser, given=[None, 1, 0])
    assert (samples.tokens_BT[:, 1:] == [1, 0]).all()
    assert (samples.revealed_BT[:, 1:] == 0).all() and (samples.revealed_BT[:, 0] > 0).all()
    nothing = draw(chooser, given=[0, 1, 0])
    assert int(nothing.calls) == 0 and (nothing.tokens_BT == [0, 1, 0]).all()
    if not chooser.least_steps:
        assert int(samples.calls) == 1


def test_conditional_distribution_of_an_infill():
    """With the ends given, the middle follows the network's token probabilities."""
    middle = draw(Best("race"), seed=2, given=[1, None, 0]).tokens_BT[:, 1]
    logits = PARAMS["logits"][MODEL.code(jnp.array([1, 2, 0])), 1, :2]
    expected = np.asarray(jax.nn.softmax(logits), np.float64)
    found = np.bincount(middle, minlength=2)
    assert stats.chisquare(found, ROWS * expected / expected.sum()).pvalue > 1e-3


def test_blocks_are_filled_from_left_to_right():
    """Blocks of one: the chain rule of the table, in the positions' order."""
    samples = draw(Best("race"), size=1)
    assert fits(samples, by_policy(lambda state, look: (state.index(MASK), 0))) > 1e-3
    np.testing.assert_array_equal(samples.revealed_BT, np.tile([1, 2, 3], (ROWS, 1)))


def test_beyond_the_training_length_the_window_slides():
    """Five tokens where the network sees three: it sees the last three, up to the block's end."""

    def policy(state, look):
        place = state.index(MASK)
        return place, max(0, place + 1 - LENGTH)

    samples = draw(Best("confidence"), length=5, size=1)
    assert fits(samples, by_policy(policy, length=5)) > 1e-3


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_a_row_does_not_depend_on_its_neighbours(chooser):
    """Nor does one that ends early keep the others from their steps: token 1 ends a text."""
    options = {"length": 6, "size": 3, "eos_id": 1, "params": PARAMS}
    alone, together = (draw(chooser, rows=rows, **options) for rows in (3, 11))
    for name in ("tokens_BT", "revealed_BT", "share_BT", "log_p_BT", "calls_B", "length_B"):
        ours, theirs = getattr(alone, name), getattr(together, name)[:3]
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert len(set(together.length_B)) > 1


def test_sampling_stops_at_the_end_of_text():
    samples = draw(Best("race"), size=1, eos_id=1)
    whole = draw(Best("race"), size=1)
    ends = np.where((whole.tokens_BT == 1).any(-1), (whole.tokens_BT == 1).argmax(-1) + 1, 3)
    np.testing.assert_array_equal(samples.length_B, ends)
    np.testing.assert_array_equal(samples.calls_B, ends)
    behind = np.arange(3) >= ends[:, None]
    assert (samples.tokens_BT[behind] == 1).all() and (samples.revealed_BT[behind] == 0).all()
    np.testing.assert_array_equal(samples.tokens_BT[~behind], whole.tokens_BT[~behind])
    given = draw(Best("race"), size=1, eos_id=1, given=[1, None, None])
    assert (given.length_B > 1).all(), "one that is given ends nothing"


def test_shares_and_log_probabilities_are_those_of_the_draws():
    """Against the table, at the state before each reveal."""
    samples = draw(Best("race"))
    for row in range(20):
        state = np.full(3, MASK)
        for step in (1, 2, 3):
            place = int(np.flatnonzero(samples.revealed_BT[row] == step)[0])
            code, token = MODEL.code(jnp.array(state)), samples.tokens_BT[row, place]
            rate = np.exp(PARAMS["reverse"][code])
            share = rate[place] / rate[state == MASK].sum()
            assert samples.share_BT[row, place] == pytest.approx(share, rel=1e-5)
            log_p = jax.nn.log_softmax(PARAMS["logits"][code, place, :2])[token]
            assert samples.log_p_BT[row, place] == pytest.approx(float(log_p), rel=1e-4, abs=1e-6)
            state[place] = token


def test_temperatures_change_what_is_drawn():
    sharp = Filter(temperature=0.5)
    policy = greedy("velocity")
    samples = draw(Best("velocity"), filter=sharp)
    assert fits(samples, by_policy(policy, filter=sharp)) > 1e-3
    assert fits(samples, by_policy(policy)) < 1e-6
    likeliest = draw(Best("velocity"), filter=Filter(temperature=0))
    assert (likeliest.tokens_BT == likeliest.tokens_BT[0]).all()
    flat = dict(PARAMS, reverse=PARAMS["reverse"] / 3)
    p = np.array([jnp.exp(oracle.log_p(MODEL, flat, x)) for x in SEQUENCES])
    assert fits(draw(Best("race"), order_temperature=3.0), p) > 1e-3
    steps = draw(Ancestral(128), order_temperature=3.0)
    assert fits(steps, p) > 1e-3, "the exponents of ancestral steps are flattened alike"


@pytest.mark.parametrize("chooser", [*(Best(by) for by in SCORES), *CHOOSERS[1:]])
def test_every_draw_is_of_full_precision(chooser, monkeypatch):
    """Gumbel noise from uniforms of 24 bits would cut off the tail; those that choose by chance
    draw positions too. See benchmarks/precision.py for what it changes."""
    modes = []
    for name in ("gumbel", "categorical"):
        plain = getattr(jax.random, name)

        def watched(*arguments, mode=None, plain=plain, **options):
            modes.append(mode)
            return plain(*arguments, mode=mode, **options)

        monkeypatch.setattr(jax.random, name, watched)
    sampler, nothing = oracle.sampler(MODEL, chooser), jnp.zeros((2, 3), jnp.int32)
    keys = row_keys(jax.random.key(0), jnp.arange(2))
    jax.eval_shape(lambda *inputs: sampler(*inputs), PARAMS, keys, nothing, nothing > 0)
    assert set(modes) == {"high"} and len(modes) >= 1 + (chooser == Best("race"))
