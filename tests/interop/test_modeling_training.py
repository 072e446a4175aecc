"""The PyTorch network as it is trained: its gradients, in bfloat16, and compiled."""

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("safetensors", reason="needs safetensors")

from lomdm_jax.interop import modeling_lomdm  # noqa: E402
from lomdm_jax.objectives import nelbo  # noqa: E402
from tests.interop.networks import batch_for, close, network, tensors, th  # noqa: E402


def test_gradients_are_those_of_jax():
    """Of the main term, for every parameter: the forward head has some through its weights."""
    net = network("lomdm")
    batch, common = batch_for(net), {"mask_id": net.generator.mask_id, "samples": 1}

    @jax.grad
    def gradient(params):
        forward = net.generator.forward(params, batch.tokens_BL)
        reverse = net.generator.reverse(params)
        return jnp.sum(nelbo.time_free(batch, forward, reverse, **common).terms.main)

    wanted = tensors(jax.jit(gradient)(net.params))
    mask = th(nelbo.time_free(batch, *forward_and_reverse(net, batch), **common).mask_KBL[0])
    model, tokens = net.model, th(batch.tokens_BL)
    rows = model, model.forward_order(tokens), tokens, th(batch.targets_BL), mask
    main = modeling_lomdm.time_free(*rows).main.sum()
    found = torch.autograd.grad(main, list(model.parameters()), allow_unused=True)
    moved = set()
    for (name, parameter), ours in zip(model.named_parameters(), found, strict=True):
        ours = torch.zeros_like(parameter) if ours is None else ours
        close(ours, wanted[name], name, atol=2e-4)
        moved |= {name.partition(".")[0]} if ours.abs().max() > 1e-2 else set()
    assert moved == {"backbone", "forward_head"}


def forward_and_reverse(net, batch):
    return net.generator.forward(net.params, batch.tokens_BL), net.generator.reverse(net.params)


def call_for(net):
    """Inputs of one call of the network, as JAX takes them without the draws' axis."""
    batch = batch_for(net)
    z = jnp.where(batch.targets_BL, net.generator.mask_id, batch.tokens_BL)
    if net.generator.one_pass == "state":
        return z, None, None, None
    rank = jnp.argsort(jax.random.uniform(jax.random.key(5), z.shape), -1).astype(jnp.int32)
    return z, None, batch.tokens_BL, rank


@pytest.mark.parametrize("name", ["lomdm", "lomdm-ranked"])
def test_autocast_rounds_as_much_as_jax_in_bfloat16(name):
    """At most twice JAX's error in the mean, and a twentieth of the largest logit anywhere."""
    sizes = {"width": 32, "layers": 2}
    net, rough = network(name, **sizes), network(name, dtype="bfloat16", **sizes)
    z, log_t, context, rank = call_for(net)
    inputs = [a if a is None else th(a) for a in (z, log_t, context, rank)]
    exact = net.model(*inputs)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        ours, scores = net.model(*inputs)
    inputs = z[None], log_t, context, None if rank is None else rank[None]
    logits = jax.jit(lambda: rough.generator.reverse(rough.params)(*inputs)[0][0])()
    theirs = th(logits)
    assert ours.dtype == torch.float32 and {a.dtype for a in [*scores]} == {torch.float32}
    error, others = (torch.sqrt(((a - exact) ** 2).mean()) for a in (ours, theirs))
    assert 0 < error < 2 * others
    assert (ours - exact).abs().max() < exact.abs().max() / 20


@pytest.mark.parametrize("name", ["lomdm", "genmd4", "r2l", "block:2", "lomdm-ranked"])
def test_the_training_pass_is_one_graph(name):
    """Also under autocast. The backend runs the graph as it is: a compiler would take a minute."""
    net = network(name)
    inputs = [a if a is None else th(a) for a in call_for(net)]
    inputs[3] = inputs[3] if net.generator.one_pass == "order" else None
    torch._dynamo.reset()
    compiled = torch.compile(net.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs)[0], net.model(*inputs)[0])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs)[0], net.model(*inputs)[0])


def test_the_compiled_graph_has_the_same_gradients():
    net = network("lomdm")
    inputs = [a if a is None else th(a) for a in call_for(net)]
    torch._dynamo.reset()
    compiled = torch.compile(net.model, fullgraph=True, backend="aot_eager")
    parameters = list(net.model.backbone.parameters())
    costs = [model(*inputs)[0].logsumexp(-1).sum() for model in (compiled, net.model)]
    torch.testing.assert_close(*(torch.autograd.grad(cost, parameters) for cost in costs))
