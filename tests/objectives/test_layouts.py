"""Attention that follows a fixed order: one pass gives what the general bound gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from lomdm_jax.config import default_config
from lomdm_jax.generator import Generator
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives import make_objective
from lomdm_jax.objectives.corruption import corrupt_groups, group_uniforms, stratified_uniforms
from lomdm_jax.objectives.nelbo import FULL_RANGE, Batch, targets_of
from lomdm_jax.orders import make_order
from lomdm_jax.sampling import make_sampler
from tests import oracle
from tests.networks import noisy, shapes_of

LENGTH, VOCAB = 4, 2
X = np.array([1, 0, 0, 1], np.int32)
ALL_BUT_FIRST = 0b1110  # the subset of positions in the oracle's numbering


def network(name, follow=True):
    """A tiny network with random parameters; with `follow` its attention follows the order."""
    order = make_order(name, c1=1.0, c2=0.0, exponent=1.0)
    sizes = Sizes(VOCAB + 1, width=8, layers=2, heads=2, cond_dim=4, dropout=0.0, dtype=jnp.float32)
    groups = tuple(order.groups(LENGTH).tolist()) if follow and order.groups else None
    layout = "full" if groups is None else "causal" if len(set(groups)) == LENGTH else "ranked"
    options = dict(mask_id=VOCAB, scores="none", layout=layout, groups=groups)
    graphdef, shapes = shapes_of(lambda: Denoiser(sizes, rngs=nnx.Rngs(0), **options))
    return Generator(graphdef, order, VOCAB), noisy(shapes, 0.5, seed=3)


def rows(count, key, ignore_first=False):
    tokens = jnp.tile(jnp.asarray(X), (count, 1))
    time_key, row_key = jax.random.split(key)
    uniform = stratified_uniforms(time_key, jnp.arange(count), count)
    targets = targets_of(jnp.ones_like(tokens, bool), ignore_first)
    return Batch(tokens, targets, jax.random.split(row_key, count), uniform)


def estimate(name, in_groups, batch, estimator="order"):
    generator, params = network(name)
    objective = make_objective(
        estimator,
        mask_id=VOCAB,
        samples=1,
        eps=1e-3,
        reconstruction_share=0.1,
        one_pass="groups" if in_groups else "state",
    )
    return objective.estimate(
        batch, generator.forward(params, batch.tokens_BL), generator.reverse(params)
    )


def mean_and_error(name, in_groups, key, **changes):
    """Of the bound over 200 batches of 64 rows, and the standard error of the mean."""

    def draw(key):
        batch = rows(64, key, changes.get("ignore_first", False))
        terms = estimate(name, in_groups, batch, changes.get("estimator", "order")).terms
        return jnp.mean(sum(terms))

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(key, 200)), np.float64)
    return drawn.mean(), drawn.std(ddof=1) / np.sqrt(200)


def exact(name, start=-1):
    """The bound of X by enumerating every state with the general model, without any context."""
    return float(oracle.closed_form(oracle.states_of(*network(name), X), start).main)


@pytest.mark.parametrize("name", ["ar", "r2l", "block:1", "permutation:3"])
def test_one_pass_of_the_causal_layout_is_the_chain_rule(name):
    """No noise at all, and the same number as the general bound and as -log p."""
    terms = estimate(name, True, rows(2, jax.random.key(0))).terms
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
            tokens, _ = generator.reverse(params)(z, None, jnp.asarray(X)[None])
            log_p = jax.nn.log_softmax(tokens.logits[0, 0, :, :VOCAB])
            nll = -np.asarray(log_p)[np.arange(LENGTH), X]
            n = subset.sum()
            ways = np.sum([s.sum() == n for s in subsets])
            total += (nll[place] * subset).sum() / n / ways  # size / n, times 1 / size for n
    assert total == pytest.approx(exact(name), rel=2e-5)
    mean, error = mean_and_error(name, True, jax.random.key(1))
    assert abs(mean - total) < 4 * error + 1e-5


@pytest.mark.parametrize("name", ["ar", "block:2"])
@pytest.mark.parametrize(
    ("estimator", "in_groups"), [("order", False), ("continuous", False), ("continuous", True)]
)
def test_every_other_estimate_has_the_same_mean(name, estimator, in_groups):
    """The general ones, state by state, and a time for every group of the layout at once."""
    mean, error = mean_and_error(name, in_groups, jax.random.key(2), estimator=estimator)
    assert abs(mean - exact(name)) < 4 * error + 1e-5


def test_every_group_has_a_time_of_its_own():
    """With u = 0 the first block stands at the end, eps, and the second at u = 1/2."""
    batch = rows(4000, jax.random.key(0))._replace(uniform_B=jnp.zeros(4000))
    found = estimate("block:2", True, batch, "continuous")
    t = 1e-3 + (1 - 1e-3) * (0.5 - 0.1) / 0.9
    shares = found.mask_KBL.mean((0, 1))
    np.testing.assert_allclose(shares[:2], 1e-3, atol=4 * np.sqrt(1e-3 / 4000))
    np.testing.assert_allclose(shares[2:], t, atol=4 * np.sqrt(t * (1 - t) / 4000))
    generator, params = network("block:2")
    z = jnp.where(found.mask_KBL, VOCAB, batch.tokens_BL)
    tokens, _ = generator.reverse(params)(z, None, batch.tokens_BL)
    log_p = jax.nn.log_softmax(tokens.logits[..., :VOCAB])[..., np.arange(LENGTH), X]
    nats = -jnp.where(found.mask_KBL, log_p, 0.0).reshape(1, 4000, 2, 2).sum(-1)
    main = (1 - 1e-3) / 0.9 / t * nats[..., 1]
    np.testing.assert_allclose(found.terms.main, main, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.terms.reconstruction, nats[..., 0] / 0.1, rtol=1e-4, atol=1e-5)


def test_a_time_for_one_block_of_everything_is_masked_diffusions():
    """The same draws from the same keys, and so the same terms."""
    batch = rows(64, jax.random.key(0))
    block = estimate("block:4", True, batch, "continuous").terms
    mdm = estimate("mdm", False, batch, "continuous").terms
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), block, mdm)


@pytest.mark.parametrize("name", ["mdm", "ar", "r2l", "block:2"])
@pytest.mark.parametrize("estimator", ["order", "continuous"])
def test_a_given_first_position_leaves_the_bound_of_the_rest(name, estimator):
    """Of x_1, x_2, ... given x_0, by enumeration from the state in which only x_0 is known."""
    changes = dict(estimator=estimator, ignore_first=True)
    mean, error = mean_and_error(name, name != "mdm", jax.random.key(3), **changes)
    rest = exact(name, ALL_BUT_FIRST)
    assert abs(mean - rest) < 4 * error + 1e-5
    nll = -float(oracle.log_p(*network(name), X, ALL_BUT_FIRST))
    assert rest >= nll - 1e-5 and exact(name) > rest + 0.1
    if name in ("ar", "r2l"):
        assert rest == pytest.approx(nll, rel=2e-5)


def with_range(batch, low, high):
    return batch._replace(noise_range_B2=jnp.tile(jnp.array([[low, high]]), (len(batch[0]), 1)))


@pytest.mark.parametrize(
    ("low", "high", "shares"),
    [(0.5, 1.0, [0, 0, 0.5, 0.5]), (0.0, 0.5, [0.5, 0.5, 0, 0]), (0.3, 0.8, [0, 0.4, 0.5, 0.1])],
)
def test_a_noise_range_bounds_the_number_of_masks(low, high, shares):
    """Of four positions, n are masked where the range meets [(n - 1) / 4, n / 4)."""
    found = estimate("block:4", True, with_range(rows(1000, jax.random.key(0)), low, high))
    counts = np.bincount(np.asarray(found.mask_KBL.sum(-1)).ravel(), minlength=5)
    np.testing.assert_allclose(counts[1:] / 1000, shares, atol=2e-3)


def test_the_full_noise_range_changes_no_bit():
    batch = rows(64, jax.random.key(0))
    ours, theirs = (
        estimate("block:2", True, b) for b in (batch, with_range(batch, *FULL_RANGE[0]))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    group = jnp.tile(jnp.array([0, 0, 1, 1]), (64, 1))
    uniform = group_uniforms(batch.uniform_B, group)
    mask, _ = corrupt_groups(batch.keys_B, group, uniform, batch.targets_BL, 1)
    np.testing.assert_array_equal(ours.mask_KBL, mask)


def test_a_permutation_is_left_to_right_on_permuted_text():
    """Same parameters: the logits of `permutation` are those of `ar` put back in place."""
    (ar, params), (permuted, _) = network("ar"), network("permutation:3")
    group = permuted.order.groups(LENGTH)
    order = np.argsort(group)
    z = jnp.asarray(X)[None, None]
    straight = ar.reverse(params)(z[..., order], None)[0].logits
    np.testing.assert_allclose(
        permuted.reverse(params)(z, None)[0].logits, straight[..., group, :], rtol=1e-5, atol=1e-6
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
            generator.reverse(params)(z, None, jnp.asarray(x)[None])[0].logits[0, 0, :, :VOCAB]
            for x in (X, other)
        )
        differs = np.asarray(jnp.abs(ours - theirs).max(-1) > 1e-6)
        np.testing.assert_array_equal(differs, group > group[changed])


def test_one_block_of_everything_is_the_bidirectional_model():
    """Same parameters, same logits: contents are seen by no query."""
    (block, params), (mdm, _) = network("block:4"), network("mdm")
    z = jnp.array([[[VOCAB, 0, 1, VOCAB]]])
    np.testing.assert_allclose(
        *(model.reverse(params)(z, None)[0].logits for model in (block, mdm)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["ar", "r2l", "block:2"])
def test_samples_follow_the_model(name):
    generator, params = network(name)
    generator = generator._replace(one_pass="groups")
    nothing = jnp.zeros((8000, LENGTH), jnp.int32)
    sampler = make_sampler(default_config().sample, generator, eos_id=0, window=LENGTH)
    keys = jax.random.split(jax.random.key(0), 8000)
    samples = jax.jit(lambda *inputs: sampler(*inputs))(params, keys, nothing, nothing > 0)
    p = [
        float(jnp.exp(oracle.log_p(generator, params, x))) for x in oracle.sequences(LENGTH, VOCAB)
    ]
    assert sum(p) == pytest.approx(1, abs=1e-5)
    found = np.bincount(np.asarray(samples.tokens_BT) @ [8, 4, 2, 1], minlength=16)
    assert stats.chisquare(found, 8000 * np.array(p) / sum(p)).pvalue > 1e-3


def test_group_masks_leave_out_what_is_no_target():
    targets = jnp.tile(jnp.array([True, False, True, True]), (500, 1))
    group = jnp.tile(jnp.array([0, 0, 1, 1]), (500, 1))
    keys, uniform = jax.random.split(jax.random.key(0), 500), jnp.linspace(0, 0.999, 500)
    mask, weight = corrupt_groups(keys, group, group_uniforms(uniform, group), targets, 3)
    assert not mask[..., 1].any() and mask[..., 0].all()
    counts = mask[..., 2:].sum(-1)
    assert set(np.unique(counts)) == {1, 2}
    np.testing.assert_allclose(weight[..., 2] * counts, 2)
    np.testing.assert_allclose(weight[..., 0], 1)
