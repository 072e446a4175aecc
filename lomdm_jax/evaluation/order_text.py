"""Text as boxes coloured by when each token was revealed: pictures, and their colours."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from lomdm_jax.evaluation.order_charts import GREY, INK

PALETTE = matplotlib.colormaps["viridis"]  # even steps in lightness, safe for colour blindness
MONO, SANS = "DejaVu Sans Mono", "DejaVu Sans"  # both come with matplotlib
WIDTH, MARGIN = 10.0, 0.8  # inches
COLUMNS = (WIDTH - 2 * MARGIN) * 72 / 0.602  # per line at 1 point; MONO is 0.602 ems wide
MAX_ROWS = 44  # a longer text would be taller than a printed page; the HTML shows all of it
Cell = tuple[int, int, int, str]  # position, row, column, text


class SampleTrace(NamedTuple):
    """pieces: L display strings. reveal_step_L: int [L], 0 = given, 1.. = step of revealing.
    nll_L: float [L], what each token cost when it was revealed, nats; None if that is unknown."""

    pieces: list[str]
    reveal_step_L: np.ndarray
    nll_L: np.ndarray | None = None


def ink(fraction: float) -> str:
    """Black or white, whichever reads better on PALETTE(fraction); contrast 4.5 : 1 or more."""
    return "#ffffff" if fraction < 0.433 else "#000000"  # both read equally well there


def clean(text: object, font: str) -> str:
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
                for chunk in re.findall(f".{{1,{columns}}}", clean(part, MONO)):
                    if column + len(chunk) > columns:
                        row, column = row + 1, 0
                    cells.append((position, row, column, chunk))
                    column += len(chunk)
                if part.endswith("\n"):
                    row, column = row + 1, 0
        if cells[-1][1] < 14:
            break
    return size, cells


class Block(NamedTuple):
    """A trace laid out: font size in points, its boxes, and how many lines of them are drawn."""

    trace: SampleTrace
    size: float
    cells: list[Cell]
    lines: int

    @property
    def inches(self) -> float:
        return self.lines * self.size * 1.75 / 72  # 1.75 ems a line leave a gap between the boxes


def laid_out(trace: SampleTrace, most: int = MAX_ROWS) -> Block:
    """The first `most` lines of the trace."""
    size, cells = _layout(trace.pieces)
    return Block(trace, size, cells, min(cells[-1][1] + 1, most))


def blank(inches: float) -> tuple[Figure, Axes]:
    """A figure so high and, between its margins, axes in inches from its top."""
    figure = Figure(figsize=(WIDTH, inches))
    page = axes_at(figure, 0, inches)
    page.set(xlim=(MARGIN, WIDTH - MARGIN), ylim=(inches, 0))
    page.axis("off")
    return figure, page


def axes_at(figure: Figure, top: float, height: float) -> Axes:
    """Axes between the margins, `top` inches below the top edge."""
    left, tall = MARGIN / WIDTH, figure.get_figheight()
    return figure.add_axes((left, 1 - (top + height) / tall, 1 - 2 * left, height / tall))


def draw_block(figure: Figure, page: Axes, top: float, block: Block, name: str) -> None:
    """A line that says what is shown, with the scale of colours, and below it, `top` inches from
    the top edge, the boxes."""
    _draw_bar(page, top - 0.25, block.trace, name)
    _draw_sample(axes_at(figure, top, block.inches), block)


def figure_of_texts(traces: Sequence[SampleTrace], names: Sequence[str]) -> Figure:
    """The first lines of each text, below one another."""
    blocks = [laid_out(trace, MAX_ROWS // len(traces)) for trace in traces]
    figure, page = blank(0.2 + sum(block.inches + 0.75 for block in blocks))
    top = 0.5
    for block, name in zip(blocks, names, strict=True):
        draw_block(figure, page, top, block, name)
        top += block.inches + 0.75
    return figure


def fraction(steps: np.ndarray) -> np.ndarray:
    """Place of each step on the colour scale, 0 = first step, 1 = last."""
    return np.clip((steps - 1) / max(steps.max() - 1, 1), 0, 1)


def _draw_bar(page: Axes, y: float, trace: SampleTrace, name: str) -> None:
    steps, right = trace.reveal_step_L, WIDTH - MARGIN
    label = f"{name}: {(steps > 0).sum()} tokens revealed in {steps.max()} steps"
    label += f", {(steps == 0).sum()} given (outlined)" if (steps == 0).any() else ""
    page.text(MARGIN, y, label, size=9.5, color=INK, parse_math=False)
    page.text(right - 2.57, y, "revealed first", size=9.5, color=INK, ha="right")
    page.text(right, y, "last", size=9.5, color=INK, ha="right")
    extent = (right - 2.5, right - 0.36, y + 0.01, y - 0.13)
    page.imshow(np.linspace(0, 1, 256)[None], cmap=PALETTE, extent=extent, aspect="auto")


def _draw_sample(axes: Axes, block: Block) -> None:
    """The first lines of the text as coloured boxes."""
    trace, size, cells, rows = block
    axes.set(xlim=(0, COLUMNS / size), ylim=(rows, 0))
    axes.axis("off")
    fractions = fraction(trace.reveal_step_L)
    for position, row, column, text in cells:
        if row >= rows:
            left = f"the remaining {len(trace.pieces) - position} tokens are in the page"
            axes.text(COLUMNS / size, rows, left, size=9, color=GREY, ha="right", va="top")
            break
        given, x = trace.reveal_step_L[position] == 0, fractions[position]
        face, edge, colour = ("white", GREY, INK) if given else (PALETTE(x), "none", ink(x))
        corner, wide = (column + 0.06, row + 0.08), len(text) - 0.12
        axes.add_patch(Rectangle(corner, wide, 0.84, facecolor=face, edgecolor=edge, clip_on=False))
        axes.text(column, row + 0.68, text, size=size, family=MONO, color=colour, parse_math=False)
