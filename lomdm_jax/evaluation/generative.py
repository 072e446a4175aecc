"""Generated text under a judge: perplexity, and beside it what perplexity alone would hide."""

import csv
import json
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from scipy import stats

from lomdm_jax.evaluation.judges import Judged
from lomdm_jax.evaluation.likelihood import bound
from lomdm_jax.evaluation.order_charts import COLOURS, GREY, INK, MARKERS

REFERENCE = "reference"  # takes the place of the sampler's name in the row of real text
GUMBEL = "full (float32 with double random bits)"
REJECTION = "none"
NOTES = (
    "Judged perplexity: exp of the judge's nats over its tokens, both summed over all texts, ± the "
    "standard error over texts.",
    "Entropy: of the frequencies of the tokens within a text, in nats, by the model's own "
    "tokenizer; mean over texts ± its standard error. Text that repeats itself has a low "
    "perplexity and a low entropy.",
    "Distinct: share of different texts among all.",
    "MAUVE: between the texts and the reference, by the judge's last hidden state; with few texts "
    "(5,000 are usual) it says little.",
    "NFE: network calls that a text needs, mean over texts; asked is what the settings aim at.",
    "Tokens per second: generated, all texts together, without compiling.",
    f"Gumbel noise of the draws of tokens: {GUMBEL}. Plain float32 cuts it off, which lowers the "
    "temperature unseen.",
    f"Rejection: {REJECTION}; all texts that were generated are judged.",
)


class Row(NamedTuple):
    """What is told of the samples of one sampler at one number of calls, or of the reference.

    asked_calls: network calls that the settings aim at; nfe: those that a sample needed, mean.
    perplexity: under the judge, whose tokens are judged_tokens; entropy: nats; both with their
      standard errors. distinct: share of different texts.
    mauve: between 0 and 1, or why there is none.
    Of the reference, what comes of sampling is None.
    """

    sampler: str
    asked_calls: int | None
    nfe: float | None
    samples: int
    perplexity: float
    perplexity_error: float
    judged_tokens: int
    entropy: float
    entropy_error: float
    distinct: float
    mauve: float | str
    tokens_per_second: float | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    gumbel: str | None
    rejection: str | None
    seed: int | None


class Texts(NamedTuple):
    """N texts, and their tokens by the tokenizer of the model, int [N] of varying length."""

    texts: Sequence[str]
    tokens: Sequence[np.ndarray]


def measure(texts: Texts, judged: Judged) -> dict[str, Any]:
    """The fields of a `Row` that depend on the texts alone, but `mauve`."""
    perplexity, perplexity_error = _perplexity(judged)
    entropies_N = np.array([*map(unigram_entropy, texts.tokens)])
    return {
        "samples": len(texts.texts),
        "perplexity": perplexity,
        "perplexity_error": perplexity_error,
        "judged_tokens": int(judged.tokens_N.sum()),
        "entropy": float(entropies_N.mean()),
        "entropy_error": _standard_error(entropies_N),
        "distinct": len(set(texts.texts)) / len(texts.texts),
    }


def _perplexity(judged: Judged) -> tuple[float, float]:
    """And its standard error; nan if no token counts."""
    if not judged.tokens_N.any():
        return math.nan, math.nan
    found = bound(judged.nats_N, judged.tokens_N, total_bytes=0)
    return found.perplexity, found.perplexity_standard_error


def _standard_error(values_N: np.ndarray) -> float:
    return float(stats.sem(values_N)) if len(values_N) > 1 else math.nan


def unigram_entropy(tokens_T: np.ndarray) -> float:
    """Entropy of the frequencies of the tokens of one text, nats; 0 without tokens.

    As BD3-LM's (kuleshov-group/bd3lms, metrics.py), over the whole text.
    """
    if not len(tokens_T):
        return 0.0
    return float(stats.entropy(np.unique(tokens_T, return_counts=True)[1]))


def mauve(judged: Judged, reference: Judged | None) -> float | str:
    """MAUVE (arXiv 2102.01454) of the texts to the reference, by the judge's features; or why there
    is none. The buckets and the scale are those of the package mauve-text."""
    if reference is None:
        return "no reference"
    if judged.features_ND is None:
        return "no features of this judge"
    try:
        from mauve import compute_mauve
    except ImportError:
        return "not installed"
    found = compute_mauve(p_features=reference.features_ND, q_features=judged.features_ND)
    return float(found.mauve)


def write(
    folder: pathlib.Path, facts: Mapping[str, Any], rows: Sequence[Row]
) -> tuple[pathlib.Path, ...]:
    """Write generative.md, .csv, .json and .png; their paths.

    facts: what holds for all rows, for the JSON; of it "judge" and "protocol" are shown.
    """
    names = [folder / f"generative.{kind}" for kind in ("md", "csv", "json", "png")]
    page, table, data, picture = names
    page.write_text(markdown(facts["protocol"], rows), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    everything = {**facts, "notes": [*NOTES], "rows": [row._asdict() for row in rows]}
    data.write_text(json.dumps(_plain(everything), indent=2) + "\n")
    _figure(facts["judge"], rows).savefig(picture, dpi=150, facecolor="white")
    return tuple(names)


def _plain(value: Any) -> Any:
    """null for a number that is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [*map(_plain, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(protocol: str, rows: Sequence[Row]) -> str:
    """The protocol and the table."""
    head = "sampler | asked calls | NFE | samples | judged perplexity | entropy | distinct | MAUVE"
    head += " | tokens/s | temperature | top-p | top-k | Gumbel noise | rejection | seed"
    lines = [head.split(" | "), ["---"] * 15, *map(_cells, rows)]
    notes = "".join(f"- {note}\n" for note in (f"Judge: {protocol}.", *NOTES))
    return f"{notes}\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    return [
        f"`{row.sampler}`" if row.sampler != REFERENCE else REFERENCE,
        shown(row.asked_calls, "d"),
        shown(row.nfe, ".1f"),
        f"{row.samples}",
        f"{row.perplexity:.2f} ± {row.perplexity_error:.2f}",
        f"{row.entropy:.3f} ± {row.entropy_error:.3f}",
        f"{row.distinct:.3f}",
        row.mauve if isinstance(row.mauve, str) else f"{row.mauve:.3f}",
        shown(row.tokens_per_second, ",.0f"),
        shown(row.temperature, "g"),
        shown(row.top_p, "g"),
        shown(row.top_k, "d"),
        (row.gumbel or "").partition(" ")[0],
        row.rejection or "",
        shown(row.seed, "d"),
    ]


def report(row: Row) -> str:
    """A line for people, without the settings."""
    calls = "" if row.nfe is None else f" at {row.asked_calls} calls (NFE {row.nfe:.1f})"
    mauve = row.mauve if isinstance(row.mauve, str) else f"{row.mauve:.3f}"
    return (
        f"{row.sampler}{calls}: judged perplexity {row.perplexity:.2f} ± {row.perplexity_error:.2f}"
        f", entropy {row.entropy:.3f} ± {row.entropy_error:.3f} nats, distinct {row.distinct:.3f}, "
        f"MAUVE {mauve}, {row.samples} texts"
    )


def _figure(judge: str, rows: Sequence[Row]) -> Figure:
    """Perplexity and entropy over NFE, a line per sampler."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, rows, "perplexity", "judged perplexity")
    _draw(right, rows, "entropy", "unigram entropy of a text (nats)")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (left.yaxis, left.xaxis, right.xaxis):  # numbers instead of powers
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8.5)
    samples = max(row.samples for row in rows)
    title = f"{samples} texts per point, with standard errors; judge: {judge}"
    figure.suptitle(textwrap.fill(title, 110), size=11, color=INK)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    samplers = dict.fromkeys(row.sampler for row in rows if row.sampler != REFERENCE)
    for number, sampler in enumerate(samplers):
        names = ("nfe", field, f"{field}_error")
        mine = [[getattr(row, f) for f in names] for row in rows if row.sampler == sampler]
        nfe, mean, error = np.array(sorted(mine), float).T
        look: dict[str, Any] = dict(ms=4, lw=1.5, elinewidth=1, capsize=2, alpha=0.85)
        look |= {"marker": MARKERS[number % len(MARKERS)], "color": COLOURS[number % len(COLOURS)]}
        axes.errorbar(nfe, mean, yerr=error, label=sampler.replace("@", "\n  "), **look)
    for row in rows:
        if row.sampler == REFERENCE:
            mean, error = getattr(row, field), np.nan_to_num(getattr(row, f"{field}_error"))
            axes.axhline(mean, color=INK, ls="--", lw=1, label="real text")
            axes.axhspan(mean - error, mean + error, color=GREY, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="network calls per text (NFE)", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
