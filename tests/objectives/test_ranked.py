"""The ranked layout against enumeration: every order of every sequence of a tiny model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from lomdm_jax.generator import Generator
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.readout import Logits
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives import loss, make_objective
from lomdm_jax.objectives.corruption import stratified_uniforms
from lomdm_jax.objectives.leave_one_out import leaders
from lomdm_jax.objectives.nelbo import Batch
from lomdm_jax.orders import make_order, race
from lomdm_jax.orders.learned import TRIALS
from lomdm_jax.orders.schedule import Weights
from lomdm_jax.sampling.contexts import Recall
from lomdm_jax.sampling.driver import row_keys
from lomdm_jax.sampling.recall import InAnyOrder
from lomdm_jax.sampling.tokens import Filter
from tests import oracle
from tests.networks import noisy, shapes_of

LENGTH, VOCAB = 3, 2
SEQUENCES = oracle.sequences(LENGTH, VOCAB)
ORDERS = np.array(list(itertools.permutations(range(LENGTH))))
RANKS = np.argsort(ORDERS, axis=-1).astype(np.int32)
X = np.array([1, 0, 1], np.int32)


def network(name="lomdm-ranked"):
    """A tiny network with random parameters, pointers and walk table included."""
    order = make_order(name, c1=1.0, c2=0.0, exponent=1.0)
    sizes = Sizes(VOCAB + 1, width=8, layers=2, heads=2, cond_dim=4, dropout=0.0, dtype=jnp.float32)
    options = dict(length=LENGTH, mask_id=VOCAB, scores=order.scores, walks=order.walks)
    graphdef, shapes = shapes_of(
        lambda: Denoiser(sizes, layout="ranked", rngs=nnx.Rngs(0), **options)
    )
    params = noisy(shapes, 0.4, seed=4)
    output = params["backbone"]["output_layer"]["linear"]  # no token may hide the others
    output |= {"kernel": output["kernel"] * 0.6, "bias": jnp.array([-3.0, 0.0, 0.0])}
    for pointer in ("prior_head", "posterior_head"):  # whose tables count thirty times
        for table in ("position", "distance", "neighbours"):
            if pointer in params:
                params[pointer][table] /= 15
    return Generator(graphdef, order, VOCAB, one_pass="order"), params


def choices(weights, rank):
    """log-probability of each choice of place, [R, L], in plain steps; weights [R, ...]."""
    found = []
    for row, ranks in enumerate(rank):
        order, last, each = np.argsort(ranks), -1, []
        for step in range(LENGTH):
            logits = []
            for i in order[step:]:
                left = i == 0 or ranks[i - 1] < step
                right = i == LENGTH - 1 or ranks[i + 1] < step
                logit = weights.log_w[row, i]
                if weights.neighbours is not None:
                    logit += jnp.broadcast_to(weights.neighbours, (len(rank), 2, 2))[
                        row, int(left), int(right)
                    ]
                if weights.moves is not None and last >= 0:
                    logit += weights.moves[row, last, weights.moves.shape[-1] // 2 + i - last]
                logits.append(logit)
            each.append(jax.nn.log_softmax(jnp.stack(logits))[0])
            last = order[step]
        found.append(jnp.stack(each))
    return jnp.stack(found)


def pairs(generator, params, x):
    """Of every order of x: cross-entropies by position [6, L], and log p and log q of its choices
    of place [6, L]."""
    x_BL = jnp.tile(jnp.asarray(x), (len(RANKS), 1))
    z = jnp.full(x_BL.shape, VOCAB)
    tokens, backward = generator.reverse(params)(z[None], None, x_BL, jnp.asarray(RANKS)[None])
    log_p = jax.nn.log_softmax(tokens.logits[0, :, :, :VOCAB])
    nll = -jnp.take_along_axis(log_p, x_BL[..., None], -1)[..., 0]
    backward = backward.weights()
    if backward.moves is not None:
        backward = backward._replace(neighbours=backward.neighbours[0], moves=backward.moves[0])
    backward = backward._replace(log_w=backward.log_w[0])
    forward = generator.forward(params, x_BL).weights()
    return nll, choices(backward, RANKS), choices(forward, RANKS)


def exact_bound(generator, params, x):
    nll, log_p, log_q = (a.sum(-1) for a in pairs(generator, params, x))
    return jnp.sum(jnp.exp(log_q) * (nll + log_q - log_p))


def exact_p(generator, params):
    """p(order, x), [8, 6], on the host."""
    all_pairs = jax.jit(lambda x: pairs(generator, params, x))
    both = [all_pairs(x) for x in SEQUENCES]
    return np.array([np.exp(log_p.sum(-1) - nll.sum(-1)) for nll, log_p, _ in both], np.float64)


def batch_of(count, key, x=X):
    tokens = jnp.tile(jnp.asarray(x), (count, 1))
    time_key, row_key = jax.random.split(key)
    uniform = stratified_uniforms(time_key, jnp.arange(count), count)
    return Batch(tokens, jnp.ones_like(tokens, bool), jax.random.split(row_key, count), uniform)


def objective(samples=2, **options):
    return make_objective(
        "order",
        mask_id=VOCAB,
        samples=samples,
        eps=1e-3,
        reconstruction_share=0.1,
        one_pass="order",
        **options,
    )


@pytest.mark.parametrize("name", ["lomdm-ranked", "walk", "mdm"])
def test_pairs_of_order_and_text_sum_to_one_and_the_bound_is_above(name):
    generator, params = network(name)
    joint = exact_p(generator, params)
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    bound = jax.jit(lambda x: exact_bound(generator, params, x))
    for x, p in zip(SEQUENCES, joint.sum(-1), strict=True):
        assert float(bound(x)) > -np.log(p) + 1e-4


@pytest.mark.parametrize("name", ["ar", "r2l", "permutation:1"])
def test_a_fixed_order_has_no_noise_and_is_the_chain_rule(name):
    generator, params = network(name)
    batch = batch_of(2, jax.random.key(0))
    forward = generator.forward(params, batch.tokens_BL)
    with np.errstate(all="raise"):  # it has no groups, so their size may be more than all rows
        terms = objective(3).estimate(batch, forward, generator.reverse(params)).terms
    rank = np.asarray(generator.order.groups(LENGTH))
    nll = pairs(generator, params, X)[0][(rank == RANKS).all(-1).argmax()].sum()
    np.testing.assert_allclose(terms.main, nll, rtol=1e-5)
    assert (terms.order == 0).all() and (terms.clock == 0).all()


def test_pads_that_are_not_counted_are_generated_as_if_they_were_known():
    """Same draws, same value and same gradients, also of the pointers, whose choices all count."""
    generator, params = network()
    batch = batch_of(60, jax.random.key(0))

    @jax.jit
    @jax.value_and_grad
    def value(params, padding, known):
        def reverse(*args):
            tokens, schedule = generator.reverse(params)(*args)
            sure = 1e3 * jax.nn.one_hot(batch.tokens_BL, VOCAB + 1)
            return Logits(jnp.where(known[..., None], sure, tokens.logits)), schedule

        padded = batch._replace(padding_BL=padding)
        forward = generator.forward(params, batch.tokens_BL)
        return jnp.mean(loss(objective(), padded, forward, reverse)[0])

    pads, none = jnp.arange(60)[:, None] % 4 < jnp.arange(LENGTH), jnp.zeros((60, LENGTH), bool)
    ours, theirs = value(params, pads, none), value(params, none, pads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    assert ours[0] < value(params, none, none)[0] - 0.1


def gradient(generator, params, key, samples=2):
    batch = batch_of(60, key)

    def mean_loss(params):
        forward = generator.forward(params, batch.tokens_BL)
        value, estimate = loss(objective(samples), batch, forward, generator.reverse(params))
        return jnp.mean(value), jnp.mean(sum(estimate.terms))

    grads, bound = jax.grad(mean_loss, has_aux=True)(params)
    return grads, bound


@pytest.mark.parametrize("samples", [2, 3])
def test_bound_and_gradients_of_trunk_prior_and_posterior_match_enumeration(samples):
    generator, params = network()
    exact = jax.jit(jax.value_and_grad(lambda p: exact_bound(generator, p, X)))
    bound, expected = exact(params)
    many = jax.jit(
        lambda keys: jax.lax.map(lambda k: gradient(generator, params, k, samples), keys)
    )
    grads, bounds = many(jax.random.split(jax.random.key(1), 400))
    error = np.std(bounds, ddof=1) / 20
    assert abs(np.mean(bounds) - bound) < 4 * error
    for part in ("backbone", "prior_head", "posterior_head"):
        found, wanted = (jax.flatten_util.ravel_pytree(g[part])[0] for g in (grads, expected))
        found = np.asarray(found).reshape(-1)
        rows = np.concatenate(
            [np.asarray(g).reshape(400, -1) for g in jax.tree.leaves(grads[part])], axis=1
        )
        wanted = np.concatenate([np.ravel(g) for g in jax.tree.leaves(expected[part])])
        error = rows.std(0, ddof=1) / 20
        score = (rows.mean(0) - wanted) / (error + 1e-6)
        assert np.abs(wanted).max() > 1e-3 and np.abs(score).max() < 5.5
        assert np.mean(score**2) < 1.5
    assert not any(np.any(g) for g in jax.tree.leaves(expected["walk_head"]))


class Recompute(Recall):
    """The same model without a memory of states: every call runs the whole layout again."""

    def start(self, rows):
        shape = (rows, LENGTH)
        return (jnp.full(shape, VOCAB), jnp.full(shape, LENGTH)), super().start(rows)[1]

    def read(self, memory, tokens, positions, slots):
        rows = jnp.arange(len(tokens))[:, None]
        where = jnp.where(slots < LENGTH, positions, LENGTH)
        pairs = zip(memory, (tokens, slots), strict=True)
        memory = tuple(old.at[rows, where].set(new, mode="drop") for old, new in pairs)
        moves = self._run(memory)[1].moves
        return jnp.take_along_axis(moves, positions[..., None], 1), memory

    def ask(self, memory, positions, slots):
        tokens, rank = memory
        asked = [
            rank.at[jnp.arange(len(rank)), positions[:, q]].set(slots[:, 0])
            for q in range(positions.shape[1])
        ]
        found = [self._run((tokens, r))[0].logits for r in asked]
        return jnp.stack(
            [
                jnp.take_along_axis(f, positions[:, q, None, None], 1)[:, 0]
                for q, f in enumerate(found)
            ],
            axis=1,
        )

    def _run(self, memory):
        tokens, rank = memory
        unique = jnp.argsort(jnp.argsort(rank, -1, stable=True), -1)  # the rest after, in any order
        z = jnp.full_like(tokens, VOCAB)
        return self.module.denoise(z, context_BL=tokens, rank_BL=unique)


def sampler(generator, params, rows, remember=True, **options):
    kind = Recall if remember else Recompute

    def model(params):
        return kind(generator.schedule, generator.module(params), LENGTH)

    @jax.jit
    def sample(key, tokens, rank):
        way = InAnyOrder(model, lambda *_: rank, Filter(), VOCAB, **options)
        return way.sampler()(params, row_keys(key, jnp.arange(rows)), tokens, rank < LENGTH)

    nothing = jnp.zeros((rows, LENGTH), jnp.int32)
    return lambda key, tokens=nothing, rank=nothing + LENGTH: sample(key, tokens, rank)


def cells(samples):
    """Counts of every (sequence, order) pair, [8, 6]; orders by the call that revealed."""
    text = np.asarray(samples.tokens_BT) @ [4, 2, 1]
    order = (np.asarray(samples.revealed_BT)[:, None] - 1 == RANKS).all(-1).argmax(-1)
    return np.bincount(text * 6 + order, minlength=48).reshape(8, 6)


@pytest.mark.parametrize("name", ["lomdm-ranked", "walk", "mdm"])
def test_the_sampler_with_a_memory_has_the_models_distribution(name):
    generator, params = network(name)
    samples = sampler(generator, params, 20_000)(jax.random.key(0))
    joint = exact_p(generator, params)
    assert (
        stats.chisquare(cells(samples).ravel(), 20_000 * (joint / joint.sum()).ravel()).pvalue
        > 1e-3
    )
    assert int(samples.calls) == LENGTH


def test_the_chi_square_test_can_fail():
    """All at once: neither tokens nor places know of one another."""
    generator, params = network()
    samples = sampler(generator, params, 20_000, reveal=3)(jax.random.key(0))
    assert int(samples.calls) == 1
    joint = exact_p(generator, params).sum(-1)
    found = np.bincount(np.asarray(samples.tokens_BT) @ [4, 2, 1], minlength=8)
    assert stats.chisquare(found, 20_000 * joint / joint.sum()).pvalue < 1e-6


@pytest.mark.parametrize("reveal", [1, 2])
def test_with_and_without_a_memory_the_samples_are_the_same(reveal):
    """Draw for draw, with a given position in the middle of some rows."""
    generator, params = network()
    tokens = jnp.ones((200, LENGTH), jnp.int32)
    rank = jnp.where((jnp.arange(200)[:, None] % 2 == 0) & (jnp.arange(LENGTH) == 1), 0, LENGTH)
    both = [
        sampler(generator, params, 200, remember, reveal=reveal)(jax.random.key(3), tokens, rank)
        for remember in (True, False)
    ]
    np.testing.assert_array_equal(both[0].tokens_BT, both[1].tokens_BT)
    np.testing.assert_array_equal(both[0].revealed_BT, both[1].revealed_BT)
    assert (both[0].tokens_BT[::2, 1] == 1).all() and (both[0].revealed_BT[::2, 1] == 0).all()


def test_an_infill_has_the_conditional_distribution_of_its_order():
    """Surroundings first, in an order of the caller's: p(x_1 | x_2, then x_0)."""
    generator, params = network()
    order = (ORDERS == [2, 0, 1]).all(-1).argmax()
    rank = jnp.tile(jnp.array([1, LENGTH, 0]), (20_000, 1))
    tokens = jnp.tile(jnp.asarray(X), (20_000, 1))
    samples = sampler(generator, params, 20_000)(jax.random.key(4), tokens, rank)
    nll = [float(pairs(generator, params, [X[0], v, X[2]])[0][order, 1]) for v in range(VOCAB)]
    assert sum(np.exp(-np.array(nll))) == pytest.approx(1, abs=1e-5)
    found = np.bincount(samples.tokens_BT[:, 1], minlength=VOCAB)
    assert (
        stats.chisquare(
            found, 20_000 * np.exp(-np.array(nll)) / np.exp(-np.array(nll)).sum()
        ).pvalue
        > 1e-3
    )


def test_the_likelihood_of_a_blank_given_the_rest():
    """Targets alone are counted, after all that is given, which comes in the order's own way."""
    generator, params = network()
    batch = batch_of(400, jax.random.key(0))
    batch = batch._replace(targets_BL=batch.targets_BL & (jnp.arange(LENGTH) == 1))
    estimate, ranks = ranks_of(objective(1), batch, generator, params)
    terms = estimate.terms
    forward = generator.forward(params, batch.tokens_BL)
    nll, _, _ = jax.jit(lambda x: pairs(generator, params, x))(X)
    found = [nll[(order == ORDERS).all(-1).argmax(), 1] for order in ([0, 2, 1], [2, 0, 1])]
    given = Weights(*(a if a is None else a[:1] for a in forward.weights()))
    given = given.after(jnp.arange(LENGTH) != 1)
    p = np.exp(race.next_log_shares(given, jnp.ones((1, LENGTH), bool), jnp.array([-1]))[0][0])
    first = (ranks == [0, 2, 1]).all(-1)
    assert (first | (ranks == [1, 2, 0]).all(-1)).all()
    np.testing.assert_allclose(terms.main[0], np.where(first, *found), rtol=1e-5)
    assert first.mean() == pytest.approx(float(p[0]), abs=4 * float(p[0] * p[2] / 400) ** 0.5)
    np.testing.assert_allclose(terms.order, 0, atol=1e-6)  # there is no choice


def test_dependence_bounds_what_a_call_reveals():
    """With none allowed every row goes one by one and is exact; with all, it is one call."""
    generator, params = network()
    joint = exact_p(generator, params)
    samples = sampler(generator, params, 20_000, reveal=3, dependence=0.0)(jax.random.key(0))
    assert int(samples.calls) == LENGTH
    assert (
        stats.chisquare(cells(samples).ravel(), 20_000 * (joint / joint.sum()).ravel()).pvalue
        > 1e-3
    )


def ranks_of(objective, batch, generator, params):
    """The estimate, and the ranks that it drew, [B, L]."""

    @jax.jit
    def draw(batch, params):
        ranks = []

        def spy(z, log_t, context, rank):
            ranks.append(rank[0])
            return generator.reverse(params)(z, log_t, context, rank)

        estimate = objective.estimate(batch, generator.forward(params, batch.tokens_BL), spy)
        return estimate, ranks[0]

    return jax.device_get(draw(batch, params))


def test_rows_for_blanks_reveal_a_span_last_and_teach_the_network_only():
    generator, params = network()
    batch = batch_of(512, jax.random.key(0))
    batch = batch._replace(uniform_B=jnp.arange(512)[::-1] / 512)  # blanks last, groups first
    blanks = objective(blank_share=0.25, order_share=0.5)
    estimate, ranks = ranks_of(blanks, batch, generator, params)
    plain, before = ranks_of(objective(order_share=0.5), batch, generator, params)
    blank = np.arange(512) >= 384
    order, main = np.asarray(estimate.terms.order[0]), np.asarray(estimate.terms.main[0])
    assert (order[blank] == 0).all() and (order[~blank] != 0).any()
    np.testing.assert_array_equal(main[~blank], plain.terms.main[0, ~blank])
    np.testing.assert_array_equal(ranks[~blank], before[~blank])
    changed = (ranks[blank] != before[blank]).any(-1).mean()
    assert 0.1 < changed < 0.9
    assert estimate.credit.log_q_KGN.shape == (2, 128, LENGTH)
    np.testing.assert_array_equal(estimate.credit.log_q_KGN, plain.credit.log_q_KGN)


def test_a_blank_is_a_span_that_comes_last():
    """Left to right but for the blank: ranks tell which span it was. There are no groups to spare:
    nothing is compared in a fixed order."""
    generator, params = network("ar")
    batch = batch_of(512, jax.random.key(0))._replace(uniform_B=jnp.zeros(512))
    ranks = ranks_of(objective(blank_share=0.5), batch, generator, params)[1]
    share = {tuple(rank): (ranks == rank).all(-1).mean() for rank in np.unique(ranks, axis=0)}
    # Of the sorted pairs of ends in 0..3 with repetition, 16 in all: two are the span 0:1, two 1:2,
    # two 0:2, and the ten others leave left to right as it is.
    expected = {(2, 0, 1): 2 / 16, (0, 2, 1): 2 / 16, (1, 2, 0): 2 / 16, (0, 1, 2): 10 / 16}
    assert share.keys() == expected.keys()
    for rank, p in expected.items():
        assert share[rank] == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 512))


def test_trials_take_turns_and_nothing_is_learned_of_the_order():
    generator, params = network()
    batch = batch_of(1200, jax.random.key(0))
    estimate, ranks = ranks_of(objective(4), batch, generator.at_random(), params)
    assert (estimate.terms.order == 0).all() and estimate.credit is None
    share = {}
    for number, name in enumerate(TRIALS):
        mine = ranks[300 * number : 300 * (number + 1)]
        share[name] = [np.mean((mine == wanted).all(-1)) for wanted in ([0, 1, 2], [2, 1, 0])]
    assert share["to the right"][0] > 0.99 and share["to the left"][1] > 0.99
    assert share["to both sides"][0] == pytest.approx(0.25, abs=0.1)
    assert share["at random"][0] == pytest.approx(1 / 6, abs=0.09)


def test_groups_take_the_text_of_their_first_row():
    np.testing.assert_array_equal(leaders(8, 2, 0.5), [0, 1, 2, 3, 0, 1, 6, 7])
    np.testing.assert_array_equal(leaders(8, 4, 0.6), [0, 1, 0, 3, 0, 5, 0, 7])
    # In two parts, the even and the odd rows, each has a group of two; in one they are the same.
    np.testing.assert_array_equal(leaders(8, 2, 0.5, parts=2), leaders(8, 2, 0.5))
    np.testing.assert_array_equal(leaders(6, 1, 1.0), np.arange(6))
