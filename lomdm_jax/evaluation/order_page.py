"""One self-contained HTML page that replays orders, of one run or of several side by side."""

import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_hex

from lomdm_jax.evaluation.order_charts import COLOURS, Chart, inline_svg
from lomdm_jax.evaluation.order_means import mean_of, relative_rank
from lomdm_jax.evaluation.order_text import PALETTE, SampleTrace, ink

SHADES = 64  # neighbouring shades are then too close to tell apart by eye
# COLOURS for a dark page, in the same hues.
DARK_COLOURS = ("#5cb3ec", "#ff9058", "#35c48f", "#e69bcb", "#dcb52f", "#b9bec5")


class Curve(NamedTuple):
    """Reveal rank by position, 0 first and 1 last: float [L], NaN where no text has any. low,
    high: 10th and 90th percentile; error: standard error of the mean, NaN for one text; ordered:
    the mean rank from left to right; samples: texts.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    ordered: np.ndarray
    samples: int


class Shown(NamedTuple):
    """What a page shows of a run: a trace for each text that is replayed, and ranks of all."""

    name: str
    traces: Sequence[SampleTrace]
    curve: Curve


def rank_curve(rank_NL: np.ndarray) -> Curve:
    """Mean and spread of reveal ranks, float [N, L], NaN where given; 0 is revealed first."""
    free_NL = np.isfinite(rank_NL)
    relative_NL = relative_rank(rank_NL, free_NL)
    ordered_NL = relative_rank(np.arange(rank_NL.shape[1]) + 0 * relative_NL, free_NL)
    means = [mean_of(column_N) for column_N in relative_NL.T]
    ends = [
        np.quantile(column_N[free_N], [0.1, 0.9]) if free_N.any() else (np.nan, np.nan)
        for column_N, free_N in zip(relative_NL.T, free_NL.T, strict=True)
    ]
    mean, error, _ = np.array(means, float).T
    ordered = np.array([mean_of(column_N).mean for column_N in ordered_NL.T])
    low, high = np.array(ends).T
    return Curve(mean, low, high, error, ordered, len(rank_NL))


def page(
    runs: Sequence[Shown],
    *,
    texts: Sequence[str],
    what: str,
    title: str,
    notes: Mapping[str, str],
    charts: Sequence[Chart] = (),
    summary: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None,
    files: Sequence[str] = (),
) -> str:
    """The page.

    runs: at most as many as there are COLOURS. texts: what the traces are called. what: of what.
    title, notes: the caption. charts: shown below, each with its numbers and its files, which lie
    beside the page. summary: header and rows of a table on top.
    files: what else lies beside the page.
    """
    rows = [f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in notes.items()]
    parts = {
        "title": html.escape(title),
        "what": html.escape(what),
        "width": "several" if charts or len(runs) > 1 else "one",
        "notes": "\n".join(f"<div>{row}</div>" for row in rows),
        "light": _variables(COLOURS),
        "dark": _variables(DARK_COLOURS),
        "summary": _summary(*summary) if summary else "",
        "figures": _figures(charts) if charts else "",
        "files": _links(files) if files else "",
        "data": _data(runs, texts),
    }
    template = pathlib.Path(__file__).with_name("order_report.html").read_text(encoding="utf-8")
    return re.sub(f"@@({'|'.join(parts)})@@", lambda match: parts[match[1]], template)


def _data(runs: Sequence[Shown], texts: Sequence[str]) -> str:
    """What the page's script reads, JSON that holds no tag."""
    data = {
        "texts": list(texts),
        "runs": [
            {
                "name": run.name,
                "traces": [_trace(trace) for trace in run.traces],
                "curve": {
                    k: _numbers(v) if np.ndim(v) else v for k, v in run.curve._asdict().items()
                },
            }
            for run in runs
        ],
        "shades": [(to_hex(PALETTE(x)), ink(x)) for x in np.linspace(0, 1, SHADES)],
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _trace(trace: SampleTrace) -> dict[str, Any]:
    pieces, steps, nll_L = trace
    ranks = relative_rank(steps[None], (steps > 0)[None])[0]
    nats = np.full(len(steps), np.nan) if nll_L is None else np.where(steps > 0, nll_L, np.nan)
    return {
        "pieces": pieces,
        "steps": steps.tolist(),
        "ranks": _numbers(ranks),
        "nats": _numbers(nats),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]


def _variables(colours: Sequence[str]) -> str:
    return "  " + " ".join(f"--run{i}: {colour};" for i, colour in enumerate(colours))


def _summary(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return (
        '<section aria-labelledby="h-summary"><h2 id="h-summary">Summary</h2>\n'
        f"{_table('Summary', header, rows, 'scroll whole')}</section>"
    )


def _figures(charts: Sequence[Chart]) -> str:
    parts = "\n".join(_figure(chart) for chart in charts)
    return f'<div class="figures" role="group" aria-label="Figures">\n{parts}\n</div>'


def _links(files: Sequence[str]) -> str:
    links = ", ".join(f'<a href="{html.escape(f)}">{html.escape(f)}</a>' for f in files)
    return f'<p class="soft">Files beside this page: {links}</p>'


def _figure(chart: Chart) -> str:
    title, caption = html.escape(chart.title), html.escape(chart.caption)
    links = ", ".join(f'<a href="{chart.name}.{k}">{k.upper()}</a>' for k in ("png", "svg", "csv"))
    rows = [[_text(cell) for cell in row] for row in chart.rows()]
    return f"""<section aria-labelledby="h-{chart.name}"><h2 id="h-{chart.name}">{title}</h2>
<figure role="img" aria-label="{title}. The numbers are in the table below.">
{inline_svg(chart)}</figure>
<p class="soft">{caption} Files: {links}</p>
<details><summary>Numbers in the figure</summary>{_table(chart.title, chart.header(), rows)}
</details></section>"""


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "–" if np.isnan(value) else f"{value:.4g}"
    return str(value)


def _table(
    name: str, header: Sequence[str], rows: Sequence[Sequence[str]], style: str = "scroll"
) -> str:
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="{style}" tabindex="0" role="region" aria-label="{html.escape(name)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
