"""The orders of one or several runs side by side on the same texts: a page, figures and tables."""

import csv
import math
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from lomdm_jax.config import saved_config
from lomdm_jax.data.pipeline import Batch
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation import order_comparison as comparison
from lomdm_jax.evaluation import order_texts
from lomdm_jax.evaluation.order_charts import (
    COLOURS,
    Chart,
    Reference,
    Series,
    save,
    save_figure,
    write_table,
)
from lomdm_jax.evaluation.order_comparison import Reading
from lomdm_jax.evaluation.order_means import Mean
from lomdm_jax.evaluation.order_page import Curve, Shown, page, rank_curve
from lomdm_jax.evaluation.order_text import SampleTrace, figure_of_texts
from lomdm_jax.evaluation.trajectories import calls
from lomdm_jax.reading import read
from lomdm_jax.trained import Trained, load, names_of

SHOWN = 8  # texts that the page replays; all count in the charts
DRAWN = 3  # texts in the picture of a run
CORRELATION = "velocity_confidence_correlation"  # a column of train.csv


def report(model: Trained) -> None:
    """Write the folder `report`: report.html, every chart as .png, .svg and .csv, the coloured
    texts of each run, and tokens.csv, steps.csv and summary.csv.

    Raises:
      UserError: a run or text of config.report cannot be read or does not fit.
    """
    config = model.config.report
    runs = [model, *map(load, _others(model))]
    names = names_of([run.workdir for run in runs])
    rows = order_texts.read(runs, config.texts, config.sequences)
    readings = [
        _read(*each, seed=model.config.eval.seed) for each in zip(runs, names, rows, strict=True)
    ]
    if multihost.leads():
        for path in _write(model.workdir / "report", runs, readings, rows):
            print(f"wrote {path}", flush=True)


def _others(model: Trained) -> list[pathlib.Path]:
    """The folders of config.report.runs, each of a run that can be compared."""
    text = model.config.report.runs
    folders = [pathlib.Path(part.strip()) for part in text.split(",") if part.strip()]
    every = [folder.resolve() for folder in (model.workdir, *folders)]
    if len(set(every)) < len(every):
        raise UserError(
            f"config.report.runs is {text!r}, which names a run twice: {model.workdir} is among "
            "those compared already, and each other one is to be named once."
        )
    if len(every) > len(COLOURS):
        raise UserError(
            f"config.report.runs is {text!r}, which makes {len(every)} runs: name "
            f"{len(COLOURS) - 1} or fewer, which can still be told apart."
        )
    for folder, config in [(model.workdir, model.config), *((f, saved_config(f)) for f in folders)]:
        if config.model.time_conditioning:
            raise UserError(
                f"{folder} has model.time_conditioning = True: its network is told a time, which "
                "an order alone has not. Leave it out of config.report.runs."
            )
    return folders


def _read(run: Trained, name: str, rows: Batch, seed: int) -> Reading:
    """A trajectory of every text."""
    count, length = rows["tokens"].shape
    passes = calls(run.generator, length, int(rows["counted"].sum(-1).max()))
    print(f"{name}: {count} texts in {passes} network calls each", flush=True)
    found = read(run, rows, seed)
    return Reading(name, run.tokenizer.pieces, rows["tokens"], rows["counted"], found)


def _write(
    folder: pathlib.Path,
    runs: Sequence[Trained],
    readings: Sequence[Reading],
    rows: Sequence[Batch],
) -> list[pathlib.Path]:
    """All files of the report; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"Text {number}" for number in range(1, len(readings[0].tokens_NL) + 1)][:SHOWN]
    shown = [
        Shown(r.name, _traces(r, some, len(texts)), _curve(r))
        for r, some in zip(readings, rows, strict=True)
    ]
    first, *charts = comparison.charts(readings) + _velocity(runs, [r.name for r in readings])
    paths = [*_tables(folder, readings), *save(first, folder)]
    for name, traces, _ in shown:
        picture = folder / f"texts_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.png"
        paths += save_figure(figure_of_texts(traces[:DRAWN], texts[:DRAWN]), picture)
    whole = page(
        shown,
        texts=texts,
        what="Texts",
        title="Generation orders side by side" if len(runs) > 1 else "The generation order",
        notes=_notes(runs, readings),
        charts=charts,  # the page draws the first one itself
        summary=_summary(readings),
        files=[path.name for path in paths],
    )
    paths += [path for chart in charts for path in save(chart, folder)]
    (folder / "report.html").write_bytes(whole.encode("utf-8", "replace"))
    return [*paths, folder / "report.html"]


def _curve(reading: Reading) -> Curve:
    """As far as the longest text goes."""
    rank_NL = np.where(reading.counted_NL, reading.found.rank_BL, np.nan)
    return rank_curve(rank_NL[:, : np.flatnonzero(reading.counted_NL.any(0))[-1] + 1])


def _traces(reading: Reading, rows: Batch, count: int) -> list[SampleTrace]:
    """The first texts, without what only fills up their rows."""
    absent_NL = rows.get("absent", np.zeros_like(rows["counted"]))
    steps_NL = np.where(reading.found.targets_BL, reading.step_NL + 1, 0)
    return [
        SampleTrace(reading.pieces(tokens_L[there].tolist()), steps_L[there], nll_L[there])
        for tokens_L, steps_L, nll_L, there in zip(
            reading.tokens_NL[:count], steps_NL, reading.found.nll_BL, ~absent_NL, strict=False
        )
    ]


def _tables(folder: pathlib.Path, readings: Sequence[Reading]) -> list[pathlib.Path]:
    measures = [
        [reading.name, measure, unit, *mean]
        for reading in readings
        for measure, unit, mean in comparison.summary(reading)
    ]
    tables = {
        "summary.csv": (("run", "measure", "unit", *Mean._fields), measures),
        "tokens.csv": (
            comparison.TOKEN_HEADER,
            [row for reading in readings for row in comparison.token_rows(reading)],
        ),
        "steps.csv": (
            comparison.STEP_HEADER,
            [row for reading in readings for row in comparison.step_rows(reading)],
        ),
    }
    for name, (header, rows) in tables.items():
        write_table(folder / name, header, rows)
    return [folder / name for name in tables]


def _notes(runs: Sequence[Trained], readings: Sequence[Reading]) -> dict[str, str]:
    """The caption: which texts, and which runs."""
    config = runs[0].config
    source = config.report.texts or f"validation text of {config.data.source or 'the run'}"
    notes = {"texts": f"{len(readings[0].tokens_NL)}, {source}"}
    for run, reading in zip(runs, readings, strict=True):
        order, layout = run.config.order.name, run.config.model.layout
        notes[reading.name] = f"order {order}, layout {layout}, folder {run.workdir}"
    return notes


def _summary(readings: Sequence[Reading]) -> tuple[list[str], list[list[str]]]:
    """A row for each measure, and a column for each run."""
    columns = [comparison.summary(reading) for reading in readings]
    rows = [
        [f"{row[0][0]} ({row[0][1]})", *(_plus_minus(mean) for _, _, mean in row)]
        for row in zip(*columns, strict=True)
    ]
    return ["mean ± standard error over the texts", *(r.name for r in readings)], rows


def _plus_minus(mean: Mean) -> str:
    if not mean.values:
        return "none"
    error = "" if math.isnan(mean.standard_error) else f" ± {round(mean.standard_error, 6):.2g}"
    return f"{round(mean.mean, 6):.4g}{error}"


def _velocity(runs: Sequence[Trained], names: Sequence[str]) -> list[Chart]:
    """Correlation of velocity and confidence over training, of the runs that have logged any; a
    step at which all rates are equal has none."""
    series = []
    for run, name in zip(runs, names, strict=True):
        steps, values = np.array([*_logged(run.workdir / "train.csv")]).reshape(-1, 2).T
        series.append(Series(name, steps, [Mean(value, math.nan, 1) for value in values]))
    every = np.concatenate([some.x for some in series])
    if not every.size:
        return []
    ends = np.array([every.min(), every.max()])
    return [
        Chart(
            name="velocity_confidence",
            title="Velocity and confidence over training",
            caption="Correlation between how soon a masked position is to be revealed and how sure "
            "the network is of its token, in the training batch of a step (arXiv 2602.02112, "
            "figure 4). Fixed orders have none.",
            x="training step",
            y="Pearson's correlation",
            series=series,
            references=[Reference("no correlation", ends, np.zeros(2))],
        )
    ]


def _logged(file: pathlib.Path) -> Iterator[tuple[float, float]]:
    """(step, correlation) of the rows that have one: 0 is logged where all rates are equal."""
    if not file.exists():
        return
    with open(file, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if float(row.get(CORRELATION) or 0):
                yield float(row["step"]), float(row[CORRELATION])
