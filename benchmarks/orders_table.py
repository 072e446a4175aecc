"""From the finished runs of orders.py to its table and its picture."""

import argparse
import csv
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np


class Cost(NamedTuple):
    """random, learned: passes per step before and after step `until`."""

    until: int
    random: float
    learned: float

    def passes(self, steps: float | np.ndarray) -> Any:
        early = np.minimum(steps, self.until)
        return early * self.random + (steps - early) * self.learned

    def steps(self, passes: float) -> int:
        """The inverse of `passes`, to the nearest step."""
        early = min(passes / self.random, self.until)
        return round(early + (passes - self.passes(early)) / self.learned)


def workdir_of(options: argparse.Namespace, variant: str, seed: int) -> pathlib.Path:
    return options.folder / f"{re.sub('[^a-z0-9.]+', '-', variant)}-{seed}"


def evaluations(options: argparse.Namespace, variant: str, seed: int) -> dict[int, dict[str, Any]]:
    """Rows of eval.csv by step."""
    with (workdir_of(options, variant, seed) / "eval.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {int(row["step"]): row for row in rows}


def seconds(options: argparse.Namespace, variant: str, steps: int) -> float:
    """Mean wall time to this step, with compilation and evaluations."""
    files = [workdir_of(options, variant, seed) / "seconds.json" for seed in options.seeds]
    return float(np.mean([json.loads(file.read_text())[str(steps)] for file in files]))


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (nan for one seed)."""
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(spread / math.sqrt(len(values)))


def score(options: argparse.Namespace, variant: str, steps: int, name: str) -> dict[str, float]:
    """Perplexity at this step and its change from masked diffusion's last one, seed by seed."""
    rows = [evaluations(options, variant, seed)[steps] for seed in options.seeds]
    mdm = [evaluations(options, "mdm", seed)[options.steps] for seed in options.seeds]
    nats, base = ([row["nelbo_order_nats_per_token"] for row in runs] for runs in (rows, mdm))
    mean, error = mean_error(nats)
    change, change_error = mean_error([a - b for a, b in zip(nats, base, strict=True)])
    return {
        f"{name}_perplexity": math.exp(mean),
        f"{name}_error": math.exp(mean) * error,
        f"{name}_change": math.expm1(change),
        f"{name}_change_error": math.exp(change) * change_error,
        f"{name}_bits_per_byte": float(np.mean([r["nelbo_order_bits_per_byte"] for r in rows])),
        f"{name}_seconds": seconds(options, variant, steps),
    }


def compare(options: argparse.Namespace, costs: dict[str, Cost]) -> list[dict[str, Any]]:
    """One row of the table per order."""
    table = []
    for variant, cost in costs.items():
        equal = cost.steps(costs["mdm"].passes(options.steps))
        row = {"order": variant, **cost._asdict(), "equal_passes_steps": equal}
        row |= score(options, variant, options.steps, "steps")
        table.append(row | score(options, variant, equal, "passes"))
    return table


def markdown(options: argparse.Namespace, table: list[dict[str, Any]]) -> str:
    at = f"at {options.steps} steps"
    head = f"order | passes per step | {at} | to mdm | steps at equal passes | at equal passes"
    head += " | to mdm | bits/byte | wall time"
    rows = [head.split(" | ")]
    for row in table:
        steps, passes = (cells(row, name) for name in ("steps", "passes"))
        first = [f"`{row['order']}`", passes_per_step(row)]
        last = [f"{row['passes_bits_per_byte']:.3f}", f"{row['passes_seconds']:.0f} s"]
        rows.append([*first, *steps, f"{row['equal_passes_steps']}", *passes, *last])
    return as_markdown(rows)


def as_markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *rest = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rest])


def passes_per_step(row: dict[str, Any]) -> str:
    early = f"{row['random']:.2f}, from step {row['until']} " if row["until"] else ""
    return early + f"{row['learned']:.2f}"


def cells(row: dict[str, Any], name: str) -> list[str]:
    """Perplexity, and its change where there is one."""
    change, error = (100 * row[f"{name}_{key}"] for key in ("change", "change_error"))
    same = row["order"] == "mdm"
    perplexity = f"{row[f'{name}_perplexity']:.3f} ± {row[f'{name}_error']:.3f}"
    return [perplexity, "" if same else f"{change:+.1f}% ± {error:.1f}"]


def statistics(options: argparse.Namespace, variants: list[str]) -> str:
    """What each order is on held-out text, before and after training, averaged over the seeds."""
    from lomdm_jax.evaluation.order_statistics import CLASSES

    names = ["Kendall's tau", "velocity with confidence", *(f"rank: {name}" for name in CLASSES)]
    rows = [["order", "", *names]]
    for variant in variants:
        files = [workdir_of(options, variant, s) / "order_statistics.json" for s in options.seeds]
        for when in ("before", "after"):
            found = [json.loads(file.read_text())[when] for file in files]
            seeds = [
                [f["kendall_tau"], f["velocity_confidence"], *f["rank_by_class"].values()]
                for f in found
            ]
            means = [[cell["mean"] for cell in column] for column in zip(*seeds, strict=True)]
            rows.append([f"`{variant}`", when, *map(mean_range, means)])
    return as_markdown(rows)


def mean_range(values: list[float | None]) -> str:
    """Mean of the seeds, and their range where they differ by more than rounding."""
    if None in values:
        return ""
    low, high = min(values), max(values)
    mean = f"{np.mean(values):+.2f}"
    return mean if high - low < 0.02 else f"{mean} ({low:+.2f} to {high:+.2f})"


def write(options: argparse.Namespace, costs: dict[str, Cost]) -> None:
    """orders.csv, orders.md and orders.png."""
    table = compare(options, costs)
    with (options.folder / "orders.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    text = markdown(options, table) + "\n" + statistics(options, list(costs))
    (options.folder / "orders.md").write_text(text)
    print(text)
    draw(options, costs)


def draw(options: argparse.Namespace, costs: dict[str, Cost]) -> None:
    """Held-out bound against steps and against passes, a line per order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (variant, cost) in enumerate(costs.items()):
        runs = [evaluations(options, variant, seed) for seed in options.seeds]
        steps = np.array(sorted(runs[0]))
        nats = np.mean([[run[s]["nelbo_order_nats_per_token"] for s in steps] for run in runs], 0)
        label, line = variant.replace("@", "\n  "), "-" if number < 10 else "--"
        style = {"color": f"C{number % 10}", "ls": line, "label": label}
        left.plot(steps, nats, "o", ms=3, **style)
        right.plot(cost.passes(steps) / 1000, nats, "o", ms=3, **style)
    left.set(xlabel="steps", ylabel="nelbo_order, held out (nats per token)")
    right.set(xlabel="thousand forward passes")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.folder / "orders.png", dpi=150)
