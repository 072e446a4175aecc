"""Samplers over network calls: judged perplexity, entropy and speed, order by order.

python benchmarks/samplers.py [--length 128] [--longer 1000] [--samples 64] [--calls 8,16,...]
                              [--orders mdm,...] [options of orders.py]

Takes the runs of orders.py in the folder (one seed; those that are missing are trained first), as
sampling.py does: each goes on for --longer steps on sequences of --length tokens. Then
`--job generative` samples each order in the ways of WAYS and lets a causal judge ("ar", of the same
size, text and steps) read what they wrote; the reference is as much held-out text. A flat order
temperature, FLAT, takes what is learned of the order away from the same network.

Samples of one network with the same calls differ in nothing but the sampler. Orders are judged
one per core, so seconds are those of one core: compare them within an order. Writes samplers.md,
samplers.csv and samplers.png.
"""

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import orders
import sampling
from orders_table import as_markdown

FLAT = "race@order_temperature=1000"
GRIDS = ("ancestral@grid=even", "ancestral@grid=linear", "ancestral@grid=cosine")
DONE = "generative.done"  # in the folder of a run: what was asked for
MASKING = "ancestral@grid=linear@remask=0.5"
WAYS = {
    "mdm": ("race", *GRIDS, "confidence", "margin", "entropy", MASKING),
    "lomdm": ("race", FLAT, *GRIDS[:2], "velocity"),
    "lomdm-order": ("race", FLAT, "velocity", "confidence"),
    "block:4": ("race", GRIDS[0], "confidence"),
    "lomdm-ranked": ("race",),
    "ar": ("race",),
}


def judged(options: argparse.Namespace, order: str, reference: pathlib.Path) -> list[dict]:
    """The rows of `--job generative` for a run that is trained, anew unless it has these."""
    folder = sampling.long_workdir_of(options, order)
    settings: dict[str, Any] = {
        "generative.judge": sampling.long_workdir_of(options, sampling.JUDGE),
        "generative.samplers": ",".join(WAYS[order]),
        "generative.calls": options.calls,
        "generative.samples": options.samples,
        "generative.reference": reference,
        "sample.batch_size": options.samples,
    }
    done, asked = folder / DONE, json.dumps(settings, default=str)
    if done.exists() and done.read_text() == asked:
        return json.loads((folder / "generative.json").read_text())["rows"]
    command = [sys.executable, "-m", "lomdm_jax.main", "--job=generative", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    environment = os.environ | ({"XLA_FLAGS": orders.ONE_CORE} if options.size == "cpu" else {})
    with (folder / "generative.log").open("w") as log:
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        subprocess.run(command, check=True, cwd=orders.ROOT, env=environment, **output)
    done.write_text(asked)
    return json.loads((folder / "generative.json").read_text())["rows"]


def reference_of(options: argparse.Namespace) -> pathlib.Path:
    """As many held-out sequences as are sampled, a line each."""
    run, _ = sampling.trained(options, sampling.JUDGE)
    texts = [run.prepared.tokenizer.decode(row.tolist()) for row in sampling.held_out(run)]
    file = options.folder / f"reference-{options.length}.txt"
    file.write_text("\n".join(" ".join(text.split()) for text in texts) + "\n")
    return file


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, the reference's first."""
    names = options.orders.split(",")
    for order in dict.fromkeys([*names, sampling.JUDGE]):
        sampling.trained(options, order)
    reference, table = reference_of(options), []
    with orders.pool(options) as workers:
        jobs = workers.map(lambda order: judged(options, order, reference), names)
        for number, (order, rows) in enumerate(zip(names, jobs, strict=True), start=1):
            table += [{"order": order} | row for row in rows[1 if table else 0 :]]
            print(f"{number}/{len(names)} {order}: {len(rows) - 1} rows", flush=True)
    table[0]["order"] = sampling.TEXT
    return table


def write(options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """samplers.csv, samplers.md and samplers.png."""
    with (options.folder / "samplers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    about = (
        f"{options.steps} steps on short sequences, {options.longer} of length {options.length}; "
        f"{options.samples} samples of each row, judged by `{sampling.JUDGE}`:\n\n"
    )
    head = "order | sampler | calls asked | NFE | judged perplexity | entropy | tokens/s"
    rows = as_markdown([head.split(" | "), *(cells(row) for row in table)])
    (options.folder / "samplers.md").write_text(about + rows)
    print(about + rows)
    draw(options, table)


def cells(row: dict[str, Any]) -> list[str]:
    """Empty where there is no number."""
    perplexity, entropy = (
        f"{row[name]:.{digits}f} ± {row[f'{name}_error']:.{digits}f}"
        for name, digits in (("perplexity", 1), ("entropy", 2))
    )
    if row["order"] == sampling.TEXT:
        return [sampling.TEXT, "", "", "", perplexity, entropy, ""]
    names = [f"`{row['order']}`", f"`{row['sampler']}`", f"{row['asked_calls']}"]
    return [*names, f"{row['nfe']:.1f}", perplexity, entropy, f"{row['tokens_per_second']:.0f}"]


def draw(options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """Judged perplexity and entropy over network calls, a panel per order."""
    from matplotlib.figure import Figure

    text, *rows = table
    names = [name for name in dict.fromkeys(row["order"] for row in rows) if name != sampling.JUDGE]
    figure = Figure(figsize=(3.2 * len(names), 5.6), layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, order in zip(panels.T, names, strict=True):
        mine = [row for row in rows if row["order"] == order]
        for sampler in dict.fromkeys(row["sampler"] for row in mine):
            line = [row for row in mine if row["sampler"] == sampler]
            calls = [row["nfe"] for row in line]
            for axes, name in zip(column, ("perplexity", "entropy"), strict=True):
                values, errors = ([row[key] for row in line] for key in (name, f"{name}_error"))
                axes.errorbar(calls, values, errors, fmt="o-", ms=3, lw=1.2, label=sampler)
        column[0].set(title=order, xscale="log", yscale="log")
        column[1].set(xlabel="network calls (NFE)")
        for axes, name in zip(column, ("perplexity", "entropy"), strict=True):
            axes.axhline(text[name], color="gray", ls=":")
            axes.spines[["top", "right"]].set_visible(False)
        column[0].legend(frameon=False, fontsize=6.5)
    panels[0, 0].set_ylabel("judged perplexity")
    panels[1, 0].set_ylabel("entropy of a sample (nats)")
    figure.savefig(options.folder / "samplers.png", dpi=150)


def main() -> None:
    parser = orders.make_parser(__doc__)
    numbers = {"length": 128, "longer": 1000, "batch": 16, "scored": 128, "samples": 64}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--calls", default="8,16,32,64,128", help="network calls, with commas")
    parser.set_defaults(folder=orders.ROOT / "runs" / "samplers", seeds="0", orders=",".join(WAYS))
    options = orders.finish(parser.parse_args())
    options.rows = options.samples
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options, measure(options))


if __name__ == "__main__":
    main()
