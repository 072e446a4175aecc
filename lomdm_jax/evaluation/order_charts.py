"""Charts of orders: drawn for print, in the colours of a page, and as tables."""

import csv
import io
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lomdm_jax.evaluation.order_means import Mean

GREY, INK = "#5f6368", "#202124"
# One for each run. As text on white all have a contrast of 4.5 or more; they differ in lightness
# and, for readers who see few colours, in dashes and markers.
COLOURS = ("#0068a8", "#c2410c", "#00734f", "#9c3f7f", "#7a5c00", "#3f4348")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), "-.", (0, (8, 2, 1, 2)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "order",  # the same chart is the same file
}
WIDTH = 3.45  # inches, a column of a paper


class Series(NamedTuple):
    """The points of one run, perhaps none: x, float [P] (of a chart with categories: their
    numbers), and a mean for each."""

    name: str
    x: np.ndarray
    means: Sequence[Mean]

    @property
    def mean(self) -> np.ndarray:
        return np.array([m.mean for m in self.means], float)

    @property
    def half(self) -> np.ndarray:
        """Half of the normal 95% interval; 0 where a single text gives no error."""
        return 1.96 * np.nan_to_num(np.array([m.standard_error for m in self.means], float))


class Reference(NamedTuple):
    """What the series are held against: a thin line through x and y, float [P]."""

    name: str
    x: np.ndarray
    y: np.ndarray


class Chart(NamedTuple):
    """name: of its files. title and caption: for people; the caption says what is read off.
    x, y: what the axes show, with units. categories: of charts with a row for each instead of a
    continuous x; what they have on it is y.
    """

    name: str
    title: str
    caption: str
    x: str
    y: str
    series: Sequence[Series]
    references: Sequence[Reference] = ()
    categories: Sequence[str] = ()

    def header(self) -> list[str]:
        """Column names of `rows`."""
        return ["run", self.x, f"mean {self.y}", "standard error", "values"]

    def rows(self) -> list[list[Any]]:
        """Every point, run by run, as [run, x or category, mean, standard error, values]."""
        return [
            [series.name, self.categories[int(x)] if self.categories else float(x), *mean]
            for series in self.series
            for x, mean in zip(series.x, series.means, strict=True)
        ]


def save(chart: Chart, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write <name>.png, .svg and .csv into the folder; their paths."""
    paths = [folder / f"{chart.name}.{kind}" for kind in ("png", "svg", "csv")]
    save_figure(figure_of(chart), paths[0])
    write_table(paths[2], chart.header(), chart.rows())
    return paths


def save_figure(figure: Figure, path: pathlib.Path) -> list[pathlib.Path]:
    """Write the PNG of this path and the SVG beside it, whose text is outlines: it looks the same
    without the font; both paths."""
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "order"}):
        figure.savefig(paths[0], dpi=300, facecolor="white")
        figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
    return paths


def write_table(path: pathlib.Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a CSV file in UTF-8."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def inline_svg(chart: Chart) -> str:
    """The chart for a page, which says its colours: as variables --ink, --soft, --run0, ...; its
    text is text, and its ids begin with the chart's name."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure_of(chart).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{chart.name}-", svg)
    variables = {INK: "ink", GREY: "soft"} | {c: f"run{i}" for i, c in enumerate(COLOURS)}
    for colour, name in variables.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("'DejaVu Sans', ", "").replace("<svg ", '<svg aria-hidden="true" ', 1)


def figure_of(chart: Chart) -> Figure:
    """The chart, a paper's column wide."""
    height = 0.8 + 0.2 * len(chart.categories) if chart.categories else 2.45
    keys = -(-(len(chart.series) + len(chart.references)) // 2)  # rows of the legend
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height + 0.16 * keys), layout="constrained")
        axes = figure.subplots()
        draw(axes, chart)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, borderaxespad=0.1)
    return figure


def draw(axes: Axes, chart: Chart) -> None:
    """The chart's series, with 95% intervals, and its references, on these axes."""
    (_draw_rows if chart.categories else _draw_lines)(axes, chart)
    for number, reference in enumerate(chart.references):
        line: dict[str, Any] = dict(color=INK, lw=0.9, ls=("--", ":", "-.")[number % 3])
        axes.plot(reference.x, reference.y, label=reference.name, **line)
    axes.spines[["top", "right"]].set_visible(False)


def _label(series: Series) -> str:
    """Its name in the legend; a run without a point keeps its colour from the others, unnamed."""
    return series.name if len(series.x) else ""


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        style: dict[str, Any] = dict(color=COLOURS[number], ls=DASHES[number], lw=1.5)
        few: dict[str, Any] = dict(marker=MARKERS[number], ms=3) if len(series.x) <= 24 else {}
        axes.plot(series.x, series.mean, label=_label(series), **style, **few)
        bounds = series.mean - series.half, series.mean + series.half
        axes.fill_between(series.x, *bounds, color=COLOURS[number], alpha=0.22, lw=0)
    axes.set(xlabel=chart.x, ylabel=chart.y)


def _draw_rows(axes: Axes, chart: Chart) -> None:
    """A row for each category, the first on top, and in it a point for each run."""
    count = len(chart.categories)
    for number, series in enumerate(chart.series):
        shift = 0.6 * ((number + 0.5) / len(chart.series) - 0.5)
        style: dict[str, Any] = dict(
            color=COLOURS[number], marker=MARKERS[number], ms=3.5, ls="none", lw=1.2
        )
        axes.errorbar(
            series.mean, series.x + shift, xerr=series.half, label=_label(series), **style
        )
    axes.set_yticks(range(count), chart.categories)
    axes.set(xlabel=chart.y, ylim=(count - 0.4, -0.6))
    axes.grid(axis="y", color=GREY, alpha=0.15, lw=0.6)
