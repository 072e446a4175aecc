"""The network against what MDLM publishes, and the separations that the gradients rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed.costs import collectives, parse
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.transformer import Sizes, Transformer, rotary
from lomdm_jax.models.visibility import full
from tests.networks import noisy, shapes_of

SIZES = Sizes(11, width=16, layers=2, heads=2, cond_dim=8, dropout=0.5, dtype=jnp.float32)


def build(scores="position", dtype=jnp.float32, randomise=True, **options):
    sizes = SIZES._replace(dtype=dtype)

    def make():
        return Denoiser(sizes, mask_id=10, scores=scores, rngs=nnx.Rngs(0), **options)

    graphdef, shapes = shapes_of(make)
    if randomise:
        return graphdef, noisy(shapes, 0.3)
    return graphdef, nnx.to_pure_dict(jax.jit(lambda: nnx.state(make(), nnx.Param))())


def names(params):
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): a.shape for path, a in paths}


def test_backbone_has_mdlms_names_and_shapes():
    """kuleshov-group/mdlm, models/dit.py: weight [out, in] is kernel [in, out] here."""
    width, cond, vocab = 16, 8, 11
    mdlm = {
        "vocab_embed.embedding": (vocab, width),
        "sigma_map.mlp.0.weight": (cond, 256),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (vocab, width),
        "output_layer.linear.bias": (vocab,),
        "output_layer.adaLN_modulation.weight": (2 * width, cond),
        "output_layer.adaLN_modulation.bias": (2 * width,),
    }
    for block in range(2):
        mdlm |= {
            f"blocks.{block}.{name}": shape
            for name, shape in {
                "norm1.weight": (width,),
                "attn_qkv.weight": (3 * width, width),
                "attn_out.weight": (width, width),
                "norm2.weight": (width,),
                "mlp.0.weight": (4 * width, width),
                "mlp.0.bias": (4 * width,),
                "mlp.2.weight": (width, 4 * width),
                "mlp.2.bias": (width,),
                "adaLN_modulation.weight": (6 * width, cond),
                "adaLN_modulation.bias": (6 * width,),
            }.items()
        }
    ours = {
        name.replace("kernel", "weight").replace("scale", "weight"): shape[::-1]
        if "kernel" in name
        else shape
        for name, shape in names(build(scores="none")[1]["backbone"]).items()
    }
    assert ours == mdlm


def test_a_fresh_model_is_uniform_and_its_order_random():
    graphdef, params = build(randomise=False)
    tokens, scores = nnx.merge(graphdef, params).denoise(jnp.zeros((2, 6), jnp.int32))
    assert (tokens.logits[..., :10] == 0).all() and (scores == 0).all()
    assert jnp.isneginf(tokens.logits[..., 10]).all()  # the mask token is never predicted


def test_learning_the_order_leaves_the_backbone_as_it_is():
    """The same seed gives the same backbone with and without heads."""
    with_heads, without = (
        build(kind, randomise=False)[1]["backbone"] for kind in ("position", "none")
    )
    jax.tree.map(np.testing.assert_array_equal, with_heads, without)


def test_rotary_turns_halves_by_position():
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 6))
    turned = rotary(x, jnp.arange(5))
    for position in range(5):
        for k in range(3):
            angle = position * 10000 ** (-k / 3)
            first, second = x[0, position, 0, k], x[0, position, 0, k + 3]
            expected = first * np.cos(angle) - second * np.sin(angle)
            assert turned[0, position, 0, k] == pytest.approx(float(expected), abs=1e-5)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_gradients_stay_in_their_parts():
    """Scores train their own head only; logits train the backbone only."""
    graphdef, params = build()
    z = jnp.arange(12).reshape(2, 6) % 11

    def touched(function):
        grads = jax.grad(lambda p: jnp.sum(function(nnx.merge(graphdef, p)) ** 2))(params)
        return {name for name in grads if any((g != 0).any() for g in jax.tree.leaves(grads[name]))}

    assert touched(lambda m: m.denoise(z)[0].logits[..., :10]) == {"backbone"}
    assert touched(lambda m: m.denoise(z)[1]) == {"reverse_head"}
    assert touched(lambda m: m.forward_scores(z)) == {"forward_head"}


def test_equal_token_rates_leave_the_logits_and_unequal_ones_tilt_them():
    graphdef, params = build(scores="token")
    z = jnp.arange(12).reshape(2, 6) % 11
    params["token_head"]["log_rate"] = jnp.zeros(11)
    tokens, scores = nnx.merge(graphdef, params).denoise(z)
    plain = nnx.merge(*build(scores="none")[:1], {"backbone": params["backbone"]}).denoise(z)[0]
    expected = jax.nn.log_softmax(plain.logits[..., :10])
    np.testing.assert_allclose(tokens.logits[..., :10], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores, 0, atol=1e-5)
    rates = jnp.linspace(0.5, 3.0, 11)
    params["token_head"]["log_rate"] = jnp.log(rates)
    model = nnx.merge(graphdef, params)
    tokens, scores = model.denoise(z)
    weighted = jnp.exp(expected) * rates[:10]
    np.testing.assert_allclose(jnp.exp(scores), weighted.sum(-1), rtol=1e-4)
    shares = weighted / weighted.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        jax.nn.softmax(tokens.logits[..., :10]), shares, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(jnp.exp(model.forward_scores(z)), rates[z], rtol=1e-6)


def test_bfloat16_compute_gives_float32_logits_near_float32s():
    z = jnp.arange(12).reshape(2, 6) % 11
    graphdef, params = build()
    exact, _ = nnx.merge(graphdef, params).denoise(z)
    rough, rough_scores = nnx.merge(build(dtype=jnp.bfloat16)[0], params).denoise(z)
    exact, rough = (tokens.logits[..., :10] for tokens in (exact, rough))
    assert rough.dtype == jnp.float32 and rough_scores.dtype == jnp.float32
    assert jax.tree.leaves(params)[0].dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.05 * float(jnp.abs(exact).max()))
    assert jnp.abs(rough - exact).max() > 0  # the compute dtype really was another


def test_dropout_depends_on_the_rows_own_key_only():
    graphdef, params = build()
    z, keys = jnp.arange(24).reshape(4, 6) % 11, jax.random.split(jax.random.key(0), 4)
    model = nnx.merge(graphdef, params)
    together = model.denoise(z, None, keys)[0].logits
    np.testing.assert_allclose(
        together[2:], model.denoise(z[2:], None, keys[2:])[0].logits, rtol=1e-5, atol=1e-5
    )
    assert not np.allclose(together, model.denoise(z)[0].logits)


def test_time_conditioning_changes_the_logits():
    graphdef, params = build()
    z, model = jnp.zeros((2, 6), jnp.int32), nnx.merge(graphdef, params)
    plain, early, late = (
        model.denoise(z, sigma)[0].logits for sigma in (None, jnp.zeros(2), jnp.ones(2))
    )
    np.testing.assert_array_equal(plain, early)
    assert not np.allclose(plain, late)


LAYOUTS = {  # scores, layout, groups (or ranks) of eight positions
    "full": ("position", "full", None),
    "left to right": ("none", "causal", range(8)),
    "right to left": ("none", "causal", range(7, -1, -1)),
    "permutation": ("none", "causal", [3, 0, 6, 1, 7, 2, 5, 4]),
    "blocks": ("none", "ranked", [0, 0, 0, 1, 1, 1, 2, 2]),
    "ranks": ("pointer", "ranked", [5, 2, 0, 7, 1, 4, 3, 6]),
}
TEXT = np.random.default_rng(0).integers(0, 10, (2, 8))
STATE = np.where(np.random.default_rng(1).random((2, 8)) < 0.5, 10, TEXT)
SEGMENTS = np.array([[0] * 3 + [1] * 5, [0] * 5 + [1] * 3])
FIVE = [(0, slice(3, 8)), (1, slice(0, 5))]  # rows and places of the documents of five tokens


def answers(kind, state, text, segments=None, place=slice(None)):
    """Logits and both scores of every position, [B, L, ...] each; for the positions `place` of the
    order."""
    scores, layout, groups = LAYOUTS[kind]
    if groups is not None:
        groups = tuple(np.unique(groups[place], return_inverse=True)[1].tolist())
    graphdef, params = build(scores, length=8, layout=layout, groups=groups)
    model, state, text = nnx.merge(graphdef, params), jnp.asarray(state), jnp.asarray(text)
    segments = None if segments is None else jnp.asarray(segments)
    tokens, reverse = model.denoise(state, context_BL=text, segments_BL=segments)
    forward = model.forward_scores(text, segments)
    return [tokens.logits, *(a.moves if scores == "pointer" else a for a in (reverse, forward))]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_documents_of_a_row_are_as_if_each_stood_alone(kind):
    """In whatever row, at whatever place; as one segment they are not."""
    packed, joined = (answers(kind, STATE, TEXT, segments) for segments in (SEGMENTS, SEGMENTS * 0))
    for row, place in FIVE:
        alone = answers(kind, STATE[row : row + 1, place], TEXT[row : row + 1, place], place=place)
        for ours, theirs in zip(packed, alone, strict=True):
            np.testing.assert_allclose(ours[row, place], theirs[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(packed, joined, strict=True):
        assert not np.any(theirs) or not np.allclose(ours, theirs, atol=1e-2)


@pytest.mark.parametrize("kind", ["right to left", "ranks"])
def test_no_gradient_crosses_from_one_document_to_another(kind):
    """The second document has tokens of its own, from 5 up, and its logits train those only."""
    scores, layout, groups = LAYOUTS[kind]
    graphdef, params = build(scores, length=8, layout=layout, groups=groups and tuple(groups))
    text = jnp.asarray(TEXT % 5 + 5 * SEGMENTS)

    def total(params):
        model = nnx.merge(graphdef, params)
        logits = model.denoise(text, segments_BL=jnp.asarray(SEGMENTS))[0].logits[..., :10]
        return jnp.sum(jnp.where(SEGMENTS[..., None] == 1, logits, 0.0) ** 2)

    grads = jax.jit(jax.grad(total))(params)["backbone"]["vocab_embed"]["embedding"]
    assert (grads[:5] == 0).all() and (grads[5:10] != 0).any() and jnp.isfinite(grads).all()


def test_devices_that_share_positions_exchange_heads_for_them_and_nothing_else():
    """Each of four has a quarter of the positions, and for attention a quarter of the heads."""
    sizes = SIZES._replace(heads=4)
    graphdef, shapes = shapes_of(lambda: Transformer(sizes, rngs=nnx.Rngs(0)))
    params, tokens, cond = noisy(shapes, 0.3), jnp.arange(16).reshape(2, 8) % 10, jnp.ones((2, 8))

    def hidden(params, tokens):
        return nnx.merge(graphdef, params).hidden(tokens, cond, full(8))

    alone = jax.jit(hidden)(params, tokens)
    with jax.set_mesh(meshes.make_mesh(1, sequence=4)):
        call = jax.jit(hidden).lower(params, tokens).compile()
        shared = call(params, tokens)
    np.testing.assert_allclose(alone, shared, rtol=1e-5, atol=1e-5)
    assert {piece.data.shape for piece in shared.addressable_shards} == {(2, 2, 16)}
    (exchanged,) = collectives(parse(call.as_text()))
    states = 4 * 2 * 2 * 16  # bytes of a device's hidden states
    assert exchanged.kind == "all-to-all" and exchanged.size == 2 * 4 * states  # q, k, v and back
