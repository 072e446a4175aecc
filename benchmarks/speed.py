"""Training and sampling against a plain PyTorch program of the same network, on the same chip.

python benchmarks/speed.py [--size quickstart|small-128|small-1024|medium] [--what training,...]
                           [--orders mdm,ar,...] [--batch N] [--rounds 5] [--seconds 3] [--out DIR]

Ours is what `--job train` and `--job sample` run. The peer is the network of `--job export`
(lomdm_jax/interop/modeling_lomdm.py) in a plain loop: scaled_dot_product_attention, fused AdamW, a
clipped gradient, an average of the parameters, torch.compile; on a GPU in bfloat16 by autocast, on
a CPU in float32, as ours. Both sides are processes that wait for one another: in every round each
works for --seconds by itself, and a ratio is that of one round's speeds. The tables have the
medians and, for ratios, the least and the most. Compilation is not in them but for its own column.

training: a step of `--orders`. "lomdm" and the like are trained by ours only: the peer has no
gradient for an order. Their tokens are those of all masked sequences, two of each text.
sampling: `mdm` in the numbers of ancestral steps of --steps. A step that reveals nothing needs no
    call of the network: the table has the calls that a row needed and those made for all rows.
cross-entropy: of a batch of hidden states, half of them masked, with its gradients.
attention: of one layer, with its gradients, full and causal, and behind a block of ranks (ours).

MFU is 6 N + 12 layers x width x length FLOPs per token (N: all parameters but the token table and
what conditions the network), a pass over the sequence and its gradient, over the rate of one large
matrix product measured in the same run; "counted" has the products of ours instead, without the
logits of what is not masked and without what is computed again for the gradient. On a CPU memory is
the most that the process has held, with the libraries (several hundred MB each). Writes
speed-SIZE.md and .csv into --out.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from orders_table import as_markdown

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZES: dict[str, dict[str, Any]] = {
    "quickstart": {"width": 64, "layers": 2, "heads": 4, "length": 32, "vocab": 512, "batch": 32},
    "small-128": {"width": 768, "layers": 12, "heads": 12, "length": 128, "batch": 256},
    "small-1024": {"width": 768, "layers": 12, "heads": 12, "length": 1024, "batch": 32},
    "medium": {"width": 1024, "layers": 24, "heads": 16, "length": 1024, "batch": 16},
}
GPT2 = 50_257  # ids; a network has one more, for the mask
ORDERS = "mdm,ar,block:4,lomdm,lomdm-ranked"
WHATS = "training,sampling,cross-entropy,attention"
PEER_ORDERS = ("mdm", "ar")  # and blocks


class Case(NamedTuple):
    """Something to be timed. what: one of WHATS, or "product"; name: of the order, or of the
    attention; steps: of the sampler. The rest: see SIZES."""

    what: str
    name: str
    steps: int
    width: int
    layers: int
    heads: int
    length: int
    vocab: int
    batch: int

    @property
    def label(self) -> str:
        return f"{self.what}, {self.name}" + (f", {self.steps} steps" if self.steps else "")

    @property
    def flops_per_token(self) -> int:
        """Of a pass over a text and its gradient, by the usual count."""
        parameters = 12 * self.layers * self.width**2 + self.width * (self.vocab + 1)
        return 6 * parameters + 12 * self.layers * self.width * self.length


class Work(NamedTuple):
    """What a side does for a case: `run` makes so many calls and waits for the last one. tokens:
    of a call; seconds: that the first call took; flops: of a call's products, 0 if not counted;
    chip, versions: for the report; memory: the most bytes held so far; calls: of the network, for
    the samples of a call, if any."""

    run: Any
    tokens: int
    seconds: float
    flops: int
    chip: str
    versions: str
    memory: Any
    calls: str = ""


def work_here(side: str, case: Case) -> None:
    """A side's process: makes its work, then calls it whenever it is told to."""
    import time

    sys.path.insert(0, str(ROOT))
    from lomdm_jax.distributed.freed import keep_freed_memory

    if side == "jax":  # as `python -m lomdm_jax.main` does
        keep_freed_memory()
    module = __import__(f"speed_{side}")
    work, answer = module.make(case), os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr
    facts = {"tokens": work.tokens, "seconds": work.seconds, "flops": work.flops}
    facts |= {"chip": work.chip, "versions": work.versions, "calls": work.calls}
    print(json.dumps(facts), file=answer, flush=True)
    for line in sys.stdin:
        calls, started, budget = 0, time.perf_counter(), float(line)
        while (passed := time.perf_counter() - started) < budget:
            more = 1 if not calls else max(1, math.ceil((budget - passed) / passed * calls / 2))
            work.run(more)
            calls += more
        took = time.perf_counter() - started
        print(json.dumps([calls, took, work.memory()]), file=answer, flush=True)


class Side:
    """A process that works when it is asked to."""

    def __init__(self, side: str, case: Case):
        command = [sys.executable, __file__, "--side", side, "--case", json.dumps(case)]
        waiting = {"OMP_WAIT_POLICY": "PASSIVE", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | waiting, **pipes)
        self.facts = self._answer()
        self.memory = 0

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side failed; see above")
        return json.loads(line)

    def speed(self, seconds: float) -> float:
        """Tokens per second."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        calls, took, self.memory = self._answer()
        return calls * self.facts["tokens"] / took

    def end(self) -> None:
        self.process.communicate()


def timed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table."""
    names = ["jax", "torch"] if has_peer(case) and not options.alone else ["jax"]
    sides = [Side(name, case) for name in names]
    for side in sides:  # what comes first is slower
        side.speed(options.seconds / 3)
    speeds = [[side.speed(options.seconds) for side in sides] for _ in range(options.rounds)]
    for side in sides:
        side.end()
    row: dict[str, Any] = {"case": case.label} | {
        key: sides[0].facts[key] for key in ("chip", "flops", "calls")
    }
    for column, (name, side) in enumerate(zip(names, sides, strict=True)):
        row[f"{name}_speed"] = statistics.median(speed[column] for speed in speeds)
        row[f"{name}_memory"], row[f"{name}_compile"] = side.memory, side.facts["seconds"]
        row[f"{name}_versions"] = side.facts["versions"]
    row["tokens"] = sides[0].facts["tokens"]
    row["ratios"] = sorted(speed[0] / speed[-1] for speed in speeds) if len(sides) > 1 else []
    return row


def has_peer(case: Case) -> bool:
    trained = case.name in PEER_ORDERS or case.name.startswith("block:")
    return trained if case.what == "training" else case.name != "ranked"


def cases(options: argparse.Namespace) -> list[Case]:
    size = {"vocab": GPT2} | SIZES[options.size]
    size["batch"] = options.batch or size["batch"]
    found = [Case("product", "one matrix", 0, **size)]
    whats = options.what.split(",")
    if "training" in whats:
        found += [Case("training", name, 0, **size) for name in options.orders.split(",")]
    if "sampling" in whats:
        steps = options.steps.split(",") if options.steps else [size["length"] // 4, size["length"]]
        found += [Case("sampling", "mdm", int(count), **size) for count in steps]
    if "cross-entropy" in whats:
        found.append(Case("cross-entropy", "half masked", 0, **size))
    if "attention" in whats:
        found += [Case("attention", name, 0, **size) for name in ("full", "causal", "ranked")]
    return found


def cells(row: dict[str, Any], case: Case, rate: float) -> list[str]:
    """Of the Markdown table."""
    ratios = row["ratios"] and [
        statistics.median(row["ratios"]),
        row["ratios"][0],
        row["ratios"][-1],
    ]
    ratio = "{:.2f} ({:.2f} to {:.2f})".format(*ratios) if ratios else ""
    both = {name: row.get(f"{name}_speed") for name in ("jax", "torch")}
    share = row["flops"] * row["jax_speed"] / row["tokens"] / rate
    mfu = [
        f"{case.flops_per_token * speed / rate:.0%}" if speed and case.what == "training" else ""
        for speed in both.values()
    ]
    speeds = [f"{speed:,.0f}" if speed else "" for speed in both.values()]
    per_side = [
        [f"{row[f'{n}_{key}'] / unit:{form}}" if both[n] else "" for n in both]
        for key, unit, form in (("memory", 2**30, ".2f"), ("compile", 1, ".0f"))
    ]
    head = [row["case"], *speeds, ratio]
    counted = f"{share:.0%}" if share else ""
    return [*head, *mfu, counted, *per_side[0], *per_side[1], row["calls"]]


def write(options: argparse.Namespace, rows: list[dict[str, Any]], made: list[Case]) -> None:
    product, *rest = rows
    rate = product["jax_speed"]  # its "tokens" are FLOPs
    heads = "case | ours, tokens/s | peer | ratio | MFU | of the peer | counted | GiB | of the peer"
    heads += " | first call, s | of the peer | calls of the network"
    pairs = zip(rest, made[1:], strict=True)
    table = [heads.split(" | "), *(cells(row, case, rate) for row, case in pairs)]
    versions = {
        row[key] for row in rows for key in ("jax_versions", "torch_versions") if key in row
    }
    facts = ", ".join([product["chip"], *sorted(versions), f"{rate / 1e12:.3g} TFLOP/s"])
    case = made[0]
    shape = f"{case.layers}x{case.width}, {case.batch} sequences of {case.length} tokens, "
    text = f"{shape}{case.vocab + 1:,} rows.\n{facts}.\n\n{as_markdown(table)}"
    (options.out / f"speed-{options.size}.md").write_text(text)
    with (options.out / f"speed-{options.size}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--what", default=WHATS, help=f"of {WHATS}")
    parser.add_argument("--orders", default=ORDERS)
    parser.add_argument("--steps", default="", help="of the sampler, with commas")
    parser.add_argument("--batch", type=int, default=0, help="sequences; 0 for the size's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a side in a round")
    parser.add_argument("--alone", action="store_true", help="without the peer")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work_here(options.side, Case(*json.loads(options.case)))
        return
    made, rows = cases(options), []
    for number, case in enumerate(made, start=1):
        rows.append(timed(case, options))
        shown = [f"{r:.2f}" for r in rows[-1]["ratios"]]
        print(
            f"{number}/{len(made)} {case.label}: {rows[-1]['jax_speed']:,.0f} {shown}", flush=True
        )
    write(options, rows, made)


if __name__ == "__main__":
    main()
