"""The PyTorch file has the numbers of JAX, with the same weights and the same draws."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("safetensors", reason="needs safetensors")

from lomdm_jax.interop import modeling_lomdm  # noqa: E402
from lomdm_jax.interop.modeling_lomdm import Terms, times  # noqa: E402
from lomdm_jax.objectives import nelbo  # noqa: E402
from lomdm_jax.objectives.corruption import corrupt_groups, group_uniforms  # noqa: E402
from lomdm_jax.orders.race import row_ranks  # noqa: E402
from tests.interop.networks import (  # noqa: E402
    EPS,
    NAMES,
    RANKED,
    SHARE,
    batch_for,
    close,
    network,
    th,
)


def jax_facts(net, batch, temperature):
    """Everything that JAX says of the batch: the forward schedule, the estimates with what was
    drawn for them, and each call of the network that they made."""
    generator, params = net.generator, net.params
    calls, common = [], {"mask_id": generator.mask_id, "samples": 1}
    timed = {"eps": EPS, "reconstruction_share": SHARE} | common

    def reverse(*inputs):
        tokens, schedule = generator.reverse(params)(*inputs)
        calls.append((inputs, tokens.logits, schedule.weights()))
        return tokens, schedule

    forward = generator.forward(params, batch.tokens_BL)
    found, rows = {"weights": forward.weights()}, (batch, forward, reverse)
    if not generator.order.walks:
        log_t_B = nelbo._times(batch.uniform_B, EPS, SHARE)[0]
        found["clock"] = forward.log_mask(log_t_B), forward.log_velocity(log_t_B)
    kind, name = generator.one_pass, net.values["order"]["name"]
    if kind == "state":
        estimate = nelbo.time_free(*rows, temperature=temperature, **common)
        found["time free"] = estimate.terms, estimate.mask_KBL
    if kind == "groups" if name == "block:2" else kind == "state" and "clock" in found:
        estimate = nelbo.continuous(*rows, **timed)
        found["continuous"] = estimate.terms, estimate.mask_KBL
    if kind == "groups":
        uniform_BL = group_uniforms(batch.uniform_B, forward.weights().group)
        drawn = batch.keys_B, forward.weights().group, uniform_BL, batch.targets_BL, 1
        found["groups"] = nelbo.all_groups(*rows, **common).terms, *corrupt_groups(*drawn)
        estimate = nelbo.continuous_groups(*rows, **timed)
        found["group times"] = estimate.terms, estimate.mask_KBL, uniform_BL
    if kind == "order":
        found["ranks"] = nelbo.all_ranks(*rows, **common).terms, ranks(batch, forward)
    return found, calls


def ranks(batch, forward):
    """The ranks that `nelbo.all_ranks` draws."""
    weights = forward.weights().after(~batch.targets_BL)
    return row_ranks(batch.keys_B, weights, jnp.ones_like(batch.targets_BL))


def compare_weights(ours, theirs, what):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            b = b[0] if b.ndim > a.ndim else b  # without the axis of draws
            close(a, np.broadcast_to(b, a.shape), f"{what} {name}")


def compare(net, temperature=1.0):
    """Every number that both have."""
    batch = batch_for(net)
    facts, calls = jax_facts(net, batch, temperature)
    forward = net.model.forward_order(th(batch.tokens_BL))
    compare_weights(forward.weights, facts["weights"], "forward")
    if "clock" in facts:
        log_t = times(th(batch.uniform_B), EPS, SHARE).log_t
        close(forward.log_mask(log_t), facts["clock"][0], "log m")
        close(forward.log_velocity(log_t), facts["clock"][1], "log velocity")
    for inputs, logits, weights in calls:
        z, log_t, context, rank = (*inputs, None, None)[:4]
        inputs = (z[0], log_t, context, None if rank is None else rank[0])
        found, backward = net.model.reverse(*(a if a is None else th(a) for a in inputs))
        assert found.dtype == torch.float32
        close(found[..., : net.generator.mask_id], logits[0, ..., :-1], "logits")
        compare_weights(backward.weights, weights, "reverse")
    for what, found in our_terms(net.model, forward, batch, facts, temperature):
        for name, ours, wanted in zip(found._fields, found, facts[what][0], strict=True):
            close(ours, wanted[0], f"{what}: {name}")


def our_terms(model, forward, batch, facts, temperature):
    """Names and terms, of the draws that JAX made."""
    tokens, targets = th(batch.tokens_BL), th(batch.targets_BL)
    rows = model, forward, tokens
    if "continuous" in facts:
        mask, at = th(facts["continuous"][1][0]), times(th(batch.uniform_B), EPS, SHARE)
        yield "continuous", modeling_lomdm.continuous(*rows, mask, at)
    if "time free" in facts:
        mask = th(facts["time free"][1][0])
        yield "time free", modeling_lomdm.time_free(*rows, targets, mask, temperature)
    if "groups" in facts:
        mask, weight = (th(a[0]) for a in facts["groups"][1:])
        yield "groups", modeling_lomdm.all_groups(model, tokens, mask, weight)
        mask, at = th(facts["group times"][1][0]), times(th(facts["group times"][2]), EPS, SHARE)
        weights = torch.where(at.at_end, 0.0, at.weight / at.log_t.exp()), at.weight * at.at_end
        main, left = (modeling_lomdm.all_groups(model, tokens, mask, w).main for w in weights)
        yield "group times", Terms(main, 0 * main, 0 * main, left)
    if "ranks" in facts:
        yield "ranks", modeling_lomdm.all_ranks(*rows, targets, th(facts["ranks"][1]))


def drawn(seed):
    """Some order, layout and sizes."""
    draw = np.random.default_rng(seed)
    name = str(draw.choice(NAMES))
    timed = name in ("mdm", "mdm2", "cosine", "genmd4", "lomdm")
    sizes = {
        "heads": int(draw.choice([1, 2, 4])),
        "layers": int(draw.integers(1, 3)),
        "head_layers": int(draw.integers(0, 3)),
        "time_conditioning": bool(timed and draw.integers(2)),
    }
    layout = "ranked" if name in RANKED and draw.integers(2) else "own"
    return network(name, layout, **sizes)


@pytest.mark.parametrize("name", NAMES)
def test_every_order_has_the_numbers_of_jax(name):
    compare(network(name))


@pytest.mark.parametrize("name", RANKED)
def test_every_order_on_the_ranked_layout_has_the_numbers_of_jax(name):
    compare(network(name, "ranked"))


@pytest.mark.parametrize("seed", range(12))
def test_networks_of_all_sizes_have_the_numbers_of_jax(seed):
    compare(drawn(seed), temperature=1.5)


@pytest.mark.parametrize("name", ["ar", "block:2"])
def test_a_shorter_text_has_the_numbers_of_the_start_of_a_longer_one(name):
    model = network(name).model
    tokens = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(0))
    z = torch.full_like(tokens, 5)
    short, whole = (model(z[:, :n], None, tokens[:, :n])[0] for n in (4, 6))
    torch.testing.assert_close(short, whole[:, :4])


@pytest.mark.parametrize("name", ["cosine", "lomdm", "block:2"])
def test_clocks_are_those_of_jax_at_all_times(name):
    """Down to t = e^-60, where float32 holds log t only."""
    net, log_t = network(name), jnp.array([-60.0, -12.0, -9.1, -8.9, -0.5, 0.0])
    tokens = batch_for(net).tokens_BL[:1]
    ours, theirs = net.model.forward_order(th(tokens)), net.generator.forward(net.params, tokens)
    for clock in ("log_mask", "log_velocity"):
        close(getattr(ours, clock)(th(log_t)), getattr(theirs, clock)(log_t), clock)
