"""Bounds on the likelihood of a data set, with their standard errors."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lomdm_jax.evaluation.trajectories import Maker, importance_bound
from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives import Objective
from lomdm_jax.objectives.nelbo import Terms, batch_of

BOUNDS = {
    "nelbo": ("main", "order", "clock", "reconstruction"),
    "nelbo_order": ("main", "order", "reconstruction"),
}
# Rounds of draws at most: the error of the draws is then an eighth of that of one.
ROUNDS = 64


class Bound(NamedTuple):
    """An upper bound on the negative log-likelihood.

    nats_per_token and its standard error over sequences; draw_error, the part of it that comes of
    the Monte Carlo draws alone and more draws would mend, nats per token, nan where it is not
    known; perplexity = exp of nats_per_token, with its standard error; bits_per_byte of the UTF-8
    text, which does not depend on the tokenizer; nan if the tokenizer loses text.
    """

    nats_per_token: float
    standard_error: float
    draw_error: float
    perplexity: float
    perplexity_standard_error: float
    bits_per_byte: float


class Evaluation(NamedTuple):
    """The paper's bound, the tighter one without the clock, and what was counted.

    terms: each term in nats per token; draws: estimates per sequence; importance: the bound that
      `trajectories` of each sequence give together, None without any.
    """

    nelbo: Bound
    nelbo_order: Bound
    terms: dict[str, float]
    sequences: int
    tokens: int
    bytes: int
    draws: int
    importance: Bound | None = None
    trajectories: int = 0


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
    draw_error: float = 0.0,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Callable[[int], None] = lambda sequences: None,
    after_round: Callable[[int, float], None] = lambda rounds, error: None,
) -> Evaluation:
    """Score every sequence of `batches`.

    Args:
      scorer: a jitted `make_scorer`.
      params: parameters, usually the EMA's.
      batches: dicts of `tokens` int32 [B, L], `counted` bool [B, L] and perhaps more, see
        `training.step`; rows without a counted token fill up a batch and are left out. Read once
        per round.
      key: PRNG key of the draws.
      draws: as given to `make_scorer`.
      byte_lengths: UTF-8 bytes of each token id, int32 [V]; None where ids do not tell, and then
        bits_per_byte is nan.
      draw_error: rounds of fresh draws follow, two at least and ROUNDS at most, until the draws'
        error of both bounds is at most this, nats per token; 0 for one round.
      place: puts host arrays on the devices.
      progress: called with the number of sequences scored so far in this round.
      after_round: called with the number of rounds so far and the draws' error, if asked for one.
    """
    rounds: list[np.ndarray] = []
    while True:
        # Counted from the end: no row's index is one of them.
        round_key = jax.random.fold_in(key, 2**32 - len(rounds)) if rounds else key
        found = over_batches(scorer, params, batches, key=round_key, place=place)
        scores_N4, counts = _scores(found, byte_lengths, progress)
        rounds.append(scores_N4)
        evaluation = _summarise(np.stack(rounds), *counts, draws * len(rounds))
        if not draw_error:
            return evaluation
        error = max(getattr(evaluation, name).draw_error for name in BOUNDS)
        after_round(len(rounds), error)
        if error <= draw_error or len(rounds) == ROUNDS:
            return evaluation


def _scores(
    found: Iterable[tuple[dict[str, np.ndarray], Terms]],
    byte_lengths: np.ndarray | None,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, tuple[np.ndarray, int]]:
    """The terms of each sequence, float64 [N, 4]; its counted tokens, int [N], and all bytes."""
    scores, tokens, total_bytes = [], [], 0
    for batch, terms in found:
        scores.append(np.stack(terms, axis=-1).astype(np.float64))
        tokens.append(batch["counted"].sum(axis=-1))
        if byte_lengths is not None:
            total_bytes += int(byte_lengths[batch["tokens"][batch["counted"]]].sum())
        progress(sum(map(len, tokens)))
    return np.concatenate(scores), (np.concatenate(tokens), total_bytes)


def importance(
    maker: Maker,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    count: int,
    total_bytes: int,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Callable[[int], None] = lambda sequences: None,
) -> Bound:
    """The bound that `count` whole trajectories of each sequence give together.

    maker: a jitted `make_trajectories`. total_bytes: of all that is counted; 0 if not known. The
    others are as of `evaluate`.
    """
    nats, errors, tokens = [], [], []

    def weigh(params: Any, batch: Any, index_B: Any, key: jax.Array) -> np.ndarray:
        made = (maker(params, batch, index_B, k) for k in jax.random.split(key, count))
        return np.stack([-jax.device_get(one.cost_BL).sum(-1, dtype=np.float64) for one in made], 1)

    for batch, log_w_BK in over_batches(weigh, params, batches, key=key, place=place):
        nats_B, error_B = importance_bound(log_w_BK.T)
        nats.append(nats_B)
        errors.append(error_B)
        tokens.append(batch["counted"].sum(axis=-1))
        progress(sum(map(len, tokens)))
    tokens_N = np.concatenate(tokens)
    error = float(np.sqrt((np.concatenate(errors) ** 2).sum()) / tokens_N.sum())
    return bound(np.concatenate(nats), tokens_N, total_bytes, error)


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
    scores_RN4: np.ndarray, tokens_N: np.ndarray, total_bytes: int, draws: int
) -> Evaluation:
    """scores_RN4: of R rounds."""
    terms = dict(zip(Terms._fields, np.moveaxis(scores_RN4, -1, 0), strict=True))
    count = int(tokens_N.sum())

    def total(name: str) -> Bound:
        nats_RN = sum(terms[term] for term in BOUNDS[name])
        error = _draw_error(nats_RN) / count
        return bound(nats_RN.mean(axis=0), tokens_N, total_bytes, error)

    return Evaluation(
        nelbo=total("nelbo"),
        nelbo_order=total("nelbo_order"),
        terms={name: float(a_RN.mean(axis=0).sum() / count) for name, a_RN in terms.items()},
        sequences=len(tokens_N),
        tokens=count,
        bytes=total_bytes,
        draws=draws,
    )


def _draw_error(nats_RN: np.ndarray) -> float:
    """Standard error of the sum over N sequences of their means over R rounds, from the spread of
    each sequence over its rounds, as draws are independent between sequences; nan for one."""
    rounds = len(nats_RN)
    if rounds < 2:
        return math.nan
    return math.sqrt(nats_RN.var(axis=0, ddof=1).sum() / rounds)


def bound(
    nats_N: np.ndarray, tokens_N: np.ndarray, total_bytes: int, draw_error: float = math.nan
) -> Bound:
    """The bound from per-sequence nats and counted tokens; see `ratio`."""
    mean, error = ratio(nats_N, tokens_N)
    perplexity = math.exp(mean)
    bits = nats_N.sum() / math.log(2) / total_bytes if total_bytes else math.nan
    return Bound(mean, error, draw_error, perplexity, perplexity * error, float(bits))


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
    lines += [line(name, getattr(evaluation, name)) for name in BOUNDS]
    if evaluation.importance is not None:
        lines.append(f"{evaluation.trajectories} whole trajectories of each sequence together:")
        lines.append(line("importance", evaluation.importance))
    lines.append(f"{'unigram':<12} {baseline:.4f} nats/token   perplexity {math.exp(baseline):.2f}")
    return "\n".join(lines)


def line(name: str, b: Bound) -> str:
    """A bound in a line for people."""
    draws = "" if math.isnan(b.draw_error) else f" (draws ± {b.draw_error:.4f})"
    return (
        f"{name:<12} {b.nats_per_token:.4f} ± {b.standard_error:.4f}{draws} nats/token   "
        f"perplexity {b.perplexity:.2f} ± {b.perplexity_standard_error:.2f}   "
        f"{b.bits_per_byte:.4f} bits/byte"
    )
