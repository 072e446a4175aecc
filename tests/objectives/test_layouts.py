"""Attention that follows a fixed order: one pass gives what the general bound gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from lomdm_jax.generator import Generator
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives import make_objective
from lomdm_jax.objectives.corruption import corrupt_groups, stratified_uniforms
from lomdm_jax.objectives.nelbo import Batch
from lomdm_jax.orders import make_order
from lomdm_jax.sampling.driver import generate
from lomdm_jax.sampling.race import Race
from tests import oracle

LENGTH, VOCAB = 4, 2
X = np.array([1, 0, 0, 1], np.int32)


def network(name, follow=True):
    """A tiny network with random parameters; with `follow` its attention follows the order."""
    order = make_order(name, c1=1.0, c2=0.0, exponent=1.0)
    sizes = Sizes(VOCAB + 1, width=8, layers=2, heads=2, cond_dim=4, dropout=0.0, dtype=jnp.float32)
    groups = tuple(order.groups(LENGTH).tolist()) if follow and order.groups else None
    module = Denoiser(sizes, mask_id=VOCAB, scores="none", groups=groups, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(module, nnx.Param)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(params))
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [a + 0.7 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return Generator(graphdef, order, VOCAB), tree.unflatten(leaves)


def estimates(name, in_groups, count, key):
    generator, params = network(name)
    objective = make_objective(
        "order",
        mask_id=VOCAB,
        samples=1,
        eps=1e-3,
        reconstruction_share=0.1,
        in_groups=in_groups,
    )
    tokens = jnp.tile(jnp.asarray(X), (count, 1))
    time_key, row_key = jax.random.split(key)
    uniform = stratified_uniforms(time_key, jnp.arange(count), count)
    keys = jax.random.split(row_key, count)
    batch = Batch(tokens, jnp.ones_like(tokens, bool), keys, uniform)
    return objective.estimate(
        batch, generator.forward(params, tokens), generator.reverse(params)
    ).terms


def exact(name):
    """The bound of X by enumerating every state with the general model, without any context."""
    return float(oracle.closed_form(oracle.states_of(*network(name), X)).main)


@pytest.mark.parametrize("name", ["ar", "r2l", "block:1", "permutation:3"])
def test_one_pass_of_the_causal_layout_is_the_chain_rule(name):
    """No noise at all, and the same number as the general bound and as -log p."""
    terms = estimates(name, True, 2, jax.random.key(0))
    np.testing.assert_allclose(terms.main, exact(name), rtol=2e-5)
    assert -float(oracle.log_p(*network(name), X)) == pytest.approx(exact(name), rel=2e-5)


@pytest.mark.parametrize("name", ["block:2", "block:4"])
def test_one_pass_of_the_doubled_layout_is_the_general_bound(name):
    """By enumerating every combination of masks of all blocks, and by Monte Carlo."""
    generator, params = network(name)
    size = int(name.partition(":")[2])
    subsets = [s for s in oracle.masks(size) if s.any()]
    total = 0.0
    for block in range(LENGTH // size):
        place = slice(block * size, (block + 1) * size)
        for subset in subsets:
            mask = np.ones(LENGTH, bool)  # what other blocks mask must not matter: mask all
            mask[place] = subset
            z = jnp.where(mask, VOCAB, X)[None, None]
            logits = generator.reverse(params)(z, None, jnp.asarray(X)[None])[0][0, 0]
            log_p = jax.nn.log_softmax(logits[:, :VOCAB])
            nll = -np.asarray(log_p)[np.arange(LENGTH), X]
            n = subset.sum()
            ways = np.sum([s.sum() == n for s in subsets])
            total += (nll[place] * subset).sum() / n / ways  # size / n, times 1 / size for n
    assert total == pytest.approx(exact(name), rel=2e-5)
    draw = jax.jit(lambda key: jnp.mean(estimates(name, True, 64, key).main))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 200)), np.float64)
    assert abs(drawn.mean() - total) < 4 * drawn.std(ddof=1) / np.sqrt(200) + 1e-5


@pytest.mark.parametrize("name", ["ar", "block:2"])
def test_both_time_free_estimates_agree(name):
    draw = jax.jit(lambda key: jnp.mean(estimates(name, False, 64, key).main))
    drawn = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(2), 200)), np.float64)
    assert abs(drawn.mean() - exact(name)) < 4 * drawn.std(ddof=1) / np.sqrt(200) + 1e-5


def test_a_permutation_is_left_to_right_on_permuted_text():
    """Same parameters: the logits of `permutation` are those of `ar` put back in place."""
    (ar, params), (permuted, _) = network("ar"), network("permutation:3")
    group = permuted.order.groups(LENGTH)
    order = np.argsort(group)
    z = jnp.asarray(X)[None, None]
    straight = ar.reverse(params)(z[..., order], None)[0]
    np.testing.assert_allclose(
        permuted.reverse(params)(z, None)[0], straight[..., group, :], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["ar", "r2l", "block:2"])
def test_nothing_leaks_from_what_is_revealed_later(name):
    """Logits change only where the changed token was revealed before."""
    generator, params = network(name)
    group = generator.order.groups(LENGTH)
    z = jnp.full((1, 1, LENGTH), VOCAB)
    for changed in range(LENGTH):
        other = X.copy()
        other[changed] = 1 - other[changed]
        ours, theirs = (
            generator.reverse(params)(z, None, jnp.asarray(x)[None])[0][0, 0] for x in (X, other)
        )
        differs = np.asarray(jnp.abs(ours - theirs).max(-1) > 1e-6)
        np.testing.assert_array_equal(differs, group > group[changed])


def test_one_block_of_everything_is_the_bidirectional_model():
    """Same parameters, same logits: contents are seen by no query."""
    (block, params), (mdm, _) = network("block:4"), network("mdm")
    z = jnp.array([[[VOCAB, 0, 1, VOCAB]]])
    np.testing.assert_allclose(
        block.reverse(params)(z, None)[0], mdm.reverse(params)(z, None)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["ar", "r2l", "block:2"])
def test_samples_follow_the_model(name):
    generator, params = network(name)
    nothing = jnp.zeros((8000, LENGTH), jnp.int32)
    sample = jax.jit(
        lambda key: generate(
            key, generator.reverse(params), Race(1, LENGTH), nothing, nothing > 0, mask_id=VOCAB
        )
    )
    p = [
        float(jnp.exp(oracle.log_p(generator, params, x))) for x in oracle.sequences(LENGTH, VOCAB)
    ]
    assert sum(p) == pytest.approx(1, abs=1e-5)
    found = np.bincount(
        np.asarray(sample(jax.random.key(0)).tokens_BL) @ [8, 4, 2, 1], minlength=16
    )
    assert stats.chisquare(found, 8000 * np.array(p) / sum(p)).pvalue > 1e-3


def test_group_masks_leave_out_what_is_no_target():
    targets = jnp.tile(jnp.array([True, False, True, True]), (500, 1))
    group = jnp.tile(jnp.array([0, 0, 1, 1]), (500, 1))
    keys, uniform = jax.random.split(jax.random.key(0), 500), jnp.linspace(0, 0.999, 500)
    mask, weight = corrupt_groups(keys, group, uniform, targets, 3)
    assert not mask[..., 1].any() and mask[..., 0].all()
    counts = mask[..., 2:].sum(-1)
    assert set(np.unique(counts)) == {1, 2}
    np.testing.assert_allclose(weight[..., 2] * counts, 2)
    np.testing.assert_allclose(weight[..., 0], 1)
