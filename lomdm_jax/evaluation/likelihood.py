"""Bounds on the likelihood of a data set, with their standard errors."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives import Objective
from lomdm_jax.objectives.nelbo import Terms, batch_of

BOUNDS = {
    "nelbo": ("main", "order", "clock", "reconstruction"),
    "nelbo_order": ("main", "order", "reconstruction"),
}


class Bound(NamedTuple):
    """An upper bound on the negative log-likelihood.

    nats_per_token and its standard error over sequences; perplexity = exp of it, with its
    standard error; bits_per_byte of the UTF-8 text, which does not depend on the tokenizer;
    nan if the tokenizer loses text.
    """

    nats_per_token: float
    standard_error: float
    perplexity: float
    perplexity_standard_error: float
    bits_per_byte: float


class Evaluation(NamedTuple):
    """The paper's bound, the tighter one without the clock, and what was counted.

    terms: each term in nats per token; draws: estimates per sequence.
    """

    nelbo: Bound
    nelbo_order: Bound
    terms: dict[str, float]
    sequences: int
    tokens: int
    bytes: int
    draws: int


Scorer = Callable[[Any, dict[str, jax.Array], jax.Array, jax.Array], Terms]


def make_scorer(generator: Generator, objective: Objective, draws: int) -> Scorer:
    """(params, batch, index [B], key) -> Terms of shape [B], nats per sequence; to be jitted.

    Each sequence gets `draws` estimates, stratified in time (or in the number of masks) within
    the sequence and independent between sequences, so that the spread over sequences gives an
    honest standard error. Draws depend on (key, index) only, not on the batch size. A batch is as
    of `training.step`.
    """

    def score(
        params: Any, batch: dict[str, jax.Array], index_B: jax.Array, key: jax.Array
    ) -> Terms:
        model = apart(generator, batch.get("segments"))
        forward = model.forward(params, batch["tokens"])
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
        keys_B2 = jax.vmap(jax.random.split)(keys_B)
        start_B = jax.vmap(jax.random.uniform)(keys_B2[:, 0])

        def draw(number: jax.Array) -> Terms:
            draw_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B2[:, 1], number)
            uniform_B = jnp.mod(start_B + number / draws, 1.0)
            rows = batch_of(batch, draw_keys_B, uniform_B)
            terms = objective.estimate(rows, forward, model.reverse(params)).terms
            return jax.tree.map(lambda term_KB: jnp.mean(term_KB, axis=0), terms)

        return jax.tree.map(lambda a: jnp.mean(a, axis=0), jax.lax.map(draw, jnp.arange(draws)))

    return score


def evaluate(
    scorer: Scorer,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    draws: int,
    byte_lengths: np.ndarray | None,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Evaluation:
    """Score every sequence of `batches`.

    Args:
      scorer: a jitted `make_scorer`.
      params: parameters, usually the EMA's.
      batches: dicts of `tokens` int32 [B, L], `counted` bool [B, L] and perhaps more, see
        `training.step`; rows without a counted token fill up a batch and are left out.
      key: PRNG key of the draws.
      draws: as given to `make_scorer`.
      byte_lengths: UTF-8 bytes of each token id, int32 [V]; None where ids do not tell, and then
        bits_per_byte is nan.
      place: puts host arrays on the devices.
      progress: called with the number of sequences scored so far.
    """
    scores, tokens, total_bytes = [], [], 0
    for batch, terms in over_batches(scorer, params, batches, key=key, place=place):
        scores.append(np.stack(terms, axis=-1).astype(np.float64))
        tokens.append(batch["counted"].sum(axis=-1))
        if byte_lengths is not None:
            total_bytes += int(byte_lengths[batch["tokens"][batch["counted"]]].sum())
        progress(sum(map(len, tokens)))
    return _summarise(np.concatenate(scores), np.concatenate(tokens), total_bytes, draws)


def over_batches(
    function: Callable[[Any, dict[str, jax.Array], jax.Array, jax.Array], Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    place: Callable[[Any], Any],
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """Each batch and what function(params, batch, index [B], key) makes of it, on the host.

    The index numbers the rows through all batches; rows without a counted token are left out of
    what is yielded.
    """
    for number, batch in enumerate(batches):
        index_B = np.arange(len(batch["tokens"])) + number * len(batch["tokens"])
        found = jax.device_get(function(params, place(batch), place(index_B), key))
        real_B = batch["counted"].any(axis=-1)
        yield jax.tree.map(lambda a, real_B=real_B: a[real_B], (batch, found))


def _summarise(
    scores_N4: np.ndarray, tokens_N: np.ndarray, total_bytes: int, draws: int
) -> Evaluation:
    terms = dict(zip(Terms._fields, scores_N4.T, strict=True))
    bounds = {
        name: bound(sum(terms[term] for term in parts), tokens_N, total_bytes)
        for name, parts in BOUNDS.items()
    }
    count = int(tokens_N.sum())
    means = {name: float(term_N.sum() / count) for name, term_N in terms.items()}
    return Evaluation(
        **bounds, terms=means, sequences=len(tokens_N), tokens=count, bytes=total_bytes, draws=draws
    )


def bound(nats_N: np.ndarray, tokens_N: np.ndarray, total_bytes: int) -> Bound:
    """The bound from per-sequence nats and counted tokens; see `ratio`."""
    mean, error = ratio(nats_N, tokens_N)
    perplexity = math.exp(mean)
    bits = nats_N.sum() / math.log(2) / total_bytes if total_bytes else math.nan
    return Bound(mean, error, perplexity, perplexity * error, float(bits))


def ratio(sums_N: np.ndarray, counts_N: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(counts) over N independent sequences, and its standard error.

    The error is that to first order; nan where only one sequence counts.
    """
    total = counts_N.sum()
    mean = sums_N.sum() / total
    residual_N = sums_N - mean * counts_N
    count = np.count_nonzero(counts_N)
    spread = (residual_N**2).sum() * count / (count - 1) if count > 1 else math.nan
    return float(mean), float(math.sqrt(spread) / total)


def report(evaluation: Evaluation, baseline: float) -> str:
    """A few lines for people.

    baseline: unigram entropy of the scored text, nats per token.
    """
    lines = [
        f"{evaluation.sequences:,} sequences, {evaluation.tokens:,} tokens, "
        f"{evaluation.bytes:,} bytes, {evaluation.draws} draws per sequence"
    ]
    for name in BOUNDS:
        b: Bound = getattr(evaluation, name)
        lines.append(
            f"{name:<12} {b.nats_per_token:.4f} ± {b.standard_error:.4f} nats/token   perplexity "
            f"{b.perplexity:.2f} ± {b.perplexity_standard_error:.2f}   "
            f"{b.bits_per_byte:.4f} bits/byte"
        )
    lines.append(f"{'unigram':<12} {baseline:.4f} nats/token   perplexity {math.exp(baseline):.2f}")
    return "\n".join(lines)
