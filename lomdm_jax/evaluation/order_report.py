"""The order in which samples were generated: one HTML page and one picture (N samples, L long)."""

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lomdm_jax.errors import UserError
from lomdm_jax.evaluation.order_charts import GREY, INK
from lomdm_jax.evaluation.order_means import relative_rank
from lomdm_jax.evaluation.order_page import Curve, Shown, page, rank_curve
from lomdm_jax.evaluation.order_text import (
    MARGIN,
    PALETTE,
    SANS,
    SampleTrace,
    axes_at,
    blank,
    clean,
    draw_block,
    fraction,
    laid_out,
)

ACCENT = "#c2410c"  # stands apart from viridis
CHART = 3.4  # inches


def write_order_report(
    folder: str | os.PathLike[str],
    traces: Sequence[SampleTrace],
    rank_NL: np.ndarray,
    *,
    title: str,
    notes: Mapping[str, str],
) -> tuple[pathlib.Path, pathlib.Path]:
    """Write order.html (self-contained, interactive) and order.png; return both paths.

    traces: at least one, of L positions each; the picture shows the first. rank_NL: int or float
    [N, L], reveal rank of each position in N >= 1 samples (0 = first), NaN where it was given.
    title, notes: the caption.
    Raises UserError when lengths differ, traces or ranks are empty, or a step is no integer >= 0.
    """
    ranks = np.asarray(rank_NL, dtype=np.float64)
    traces = [t._replace(reveal_step_L=np.asarray(t.reveal_step_L)) for t in traces]
    _check(traces, ranks)
    curve = rank_curve(ranks)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file, picture = folder / "order.html", folder / "order.png"
    texts = [f"Sample {number}" for number in range(1, len(traces) + 1)]
    shown = [Shown("samples", traces, curve)]
    whole = page(shown, texts=texts, what="Sample", title=title, notes=notes)
    file.write_bytes(whole.encode("utf-8", "replace"))
    caption = "   ·   ".join(f"{key}: {value}" for key, value in notes.items())
    _figure(traces, curve, title, caption).savefig(picture, dpi=150, facecolor="white")
    return file, picture


def _check(traces: Sequence[SampleTrace], ranks: np.ndarray) -> None:
    if not traces or ranks.ndim != 2 or 0 in ranks.shape:
        got = f"{len(traces)} traces and rank_NL of shape {ranks.shape}"
        raise UserError(f"The order report got {got}; give one trace or more and ranks [N, L].")
    for i, (pieces, steps, _) in enumerate(traces):
        if steps.shape != ranks.shape[1:] or len(pieces) != ranks.shape[1]:
            raise UserError(
                f"traces[{i}] has {len(pieces)} pieces and reveal_step_L of shape {steps.shape}, "
                f"but rank_NL has {ranks.shape[1]} positions; give all three the same length."
            )
        if steps.dtype.kind not in "iu" or steps.min() < 0:
            raise UserError(
                f"traces[{i}].reveal_step_L has dtype {steps.dtype} and minimum {steps.min()}; "
                "give integers, 0 for given positions and 1, 2, ... for the others."
            )


def trace_rank(reveal_step_L: np.ndarray) -> np.ndarray:
    """Rank of each revealed position, float [L]: ties share their mean rank, NaN where given."""
    revealed = np.sort(reveal_step_L[reveal_step_L > 0])
    before, through = (np.searchsorted(revealed, reveal_step_L, side) for side in ("left", "right"))
    return np.where(reveal_step_L > 0, (before + through - 1) / 2, np.nan)


def _figure(traces: Sequence[SampleTrace], curve: Curve, title: str, caption: str) -> Figure:
    """Caption, first sample and chart, stacked in inches from the top."""
    lines = [(s, 15.0, INK, 0.32) for s in textwrap.wrap(clean(title, SANS), 68)]
    lines += [(s.rstrip(" ·"), 9.5, GREY, 0.2) for s in textwrap.wrap(clean(caption, SANS), 112)]
    block = laid_out(traces[0])
    text = 0.85 + sum(line[3] for line in lines)
    chart = text + block.inches + 0.7
    figure, page = blank(chart + CHART + 0.75)
    top = 0.4
    for string, points, colour, height in lines:
        page.text(MARGIN, top, string, size=points, color=colour, family=SANS, parse_math=False)
        top += height
    draw_block(figure, page, text, block, f"Sample 1 of {len(traces)}")
    _draw_curve(axes_at(figure, chart, CHART), curve, traces[0].reveal_step_L)
    return figure


def _draw_curve(axes: Axes, curve: Curve, steps: np.ndarray) -> None:
    """Mean reveal rank by position, its bands, both reference lines and the first sample."""
    where, mean = np.arange(len(steps)), curve.mean
    ranks = relative_rank(steps[None], (steps > 0)[None])[0]
    low, high = mean - 1.96 * curve.error, mean + 1.96 * curve.error  # normal 95% interval
    band: dict[str, Any] = {"facecolor": ACCENT, "linewidth": 0}
    axes.fill_between(where, curve.low, curve.high, alpha=0.13, label="10–90% of samples", **band)
    axes.fill_between(where, low, high, alpha=0.4, label="95% interval of mean", **band)
    axes.plot(where, mean, color=ACCENT, lw=1.8, label=f"mean (N = {curve.samples})")
    axes.plot(where, curve.ordered, "--", color=INK, lw=1, label="left to right")
    axes.plot(where, 0 * where + 0.5, ":", color=INK, lw=1.4, label="random order")
    dots = axes.scatter(where, ranks, c=PALETTE(fraction(steps)), label="sample 1")
    dots.set(sizes=[min(16, 4000 / len(steps))], edgecolor=GREY, linewidth=0.4, zorder=3)
    axes.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-0.03, 1.03))
    axes.set(xlabel="position (tokens)", ylabel="reveal rank (0 first, 1 last)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc=(0, 1.01), ncols=6, frameon=False, fontsize=8.5, columnspacing=1.3)
