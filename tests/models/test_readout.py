"""What positions cost, computed in parts, against the logits of all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lomdm_jax.distributed.costs import collectives, parse
from lomdm_jax.models import readout
from lomdm_jax.models.placement import BATCH, WITHIN
from lomdm_jax.models.readout import Logits, Readout

DRAWS, ROWS, LENGTH, WIDTH, VOCAB = 2, 4, 12, 8, 11
SHAPE = (DRAWS, ROWS, LENGTH)
MASK = VOCAB - 1


def network(dtype=jnp.float32, share=0.5):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*SHAPE, WIDTH)).astype(dtype)
    kernel = jax.random.normal(keys[1], (WIDTH, VOCAB))
    bias = jax.random.normal(keys[2], (VOCAB,)).at[MASK].set(-jnp.inf)
    tokens = jax.random.randint(keys[3], SHAPE, 0, MASK)
    return Readout(hidden, kernel, bias, share), tokens


def wheres():
    draw = np.random.default_rng(0).random(SHAPE)
    some = {f"{share:.0%}": draw < share for share in (0.1, 0.5, 0.9)}
    first = np.zeros(SHAPE, bool)
    first[:, 0] = True  # all in one row, which is more than its device's share
    return {"none": np.zeros(SHAPE, bool), "all": np.ones(SHAPE, bool), "one row": first} | some


@pytest.fixture
def parts(monkeypatch):
    """So small that there are many."""
    monkeypatch.setattr(readout, "LEAST", 5)
    monkeypatch.setattr(readout, "LOGITS", 5 * VOCAB)


def found_and_gradients(costs_of, inputs, tokens, where, weights):
    """Costs, confidences, and the gradient of a weighted sum of the costs, in one program."""

    @jax.jit
    def call(inputs, where):
        def total(inputs):
            nll, confidence = costs_of(inputs).costs(tokens, where)
            return jnp.sum(weights * nll) + jnp.sum(confidence), (nll, confidence)

        gradients, found = jax.grad(total, has_aux=True)(inputs)
        return found, gradients

    return lambda where: call(inputs, where)


def plain(share):
    return lambda inputs: Logits(Readout(*inputs, share).logits)


def in_parts(share):
    return lambda inputs: Readout(*inputs, share)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_costs_and_gradients_are_those_of_all_logits(share, parts):
    """Also where more positions are asked for than was expected: none is dropped."""
    model, tokens = network()
    weights = jax.random.normal(jax.random.key(1), SHAPE)
    both = [
        found_and_gradients(make(share), tuple(model)[:3], tokens, None, weights)
        for make in (plain, in_parts)
    ]
    for name, where in wheres().items():
        expected, found = (call(jnp.asarray(where)) for call in both)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.all(np.asarray(found[0])[:, ~where] == 0)


def test_bfloat16_products_with_sums_in_float32(parts):
    """Against float32 throughout, from the same rounded hidden states: the error is that of the
    rounded kernel and, for gradients, of the rounded excess."""
    model, tokens = network(jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(1), SHAPE)
    exact = (model.hidden.astype(jnp.float32), model.kernel, model.bias)
    where = jnp.asarray(wheres()["50%"])
    rough = found_and_gradients(in_parts(0.5), tuple(model)[:3], tokens, None, weights)(where)
    fine = found_and_gradients(plain(0.5), exact, tokens, None, weights)(where)
    (costs, _), (hidden, kernel, bias) = rough
    (costs_fine, _), (hidden_fine, kernel_fine, bias_fine) = fine
    assert costs.dtype == kernel.dtype == bias.dtype == jnp.float32
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(costs, costs_fine, atol=0.04)
    pairs = ((hidden, hidden_fine), (kernel, kernel_fine), (bias, bias_fine))
    for a, b in pairs:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.sqrt(np.mean((a - b) ** 2)) < 0.01 * np.sqrt(np.mean(b**2))


def test_no_array_of_all_logits():
    """Forward and backward, at a vocabulary that cannot be mistaken for anything else."""
    vocab, positions = 50_021, 4096
    inputs = (
        jax.ShapeDtypeStruct((1, 4, positions // 4, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((WIDTH, vocab), jnp.float32),
        jax.ShapeDtypeStruct((vocab,), jnp.float32),
    )
    tokens = jax.ShapeDtypeStruct((1, 4, positions // 4), jnp.int32)
    where = jax.ShapeDtypeStruct(tokens.shape, bool)

    def total(inputs, tokens, where):
        return jnp.sum(Readout(*inputs, 0.5).costs(tokens, where)[0])

    traced = jax.jit(jax.grad(total)).trace(inputs, tokens, where)
    compiled = traced.lower().compile().memory_analysis()
    assert compiled.temp_size_in_bytes < 4 * positions * vocab
    size, count = readout._parts(positions, vocab)
    assert size * vocab <= readout.LOGITS < positions * vocab and count > 1


@pytest.mark.parametrize("within", [(1, 1), (2, 1), (1, 2)])
def test_devices_keep_what_is_theirs(within, parts):
    """Over a mesh the results are the same; and devices that split a batch exchange nothing but
    how many parts there are, and once the gradient of the parameters."""
    mesh = jax.make_mesh((4, 1, *within), (*BATCH, *WITHIN), (AxisType.Auto,) * 4)
    model, tokens = network()
    weights = jax.random.normal(jax.random.key(1), SHAPE)
    where = jnp.asarray(wheres()["one row"])

    def total(inputs, tokens, where, weights):
        nll, confidence = Readout(*inputs, 0.5).costs(tokens, where)
        return jnp.sum(weights * nll), (nll, confidence)

    inputs = tuple(model)[:3]
    (costs, expected) = found_and_gradients(plain(0.5), inputs, tokens, None, weights)(where)
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, P(None, BATCH))
        hidden, *batch = (jax.device_put(a, split) for a in (model.hidden, tokens, where, weights))
        call = jax.jit(jax.grad(total, has_aux=True)).lower((hidden, *inputs[1:]), *batch).compile()
        gradients, found = call((hidden, *inputs[1:]), *batch)
    for a, b in zip((*found, *gradients), (*costs, *expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if within == (1, 1):
        (exchanged,) = collectives(parse(call.as_text()))
        assert exchanged.kind == "all-reduce"
        assert exchanged.size == 4 * (WIDTH * VOCAB + VOCAB + 1)
