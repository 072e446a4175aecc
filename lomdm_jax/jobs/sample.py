"""Text from a checkpoint, and the order in which it was generated."""

import json
import pathlib

import jax
import numpy as np

from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError
from lomdm_jax.evaluation.order_report import SampleTrace, trace_rank, write_order_report
from lomdm_jax.sampling import make_sampler
from lomdm_jax.sampling.driver import Samples
from lomdm_jax.trained import Trained

# Samples printed and replayed; all of them count in the statistics of order.
SHOWN = 3


def sample(run: Trained) -> None:
    """Generate `sample.count` sequences; write samples.jsonl, order.html and order.png."""
    samples = _generate(run)
    if not multihost.leads():
        return
    tokenizer = run.tokenizer
    texts = [tokenizer.decode(row.tolist()) for row in samples.tokens_BL]
    with open(run.workdir / "samples.jsonl", "w", encoding="utf-8") as file:
        for text, tokens_L, steps_L in zip(
            texts, samples.tokens_BL, samples.revealed_BL, strict=True
        ):
            record = {
                "text": text,
                "tokens": tokens_L.tolist(),
                "revealed": steps_L.tolist(),
                "calls": int(samples.calls),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    for number, text in enumerate(texts[:SHOWN], start=1):
        print(f"--- sample {number} ({int(samples.calls)} network calls)\n{text}", flush=True)
    for path in _draw_order(run, samples):
        print(f"wrote {path}", flush=True)


def _generate(run: Trained) -> Samples:
    """`sample.count` sequences around the prompt and the suffix, on the host."""
    tokens_BL, given_BL = _given(run)
    key = run.key(run.config.sample.seed)
    sampler = run.jit(make_sampler(run.config.sample, run.generator))
    return jax.device_get(sampler(run.params, key, run.place(tokens_BL), run.place(given_BL)))


def _given(run: Trained) -> tuple[np.ndarray, np.ndarray]:
    """The given tokens int32 [B, L] and where they stand, bool [B, L]."""
    config, length = run.config.sample, run.config.data.length
    tokenizer = run.tokenizer
    prompt, suffix = tokenizer.encode(config.prompt), tokenizer.encode(config.suffix)
    if run.config.objective.ignore_first and not prompt:
        prompt = [tokenizer.eos_id]  # the first position is never generated; eos precedes a text
    if len(prompt) + len(suffix) > length:
        raise UserError(
            f"config.sample.prompt ({len(prompt)} tokens) and config.sample.suffix ({len(suffix)} "
            f"tokens) do not fit in config.data.length = {length}: shorten them."
        )
    row = prompt + [0] * (length - len(prompt) - len(suffix)) + suffix
    given = np.ones(length, bool)
    given[len(prompt) : length - len(suffix)] = False
    return np.tile(np.asarray(row, np.int32), (config.count, 1)), np.tile(given, (config.count, 1))


def _draw_order(run: Trained, samples: Samples) -> tuple[pathlib.Path, pathlib.Path]:
    config = run.config.sample
    pieces = run.tokenizer.pieces
    traces = [
        SampleTrace(pieces(tokens_L.tolist()), steps_L)
        for tokens_L, steps_L in zip(
            samples.tokens_BL[:SHOWN], samples.revealed_BL[:SHOWN], strict=True
        )
    ]
    notes = {
        "order": run.config.order.name,
        "sampler": config.sampler,
        "samples": str(config.count),
        "network calls": str(int(samples.calls)),
    }
    return write_order_report(
        run.workdir,
        traces,
        np.stack([trace_rank(steps_L) for steps_L in samples.revealed_BL]),
        title="The order in which the text was generated",
        notes=notes,
    )
