"""The evaluation against exact bounds, and its standard errors against repetition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.evaluation import likelihood
from lomdm_jax.evaluation.likelihood import bound, evaluate, importance, make_scorer, report
from lomdm_jax.evaluation.trajectories import make_trajectories
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.objectives import make_objective
from tests import oracle


class Table(oracle.TableModel):
    """The free table as the evaluation sees it."""

    one_pass = "state"


MODEL = Table(length=3, vocab=2)
PARAMS = MODEL.init(jax.random.key(0))
BYTES = np.array([1, 4, 0], np.int32)


def batches(size, copies=1):
    """All sequences, `copies` times, in batches of `size`; the last one is padded."""
    tokens = np.tile(oracle.sequences(3, 2), (copies, 1))
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        padding = ((0, size - len(part)), (0, 0))
        yield {"tokens": np.pad(part, padding), "counted": np.pad(part >= 0, padding)}


@functools.cache
def scorer_of(name, draws):
    objective = make_objective(name, mask_id=2, samples=1, eps=1e-3, reconstruction_share=0.1)
    return jax.jit(make_scorer(MODEL, objective, draws))


def run(name, size, draws=16, copies=1, change=lambda batch: batch, seed=3, **options):
    scorer = scorer_of(name, draws)
    data, key = list(map(change, batches(size, copies))), jax.random.key(seed)
    known = dict(key=key, draws=draws, byte_lengths=BYTES)
    return evaluate(scorer, PARAMS, data, **known, **options)


@pytest.mark.parametrize("name", ["order", "continuous"])
def test_bounds_are_the_exact_ones_within_their_errors(name):
    found = run(name, size=800, copies=100)
    exact = [
        oracle.closed_form(states) if name == "order" else oracle.quadrature(states, 1e-3)
        for states in (oracle.states_of(MODEL, PARAMS, x) for x in oracle.sequences(3, 2))
    ]
    nelbo = float(jnp.mean(jnp.array([sum(terms) for terms in exact]))) / 3
    order = nelbo - float(jnp.mean(jnp.array([terms.clock for terms in exact]))) / 3
    # Every sequence occurs equally often, so the error holds more than the draws' own noise.
    assert abs(found.nelbo.nats_per_token - nelbo) < 4 * found.nelbo.standard_error
    assert abs(found.nelbo_order.nats_per_token - order) < 4 * found.nelbo_order.standard_error
    assert found.nelbo_order.standard_error < 0.05


def test_the_bound_with_pads_is_that_of_the_block_less_their_cost():
    """The last token of each sequence is a pad: generated, but neither paid for nor counted."""

    def padded(batch):
        last = np.arange(3) == 2
        return batch | {"counted": batch["counted"] & ~last, "padding": batch["counted"] & last}

    found, exact = run("order", size=800, copies=100, change=padded), []
    for x in oracle.sequences(3, 2):
        states = oracle.states_of(MODEL, PARAMS, x)
        terms = oracle.closed_form(states._replace(nll=states.nll * np.array([1, 1, 0])))
        exact.append(float(terms.main + terms.order) / 2)
    assert found.tokens == 1600 and found.bytes == 800 * 1 + 800 * 4
    assert abs(found.nelbo_order.nats_per_token - np.mean(exact)) < 4 * (
        found.nelbo_order.standard_error
    )
    assert found.nelbo_order.standard_error < 0.05


def test_a_document_costs_the_same_whatever_stands_beside_it():
    """Left to right, where nothing is drawn; in one document what comes before it matters."""
    config = default_config()
    config.model.update(width=16, layers=1, heads=2, cond_dim=8)
    config.order.name, config.data.length = "ar", 8
    generator = make_generator(config, 13, 12)
    params = init_params(config, 13, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.3 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), params)
    objective = make_objective(
        *("order",), mask_id=12, samples=1, eps=1, reconstruction_share=1, one_pass="groups"
    )
    tokens = np.random.default_rng(0).integers(0, 12, (6, 8)).astype(np.int32)
    tokens[:, 3:] = tokens[0, 3:]  # behind six different documents
    batch = {"tokens": tokens, "counted": np.tile(np.arange(8) >= 3, (6, 1))}
    segments = np.tile(np.arange(8) >= 3, (6, 1)).astype(np.int32)
    scorer = jax.jit(make_scorer(generator, objective, 1))
    apart, joined = (
        scorer(params, rows, np.arange(6), jax.random.key(0)).main
        for rows in (batch | {"segments": segments}, batch | {"segments": segments * 0})
    )
    np.testing.assert_allclose(apart, apart[0], rtol=1e-5)
    assert np.ptp(joined) > 0.1


def test_counts_and_units():
    found = run("order", size=8)
    assert (found.sequences, found.tokens, found.draws) == (8, 24, 16)
    assert found.bytes == 12 * 1 + 12 * 4
    nats = found.nelbo.nats_per_token * found.tokens
    assert found.nelbo.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes)
    assert found.nelbo.perplexity == pytest.approx(math.exp(found.nelbo.nats_per_token))
    assert "8 sequences, 24 tokens, 60 bytes, 16 draws" in report(found, 0.69)


def test_numbers_do_not_depend_on_the_batch_size_nor_on_padding():
    whole, padded = run("order", size=8), run("order", size=5)
    assert padded.sequences == 8
    assert padded.nelbo.nats_per_token == pytest.approx(whole.nelbo.nats_per_token, rel=1e-6)
    assert padded.nelbo.standard_error == pytest.approx(whole.nelbo.standard_error, rel=1e-5)


def test_standard_error_of_equal_lengths_is_the_familiar_one():
    nats = np.array([3.0, 5.0, 4.0, 8.0])
    found = bound(nats, np.full(4, 2), 10)
    assert found.standard_error == pytest.approx(nats.std(ddof=1) / 2 / np.sqrt(4))
    assert found.perplexity_standard_error == pytest.approx(math.exp(2.5) * found.standard_error)


def test_standard_error_is_the_spread_over_repeated_data_sets():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        tokens = rng.integers(1, 20, 200)
        found.append(bound(tokens * rng.normal(2.0, 0.5, 200) + rng.normal(0, 1, 200), tokens, 1))
    spread = np.std([b.nats_per_token for b in found])
    assert np.mean([b.standard_error for b in found]) == pytest.approx(spread, rel=0.05)


def test_one_round_is_the_first_of_several_and_its_draws_error_is_not_known():
    rounds = []
    one = run("order", size=8, after_round=lambda *told: rounds.append(told))
    assert math.isnan(one.nelbo.draw_error) and not rounds
    many = run("order", size=8, draw_error=0.05, after_round=lambda *told: rounds.append(told))
    assert [number for number, _ in rounds] == list(range(1, len(rounds) + 1))
    assert many.draws == 16 * len(rounds) > 16 and math.isnan(rounds[0][1])
    assert all(error > 0.05 for _, error in rounds[1:-1]) and rounds[-1][1] <= 0.05
    assert rounds[-1][1] == max(many.nelbo.draw_error, many.nelbo_order.draw_error)
    assert "(draws ± " in report(many, 0.69) and "(draws ± " not in report(one, 0.69)
    assert (many.sequences, many.tokens, many.bytes) == (one.sequences, one.tokens, one.bytes)


def test_the_draws_error_is_the_spread_over_repeated_evaluations_of_the_same_text():
    found = [run("order", size=8, draws=1, draw_error=0.2, seed=seed) for seed in range(60)]
    for name in ("nelbo", "nelbo_order"):
        bounds = [getattr(evaluation, name) for evaluation in found]
        spread = np.std([b.nats_per_token for b in bounds], ddof=1)
        stated = np.sqrt(np.mean([b.draw_error**2 for b in bounds]))
        assert stated == pytest.approx(spread, rel=0.4)
    assert len({evaluation.draws for evaluation in found}) > 1


def test_rounds_end_at_their_maximum(monkeypatch):
    monkeypatch.setattr(likelihood, "ROUNDS", 3)
    assert run("order", size=8, draws=2, draw_error=1e-9).draws == 6


def test_trajectories_together_are_between_the_bound_and_the_likelihood():
    """Of every sequence equally often; the exact numbers are the mean over the eight."""
    exact = [oracle.states_of(MODEL, PARAMS, x) for x in oracle.sequences(3, 2)]
    bounds = [oracle.closed_form(states) for states in exact]
    order = float(np.mean([b.main + b.order for b in bounds])) / 3
    log_p = float(np.mean([oracle.log_p(MODEL, PARAMS, x) for x in oracle.sequences(3, 2)])) / 3
    maker = jax.jit(make_trajectories(MODEL))
    found = {
        count: importance(
            maker,
            PARAMS,
            batches(300, 100),
            key=jax.random.key(0),
            count=count,
            total_bytes=6000,
        )
        for count in (1, 64)
    }
    assert abs(found[1].nats_per_token - order) < 4 * found[1].standard_error
    assert math.isnan(found[1].draw_error) and found[64].draw_error < 0.01
    assert -log_p - 4 * found[64].draw_error < found[64].nats_per_token < order - 0.01
    assert found[64].nats_per_token + log_p < 0.1 * (order + log_p)
    assert found[64].bits_per_byte == pytest.approx(
        found[64].nats_per_token * 2400 / math.log(2) / 6000
    )
