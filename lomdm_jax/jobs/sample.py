"""Text from a checkpoint, and the order in which it was generated."""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lomdm_jax.distributed import multihost
from lomdm_jax.evaluation.order_report import SampleTrace, trace_rank, write_order_report
from lomdm_jax.generation import Completion, completions, generate
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.trained import Trained

# Samples printed and replayed; all of them count in the statistics of order.
SHOWN = 3


def sample(model: Trained) -> None:
    """Generate `sample.count` sequences; write samples.jsonl, order.html and order.png."""
    generated = generate(model, model.config.sample)
    if not multihost.leads():
        return
    samples = generated.samples
    with open(model.workdir / "samples.jsonl", "w", encoding="utf-8") as file:
        for record in records(completions(generated)):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for number, text in enumerate(generated.texts[:SHOWN], start=1):
        calls = int(samples.calls_B[number - 1])
        print(f"--- sample {number} ({calls} network calls)\n{text}", flush=True)
    print(f"{generated.tokens_per_second:,.0f} tokens per second, compiling apart", flush=True)
    for path in _draw_order(model, samples):
        print(f"wrote {path}", flush=True)


def records(found: Iterable[Completion]) -> Iterator[dict[str, Any]]:
    """Each sample as JSON-able values, with as many digits as are of use."""
    for each in found:
        share, log_p = ([round(v, n) for v in a] for a, n in ((each.share, 6), (each.log_p, 4)))
        yield each._asdict() | {"share": share, "log_p": log_p}


def _draw_order(model: Trained, samples: Samples) -> tuple[pathlib.Path, pathlib.Path]:
    config = model.config.sample
    pieces = model.tokenizer.pieces
    traces = [
        SampleTrace(pieces(tokens_L.tolist()), steps_L)
        for tokens_L, steps_L in zip(
            samples.tokens_BT[:SHOWN], samples.revealed_BT[:SHOWN], strict=True
        )
    ]
    notes = {
        "order": model.config.order.name,
        "sampler": config.sampler,
        "samples": str(len(samples.calls_B)),
        "network calls": f"{samples.calls_B.mean():.0f}",
    }
    return write_order_report(
        model.workdir,
        traces,
        np.stack([trace_rank(steps_L) for steps_L in samples.revealed_BT]),
        title="The order in which the text was generated",
        notes=notes,
    )
