"""Which order is found from a random start, on texts whose best order is known or suspected.

python benchmarks/discovery.py [--runs english:10,docstrings:10,reversed:3,...] [--steps N]
                               [--train FILE --valid FILE] [--folder DIR]

Trains `lomdm-ranked` on each text with so many seeds (the first to N steps, the others to three
fifths of them; the trials of walks take half of N), and writes into the folder discovery.md (what
the trials cost, which walk was kept, what the order is at the end) and discovery.png (a seed: the
order over training, the table of distances, and replays of samples). The texts:

english      the novels that lie beside the project, if they do, or --train and --valid
docstrings   of Python's standard library
reversed     the same as english, every document written from its end
last         sentences of 15 letters whose last one determines the eight in the middle, each of
             them by a table of its own; several last letters give the same, so that guessing it
             from them is hard. Best: the last letter before the middle
middle       the same, with the deciding letter in the middle and the eight around it
"""

import argparse
import concurrent.futures
import json
import lzma
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import orders
from orders_table import as_markdown

LENGTH = 16  # of the sentences, with the end of the text
KEYS, DECIDED, NOISE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ012345", "abcd", "uvwxyz"
# Place of the deciding letter, and of those that it decides.
FIELDS = {"last": (14, range(4, 12)), "middle": (8, [4, 5, 6, 7, 9, 10, 11, 12])}
RUNS = "english:10,docstrings:10,reversed:3,last:3,middle:2"
SNAPSHOTS = 5


def sentences(name: str, count: int, seed: int) -> Iterator[str]:
    """Random letters, but for those that the deciding one determines."""
    tables = np.random.default_rng(0).integers(len(DECIDED), size=(LENGTH, len(KEYS)))
    rng, (place, decided) = np.random.default_rng(seed), FIELDS[name]
    for _ in range(count):
        key = rng.integers(len(KEYS))
        letters = [NOISE[i] for i in rng.integers(len(NOISE), size=LENGTH - 1)]
        letters[place] = KEYS[key]
        for i in decided:
            letters[i] = DECIDED[tables[i, key]]
        yield "".join(letters)


def documents(path: str) -> Iterator[str]:
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8") as file:
        yield from (json.loads(line)["text"] for line in file)


def write_texts(path: pathlib.Path, texts: Iterator[str]) -> str:
    """As .jsonl, once; the path."""
    if not path.exists():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        path.write_text("".join(lines))
    return str(path)


def sources(options: argparse.Namespace, text: str) -> tuple[str, str]:
    """The files to train and to validate on."""
    names = [options.folder / f"{text}_{part}.jsonl" for part in ("train", "valid")]
    if text == "docstrings":
        return "stdlib", ""
    if text in FIELDS:
        sizes = ((40_000, 1), (1_000, 2))
        found = [write_texts(p, sentences(text, *s)) for p, s in zip(names, sizes, strict=True)]
        return found[0], found[1]
    given = (options.train, options.valid)
    if text == "english":
        return given
    mirrored = [(t[::-1] for t in documents(path)) for path in given]
    found = [write_texts(p, t) for p, t in zip(names, mirrored, strict=True)]
    return found[0], found[1]


def make_config(options: argparse.Namespace, text: str, seed: int, steps: int) -> Any:
    from lomdm_jax.config import validate
    from lomdm_jax.main import load_config

    config = load_config(str(orders.ROOT / "configs" / "quickstart.py"), "lomdm-ranked")
    config.data.source, config.data.valid_source = sources(options, text)
    config.data.directory = str(options.folder / "data")
    # Hundreds of pieces, not characters: in spelling alone neither direction is better.
    config.data.vocab_size = 258 + len(KEYS + DECIDED + NOISE) if text in FIELDS else 1024
    config.data.length = LENGTH if text in FIELDS else 32
    # Smaller networks (2 blocks of 64) gain nothing from one direction over the other.
    config.model.width, config.model.layers = 96, 3
    config.optimizer.learning_rate = 1e-3
    config.train.random_steps = trial_steps(options)
    config.train.steps, config.train.seed = steps, seed
    config.train.log_every = config.train.eval_every = config.checkpoint.every = 10**9
    config.eval.sequences = 256
    config.sample.count = 12
    validate(config)
    return config


def trial_steps(options: argparse.Namespace) -> int:
    return options.steps // 2


def workdir_of(options: argparse.Namespace, text: str, seed: int) -> pathlib.Path:
    return options.folder / f"{text}-{seed}"


def train(options: argparse.Namespace, text: str, seed: int, snapshots: int) -> None:
    """Train, stopping to look at the order; what was seen goes to found.json."""
    from lomdm_jax.jobs.evaluate import describe_order
    from lomdm_jax.jobs.sample import sample
    from lomdm_jax.jobs.train import train as run_training
    from lomdm_jax.orders.learned import TRIALS
    from lomdm_jax.run import start
    from lomdm_jax.training.initial import saved_state

    workdir, found = workdir_of(options, text, seed), []
    workdir.mkdir(parents=True, exist_ok=True)
    last = options.steps if snapshots > 1 else 3 * options.steps // 5
    for steps in np.linspace(trial_steps(options), last, snapshots + 1).astype(int)[1:]:
        run = start(make_config(options, text, seed, int(steps)), workdir)
        params = run_training(run)
        describe_order(run, params)
        found.append({"step": int(steps), **seen(workdir, params)})
    found.insert(0, {"step": 0, **seen(workdir, params, "before")})
    sample(run.trained(params))
    trials = np.asarray(saved_state(run).trials) / run.config.train.random_steps
    table = np.asarray(params["walk_head"]["table"])
    walk = next(name for name, known in TRIALS.items() if np.array_equal(table, known))
    facts = {"trials": dict(zip(TRIALS, trials.tolist(), strict=True)), "walk": walk}
    (workdir / "found.json").write_text(json.dumps({**facts, "snapshots": found}))


def seen(workdir: pathlib.Path, params: Any, when: str = "after") -> dict[str, Any]:
    """What the order is now, or was before training."""
    statistics = json.loads((workdir / "order_statistics.json").read_text())[when]
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    learned = 30 * np.asarray(params["posterior_head"]["distance"]) * (when == "after")
    return {
        "nats": evaluation["nelbo_order_nats_per_token"],
        "tau": statistics["kendall_tau"]["mean"],
        "rank": [mean["mean"] for mean in statistics["rank_by_position"]],
        "distance": learned.tolist(),
    }


def decided_after(options: argparse.Namespace, text: str, seed: int) -> float:
    """Share of the decided letters that samples reveal after the letter that decides them."""
    lines = (workdir_of(options, text, seed) / "samples.jsonl").read_text().splitlines()
    revealed = np.array([json.loads(line)["revealed"] for line in lines])
    place, decided = FIELDS[text]
    return float(np.mean(revealed[:, list(decided)] > revealed[:, [place]]))


def row_of(options: argparse.Namespace, text: str, seed: int) -> list[str]:
    found = json.loads((workdir_of(options, text, seed) / "found.json").read_text())
    last = found["snapshots"][-1]
    after = f"{decided_after(options, text, seed):.2f}" if text in FIELDS else ""
    trials = [f"{cost:.4f}" for cost in found["trials"].values()]
    return [
        text,
        str(seed),
        *trials,
        found["walk"],
        f"{last['tau']:+.2f}",
        after,
        f"{last['nats']:.3f}",
    ]


def one(options: argparse.Namespace, text: str, seed: int) -> str:
    """One run in a process of its own, unless it is complete; its name."""
    if not (workdir_of(options, text, seed) / "found.json").exists():
        snapshots = 1 if seed else SNAPSHOTS
        orders.child(options, "--run", json.dumps([text, seed, snapshots]))
    return f"{text}, seed {seed}"


def write(options: argparse.Namespace) -> None:
    """discovery.md and discovery.png."""
    from lomdm_jax.orders.learned import TRIALS

    last = ["kept", "Kendall's tau", "decided after", "nats per token"]
    pairs = [(text, seed) for text, seeds in options.runs.items() for seed in range(seeds)]
    table = as_markdown(
        [["text", "seed", *TRIALS, *last], *(row_of(options, *pair) for pair in pairs)]
    )
    (options.folder / "discovery.md").write_text(table)
    print(table)
    draw(options)


def draw(options: argparse.Namespace) -> None:
    """A row per text, of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.5 * len(options.runs)), layout="constrained")
    axes = figure.subplots(len(options.runs), 4, squeeze=False, width_ratios=(2, 3, 3, 3))
    for row, text in zip(axes, options.runs, strict=True):
        workdir = workdir_of(options, text, 0)
        snapshots = json.loads((workdir / "found.json").read_text())["snapshots"]
        lines = (workdir / "samples.jsonl").read_text().splitlines()
        revealed = np.array([json.loads(line)["revealed"] for line in lines])
        draw_row(row, text, snapshots, revealed)
    figure.savefig(options.folder / "discovery.png", dpi=130)


def draw_row(row: Any, text: str, snapshots: list[dict[str, Any]], revealed: np.ndarray) -> None:
    steps = [s["step"] for s in snapshots]
    row[0].plot(steps, [s["tau"] for s in snapshots], "o-", ms=3)
    row[0].set(ylim=(-1.05, 1.05), xlabel="step", ylabel=f"{text}\n\nKendall's tau")
    top, end, length = 0, len(snapshots), revealed.shape[1]
    rank = np.array([s["rank"] for s in snapshots], float)
    style = {"aspect": "auto", "interpolation": "nearest", "origin": "upper"}
    row[1].imshow(rank, extent=(0, length, end, top), vmin=0, vmax=1, **style)
    row[1].set(title="mean rank (dark: early)", xlabel="position", ylabel="step")
    row[1].set_yticks(np.arange(0, end, 2) + 0.5, steps[::2])
    table = np.array([s["distance"] for s in snapshots])
    window, limit = table.shape[1] // 2, max(np.abs(table).max(), 0.1)
    extent = (-window - 0.5, window + 0.5, end, top)
    row[2].imshow(table, extent=extent, vmin=-limit, vmax=limit, cmap="PuOr_r", **style)
    row[2].set_yticks([])
    row[2].set(title=f"table of distances (±{limit:.1f} nats)", xlabel="distance from the last")
    row[3].imshow(revealed, extent=(0, length, len(revealed), 0), **style)
    row[3].set(title="samples (dark: early)", xlabel="position", ylabel="sample")


def main() -> None:
    parser = orders.make_parser(__doc__)
    parser.add_argument("--runs", default=RUNS, help="texts, and how many seeds of each")
    parser.set_defaults(steps=2000, folder=orders.ROOT / "runs" / "discovery")
    options = orders.finish(parser.parse_args())
    pairs = (pair.split(":") for pair in options.runs.split(","))
    options.runs = {text: int(seeds) for text, seeds in pairs}
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.run:
        return train(options, *json.loads(options.run))
    from lomdm_jax.data.prepare import prepare

    for text in options.runs:  # before several processes ask for it
        prepare(make_config(options, text, 0, options.steps).data)
    most = range(max(options.runs.values()))
    pairs = [(t, seed) for seed in most for t, count in options.runs.items() if seed < count]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
        jobs = [workers.submit(one, options, *pair) for pair in pairs]
        for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
            print(f"{number}/{len(jobs)} {job.result()}", flush=True)
    write(options)


if __name__ == "__main__":
    main()
