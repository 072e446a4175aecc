"""Samplers on long sequences: tokens per second, network calls, and quality under a judge.

python benchmarks/sampling.py [--length 1024] [--longer N] [--rows N] [--samplers mdm,...]
                              [options of orders.py]

Takes three runs of orders.py in the folder (one seed; they are trained first if they are missing):
masked diffusion ("mdm"), which calls the whole network for every reveal; the ranked layout
("lomdm-ranked"), which remembers what it has read; and a causal judge ("ar"). Each goes on for
--longer steps on sequences of the full length. Then samples some sequences in every way of
SAMPLERS, each an order with changes of the config's section `sample`.

Quality is the generative perplexity: what the judge says of the samples, exp of nats per token with
a standard error over the sequences. It falls when samples repeat themselves, so the entropy of
their token frequencies stands beside it, and the same of as much held-out text. The judge has the
size, the text and the steps of the other two, small as they are: its verdict compares samplers and
says little of how good the text is.

Seconds are the sampler's for all rows together, compiled before the clock starts, the best of a
few runs. A call of the ranked sampler asks for a few positions and reads them; a call of the other
is a pass over all positions. Writes sampling.md, sampling.csv and sampling.png into the folder.
"""

import argparse
import csv
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orders
from orders_table import as_markdown, workdir_of

PLAIN, RANKED, JUDGE, TEXT = "mdm", "lomdm-ranked", "ar", "held-out text"
EXACT = f"{RANKED}@sample.reveal=1"
SAMPLERS = (
    *(f"{PLAIN}@sample.reveal={number}" for number in (1, 4, 16, 64, 256)),
    *(f"{PLAIN}@sample.sampler=ancestral@sample.steps={number}" for number in (16, 64, 256)),
    *(f"{RANKED}@sample.reveal={number}" for number in (1, 2, 4, 8, 16)),
    *(f"{RANKED}@sample.reveal=4@sample.dependence={nats}" for nats in (1.0, 2.0, 4.0, 8.0)),
)
TRIES, LONG_ENOUGH = 3, 10.0  # runs that are timed, unless they have taken so many seconds


def make_config(options: argparse.Namespace, variant: str) -> Any:
    """The config of an order or a sampler: that of orders.py, on longer sequences."""
    from lomdm_jax.config import validate

    config = orders.make_config(options, variant, options.steps)
    config.train.start_from = str(workdir_of(options, order_of(variant), options.seeds[0]))
    config.train.random_steps = 0  # the walk was found before
    config.data.length = options.length
    config.train.batch_size = options.batch
    # One group of draws of the same text at least, from which the order is learned.
    share = min(1.0, (config.objective.mask_samples + 0.5) / config.train.batch_size)
    config.objective.order_share = max(config.objective.order_share, share)
    config.train.steps = config.train.eval_every = config.checkpoint.every = options.longer
    config.train.log_every = max(1, options.longer // 10)
    config.eval.batch_size = config.sample.count = options.rows
    config.eval.sequences, config.eval.draws = options.scored, 4
    validate(config)
    return config


def trained(options: argparse.Namespace, order: str) -> tuple[Any, Any]:
    """The order's run on the full length and its EMA parameters."""
    from lomdm_jax.jobs.train import train
    from lomdm_jax.run import start

    seed = options.seeds[0]
    if not (workdir_of(options, order, seed) / "seconds.json").exists():
        orders.train(options, order, seed, [options.steps])
    workdir = long_workdir_of(options, order)
    workdir.mkdir(parents=True, exist_ok=True)
    run = start(make_config(options, order), workdir)
    return run, train(run)


def long_workdir_of(options: argparse.Namespace, order: str) -> pathlib.Path:
    return options.folder / f"long-{workdir_of(options, order, options.seeds[0]).name}"


def make_judge(options: argparse.Namespace) -> Callable[[np.ndarray], dict[str, float]]:
    """From samples [B, L] to the judge's nats per token, with their error, and the entropy."""
    import jax

    from lomdm_jax.evaluation import likelihood
    from lomdm_jax.run import objective_for

    run, params = trained(options, JUDGE)
    objective = objective_for(run, run.config.eval.estimator, samples=1)
    scorer = jax.jit(likelihood.make_scorer(run.generator, objective, draws=1))
    key = run.key(0)  # draws nothing: the order is left to right

    def judge(tokens_BL: np.ndarray) -> dict[str, float]:
        batch = {"tokens": tokens_BL, "counted": np.ones(tokens_BL.shape, bool)}
        index_B = np.arange(len(tokens_BL))
        terms = jax.device_get(scorer(params, run.place(batch), run.place(index_B), key))
        counts_B = batch["counted"].sum(-1)
        nats, error = likelihood.ratio(terms.main.astype(np.float64), counts_B)
        return {"nats": nats, "nats_error": error, "entropy": entropy(tokens_BL)}

    return judge


def entropy(tokens_BL: np.ndarray) -> float:
    """Of the token frequencies, nats per token."""
    share_V = np.unique(tokens_BL, return_counts=True)[1] / tokens_BL.size
    return float(-(share_V * np.log(share_V)).sum())


def held_out(run: Any) -> np.ndarray:
    """As many held-out sequences as are sampled, int32 [B, L]."""
    from lomdm_jax.run import valid_batches

    rows = run.config.sample.count
    return next(valid_batches(run, rows))["tokens"]


def timed(options: argparse.Namespace, run: Any, params: Any, config: Any) -> tuple[Any, float]:
    """The samples and the seconds that they took, without compilation."""
    from lomdm_jax.generation import Given, compiled, stream

    shape = (options.rows, options.length)
    nothing = Given(np.zeros(shape, np.int32), np.zeros(shape, bool))
    program = compiled(run.trained(params), config.sample, options.rows)
    seconds: list[float] = []
    while len(seconds) < TRIES and sum(seconds) < LONG_ENOUGH:
        started = time.perf_counter()
        *_, samples = stream(program, nothing, config.sample.seed, every=options.length)
        seconds.append(time.perf_counter() - started)
    return samples, min(seconds)


def measure(
    options: argparse.Namespace,
    variant: str,
    run: Any,
    params: Any,
    judge: Callable[[np.ndarray], dict[str, float]],
) -> dict[str, Any]:
    """A row of the table. `calls` are those of all rows together, `calls_of_one` the mean of each
    row's own."""
    samples, seconds = timed(options, run, params, make_config(options, variant))
    row = {
        "sampler": variant,
        "samples": options.rows,
        "calls": int(samples.calls),
        "calls_of_one": float(samples.calls_B.mean()),
        "seconds": seconds,
        "tokens_per_second": options.rows * options.length / seconds,
    }
    return row | judge(samples.tokens_BT)


def measure_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per sampler, and one for held-out text."""
    judge, runs, table = make_judge(options), {}, []
    for order in dict.fromkeys(order_of(variant) for variant in options.samplers):
        runs[order] = trained(options, order)
    for number, variant in enumerate(options.samplers, start=1):
        row = measure(options, variant, *runs[order_of(variant)], judge)
        print(f"{number}/{len(options.samplers)} {variant}: {row['seconds']:.1f} s", flush=True)
        table.append(row)
    run = next(iter(runs.values()))[0]
    nothing = dict.fromkeys(("calls", "calls_of_one", "seconds", "tokens_per_second"), math.nan)
    text = {"sampler": TEXT, "samples": options.rows, **nothing}
    return [*table, text | judge(held_out(run))]


def order_of(variant: str) -> str:
    """The order, with the changes that matter to its training."""
    order, *changes = variant.split("@")
    return "@".join([order, *(c for c in changes if not c.startswith("sample."))])


def summary(table: list[dict[str, Any]]) -> str:
    """The exact ranked sampler against the bidirectional one that is as good in fewest calls."""
    exact = next((row for row in table if row["sampler"] == EXACT), None)
    others = [row for row in table if order_of(row["sampler"]) == PLAIN]
    if exact is None or not others:
        return f"Not compared: that needs `{EXACT}` and a sampler of `{PLAIN}`.\n"
    equal = [row for row in others if row["nats"] <= exact["nats"]]
    if equal:
        found = against(exact, min(equal, key=lambda row: row["calls"]))
    else:
        found = "No bidirectional sampler that was judged reaches it."
    speed = exact["tokens_per_second"]
    all_ratios = (f"{speed / r['tokens_per_second']:.2f} (`{r['sampler']}`)" for r in others)
    return (
        f"The exact ranked sampler: {quality(exact)}. {found} Its tokens per second over those of "
        f"each bidirectional sampler: {', '.join(all_ratios)}.\n"
    )


def against(exact: dict[str, Any], other: dict[str, Any]) -> str:
    ratio = exact["tokens_per_second"] / other["tokens_per_second"]
    return (
        f"It makes **{ratio:.2f} times** the tokens per second of `{other['sampler']}`, the "
        "bidirectional sampler with the fewest calls whose judged perplexity is no worse "
        f"({other['calls']} calls, {quality(other)}; the means are compared, whatever their error)."
    )


def quality(row: dict[str, Any]) -> str:
    """Judged perplexity, and the entropy without which it says nothing."""
    perplexity = math.exp(row["nats"])
    error = perplexity * row["nats_error"]
    return f"perplexity {perplexity:.1f} ± {error:.1f} at entropy {row['entropy']:.2f}"


def networks(options: argparse.Namespace) -> str:
    """A table of what was trained: the held-out bound."""
    rows = [["network", "held-out nelbo_order, nats per token"]]
    orders_used = dict.fromkeys([*(order_of(variant) for variant in options.samplers), JUDGE])
    for order in orders_used:
        found = json.loads((long_workdir_of(options, order) / "evaluation.json").read_text())
        nats, error = (found[f"nelbo_order_{k}"] for k in ("nats_per_token", "standard_error"))
        note = " (the judge)" if order == JUDGE else ""
        rows.append([f"`{order}`{note}", f"{nats:.3f} ± {error:.3f}"])
    return as_markdown(rows)


def markdown(table: list[dict[str, Any]]) -> str:
    head = "sampler | samples | calls | seconds | tokens/s | judged perplexity | unigram entropy"
    return as_markdown([head.split(" | "), *(cells(row) for row in table)])


def cells(row: dict[str, Any]) -> list[str]:
    """Empty where there is no number."""
    name = row["sampler"] if row["sampler"] == TEXT else f"`{row['sampler']}`"
    perplexity = math.exp(row["nats"])
    found = [
        *(f"{row['calls']}", f"{row['seconds']:.2f}", f"{row['tokens_per_second']:.0f}"),
        *(f"{perplexity:.1f} ± {perplexity * row['nats_error']:.1f}", f"{row['entropy']:.3f}"),
    ]
    return [name, f"{row['samples']}", *("" if "nan" in cell else cell for cell in found)]


def write(options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """sampling.csv, sampling.md and sampling.png."""
    with (options.folder / "sampling.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    about = f"{options.steps} steps on short sequences, {options.longer} of length {options.length}"
    parts = [f"{about}:\n", networks(options), markdown(table)]
    text = "\n".join([*parts, summary(table)])
    (options.folder / "sampling.md").write_text(text)
    print(text)
    draw(options, table)


def family(variant: str) -> str:
    """Samplers of one line in the picture: all but the number that varies along it."""
    order, *changes = variant.split("@")
    names = {change.partition("=")[0]: change.partition("=")[2] for change in changes}
    if "sample.dependence" in names:
        return f"{order}, up to {names.get('sample.reveal', 1)} per call"
    return f"{order}, {names.get('sample.sampler', 'race')}"


def draw(options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    """The judge's nats per token against calls and against seconds, a line per kind of sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    *rows, text = table
    judged = [row for row in rows if not math.isnan(row["nats"])]
    for name in dict.fromkeys(family(row["sampler"]) for row in judged):
        line = [row for row in judged if family(row["sampler"]) == name]
        nats, errors = ([row[key] for row in line] for key in ("nats", "nats_error"))
        for axes, key in ((left, "calls"), (right, "seconds")):
            axes.errorbar([row[key] for row in line], nats, errors, fmt="o-", ms=3, label=name)
    left.set(xlabel="network calls", ylabel="nats per token under the judge")
    right.set(xlabel=f"seconds for {options.rows} sequences")
    for axes in (left, right):
        axes.axhline(text["nats"], color="gray", ls=":", label=TEXT)
        axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(options.folder / "sampling.png", dpi=150)


def main() -> None:
    parser = orders.make_parser(__doc__)
    numbers = {"length": 1024, "longer": 200, "batch": 8, "rows": 4, "scored": 32}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.set_defaults(folder=orders.ROOT / "runs" / "ranked", seeds="0")
    options = orders.finish(parser.parse_args())
    options.samplers = options.samplers.split(",")
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options, measure_all(options))


if __name__ == "__main__":
    main()
