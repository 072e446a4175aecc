"""Both estimators against exact enumeration, in value and in gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomdm_jax.generator import Generator
from lomdm_jax.models.denoiser import Denoiser
from lomdm_jax.models.readout import Logits
from lomdm_jax.models.transformer import Sizes
from lomdm_jax.objectives import loss, make_objective
from lomdm_jax.objectives.corruption import stratified_uniforms
from lomdm_jax.objectives.leave_one_out import surrogate
from lomdm_jax.objectives.nelbo import Batch, batch_of, targets_of
from lomdm_jax.orders import make_order
from tests import oracle
from tests.networks import noisy, shapes_of

EPS = 1e-3
MODEL = oracle.TableModel(length=3, vocab=2)
PARAMS = MODEL.init(jax.random.key(0))
SEQUENCES = oracle.sequences(3, 2)
ALL_STATES = [oracle.states_of(MODEL, PARAMS, x) for x in SEQUENCES]


def objective(name, samples=2, eps=EPS, share=1 / 4, **options):
    return make_objective(
        name, mask_id=2, samples=samples, eps=eps, reconstruction_share=share, **options
    )


def rows(x, count, key):
    """`count` rows of the same sequence, stratified as one global batch."""
    tokens = jnp.broadcast_to(jnp.asarray(x), (count, len(x)))
    time_key, row_key = jax.random.split(key)
    uniform = stratified_uniforms(time_key, jnp.arange(count), count)
    return Batch(tokens, jnp.ones_like(tokens, bool), jax.random.split(row_key, count), uniform)


def scored(batch, params=PARAMS):
    """What an estimator takes: the rows, and the table model's forward and reverse."""
    return batch, MODEL.forward(params, batch.tokens_BL), MODEL.reverse(params)


def within(samples, exact, errors=4.0, rounding=1e-5):
    """Is the mean of independent `samples` [N, ...] within `errors` standard errors of exact?"""
    samples = np.asarray(samples, np.float64)
    mean, error = samples.mean(0), samples.std(0, ddof=1) / np.sqrt(len(samples))
    return np.all(np.abs(mean - np.asarray(exact)) <= errors * error + rounding)


def test_p_sums_to_one():
    total = sum(float(jnp.exp(oracle.log_p(MODEL, PARAMS, x))) for x in SEQUENCES)
    assert total == pytest.approx(1, abs=1e-6)


def test_closed_form_equals_quadrature():
    for states in ALL_STATES:
        long = oracle.quadrature(states, eps=1e-200, nodes=400)
        np.testing.assert_allclose(oracle.closed_form(states)[:3], long[:3], rtol=2e-4, atol=1e-6)


def test_order_of_the_bounds():
    for x, states in zip(SEQUENCES, ALL_STATES, strict=True):
        exact = oracle.closed_form(states)
        nll = -float(oracle.log_p(MODEL, PARAMS, x))
        nelbo_order = float(exact.main + exact.order)
        assert nll < nelbo_order < nelbo_order + float(exact.clock)
        assert float(exact.clock) > 0 and float(exact.order) > 0


def test_truncation_breaks_the_bound_and_reconstruction_mends_it():
    below = 0
    for x, states in zip(SEQUENCES, ALL_STATES, strict=True):
        cut = oracle.quadrature(states, EPS)
        nll = -float(oracle.log_p(MODEL, PARAMS, x))
        below += float(sum(cut[:3])) < nll
        assert float(sum(cut)) > nll
    assert below >= 4  # exponents are small: without the term it is no bound


@pytest.mark.parametrize("name", ["continuous", "order"])
def test_estimates_are_unbiased(name):
    @functools.partial(jax.jit, static_argnums=0)
    def draw(name, x, key):
        estimate = objective(name).estimate(*scored(rows(x, 256, key)))
        return jnp.stack([jnp.mean(term) for term in estimate.terms])

    for x, states in zip(SEQUENCES[:4], ALL_STATES, strict=False):
        exact = oracle.quadrature(states, EPS) if name == "continuous" else None
        exact = exact or oracle.closed_form(states)
        keys = jax.random.split(jax.random.key(7), 300)
        drawn = jax.lax.map(lambda key, x=x: draw(name, jnp.asarray(x), key), keys)
        assert within(drawn, exact), (x, drawn.mean(0), exact)


def test_order_estimate_has_no_variance_at_initialisation():
    """Every cross-entropy is log V and all weights are equal: each draw is L log V exactly."""
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    x = jnp.array([0, 1, 0])
    estimate = objective("order").estimate(*scored(rows(x, 64, jax.random.key(0)), params))
    np.testing.assert_allclose(estimate.terms.main, 3 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(estimate.terms.order, 0, atol=1e-6)


def test_a_given_first_position_leaves_the_bound_of_the_rest():
    """Also for a learned order: all terms, from the state in which only x_0 is known."""

    @jax.jit
    def draw(x, key):
        batch = rows(x, 256, key)
        batch = batch._replace(targets_BL=targets_of(batch.targets_BL, True))
        return jnp.stack([jnp.mean(a) for a in objective("order").estimate(*scored(batch)).terms])

    for x, states in zip(SEQUENCES[:2], ALL_STATES, strict=False):
        exact = oracle.closed_form(states, start=0b110)
        drawn = jax.lax.map(
            lambda key, x=x: draw(jnp.asarray(x), key), jax.random.split(jax.random.key(8), 300)
        )
        assert within(drawn, exact), (x, drawn.mean(0), exact)
        assert float(exact.main + exact.order) > -float(oracle.log_p(MODEL, PARAMS, x, 0b110))


def test_positions_that_are_not_targets_stay_visible_and_cost_nothing():
    x = jnp.array([0, 1, 1])
    targets = jnp.array([True, False, True])
    for name in ("continuous", "order"):
        batch = rows(x, 128, jax.random.key(3))._replace(targets_BL=jnp.tile(targets, (128, 1)))
        estimate = objective(name).estimate(*scored(batch))
        assert not estimate.mask_KBL[..., 1].any()
        assert estimate.mask_KBL[..., 0].any() and estimate.mask_KBL[..., 2].any()
        assert all(jnp.isfinite(term).all() for term in estimate.terms)
        none = batch._replace(targets_BL=jnp.zeros((128, 3), bool))
        assert all((term == 0).all() for term in objective(name).estimate(*scored(none)).terms)


def as_known(reverse, tokens_BL, known_BL):
    """The same model, but for positions of which it is certain, whatever it sees."""

    def call(*args):
        tokens, schedule = reverse(*args)
        sure = 1e3 * jax.nn.one_hot(tokens_BL, tokens.logits.shape[-1])
        return Logits(jnp.where(known_BL[..., None], sure, tokens.logits)), schedule

    return call


@pytest.mark.parametrize(
    ("name", "one_pass"),
    [("continuous", "state"), ("order", "state"), ("continuous", "groups"), ("order", "groups")],
)
def test_pads_that_are_not_counted_are_generated_as_if_they_were_known(name, one_pass):
    """Same draws, same value and same gradient of all parameters; and less than if they counted."""
    order = make_order("block:3", c1=1.0, c2=0.0, exponent=1.0) if one_pass == "groups" else None
    model = MODEL._replace(order=order)
    mix = {"uniform_share": 0.5} if (name, one_pass) == ("order", "state") else {}
    made, batch = objective(name, one_pass=one_pass, **mix), rows([1, 0, 1], 64, jax.random.key(0))

    @jax.jit
    @jax.value_and_grad
    def value(params, padding, known):
        padded, forward = batch._replace(padding_BL=padding), model.forward(params, batch.tokens_BL)
        reverse = as_known(model.reverse(params), batch.tokens_BL, known)
        return jnp.mean(loss(made, padded, forward, reverse)[0])

    pads, none = jnp.arange(64)[:, None] % 4 < jnp.arange(3), jnp.zeros((64, 3), bool)
    ours, theirs = value(PARAMS, pads, none), value(PARAMS, none, pads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    assert ours[0] < value(PARAMS, none, none)[0] - 0.1


def test_what_is_generated_is_what_is_counted_and_the_pads():
    counted, padding = (
        jnp.array([[True, True, False, False]]),
        jnp.array([[False, False, True, False]]),
    )
    arrays = {"tokens": jnp.zeros((1, 4), jnp.int32), "counted": counted}
    plain = batch_of(arrays, None, None)
    padded = batch_of(arrays | {"padding": padding}, None, None)
    assert plain.targets_BL is counted and plain.padding_BL is None
    assert (padded.targets_BL == jnp.array([[True, True, True, False]])).all()
    assert (targets_of(padded.targets_BL, True) == jnp.array([[False, True, True, False]])).all()


def tiny_network(name):
    """A real denoiser of a learned order, all parameters random, so that no gradient is zero."""
    order = make_order(name, c1=0.7, c2=0.65, exponent=1.0)

    def make():
        sizes = Sizes(3, width=8, layers=1, heads=2, cond_dim=4, dropout=0.0, dtype=jnp.float32)
        rngs = nnx.Rngs(0)
        return Denoiser(sizes, mask_id=2, scores=order.scores, walks=order.walks, rngs=rngs)

    graphdef, shapes = shapes_of(make)
    params = noisy(shapes, 0.7)
    if order.walks:
        params["walk_head"]["table"] = jnp.array([[0.0, -1.0], [3.0, 1.5]])
    return Generator(graphdef, order, mask_id=2), params


def exact_loss(generator, params, x, name):
    states = oracle.states_of(generator, params, x)
    if name == "continuous":
        return sum(oracle.quadrature(states, EPS, nodes=60))
    exact = oracle.closed_form(states)
    return exact.main + exact.order


def test_genmd4_is_bounded_and_with_equal_rates_it_is_masked_diffusion():
    """Its reverse rates are expected under the tokens, so its bound is the general one."""
    generator, params = tiny_network("genmd4")
    log_p = [oracle.log_p(generator, params, x) for x in SEQUENCES]
    assert float(jnp.sum(jnp.exp(jnp.stack(log_p)))) == pytest.approx(1, abs=1e-5)
    for x, log_p_x in zip(SEQUENCES, log_p, strict=True):
        found = oracle.closed_form(oracle.states_of(generator, params, x))
        assert -float(log_p_x) < float(found.main + found.order) < float(sum(found))
        direct = genmd4_bound(generator, params, x)
        assert float(sum(found)) == pytest.approx(direct, rel=1e-4)
    params["token_head"]["log_rate"] = jnp.zeros(3)
    equal = oracle.closed_form(oracle.states_of(generator, params, SEQUENCES[3]))
    mdm, _ = tiny_network("mdm")
    plain = oracle.states_of(mdm, {"backbone": params["backbone"]}, SEQUENCES[3])
    np.testing.assert_allclose(sum(equal), sum(oracle.closed_form(plain)), rtol=1e-5)


def genmd4_bound(generator, params, x):
    """GenMD4's own form: the integral of w_x CE + (sum_v p_v w_v) - w_x over masked positions,
    with the network's plain token probabilities (Shi et al., arXiv 2406.04329)."""
    states = oracle.states_of(generator, params, x)
    rates = jnp.exp(params["token_head"]["log_rate"])[:2]
    z = jnp.where(states.mask, 2, x)
    mdm, _ = tiny_network("mdm")
    logits = mdm.reverse({"backbone": params["backbone"]})(z[None], None)[0].logits[0, ..., :2]
    p = jax.nn.softmax(logits)
    nll = -jnp.log(jnp.take_along_axis(p, jnp.broadcast_to(x, z.shape)[..., None], -1)[..., 0])
    cost = rates[x] * nll + p @ rates - rates[x]
    node, weight = np.polynomial.legendre.leggauss(400)
    visits = 200 * weight @ oracle.mask_probability(states, jnp.asarray((node + 1) * 200))
    return float(visits @ jnp.sum(jnp.where(states.mask, cost, 0), -1))


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ("lomdm", "continuous"),
        ("lomdm", "order"),
        ("genmd4", "continuous"),
        ("genmd4", "order"),
        ("lomdm-order", "order"),
    ],
)
def test_gradients_match_enumeration(order, name):
    """theta, phi and psi: the mean gradient of the training loss, along random directions."""
    generator, params = tiny_network(order)
    x = np.array([1, 0, 1], np.int32)
    exact = jax.jit(jax.grad(lambda p: exact_loss(generator, p, x, name)))(params)
    groups = set(params) - {"walk_head"}  # which is searched for, not learned by gradients
    rng = np.random.default_rng(0)
    directions = {
        group: jax.tree.map(lambda a: rng.standard_normal((6, *a.shape), np.float32), params[group])
        for group in groups
    }

    @jax.jit
    def draws(keys):
        def one(key):
            def value(p):
                reverse, batch = generator.reverse(p), rows(x, 64, key)
                forward = generator.forward(p, batch.tokens_BL)
                return jnp.mean(loss(objective(name), batch, forward, reverse)[0])

            return project(jax.grad(value)(params))

        return jax.vmap(one)(keys)

    def project(grads):
        """Along six random directions for each group of parameters."""

        def along(a, directions):
            return jnp.reshape(directions, (6, -1)) @ a.ravel()

        products = {g: jax.tree.map(along, grads[g], directions[g]) for g in groups}
        return {group: sum(jax.tree.leaves(tree)) for group, tree in products.items()}

    drawn = draws(jax.random.split(jax.random.key(11), 200))
    expected = jax.jit(project)(exact)
    for group, samples in drawn.items():
        assert np.abs(expected[group]).max() > 1e-2, f"the {group} gradient vanishes: no test"
        assert within(samples, expected[group], rounding=1e-4), (group, expected[group])


def test_a_walking_order_is_a_model_and_its_bound_holds():
    generator, params = tiny_network("lomdm-order")
    log_p = [oracle.log_p(generator, params, x) for x in SEQUENCES]
    assert float(jnp.sum(jnp.exp(jnp.stack(log_p)))) == pytest.approx(1, abs=1e-5)
    for x, log_p_x in zip(SEQUENCES, log_p, strict=True):
        exact = oracle.closed_form(oracle.states_of(generator, params, x))
        assert -float(log_p_x) < float(exact.main + exact.order)


def drawn_terms(generator, params, x, draws=300, **options):
    """Means of main and order over batches of 64, [draws, 2]."""
    made = make_objective(
        "order", mask_id=2, samples=2, eps=EPS, reconstruction_share=1 / 4, **options
    )

    @jax.jit
    def draw(key):
        batch = rows(x, 64, key)
        forward = generator.forward(params, batch.tokens_BL)
        terms = made.estimate(batch, forward, generator.reverse(params)).terms
        return jnp.stack([jnp.mean(terms.main), jnp.mean(terms.order)])

    return jax.lax.map(draw, jax.random.split(jax.random.key(2), draws))


def test_a_temperature_gives_the_bound_of_the_flattened_orders():
    """Heads and table divided by 2 are the same model as a temperature of 2."""
    generator, params = tiny_network("lomdm-order")
    halves = jax.tree.map(jnp.copy, params)
    for head in ("forward_head", "reverse_head"):
        halves[head]["mlp"]["2"] = jax.tree.map(lambda a: a / 2, params[head]["mlp"]["2"])
    halves["walk_head"]["table"] = params["walk_head"]["table"] / 2
    x = np.array([1, 0, 1], np.int32)
    flat = oracle.closed_form(oracle.states_of(generator, halves, x))
    drawn = drawn_terms(generator, params, x, temperature=2.0)
    assert within(drawn, flat[:2])
    sharp = oracle.closed_form(oracle.states_of(generator, params, x))
    assert not within(drawn, sharp[:2])


def test_equal_weights_change_the_networks_gradient_and_nothing_else():
    """Of sum over states of visits times cross-entropies with weights (1 - s) w + s / masked."""
    generator, params = tiny_network("walk")
    x, share = np.array([1, 0, 1], np.int32), 0.5
    visits, weights, equal = walk_visits(generator, params, x)

    def mixed(params):
        nll = oracle.states_of(generator, params, x).nll
        return visits @ jnp.sum(((1 - share) * weights + share * equal) * nll, -1)

    def drawn(share):
        made = make_objective(
            *("order",), mask_id=2, samples=1, eps=EPS, reconstruction_share=1, uniform_share=share
        )

        def value(params, key):
            batch = rows(x, 64, key)
            forward = generator.forward(params, batch.tokens_BL)
            return jnp.mean(loss(made, batch, forward, generator.reverse(params))[0])

        both = jax.jit(jax.value_and_grad(value))
        found = [both(params, key) for key in jax.random.split(jax.random.key(3), 400)]
        return [(v, g["backbone"]["output_layer"]["linear"]["bias"]) for v, g in found]

    with_share, without = drawn(share), drawn(0.0)
    np.testing.assert_allclose([v for v, _ in with_share], [v for v, _ in without], rtol=1e-5)
    exact = jax.grad(mixed)(params)["backbone"]["output_layer"]["linear"]["bias"]
    assert within([g for _, g in with_share], exact)
    assert not within([g for _, g in without], exact)


def walk_visits(generator, params, x):
    """How often each subset is passed, [S], and both kinds of weights in it, [S, L]."""
    states = oracle.states_of(generator, params, x)
    visits = oracle.visits_of(states)
    count = np.maximum(states.mask.sum(-1, keepdims=True), 1)
    return visits, states.share, states.mask / count


def test_uniforms_are_stratified_over_the_global_batch_however_it_is_split():
    key = jax.random.key(4)
    whole = stratified_uniforms(key, jnp.arange(16), 16)
    assert sorted(np.floor(np.asarray(whole) * 16)) == list(range(16))
    halves = [stratified_uniforms(key, jnp.arange(8) + start, 16) for start in (0, 8)]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))


def test_leave_one_out_with_two_samples_is_the_papers_surrogate():
    log_q, values = jnp.array([[0.3], [-1.0]]), jnp.array([[2.0], [5.0]])
    expected = 0.5 * (log_q[0] - log_q[1]) * (values[0] - values[1])
    np.testing.assert_allclose(surrogate(log_q, values), expected, rtol=1e-6)
