"""What the PyTorch file draws: samples and bounds against exact enumeration of tiny networks.

Chi-square tests are held to p > 1e-4, with fixed seeds: of the 50 in this file a right sampler
would fail one in 200 files if they were seeded anew. Means are held to 4 standard errors.
"""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("safetensors", reason="needs safetensors")

from lomdm_jax.interop import modeling_lomdm  # noqa: E402
from lomdm_jax.interop.modeling_lomdm import (  # noqa: E402
    GRIDS,
    Causal,
    Filter,
    Groups,
    Reader,
    Schedule,
    Weights,
    all_ranks,
    even_progress,
    gumbel,
    next_log_shares,
    remove_mask,
    reveal_log_probabilities,
    token_nll,
    unmask_probability,
)
from lomdm_jax.orders import schedule as jax_schedule  # noqa: E402
from lomdm_jax.sampling import tokens as jax_tokens  # noqa: E402
from lomdm_jax.sampling.ancestral import even_progress as jax_even_progress  # noqa: E402
from tests import oracle  # noqa: E402
from tests.interop.networks import EPS, close, network, th  # noqa: E402

LENGTH, VOCAB, MASK, ROWS = 4, 2, 2, 9_000
NOTHING = (MASK,) * LENGTH
TEXTS = oracle.sequences(LENGTH, VOCAB)
RANKS = torch.tensor(list(itertools.permutations(range(LENGTH)))).argsort(-1)
STATES = ("mdm", "cosine", "genmd4", "lomdm", "walk", "lomdm-order")
GROUPS = ("ar", "r2l", "permutation:3", "block:2")


@functools.cache
def tiny(name, layout="own", **sizes):
    """A network over texts of four tokens. On the ranked layout it has a second block: states of
    one depend on no order."""
    layers = 2 if layout == "ranked" or name == "lomdm-ranked" else 1
    sizes = {
        "width": 8,
        "cond_dim": 4,
        "layers": layers,
        "sharp": 0.4,
        "length": LENGTH,
        "vocab": VOCAB,
    } | sizes
    return network(name, layout, **sizes)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(tokens):
    """How often each text was drawn."""
    return np.bincount(tokens @ torch.tensor([8, 4, 2, 1]), minlength=len(TEXTS))


def fits(found, p):
    """p-value of counts under probabilities. What cannot be must not be found, and what is rarer
    than five times counts together."""
    assert p.sum() == pytest.approx(1, abs=1e-4) and not found[p == 0].any()
    expected = found.sum() * p / p.sum()
    rare = expected < 5
    found, expected = ([*a[~rare], a[rare].sum()] for a in (found, expected))
    some = slice(None) if expected[-1] else slice(-1)
    return stats.chisquare(found[some], expected[some]).pvalue


# Models of states and of groups


@torch.no_grad()
def look(model, state):
    """Log-probabilities of tokens [L, 2] and the weights of the order, in one state."""
    z = torch.tensor([state])
    logits, schedule = model.reverse(z)
    return remove_mask(logits, MASK).log_softmax(-1)[0], schedule.at(z == MASK).weights


def exact(model, reveal=1, start=None):
    """p of each text when a call reveals up to so many positions, drawn one after another by the
    weights in the state before it, with independent tokens."""
    mass = {tuple(start or NOTHING): 1.0}
    for _ in range(LENGTH):
        states, mass = mass, {}
        for state, p in states.items():
            for after, q in reveals(model, state, reveal):
                mass[after] = mass.get(after, 0.0) + p * q
    return np.array([mass.get(tuple(text), 0.0) for text in TEXTS.tolist()])


def reveals(model, state, reveal):
    """The states that may follow, each with its probability."""
    if MASK not in state:
        return [(state, 1.0)]
    log_p, weights = look(model, state)
    able = next_log_shares(weights, torch.tensor([state]) == MASK)[0][0].isfinite()
    able, found = able.nonzero()[:, 0].tolist(), []
    for order in itertools.permutations(able, min(reveal, len(able))):
        masked, chance = torch.tensor([state]) == MASK, 1.0
        for place in order:
            chance *= float(next_log_shares(weights, masked)[0][0, place].exp())
            masked[0, place] = False
        for tokens in itertools.product(range(VOCAB), repeat=len(order)):
            after, q = list(state), chance
            for place, token in zip(order, tokens, strict=True):
                after[place], q = token, q * float(log_p[place, token].exp())
            found.append((tuple(after), q))
    return found


@pytest.mark.parametrize("name", [*STATES, *GROUPS])
def test_one_by_one_the_race_has_the_distribution_of_the_model(name):
    """The causal layout and blocks with what they remember, the others without."""
    model = tiny(name).model
    samples = model.sample(rows=ROWS, generator=rng())
    assert fits(counts(samples.tokens), exact(model)) > 1e-4
    assert samples.calls == 4
    assert (samples.revealed.sort(-1).values == torch.arange(1, 5)).all()


@pytest.mark.parametrize(("name", "reveal"), [("lomdm", 2), ("lomdm-order", 3), ("block:2", 2)])
def test_several_at_once_are_drawn_by_the_order_and_independent(name, reveal):
    model = tiny(name).model
    samples = model.sample(rows=ROWS, reveal=reveal, generator=rng())
    assert fits(counts(samples.tokens), exact(model, reveal)) > 1e-4
    assert fits(counts(samples.tokens), exact(model)) < 1e-6, "the test can fail"
    assert samples.calls == 2


def test_all_at_once_is_one_call():
    model = tiny("lomdm").model
    samples = model.sample(rows=ROWS, reveal=9, generator=rng())
    assert fits(counts(samples.tokens), exact(model, 4)) > 1e-4
    assert samples.calls == 1 and (samples.revealed == 1).all()


def distance(samples, p):
    return 0.5 * np.abs(counts(samples.tokens) / len(samples.tokens) - p).sum()


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        *(("lomdm", grid) for grid in GRIDS),
        *(("cosine", "even"), ("block:2", "even")),
    ],
)
def test_ancestral_steps_converge_to_the_race(name, grid):
    """The distance falls as steps grow, to that of sampling noise for the even grid."""
    model = tiny(name).model
    p = exact(model)
    few, many = (model.sample(rows=5000, steps=n, grid=grid, generator=rng(n)) for n in (2, 48))
    assert distance(few, p) > 2 * distance(many, p)
    if grid == "even":
        assert fits(counts(many.tokens), p) > 1e-4
    assert few.revealed.max() <= 2 * (2 if name == "block:2" else 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_steps_reveal_what_their_times_say(grid):
    """Each position by itself, m(t) = t; even progress is linear for it as long as all are hidden
    together, which a text of one position is."""
    model, count = tiny("mdm", length=1).model, 5
    start, end = (np.arange(count) / count, np.arange(1, count + 1) / count)
    p = np.cos(np.pi / 2 * start) - np.cos(np.pi / 2 * end) if grid == "cosine" else end - start
    revealed = model.sample(rows=ROWS, steps=count, grid=grid, generator=rng()).revealed[:, 0]
    found = np.bincount(revealed, minlength=count + 1)[1:]
    assert stats.chisquare(found, ROWS * p).pvalue > 1e-4


def test_even_steps_are_those_of_jax():
    """For exponents from 0.01 to 3, and for the cosine."""
    draw = np.random.default_rng(0)
    log_w = np.log(draw.uniform(0.01, 3, (20, 9))).astype("f4")
    masked, log_t = draw.random((20, 9)) < 0.7, -draw.exponential(5, 20).astype("f4")
    masked[:, 0] = True
    group = torch.zeros(20, 9, dtype=torch.int64)
    for ours, theirs in (
        (Schedule(Weights(torch.tensor(log_w), group)), jax_schedule.Power(jnp.asarray(log_w))),
        (
            Schedule(Weights(group.float(), group), "cosine"),
            jax_schedule.Cosine(jnp.zeros((20, 9))),
        ),
    ):
        found = even_progress(ours, torch.tensor(masked), torch.tensor(log_t), 4)
        wanted = jax_even_progress(theirs, jnp.asarray(masked), jnp.asarray(log_t), 4)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        chance = jax_schedule.unmask_probability(theirs, jnp.asarray(log_t), wanted)
        close(unmask_probability(ours, torch.tensor(log_t), th(wanted)), chance, "chance")


def test_what_reveals_nothing_costs_no_call_unless_the_network_is_told_the_time():
    alone = tiny("mdm").model.sample(steps=64, grid="linear", generator=rng())
    assert alone.calls == len(set(alone.revealed[0].tolist())) <= 4 < alone.revealed.max()
    told = tiny("mdm", time_conditioning=True).model.sample(steps=64, generator=rng())
    assert told.calls == told.revealed.max() > 4


@pytest.mark.parametrize("name", ["lomdm", "lomdm-order", *GROUPS])
def test_what_is_given_stays_and_the_rest_follows_it(name):
    """In each row elsewhere."""
    model, starts = tiny(name).model, [(1, MASK, MASK, 0), (MASK, MASK, 0, MASK)]
    given = torch.tensor(starts).repeat(ROWS // 2, 1)
    samples = model.sample(given, generator=rng(1))
    kept = given != MASK
    assert (samples.tokens[kept] == given[kept]).all() and (samples.revealed[kept] == 0).all()
    for row, start in enumerate(starts):
        shown = samples.revealed[row::2][given[row::2] == MASK].view(-1, start.count(MASK))
        assert (shown.sort(-1).values == torch.arange(1, start.count(MASK) + 1)).all()
        assert fits(counts(samples.tokens[row::2]), exact(model, 1, start)) > 1e-4
    nothing = model.sample(samples.tokens)
    assert nothing.calls == 0 and (nothing.tokens == samples.tokens).all()


# The ranked layout


def comes_first(given):
    """Which orders reveal what is given before all else, bool [24]."""
    return ((given.sum() > RANKS) == given).all(-1)


@torch.no_grad()
def pairs(model, start=None):
    """p of each text and order, [16, 24]: what is given is read as the posterior of nothing but
    that reveals it, and all else comes by the prior."""
    z = torch.tensor([start or NOTHING])
    given = z[0] != MASK
    weights = model.forward_order(z).weights.after(given[None])
    log_q = torch.where(given, reveal_log_probabilities(weights, RANKS), 0.0).sum(-1)
    found = []
    for text in TEXTS:
        tokens = torch.tensor(text).long().expand(len(RANKS), -1)
        logits, backward = model.reverse(torch.full_like(tokens, MASK), None, tokens, RANKS)
        log_p = reveal_log_probabilities(backward.weights, RANKS) - token_nll(logits, tokens, MASK)
        log_p = log_q + torch.where(given, 0.0, log_p).sum(-1)
        fits_start = comes_first(given) & bool((tokens[0] == z[0])[given].all())
        found.append(torch.where(fits_start, log_p.exp(), 0.0))
    return torch.stack(found).double().numpy()


def cells(samples):
    """Counts of every text and order, from the calls that revealed."""
    order = (samples.revealed[:, None] - 1 == RANKS).all(-1).int().argmax(-1)
    text = samples.tokens @ torch.tensor([8, 4, 2, 1])
    return np.bincount(text * len(RANKS) + order, minlength=len(TEXTS) * len(RANKS))


@pytest.mark.parametrize("name", ["lomdm-ranked", "walk", "mdm", "block:2"])
def test_in_any_order_texts_and_orders_have_the_distribution_of_the_model(name):
    model = tiny(name, "ranked").model
    samples = model.sample(rows=2 * ROWS, generator=rng())
    assert fits(cells(samples), pairs(model).ravel()) > 1e-4
    assert samples.calls == 4


def test_several_at_once_in_any_order_know_nothing_of_each_other():
    """All of them: the order by the tables alone, the tokens each as if it came first."""
    model = tiny("lomdm-ranked").model
    joint, nothing = pairs(model), torch.tensor([NOTHING])
    with torch.no_grad():
        log_order = reveal_log_probabilities(Reader(model, nothing, 4).weights, RANKS).sum(-1)
        log_p = remove_mask(model(nothing)[0], MASK).log_softmax(-1)[0]
    tokens = [sum(log_p[i, token] for i, token in enumerate(text)) for text in TEXTS]
    p = (torch.stack(tokens)[:, None] + log_order).exp().numpy().astype(np.float64)
    samples = model.sample(rows=ROWS, reveal=4, generator=rng())
    assert samples.calls == 1 and (samples.revealed == 1).all()
    assert fits(counts(samples.tokens), p.sum(-1)) > 1e-4
    assert fits(counts(samples.tokens), joint.sum(-1)) < 1e-6, "the test can fail"
    two = model.sample(rows=ROWS, reveal=2, generator=rng())
    assert two.calls == 2 and distance(two, joint.sum(-1)) < distance(samples, joint.sum(-1))


@pytest.mark.parametrize("name", ["lomdm-ranked", "walk", "ar"])
def test_in_any_order_what_is_given_stays_and_the_rest_follows_it(name):
    model, starts = tiny(name, "ranked").model, [(MASK, 1, MASK, MASK), (0, MASK, 1, MASK), NOTHING]
    given = torch.tensor(starts).repeat(ROWS // 2, 1)
    samples = model.sample(given, generator=rng(1))
    kept = given != MASK
    assert (samples.tokens[kept] == given[kept]).all() and (samples.revealed[kept] == 0).all()
    for row, start in enumerate(starts):
        assert fits(counts(samples.tokens[row::3]), pairs(model, start).sum(-1)) > 1e-4
        shown = samples.revealed[row::3][given[row::3] == MASK].view(-1, start.count(MASK))
        assert (shown.sort(-1).values == torch.arange(1, start.count(MASK) + 1)).all()


# What is remembered


@torch.no_grad()
@pytest.mark.parametrize("name", ["ar", "r2l", "permutation:3"])
def test_a_causal_cache_has_the_logits_of_one_pass(name):
    """Read one by one, and several at once."""
    model = network(name, layers=2).model
    tokens = torch.randint(5, (3, 6), generator=rng())
    whole = model(torch.full_like(tokens, 5), None, tokens)[0]
    for steps in (range(6), (1, 4, 5)):
        context = Causal(model, tokens)
        for n in steps:
            logits, _ = context.look(n, torch.zeros(3))
            torch.testing.assert_close(logits[:, 0], whole[:, context.order[n]])


@torch.no_grad()
def test_a_cache_of_blocks_has_the_logits_of_one_pass():
    """Asked twice, with part of a block revealed; and with blocks left out."""
    model = network("block:2", layers=2).model
    tokens = torch.randint(5, (3, 6), generator=rng())
    for blocks in ((0, 1, 2), (0, 2), (2,)):
        z = tokens.clone()
        context = Groups(model, z)
        for block in blocks:
            places = slice(2 * block, 2 * block + 2)
            for hidden in ([True, True], [False, True]):
                z[:, places] = torch.where(torch.tensor(hidden), 5, tokens[:, places])
                whole = model(z, None, tokens)[0]
                logits, _ = context.look(block, torch.zeros(3))
                torch.testing.assert_close(logits, whole[:, places])
            z[:, places] = tokens[:, places]


@torch.no_grad()
def test_a_cache_in_any_order_has_the_logits_and_moves_of_one_pass():
    """Rows with different numbers of tokens read, and several asked at once."""
    model = network("lomdm-ranked", layers=2).model
    tokens = torch.randint(5, (3, 6), generator=rng())
    rank = torch.rand(3, 6, generator=rng()).argsort(-1)
    order = rank.argsort(-1)
    done = torch.tensor([2, 0, 3])
    reader, where = Reader(model, tokens, 2), torch.arange(3).expand(3, -1)
    slots = torch.where(where < done[:, None], where, 6)
    reader.read(order[:, :3], slots)
    whole, backward = model.reverse(torch.full_like(tokens, 5), None, tokens, rank)
    next_two = torch.stack([order[row, done[row] : done[row] + 2] for row in range(3)])
    logits = reader.ask(next_two, done[:, None])
    for row in range(3):
        torch.testing.assert_close(logits[row, 0], whole[row, next_two[row, 0]])
        read = order[row, : done[row]]
        moves = reader.weights.moves[row, read], backward.weights.moves[row, read]
        torch.testing.assert_close(*moves)
        other = rank[row].clone()  # the second, as if it came next
        other[next_two[row]] = other[next_two[row]].flip(0)
        logits_there = model(torch.full((1, 6), 5), None, tokens[row : row + 1], other[None])[0]
        torch.testing.assert_close(logits[row, 1], logits_there[0, next_two[row, 1]])


# Draws


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 2},
        {"top_k": 3, "top_p": 0.6},
        {"temperature": 0.5, "top_p": 0.8},
        {"temperature": 0},
        {"top_p": 1e-9},
    ],
)
def test_filters_are_those_of_jax(settings):
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype("f4")
    theirs = jax_tokens.Filter(**settings)(jnp.asarray(logits))
    close(Filter(**settings)(torch.tensor(logits)), theirs, "logits", atol=1e-6)


def test_what_is_filtered_out_is_never_drawn():
    model = tiny("lomdm").model
    greedy = [model.sample(rows=50, temperature=0, steps=1, generator=rng(n)) for n in range(2)]
    assert (greedy[0].tokens == greedy[1].tokens).all()
    assert (greedy[0].tokens == greedy[0].tokens[0]).all()
    nearly = model.sample(rows=50, top_p=1e-6, steps=1, generator=rng())
    assert (nearly.tokens == greedy[0].tokens).all()


def test_noise_is_finer_than_float32():
    """Uniforms of 24 bits would put exp(-noise) on multiples of 2^-24 at the tail."""
    noise = gumbel(torch.empty(1_000_000), rng())
    tail = noise[noise > math.log(1e3)]
    assert noise.dtype == torch.float64 and len(tail) > 900
    cells = torch.exp(-tail) * 2**24
    assert ((cells - cells.round()).abs() > 1e-3).double().mean() > 0.95
    assert stats.kstest(noise[:100_000].numpy(), stats.gumbel_r.cdf).pvalue > 1e-4


# Bounds


def mean_of(net, text, targets=None, draws=1, rows=8000):
    """The bound of one text over many draws, its standard error, and its terms."""
    tokens = torch.tensor(text).expand(rows, -1)
    targets = None if targets is None else torch.tensor(targets).expand(rows, -1)
    bound = net.model.nelbo(tokens, targets, draws=draws, generator=rng())
    return bound.mean.mean(), bound.mean.std() / math.sqrt(rows), bound.terms


@pytest.mark.parametrize("name", [*STATES, *GROUPS])
@pytest.mark.parametrize("start", [0b1111, 0b0101])
def test_the_bound_has_the_mean_that_enumeration_gives(name, start):
    """Of all of the text, and of two positions with the others given."""
    net, text = tiny(name), [1, 0, 0, 1]
    states = oracle.states_of(net.generator, net.params, np.array(text, np.int32))
    wanted = oracle.closed_form(states, start)
    targets = [bool(start >> i & 1) for i in range(4)]
    mean, error, terms = mean_of(net, text, targets)
    assert abs(mean - float(wanted.main + wanted.order)) < 4 * error + 1e-4
    if name in STATES:
        for what, term in terms._asdict().items():
            noise = 4 * float(term.std()) / math.sqrt(len(term)) + 1e-4
            assert abs(float(term.mean()) - float(getattr(wanted, what))) < noise, what
    elif name != "block:2":
        assert error < 1e-5, "exact, without any noise"
    nll = -float(oracle.log_p(net.generator, net.params, np.array(text), start))
    assert mean > nll - 4 * error - 1e-4


def test_with_a_time_the_bound_is_the_continuous_one(monkeypatch):
    """Of a network that does not listen to it: what is left at the end is counted."""
    net, told, text = tiny("lomdm"), tiny("lomdm", time_conditioning=True), [1, 0, 0, 1]
    states = oracle.states_of(net.generator, net.params, np.array(text, np.int32))
    wanted, condition = oracle.quadrature(states, EPS), net.model.backbone.condition
    monkeypatch.setattr(told.model.backbone, "condition", lambda sigma_B=None: condition())
    terms = mean_of(told, text, rows=30_000)[2]
    for name, term in terms._asdict().items():
        noise = float(term.std()) / math.sqrt(len(term))
        assert abs(float(term.mean()) - float(getattr(wanted, name))) < 4 * noise, name
    assert float(terms.reconstruction.mean()) > 0.01


@pytest.mark.parametrize("name", ["lomdm-ranked", "walk", "ar"])
def test_the_bound_of_the_ranked_layout_is_that_of_its_orders(name):
    """Sum over orders of q (nll + log q - log p)."""
    net, text = tiny(name, "ranked"), [1, 0, 0, 1]
    joint, tokens = pairs(net.model)[0b1001], torch.tensor([text])
    with torch.no_grad():
        forward = net.model.forward_order(tokens).weights
        log_q = reveal_log_probabilities(forward, RANKS).sum(-1).double().numpy()
    some = np.exp(log_q) > 1e-30
    wanted = np.sum(np.exp(log_q[some]) * (log_q[some] - np.log(joint[some])))
    mean, error, _ = mean_of(net, text)
    assert abs(mean - wanted) < 4 * error + 1e-4
    assert mean > -np.log(joint.sum()) - 4 * error - 1e-4


@pytest.mark.parametrize("given", [[1, 0, 1, 0], [1, 1, 0, 1]])
def test_given_text_is_read_in_an_order_that_does_not_know_the_rest(given, monkeypatch):
    """So that the conditional bound is one of a distribution. The rest goes on from its last."""
    model, text = tiny("lomdm-ranked").model, torch.tensor([[1, 0, 0, 1]])
    found, given = [], torch.tensor(given) > 0
    score = lambda *inputs: found.append(inputs[-1]) or all_ranks(*inputs)  # noqa: E731
    monkeypatch.setattr(modeling_lomdm, "all_ranks", score)
    model.nelbo(text.expand(40_000, -1), ~given.expand(40_000, -1), draws=1, generator=rng())
    with torch.no_grad():
        blind = model.forward_order(torch.where(given, text, MASK)).weights.after(given[None])
        known = model.forward_order(text).weights
        each = [reveal_log_probabilities(weights, RANKS) for weights in (blind, known)]
    q = torch.where(given, *each).sum(-1).exp() * comes_first(given)
    drawn = (found[0][:, None] == RANKS).all(-1).int().argmax(-1)
    assert fits(np.bincount(drawn, minlength=24), q.double().numpy()) > 1e-4
    p = pairs(model, torch.where(given, text, MASK)[0].tolist()).sum(-1)
    assert p.sum() == pytest.approx(1, abs=1e-5)


def test_draws_are_averaged_and_their_error_is_that_of_the_mean():
    net = tiny("lomdm")
    mean, error, _ = mean_of(net, [1, 0, 0, 1])
    bound = net.model.nelbo(torch.tensor([[1, 0, 0, 1]]), draws=500, generator=rng(1))
    assert bound.error[0] > 0 and abs(bound.mean[0] - mean) < 4 * math.hypot(bound.error[0], error)
    # Spread evenly over the numbers of masks, draws err less than independent ones.
    spread = net.model.nelbo(torch.tensor([[1, 0, 0, 1]] * 500), draws=16, generator=rng(2))
    assert spread.mean.std() < spread.error.mean()
    assert net.model.nelbo(torch.tensor([[1, 0, 0, 1]]), draws=1).error.isnan().all()


# Errors


@pytest.mark.parametrize(
    ("name", "layout", "settings", "message"),
    [
        ("mdm", "own", {"reveal": 0}, "reveal is 0"),
        ("mdm", "own", {"reveal": 2, "steps": 4}, "set one of them"),
        ("mdm", "own", {"steps": 4, "grid": "square"}, "grid is 'square'"),
        ("mdm", "own", {"temperature": -1.0}, "temperature"),
        ("mdm", "own", {"top_p": 0.0}, "top_p"),
        ("walk", "ranked", {"steps": 4}, "knows no times"),
        ("mdm", "own", {"given_BL": torch.zeros(2, 5, dtype=torch.int64)}, "5 positions"),
        ("r2l", "own", {"given_BL": torch.zeros(2, 3, dtype=torch.int64)}, "3 positions"),
        ("mdm", "own", {"given_BL": torch.full((2, 4), 3)}, "ids must run from 0 to 2"),
        ("mdm", "own", {"given_BL": torch.zeros(4)}, "whole numbers"),
    ],
)
def test_wrong_settings_are_named(name, layout, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, layout).model.sample(**settings)


def test_a_network_that_is_told_the_time_needs_a_grid():
    with pytest.raises(ValueError, match="set steps"):
        tiny("mdm", time_conditioning=True).model.sample()
