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
    """Of main and order, for every parameter. Nothing of the heads reaches the backbone, and the
    forward head has some through the weights of the cross-entropies."""
    net = network("lomdm")
    batch, common = batch_for(net), {"mask_id": net.generator.mask_id, "samples": 1}

    def cost(params):
        forward = net.generator.forward(params, batch.tokens_BL)
        estimate = nelbo.time_free(batch, forward, net.generator.reverse(params), **common)
        return jnp.sum(estimate.terms.main + estimate.terms.order), estimate.mask_KBL[0]

    wanted, mask = jax.jit(jax.grad(cost, has_aux=True))(net.params)
    model, tokens, wanted = net.model, th(batch.tokens_BL), tensors(wanted)
    rows = model, model.forward_order(tokens), tokens, th(batch.targets_BL), th(mask)
    terms = modeling_lomdm.time_free(*rows)
    found = torch.autograd.grad((terms.main + terms.order).sum(), list(model.parameters()))
    moved = set()
    for (name, _), ours in zip(model.named_parameters(), found, strict=True):
        close(ours, wanted[name], name, atol=2e-4)
        moved |= {name.partition(".")[0]} if ours.abs().max() > 1e-2 else set()
    assert moved == {"backbone", "forward_head", "reverse_head"}


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
    logits = jax.jit(lambda: rough.generator.reverse(rough.params)(*inputs)[0].logits[0])()
    exact, ours, theirs = (a[..., : rough.generator.mask_id] for a in (exact, ours, th(logits)))
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
