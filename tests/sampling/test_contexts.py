"""What a model remembers while it samples, against passes that read everything again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.sampling import make_sampler
from lomdm_jax.sampling.contexts import Blocks, Causal, _held
from lomdm_jax.sampling.driver import row_keys
from tests.networks import noisy

VOCAB, LENGTH, ROWS = 5, 8, 3


@functools.cache
def network(name, layers=2):
    """A tiny network of an order, with random parameters everywhere."""
    config = default_config()
    sizes = {"width": 16, "layers": layers, "heads": 2, "cond_dim": 8, "dropout": 0.0}
    config.model.update(sizes)
    config.order.name, config.data.length = name, LENGTH
    shapes = jax.eval_shape(lambda: init_params(config, VOCAB + 1, jax.random.key(0)))
    return make_generator(config, VOCAB + 1, VOCAB), noisy(shapes, 0.3)


def text(length=LENGTH):
    return jax.random.randint(jax.random.key(2), (ROWS, length), 0, VOCAB)


def walked(context, tokens, first):
    """Logits [ROWS, K, V] of every block from the first that is not given, with the last of its
    positions revealed, and the text before it."""
    given = jnp.arange(tokens.shape[1])[None] < first
    memory, block = context.begin(tokens, jnp.broadcast_to(given, tokens.shape))
    found = {}
    while int(block) * context.size < tokens.shape[1]:
        places = context.places(block)
        z = tokens.at[:, places[: context.size - 1]].set(VOCAB)
        if context.size == 1:
            z = tokens.at[:, places].set(VOCAB)
        logits, _ = context.look(memory, z, block, jnp.zeros(ROWS))
        found[int(block)] = logits
        memory, block = context.finish(memory, tokens, block), block + 1
    return found


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("name", ["ar", "r2l", "permutation:1"])
def test_a_causal_cache_gives_the_logits_of_a_whole_pass(name, first):
    generator, params = network(name)
    order = np.argsort(generator.order.groups(LENGTH))
    tokens, module = text(), generator.module(params)
    given = jnp.zeros((ROWS, LENGTH), bool).at[:, order[:first]].set(True)
    context = Causal(module, order, LENGTH)
    memory, block = context.begin(tokens, given)
    assert int(block) == first
    whole, _ = generator.reverse(params)(jnp.full((1, ROWS, LENGTH), VOCAB), None, tokens)
    for number in range(first, LENGTH):
        logits, _ = context.look(memory, tokens, jnp.int32(number), jnp.zeros(ROWS))
        np.testing.assert_allclose(
            logits[:, 0], whole.logits[0, :, order[number]], rtol=1e-4, atol=1e-4
        )
        memory = context.finish(memory, tokens, jnp.int32(number))


@pytest.mark.parametrize("first", [0, 5])
def test_a_cache_of_blocks_gives_the_logits_of_a_whole_pass(first):
    generator, params = network("block:4")
    tokens = text()
    context = Blocks(generator.module(params), LENGTH, LENGTH, 4)
    found = walked(context, tokens, first)
    assert set(found) == ({0, 1} if first == 0 else {1})
    for block, logits in found.items():
        places = slice(4 * block, 4 * block + 4)
        z = tokens.at[:, 4 * block : 4 * block + 3].set(VOCAB)[None]
        whole, _ = generator.reverse(params)(z, None, tokens)
        np.testing.assert_allclose(logits, whole.logits[0][:, places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 6, 12])
@pytest.mark.parametrize("name", ["ar", "block:4"])
def test_beyond_the_training_length_the_oldest_is_forgotten(name, first):
    """With one layer a state holds nothing but its own token: then 16 tokens in a cache of 8 are
    what a pass over the last 8 gives. Positions are relative."""
    generator, params = network(name, layers=1)
    tokens, module = text(16), generator.module(params)
    context = {
        "ar": Causal(module, np.arange(16), LENGTH),
        "block:4": Blocks(module, 16, LENGTH, 4),
    }[name]
    found = walked(context, tokens, first)
    assert max(found) == 16 // context.size - 1
    for block, logits in found.items():
        end = (block + 1) * context.size
        start = max(0, end - LENGTH)
        seen = tokens[:, start : start + LENGTH]
        here = slice(end - start - context.size, end - start)
        z = jnp.full_like(seen, VOCAB)
        if context.size > 1:
            z = z.at[:, end - start - 1].set(seen[:, end - start - 1])
        # The causal layout begins with a mask token, which the cache has forgotten by then.
        if name == "ar" and start > 0:
            seen = jnp.concatenate([tokens[:, start - 1 : end - 1], seen[:, -1:]], 1)
            logits_of = _without_start(generator, params, seen)
        else:
            logits_of = generator.reverse(params)(z[None], None, seen)[0].logits[0]
        ours, theirs = (a[..., :VOCAB] for a in (logits, logits_of[:, here]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def _without_start(generator, params, seen):
    """The causal network on tokens that stand one place to the left of what they predict."""
    from lomdm_jax.models.visibility import causal

    backbone = generator.module(params).backbone
    cond = backbone.condition(jnp.zeros(ROWS))
    hidden = backbone.hidden(seen[:, :LENGTH], cond, causal(LENGTH))
    return backbone.output_layer(hidden, cond).logits


def test_slots_are_written_in_turn():
    np.testing.assert_array_equal(_held(2, 4), [0, 1, 2, -1])
    np.testing.assert_array_equal(_held(5, 4), [4, 5, 2, 3])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ar", {}),
        ("ar", {"length": 16}),
        ("r2l", {}),
        ("block:4", {"sampler": "ancestral", "steps": 3}),
        ("block:4", {"sampler": "confidence", "reveal": 2, "length": 16}),
        ("lomdm", {"length": 16, "block": 4, "sampler": "ancestral", "steps": 4}),
        ("lomdm-ranked", {"reveal": 2}),
    ],
)
def test_rows_of_a_batch_do_not_influence_one_another(name, settings):
    """Prompts of different lengths, with an end of text: alone, and among others. None is empty:
    of masks alone all positions are equally likely, and rounding would choose the first."""
    generator, params = network(name)
    config = default_config().sample
    config.update(settings | {"stop_at_eos": name != "r2l"})
    sampler = make_sampler(config, generator, eos_id=0, window=LENGTH)
    length = settings.get("length", LENGTH)
    rows, tokens = 6, jax.random.randint(jax.random.key(3), (6, length), 0, VOCAB)
    given = jnp.arange(length)[None] < jnp.array([2, 3, 5, 1, 7, 4])[:, None]
    keys = row_keys(jax.random.key(4), jnp.arange(rows))
    run = jax.jit(lambda *inputs: sampler(*inputs))
    together, alone = (
        jax.device_get(run(params, *(a[:n] for a in (keys, tokens, given)))) for n in (6, 2)
    )
    for field in ("tokens_BT", "revealed_BT", "calls_B", "length_B"):
        ours, theirs = getattr(alone, field), getattr(together, field)[:2]
        np.testing.assert_array_equal(ours, theirs, err_msg=field)
    kept = np.where(given, tokens, together.tokens_BT)
    np.testing.assert_array_equal(together.tokens_BT, kept)
    assert (together.revealed_BT[given] == 0).all()
    hidden = ~given & (np.arange(length) < together.length_B[:, None])
    assert (together.revealed_BT[hidden] > 0).all() and (together.tokens_BT < VOCAB).all()
