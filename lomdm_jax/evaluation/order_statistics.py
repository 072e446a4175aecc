"""What an order is, on held-out text: when each position and each kind of token is revealed, how
near that is to left to right, and whether what comes first is what the network is sure of."""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from lomdm_jax.evaluation.likelihood import over_batches, ratio
from lomdm_jax.evaluation.order_report import ACCENT, GREY, INK
from lomdm_jax.generator import Generator, apart
from lomdm_jax.objectives import Objective
from lomdm_jax.objectives.nelbo import batch_of
from lomdm_jax.orders.race import row_ranks

# Sequences that the statistics read: tau of a random order is then known to 0.005 at L = 32.
SEQUENCES = 512
RARE = 30  # a class with fewer tokens is not drawn: its mean says little
CLASSES = ("word start", "inside a word", "number", "punctuation", "white space", "end of text")


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


class Mean(NamedTuple):
    """A mean, its standard error over sequences, and how many values are in it."""

    mean: float
    standard_error: float
    values: int


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
    taus = [
        stats.kendalltau(np.flatnonzero(counted_L), rank_L[counted_L]).statistic
        for rank_L, counted_L in zip(rank_NL, counted_NL, strict=True)
    ]
    mask_NL = draws.mask_BL & counted_NL
    velocity, confidence = (a[mask_NL] for a in (draws.velocity_BL, draws.confidence_BL))
    within = [
        _correlation(stats.spearmanr, v[mask], c[mask])
        for mask, v, c in zip(mask_NL, draws.velocity_BL, draws.confidence_BL, strict=True)
    ]
    class_NL = classes(tokens_NL, pieces)
    return Statistics(
        kendall_tau=_mean(np.array(taus)),
        velocity_confidence=_mean(np.array(within)),
        velocity_confidence_pooled=_correlation(stats.pearsonr, velocity, confidence),
        rank_by_position=[_mean(rank_N) for rank_N in rank_NL.T],
        rank_by_class={
            name: _mean_where(rank_NL, counted_NL & (class_NL == number))
            for number, name in enumerate(CLASSES)
        },
    )


def relative_rank(rank_NL: np.ndarray, counted_NL: np.ndarray) -> np.ndarray:
    """Reveal rank among the counted positions, 0 first and 1 last; nan elsewhere, float [N, L]."""
    count_N1 = counted_NL.sum(axis=-1, keepdims=True)
    first_N1 = counted_NL.shape[-1] - count_N1
    rank_NL = np.where(counted_NL, rank_NL, -1).argsort(-1).argsort(-1)  # the others come before
    return np.where(counted_NL, (rank_NL - first_N1) / np.maximum(count_N1 - 1, 1), np.nan)


def classes(tokens_NL: np.ndarray, pieces: Callable[[list[int]], list[str]]) -> np.ndarray:
    """The index in CLASSES of every token, int [N, L]."""
    ids, inverse = np.unique(tokens_NL, return_inverse=True)
    named = [CLASSES.index(token_class(piece)) for piece in pieces(ids.tolist())]
    return np.array(named)[inverse].reshape(tokens_NL.shape)


def token_class(piece: str) -> str:
    """One of CLASSES, by the first character that is not white space."""
    text = piece.lstrip()
    if piece == "⏎":  # how tokenizers show the end of a text
        return "end of text"
    if not text:
        return "white space"
    if text[0].isalpha():
        return "inside a word" if text == piece else "word start"
    return "number" if text[0].isdigit() else "punctuation"


def _correlation(measure: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    """nan where one is constant, or there are fewer than three values."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(measure(x, y).statistic)


def _mean(values: np.ndarray) -> Mean:
    return _mean_where(values[:, None], ~np.isnan(values)[:, None])


def _mean_where(values_NL: np.ndarray, where_NL: np.ndarray) -> Mean:
    count = int(where_NL.sum())
    if not count:
        return Mean(float("nan"), float("nan"), 0)
    sums_N = np.sum(values_NL, axis=-1, where=where_NL)
    return Mean(*ratio(sums_N, where_NL.sum(axis=-1)), count)


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
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_positions(left, before, after)
    _draw_classes(right, before, after)
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


def _draw_positions(axes: Axes, before: Statistics, after: Statistics) -> None:
    where = np.arange(len(after.rank_by_position))
    axes.plot(where, where / max(len(where) - 1, 1), "--", color=INK, lw=1, label="left to right")
    # What was before is drawn larger, so that it shows where nothing has changed.
    for found, colour, label, lw in ((before, GREY, "before", 4), (after, ACCENT, "after", 1.8)):
        mean, error = (np.array([m[i] for m in found.rank_by_position], float) for i in range(2))
        axes.plot(where, mean, color=colour, lw=lw, label=f"{label} training")
        bounds = (mean - 1.96 * error, mean + 1.96 * error)
        axes.fill_between(where, *bounds, color=colour, alpha=0.25, lw=0)
    axes.set(xlabel="position (tokens)", ylabel="mean reveal rank (0 first, 1 last)")
    axes.set(xlim=(-0.5, len(where) - 0.5), ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def _draw_classes(axes: Axes, before: Statistics, after: Statistics) -> None:
    present = [name for name in CLASSES if after.rank_by_class[name].values >= RARE]
    where = np.arange(len(present))[::-1]
    for found, colour, size in ((before, GREY, 9), (after, ACCENT, 5)):
        means = [found.rank_by_class[name] for name in present]
        errors = [1.96 * m.standard_error for m in means]
        axes.errorbar(
            [m.mean for m in means], where, xerr=errors, fmt="o", ms=size, color=colour, capsize=2
        )
    axes.axvline(0.5, color=GREY, lw=0.8, ls=":")
    axes.set_yticks(where, present)
    axes.set(xlabel="mean reveal rank, 95% interval", ylim=(-0.6, len(present) - 0.4))
    axes.spines[["top", "right"]].set_visible(False)
