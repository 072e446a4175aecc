"""Zero-shot perplexities beside those of the papers, and whether these may be compared."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from lomdm_jax.evaluation.likelihood import BOUNDS, Bound, Evaluation

PREFIX = "zero-shot-"  # of the presets
# Perplexities of models of OpenWebText (gpt2, 1,024 tokens). MDLM: arXiv 2406.07524, as quoted in
# kuleshov-group/mdlm#29. BD3-LM and LoMDM: as arXiv 2602.02112 has them; how LoMDM counted
# is not public.
FIGURES: dict[str, dict[str, float]] = {
    "ptb": {"MDLM": 95.26, "BD3-LM": 96.81, "LoMDM": 80.40},
    "wikitext": {"MDLM": 32.83, "BD3-LM": 31.31, "LoMDM": 27.82},
    "lm1b": {"MDLM": 67.01},
    "lambada": {"MDLM": 47.52, "BD3-LM": 50.03, "LoMDM": 36.32},
    "ag-news": {"MDLM": 61.15},
    "pubmed": {"MDLM": 41.89},
    "arxiv": {"MDLM": 37.37},
}
PAPERS = ("MDLM", "BD3-LM", "LoMDM")


class Row(NamedTuple):
    """A set: its evaluation and the passport of its text (see `Prepared.passport`), or None of both
    and what went wrong."""

    name: str
    evaluation: Evaluation | None
    passport: dict[str, Any] | None
    failure: str = ""


def protocol(config: ConfigDict) -> str:
    """ "yes", and whose way of counting, or "no" and in which points the run differs from what the
    papers' figures were measured with."""
    data, points = config.data, []
    if pathlib.PurePath(data.tokenizer.partition(":")[2]).name != "gpt2":
        points.append(f"tokenizer {data.tokenizer}, not gpt2")
    if data.length != 1024:
        points.append(f"length {data.length}, not 1024")
    source = data.mixture or data.source
    if "openwebtext" not in data.source.lower() or data.mixture:
        points.append(f"trained on {source or 'unknown text'}, not OpenWebText")
    if config.eval.sequences:
        points.append(f"the first {config.eval.sequences} blocks, not all")
    whose = "BD3-LM: the first token is given" if config.objective.ignore_first else "MDLM: all"
    return f"no: {'; '.join(points)}" if points else f"yes, counted as {whose}"


def columns(row: Row, config: ConfigDict) -> dict[str, Any]:
    """A row of the table by column; None where a number is not known."""
    figures = FIGURES.get(row.name.removeprefix(PREFIX), {}) if row.name.startswith(PREFIX) else {}
    papers = {paper: figures.get(paper) for paper in PAPERS}
    if row.evaluation is None or row.passport is None:
        return {"set": row.name, "failure": row.failure} | papers
    numbers: dict[str, Any] = {}
    for name in BOUNDS:
        bound: Bound = getattr(row.evaluation, name)
        numbers |= {f"{name}_{key}": value for key, value in bound._asdict().items()}
    return {
        "set": row.name,
        "nats": numbers["nelbo_nats_per_token"] * row.evaluation.tokens,
        **{key: None if math.isnan(value) else value for key, value in numbers.items()},
        "draws": row.evaluation.draws,
        "blocks": row.evaluation.sequences,
        "tokens": row.evaluation.tokens,
        **{key: row.passport[key] for key in ("documents", "dropped", "sha256")},
        **papers,
        "protocol": protocol(config) if figures else "no: no paper has this set",
    }


def write(
    folder: pathlib.Path, rows: Sequence[Row], config: ConfigDict
) -> tuple[pathlib.Path, ...]:
    """Write zero_shot.json, zero_shot.csv and zero_shot.md into `folder`; their paths."""
    paths = tuple(folder / f"zero_shot.{kind}" for kind in ("json", "csv", "md"))
    facts = {"order": config.order.name, "tokenizer": config.data.tokenizer}
    facts |= {"length": config.data.length, "estimator": config.eval.estimator}
    found = [columns(row, config) for row in rows]
    paths[0].write_text(json.dumps(facts | {"sets": found}, indent=2) + "\n")
    names = list(dict.fromkeys(name for row in found for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    paths[1].write_text(table.getvalue())
    paths[2].write_text(markdown(rows, config) + "\n")
    return paths


def markdown(rows: Sequence[Row], config: ConfigDict) -> str:
    """The table for people. nelbo is the papers' bound; nelbo_order a tighter one."""
    heads: tuple[str, ...] = ("set", "nelbo", "nelbo_order", "draws ±", "blocks", "tokens")
    heads += ("SHA-256", *PAPERS, "as the papers")
    lines = [heads, tuple("---" for _ in heads)]
    lines += [_cells(columns(row, config)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(found: dict[str, Any]) -> tuple[str, ...]:
    papers = tuple("" if found[paper] is None else f"{found[paper]:.2f}" for paper in PAPERS)
    if "failure" in found:
        return (found["set"], *[""] * 6, *papers, f"failed: {found['failure']}")
    bounds = tuple(
        f"{found[f'{name}_perplexity']:.2f} ± {found[f'{name}_perplexity_standard_error']:.2f}"
        if found[f"{name}_perplexity_standard_error"] is not None
        else f"{found[f'{name}_perplexity']:.2f}"
        for name in BOUNDS
    )
    error = found["nelbo_draw_error"]
    draws = "" if error is None else f"{error * found['nelbo_perplexity']:.2f}"
    counts = tuple(f"{found[key]:,}" for key in ("blocks", "tokens"))
    return (found["set"], *bounds, draws, *counts, found["sha256"][:12], *papers, found["protocol"])
