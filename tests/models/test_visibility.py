"""Who sees whom: the ranked rule against a plain mask, whole and in parts, and what it equals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from lomdm_jax.models import visibility
from lomdm_jax.models.transformer import Sizes, Transformer
from lomdm_jax.models.visibility import Cached, causal, full, ranked
from tests.networks import noisy, shapes_of

SIZES = Sizes(11, width=16, layers=2, heads=2, cond_dim=8, dropout=0.0, dtype=jnp.float32)


@pytest.fixture(scope="module")
def backbone():
    """With random weights, so that every gate is open."""
    graphdef, shapes = shapes_of(lambda: Transformer(SIZES, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, noisy(shapes, 0.3))


def heads(key, rows, length):
    return tuple(jax.random.normal(k, (rows, length, 2, 4)) for k in jax.random.split(key, 3))


def plain(query, key, value, rank, segment):
    """The rule written out with one mask, [B, 2 L, 2 L]."""
    length = rank.shape[-1]
    r = np.concatenate([rank, rank], axis=-1)
    s = np.concatenate([segment, segment], axis=-1)
    lower, equal = r[:, None] < r[..., None], r[:, None] == r[..., None]
    asks = np.arange(2 * length) < length
    mask = np.where(
        asks[:, None],
        np.where(asks, equal, lower),
        np.where(asks, False, lower | equal),
    )
    mask &= s[:, None] == s[..., None]
    return jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(mask)[:, None])


@pytest.mark.parametrize("ranks", ["positions", "permutations", "blocks", "segments"])
@pytest.mark.parametrize("rows", [256, 4])
def test_the_rule_in_parts_is_the_rule_with_a_mask(monkeypatch, ranks, rows):
    """Values and gradients; 4 rows at a time leave a rest of 2."""
    monkeypatch.setattr(visibility, "ROWS", rows)
    length, rng = 10, np.random.default_rng(0)
    rank = {
        "positions": np.arange(length)[None].repeat(3, 0),
        "permutations": rng.permuted(np.arange(length)[None].repeat(3, 0), axis=1),
        "blocks": np.arange(length)[None].repeat(3, 0) // 5,
        "segments": rng.permuted(np.arange(length)[None].repeat(3, 0), axis=1),
    }[ranks]
    segment = (np.arange(length) >= 6)[None].repeat(3, 0) * int(ranks == "segments")
    inputs = heads(jax.random.key(0), 3, 2 * length)
    view = ranked(jnp.asarray(rank), jnp.asarray(segment) if segment.any() else None)
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)

    def ours(inputs):
        return jnp.sum(weights * view.attend(*inputs)[0])

    def theirs(inputs):
        return jnp.sum(weights * plain(*inputs, rank, segment))

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(ours)(inputs)),
        jax.tree.leaves(jax.value_and_grad(theirs)(inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", [full, causal])
@pytest.mark.parametrize("rows", [256, 4])
def test_segments_in_parts_are_those_of_a_mask(monkeypatch, kind, rows):
    """Values and gradients, of rows that are cut in different places."""
    monkeypatch.setattr(visibility, "ROWS", rows)
    length = 10
    segment = jnp.array([[0] * 6 + [1] * 4, [0, 1, 1, 2, 2, 2, 2, 2, 2, 5], [3] * 10])
    mask = segment[:, None] == segment[..., None]
    mask &= kind is full or np.tri(length, dtype=bool)
    inputs = heads(jax.random.key(0), 3, length)
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)

    def ours(inputs):
        return jnp.sum(weights * kind(length, segment).attend(*inputs)[0])

    def theirs(inputs):
        return jnp.sum(weights * jax.nn.dot_product_attention(*inputs, mask=mask[:, None]))

    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(ours)(inputs)),
        jax.tree.leaves(jax.value_and_grad(theirs)(inputs)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["ranked", "full", "causal"])
def test_no_whole_mask_at_length_1024(kind):
    """Of all arrays that a training pass makes, none is as large as a mask [L, L]; small heads
    and one row, so that only something quadratic could be."""
    length, segment = 1024, jnp.zeros((1, 1024), jnp.int32)
    view = ranked(jnp.arange(length)[None])
    if kind != "ranked":
        view = {"full": full, "causal": causal}[kind](length, segment)
    seen = len(view.positions)
    inputs = tuple(a[:, :, :1, :2] for a in heads(jax.random.key(0), 1, seen))

    def total(inputs):
        return jnp.sum(view.attend(*inputs)[0])

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield variable.aval.size
            for inner in jaxprs_in_params(equation.params):
                yield from largest(inner)

    sizes = list(largest(jax.make_jaxpr(jax.grad(total))(inputs).jaxpr))
    assert max(sizes) == visibility.ROWS * seen < length**2


def test_packed_segments_are_as_if_alone(backbone):
    """Two texts in one row, each with its own ranks, against the first in a row of its own."""
    tokens = jax.random.randint(jax.random.key(0), (1, 8), 0, 10)
    rank = jnp.array([[1, 0, 2, 3, 0, 2, 1, 3]])
    segment = jnp.arange(8)[None] // 4
    cond = backbone.condition(jnp.zeros(1))
    both = jnp.concatenate([jnp.full_like(tokens, 10), tokens], axis=1)
    packed = backbone.hidden(both, cond, ranked(rank, segment))
    first = jnp.concatenate([jnp.full_like(tokens[:, :4], 10), tokens[:, :4]], axis=1)
    alone = backbone.hidden(first, cond, ranked(rank[:, :4]))
    np.testing.assert_allclose(packed[:, :4], alone[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 8:12], alone[:, 4:], rtol=1e-4, atol=1e-5)


def test_left_to_right_it_is_a_causal_model_that_is_asked_by_a_mask_token(backbone):
    """Contents have the very states of a causal pass over the text, unshifted; a query has what
    such a pass gives for a mask token that is appended to the text before it."""
    length, mask_id = 5, 10
    tokens = jax.random.randint(jax.random.key(0), (2, length), 0, 10)
    cond = backbone.condition(jnp.zeros(2))
    both = jnp.concatenate([jnp.full_like(tokens, mask_id), tokens], axis=1)
    hidden = backbone.hidden(both, cond, ranked(jnp.arange(length)[None]))
    plain = backbone.hidden(tokens, cond, causal(length))
    np.testing.assert_allclose(hidden[:, length:], plain, rtol=1e-4, atol=1e-5)
    for place in range(length):  # what stands behind it is not seen
        asked = tokens.at[:, place].set(mask_id)
        answer = backbone.hidden(asked, cond, causal(length))[:, place]
        np.testing.assert_allclose(hidden[:, place], answer, rtol=1e-4, atol=1e-5)


def queries(places, slots, length):
    return Cached(places, jnp.zeros_like(slots), slots, jnp.arange(length))


def contents(places, slots, length):
    return queries(places, slots + 1, length)._replace(slots=slots)


def test_a_memory_holds_what_a_whole_pass_computes(backbone):
    """Contents read in pieces, out of order, and queries after them, as in one ranked pass."""
    length, mask_id = 6, 10
    tokens = jax.random.randint(jax.random.key(0), (2, length), 0, 10)
    order = jnp.array([[3, 1, 5, 0, 2, 4], [0, 5, 2, 1, 4, 3]])
    rank = jnp.argsort(order, -1)
    cond = backbone.condition(jnp.zeros(2))
    both = jnp.concatenate([jnp.full_like(tokens, mask_id), tokens], axis=1)
    whole = backbone.hidden(both, cond, ranked(rank))
    memories = backbone.memories(2, length)
    for start, end in ((0, 3), (3, 4), (4, 6)):
        places = order[:, start:end]
        slots = jnp.tile(jnp.arange(start, end), (2, 1))
        asked, _ = backbone.recall(
            jnp.full_like(places[:, :1], mask_id),
            cond,
            queries(places[:, :1], slots[:, :1], length),
            memories,
        )
        here = jnp.take_along_axis(whole[:, :length], places[:, :1, None], 1)
        np.testing.assert_allclose(asked, here, rtol=1e-4, atol=1e-5)
        text = jnp.take_along_axis(tokens, places, 1)
        read, memories = backbone.recall(text, cond, contents(places, slots, length), memories)
        here = jnp.take_along_axis(whole[:, length:], places[..., None], 1)
        np.testing.assert_allclose(read, here, rtol=1e-4, atol=1e-5)


def test_slots_beyond_the_end_are_not_written(backbone):
    tokens, beyond = jnp.ones((2, 3), jnp.int32), jnp.full((2, 3), 4)
    memories = backbone.memories(2, 4)
    view = contents(jnp.zeros((2, 3), jnp.int32), beyond, 4)
    _, after = backbone.recall(tokens, backbone.condition(jnp.zeros(2)), view, memories)
    assert not any(np.any(a) for a in jax.tree.leaves(after))
