"""The order in which samples were generated: one HTML page and one picture (N samples, L long)."""

import html
import json
import os
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from lomdm_jax.errors import UserError

PALETTE = matplotlib.colormaps["viridis"]  # even steps in lightness, safe for colour blindness
SHADES = 64  # neighbouring shades are then too close to tell apart by eye
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"  # both come with matplotlib
WIDTH, MARGIN, CHART = 10.0, 0.8, 3.4  # inches
COLUMNS = (WIDTH - 2 * MARGIN) * 72 / 0.602  # per line at 1 point; MONO is 0.602 ems wide
MAX_ROWS = 44  # a longer sample would be taller than a printed page; the HTML shows all of it
GREY, INK, ACCENT = "#5f6368", "#202124", "#c2410c"  # the accent stands apart from viridis
Cell = tuple[int, int, int, str]  # position, row, column, text


class SampleTrace(NamedTuple):
    """pieces: L display strings. reveal_step_L: int [L], 0 = given, 1.. = step of revealing."""

    pieces: list[str]
    reveal_step_L: np.ndarray


class Curve(NamedTuple):
    """Reveal rank by position: float [L], NaN where given. low, high: 10th and 90th percentile;
    error: standard error of the mean, NaN for one sample; ordered: the rank from left to right;
    random: the expected rank in random order.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    ordered: np.ndarray
    random: float
    samples: int


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
    [N, L], reveal rank of each position in N >= 1 samples (0 = first), NaN where it was given; a
    position given in any sample is left out of the chart. title, notes: the caption.
    Raises UserError when lengths differ, traces or ranks are empty, or a step is no integer >= 0.
    """
    ranks = np.asarray(rank_NL, dtype=np.float64)
    traces = [SampleTrace(list(t.pieces), np.asarray(t.reveal_step_L)) for t in traces]
    _check(traces, ranks)
    curve = rank_curve(ranks)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "order.html", folder / "order.png"
    page.write_bytes(_page(traces, curve, title, notes).encode("utf-8", "replace"))
    caption = "   ·   ".join(f"{key}: {value}" for key, value in notes.items())
    _figure(traces, curve, title, caption).savefig(picture, dpi=150, facecolor="white")
    return page, picture


def _check(traces: Sequence[SampleTrace], ranks: np.ndarray) -> None:
    if not traces or ranks.ndim != 2 or 0 in ranks.shape:
        got = f"{len(traces)} traces and rank_NL of shape {ranks.shape}"
        raise UserError(f"The order report got {got}; give one trace or more and ranks [N, L].")
    for i, (pieces, steps) in enumerate(traces):
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


def rank_curve(rank_NL: np.ndarray) -> Curve:
    """Mean, spread and reference lines of rank_NL: float [N, L], NaN where given."""
    count, mean = len(rank_NL), rank_NL.mean(axis=0)
    free = np.isfinite(mean)
    low, high = np.quantile(rank_NL, [0.1, 0.9], axis=0)
    spread = rank_NL.std(axis=0, ddof=1) if count > 1 else np.full_like(mean, np.nan)
    ordered = np.where(free, np.cumsum(free) - 1.0, np.nan)
    return Curve(mean, low, high, spread / count**0.5, ordered, (free.sum() - 1) / 2, count)


def trace_rank(reveal_step_L: np.ndarray) -> np.ndarray:
    """Rank of each revealed position, float [L]: ties share their mean rank, NaN where given."""
    revealed = np.sort(reveal_step_L[reveal_step_L > 0])
    before, through = (np.searchsorted(revealed, reveal_step_L, side) for side in ("left", "right"))
    return np.where(reveal_step_L > 0, (before + through - 1) / 2, np.nan)


def _ink(fraction: float) -> str:
    """Black or white, whichever reads better on PALETTE(fraction); contrast 4.5 : 1 or more."""
    return "#ffffff" if fraction < 0.433 else "#000000"  # both read equally well there


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 3) if np.isfinite(v) else None for v in values]


def _page(traces: Sequence[SampleTrace], curve: Curve, title: str, notes: Mapping[str, str]) -> str:
    data = {
        "traces": [
            {"pieces": p, "steps": s.tolist(), "ranks": _numbers(trace_rank(s))} for p, s in traces
        ],
        "curve": {k: _numbers(v) for k, v in curve._asdict().items() if np.ndim(v) == 1},
        "random": float(curve.random),
        "samples": curve.samples,
        "shades": [(to_hex(PALETTE(x)), _ink(x)) for x in np.linspace(0, 1, SHADES)],
    }
    rows = [f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in notes.items()]
    parts = {
        "title": html.escape(title),
        "notes": "\n".join(f"<div>{row}</div>" for row in rows),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = pathlib.Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return re.sub("@@(title|notes|data)@@", lambda match: parts[match[1]], template)


def _clean(text: object, font: str) -> str:
    """`text` with line breaks and tabs made visible, and a box for what `font` cannot draw."""
    has, marks = get_font(findfont(font)).get_char_index, {"\n": "↵", "\t": "→"}
    chars = unicodedata.normalize("NFC", str(text).encode("utf-8", "replace").decode())
    plain = {c for c in chars if c.isprintable() and not unicodedata.combining(c) and has(ord(c))}
    return "".join(c if c in plain else marks.get(c, "□") for c in chars)


def _layout(pieces: Sequence[str]) -> tuple[float, list[Cell]]:
    """Font size in points and the boxes; a box breaks only when longer than a line."""
    for size in (14.0, 12.0, 10.5, 9.0):  # the largest that fits in 14 rows, else 9 points
        columns, cells, row, column = int(COLUMNS / size), list[Cell](), 0, 0
        for position, piece in enumerate(pieces):
            for part in re.findall("[^\n]*\n|[^\n]+", piece) or [" "]:
                for chunk in re.findall(f".{{1,{columns}}}", _clean(part, MONO)):
                    if column + len(chunk) > columns:
                        row, column = row + 1, 0
                    cells.append((position, row, column, chunk))
                    column += len(chunk)
                if part.endswith("\n"):
                    row, column = row + 1, 0
        if cells[-1][1] < 14:
            break
    return size, cells


def _figure(traces: Sequence[SampleTrace], curve: Curve, title: str, caption: str) -> Figure:
    """Caption, first sample, colour bar and chart, stacked in inches from the top."""
    size, cells = _layout(traces[0].pieces)
    rows = min(cells[-1][1] + 1, MAX_ROWS)
    lines = [(s, 15.0, INK, 0.32) for s in textwrap.wrap(_clean(title, SANS), 68)]
    lines += [(s.rstrip(" ·"), 9.5, GREY, 0.2) for s in textwrap.wrap(_clean(caption, SANS), 112)]
    text = 0.85 + sum(line[3] for line in lines)
    chart = text + rows * size * 1.75 / 72 + 0.7  # 1.75 ems per row leave a gap between the boxes
    figure = Figure(figsize=(WIDTH, chart + CHART + 0.75))
    page, top = _axes(figure, 0, chart), 0.4
    page.set(xlim=(MARGIN, WIDTH - MARGIN), ylim=(chart, 0))
    page.axis("off")
    for string, points, colour, height in lines:
        page.text(MARGIN, top, string, size=points, color=colour, family=SANS, parse_math=False)
        top += height
    _draw_bar(page, text - 0.25, traces)
    _draw_sample(_axes(figure, text, chart - text - 0.7), traces[0], cells, size, rows)
    _draw_curve(_axes(figure, chart, CHART), curve, traces[0].reveal_step_L)
    return figure


def _axes(figure: Figure, top: float, height: float) -> Axes:
    """Axes between the margins, `top` inches below the top edge."""
    left, tall = MARGIN / WIDTH, figure.get_figheight()
    return figure.add_axes((left, 1 - (top + height) / tall, 1 - 2 * left, height / tall))


def _fraction(steps: np.ndarray) -> np.ndarray:
    """Place of each step on the colour scale, 0 = first step, 1 = last."""
    return np.clip((steps - 1) / max(steps.max() - 1, 1), 0, 1)


def _draw_bar(page: Axes, y: float, traces: Sequence[SampleTrace]) -> None:
    """One line, in inches: what is shown, and the colour scale at the right."""
    steps, right = traces[0].reveal_step_L, WIDTH - MARGIN
    label = f"Sample 1 of {len(traces)}: {(steps > 0).sum()} tokens revealed in {steps.max()} steps"
    label += f", {(steps == 0).sum()} given (outlined)" if (steps == 0).any() else ""
    page.text(MARGIN, y, label, size=9.5, color=INK)
    page.text(right - 2.57, y, "revealed first", size=9.5, color=INK, ha="right")
    page.text(right, y, "last", size=9.5, color=INK, ha="right")
    extent = (right - 2.5, right - 0.36, y + 0.01, y - 0.13)
    page.imshow(np.linspace(0, 1, 256)[None], cmap=PALETTE, extent=extent, aspect="auto")


def _draw_sample(axes: Axes, trace: SampleTrace, cells: list[Cell], size: float, rows: int) -> None:
    """The first `rows` lines of the sample as coloured boxes, in points `size`."""
    axes.set(xlim=(0, COLUMNS / size), ylim=(rows, 0))
    axes.axis("off")
    fractions = _fraction(trace.reveal_step_L)
    for position, row, column, text in cells:
        if row >= rows:
            left = f"the remaining {len(trace.pieces) - position} tokens are in order.html"
            axes.text(COLUMNS / size, rows, left, size=9, color=GREY, ha="right", va="top")
            break
        given, x = trace.reveal_step_L[position] == 0, fractions[position]
        face, edge, ink = ("white", GREY, INK) if given else (PALETTE(x), "none", _ink(x))
        corner, wide = (column + 0.06, row + 0.08), len(text) - 0.12
        axes.add_patch(Rectangle(corner, wide, 0.84, facecolor=face, edgecolor=edge, clip_on=False))
        axes.text(column, row + 0.68, text, size=size, family=MONO, color=ink, parse_math=False)


def _draw_curve(axes: Axes, curve: Curve, steps: np.ndarray) -> None:
    """Mean reveal rank by position, its bands, both reference lines and the first sample."""
    where, mean = np.arange(len(steps)), curve.mean
    low, high = mean - 1.96 * curve.error, mean + 1.96 * curve.error  # normal 95% interval
    band: dict[str, Any] = {"facecolor": ACCENT, "linewidth": 0}
    axes.fill_between(where, curve.low, curve.high, alpha=0.13, label="10–90% of samples", **band)
    axes.fill_between(where, low, high, alpha=0.4, label="95% interval of mean", **band)
    axes.plot(where, mean, color=ACCENT, lw=1.8, label=f"mean (N = {curve.samples})")
    axes.plot(where, curve.ordered, "--", color=INK, lw=1, label="left to right")
    axes.plot(where, 0 * mean + curve.random, ":", color=INK, lw=1.4, label="random order")
    dots = axes.scatter(where, trace_rank(steps), c=PALETTE(_fraction(steps)), label="sample 1")
    dots.set(sizes=[min(16, 4000 / len(steps))], edgecolor=GREY, linewidth=0.4, zorder=3)
    axes.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-0.03 * len(steps), 1.03 * len(steps) - 1))
    axes.set(xlabel="position (tokens)", ylabel="reveal rank (tokens revealed before)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(integer=True)
    axes.legend(loc=(0, 1.01), ncols=6, frameon=False, fontsize=8.5, columnspacing=1.3)
