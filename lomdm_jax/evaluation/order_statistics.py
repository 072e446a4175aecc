"""What an order is, on held-out text: when each position and each kind of token is revealed, how
near that is to left to right, and whether what comes first is what the network is sure of."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from lomdm_jax.evaluation.likelihood import over_batches
from lomdm_jax.evaluation.order_charts import INK, Chart, Reference, Series, draw
from lomdm_jax.evaluation.order_classes import CLASSES, classes
from lomdm_jax.evaluation.order_means import (
    Mean,
    correlation,
    kendall_tau,
    mean_of,
    mean_where,
    relative_rank,
)
from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives import Objective
from lomdm_jax.objectives.nelbo import batch_of
from lomdm_jax.orders.race import row_ranks

# Sequences that the statistics read: tau of a random order is then known to 0.005 at L = 32.
SEQUENCES = 512
RARE = 30  # a class with fewer tokens is not drawn: its mean says little


class Draw(NamedTuple):
    """One order of each of B sequences, and one state on the way of another.

    rank_BL: int32, 0 is revealed first; what is given comes before all that is generated.
    mask_BL: bool, the masked positions of the state.
    velocity_BL, confidence_BL: float32, the reverse rate and the largest token probability there.
    """

    rank_BL: Any
    mask_BL: Any
    velocity_BL: Any
    confidence_BL: Any


class Statistics(NamedTuple):
    """kendall_tau: between reveal rank and position; 1 is left to right, -1 right to left.
    velocity_confidence: rank correlation between the two inside a state, Spearman's; nan where
      all rates are equal.
    velocity_confidence_pooled: Pearson's over all masked positions of all states (arXiv
      2602.02112, figure 4).
    rank_by_position, rank_by_class: reveal rank, 0 for the first position and 1 for the last.
    """

    kendall_tau: Mean
    velocity_confidence: Mean
    velocity_confidence_pooled: float
    rank_by_position: list[Mean]
    rank_by_class: dict[str, Mean]


def make_draw(generator: Generator, objective: Objective) -> Callable[..., Draw]:
    """(params, batch, index [B], key) -> Draw, to be jitted; as `likelihood.make_scorer`.

    objective: with one sample; the number of masks of its states is uniform.
    """

    def draw(params: Any, batch: dict[str, jax.Array], index_B: jax.Array, key: jax.Array) -> Draw:
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index_B)
        keys_B3 = jax.vmap(lambda key: jax.random.split(key, 3))(keys_B)
        uniform_B = jax.vmap(jax.random.uniform)(keys_B3[:, 1])
        rows = batch_of(batch, keys_B3[:, 2], uniform_B)
        model = apart(generator, batch.get("segments"))
        forward = model.forward(params, rows.tokens_BL)
        rank_BL = row_ranks(keys_B3[:, 0], forward.weights(), rows.targets_BL)
        e = objective.estimate(rows, forward, model.reverse(params))
        return Draw(rank_BL, e.mask_KBL[0], e.reverse_KBL[0], e.confidence_KBL[0])

    return draw


def measure(
    draw: Callable[..., Draw],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    key: jax.Array,
    pieces: Callable[[list[int]], list[str]],
    place: Callable[[Any], Any] = jax.device_put,
) -> Statistics:
    """The statistics over every sequence of `batches`.

    Args:
      draw: a jitted `make_draw`.
      params: parameters, usually the EMA's.
      batches: dicts of `tokens` int32 [B, L], `counted` bool [B, L] and perhaps more, see
        `training.step`; rows without a counted token fill up a batch and are left out.
      key: PRNG key of the draws.
      pieces: from token ids to their texts.
      place: puts host arrays on the devices.
    """
    found = over_batches(draw, params, batches, key=key, place=place)
    batch, draws = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    return summarise(draws, batch["tokens"], batch["counted"], pieces)


def summarise(
    draws: Draw,
    tokens_NL: np.ndarray,
    counted_NL: np.ndarray,
    pieces: Callable[[list[int]], list[str]],
) -> Statistics:
    """See `measure`; arrays [N, L] of sequences with a counted token each, and of those only."""
    rank_NL = relative_rank(draws.rank_BL, counted_NL)
    mask_NL = draws.mask_BL & counted_NL
    velocity, confidence = (a[mask_NL] for a in (draws.velocity_BL, draws.confidence_BL))
    within = [
        correlation(stats.spearmanr, v[mask], c[mask])
        for mask, v, c in zip(mask_NL, draws.velocity_BL, draws.confidence_BL, strict=True)
    ]
    return Statistics(
        kendall_tau=mean_of(kendall_tau(rank_NL, counted_NL, np.arange(rank_NL.shape[-1]))),
        velocity_confidence=mean_of(np.array(within)),
        velocity_confidence_pooled=correlation(stats.pearsonr, velocity, confidence),
        rank_by_position=[mean_of(rank_N) for rank_N in rank_NL.T],
        rank_by_class={
            name: mean_where(rank_NL, member_NL)
            for name, member_NL in classes(tokens_NL, counted_NL, pieces).items()
        },
    )


def report(before: Statistics, after: Statistics) -> str:
    """Two lines for people."""
    return "\n".join(
        f"{name:<12} {_plus_minus(getattr(after, field))}   before training "
        f"{_plus_minus(getattr(before, field))}   {meaning}"
        for name, field, meaning in (
            ("order", "kendall_tau", "Kendall's tau to left to right"),
            ("", "velocity_confidence", "rank correlation of velocity and confidence"),
        )
    )


def _plus_minus(mean: Mean) -> str:
    return (
        f"{mean.mean:+.3f} ± {mean.standard_error:.3f}" if mean.values else "none, all rates equal"
    )


def write(
    folder: pathlib.Path, before: Statistics, after: Statistics, order: str
) -> tuple[pathlib.Path, pathlib.Path]:
    """Write order_statistics.json and order_statistics.png into `folder`; both paths."""
    table, picture = folder / "order_statistics.json", folder / "order_statistics.png"
    both = {"order": order, "before": before, "after": after}
    table.write_text(json.dumps(_plain(both), indent=2) + "\n")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    named = {"before training": before, "after training": after}
    draw(left, rank_by_position({name: s.rank_by_position for name, s in named.items()}))
    draw(right, rank_by_class({name: s.rank_by_class for name, s in named.items()}))
    left.legend(frameon=False, fontsize=8.5)
    figure.suptitle(
        f"{order}: reveal rank on held-out text, Kendall's tau to left to right "
        f"{before.kendall_tau.mean:+.2f} before training, {after.kendall_tau.mean:+.2f} after",
        size=11,
        color=INK,
    )
    figure.savefig(picture, dpi=150, facecolor="white")
    return table, picture


def _plain(value: Any) -> Any:
    """NamedTuples as objects, and null for what is not a number, which JSON has no word for."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def rank_by_position(runs: Mapping[str, Sequence[Mean]]) -> Chart:
    """Mean reveal rank at each position, for every run."""
    length = max(map(len, runs.values()))
    ends = np.array([0.0, max(length - 1, 1)])
    return Chart(
        name="rank_by_position",
        title="Reveal rank by position",
        caption="Where in the text the order begins and ends: a falling line goes from right to "
        "left, a level one has no direction.",
        x="position (tokens)",
        y="reveal rank (0 first, 1 last)",
        series=[Series(name, np.arange(len(means)), means) for name, means in runs.items()],
        references=[
            Reference("left to right", ends, np.array([0.0, 1.0])),
            Reference("random order", ends, np.array([0.5, 0.5])),
        ],
    )


def rank_by_class(runs: Mapping[str, Mapping[str, Mean]]) -> Chart:
    """Mean reveal rank of each kind of token that no run has few of, for every run."""
    present = [name for name in CLASSES if all(m[name].values >= RARE for m in runs.values())]
    where = np.arange(len(present))
    rows = {name: [means[kind] for kind in present] for name, means in runs.items()}
    return Chart(
        name="rank_by_class",
        title="Reveal rank by kind of token",
        caption=f"Which tokens come early and which late. Kinds with fewer than {RARE} tokens are "
        "left out; a fifth is one of all tokens, by how often they occur in these texts.",
        x="kind of token",
        y="reveal rank (0 first, 1 last)",
        series=[Series(name, where, means) for name, means in rows.items()],
        references=[Reference("random order", np.array([0.5, 0.5]), np.array([-0.6, where.size]))],
        categories=present,
    )
