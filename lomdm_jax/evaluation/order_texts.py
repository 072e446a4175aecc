"""The texts on which orders are compared, as each run reads them: a row of its length for each."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lomdm_jax.data.packing import make_rules
from lomdm_jax.data.pipeline import Batch, valid_batches
from lomdm_jax.data.prepare import prepare
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError, one_line
from lomdm_jax.objectives.nelbo import targets_of
from lomdm_jax.trained import Trained

SAMPLES = "samples"  # config.report.texts: what each run has generated


def read(runs: Sequence[Trained], texts: str, sequences: int) -> list[Batch]:
    """The rows of every run, [N, L] of its own L, with the same text in row n of all (but for
    samples, of which each run has its own).

    Args:
      runs: the first of them is the one whose validation text is read.
      texts: a file with a text in each line; SAMPLES; or "" for the validation text.
      sequences: how many texts at most; 0 for all.

    Raises:
      UserError: there is no text, or one is empty for a run or longer than a run's rows.
    """
    if not texts:
        return _validation(runs, sequences)
    if texts == SAMPLES:
        ids = [_samples(run)[: sequences or None] for run in runs]
        fewest = min(map(len, ids))
        return [_rows(run, some[:fewest]) for run, some in zip(runs, ids, strict=True)]
    lines = _lines(pathlib.Path(texts))[: sequences or None]
    return [_rows(run, _encode(run, lines)) for run in runs]


def batches(rows: Batch, size: int) -> Iterator[Batch]:
    """The rows, `size` at a time; zeros and False fill up the last ones."""
    count = len(rows["tokens"])
    for start in range(0, count, size):
        missing = max(start + size - count, 0)
        yield {
            name: np.pad(a[start : start + size], ((0, missing), (0, 0)))
            for name, a in rows.items()
        }


def _lines(file: pathlib.Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config.report.texts is {str(file)!r}, which cannot be read ({one_line(error)}): give "
            f"a UTF-8 file with a text in each line, {SAMPLES!r}, or '' for the validation text."
        ) from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(
            f"config.report.texts is {str(file)!r}, which holds no text: give a file with a text "
            "in each line."
        )
    return lines


def _samples(run: Trained) -> list[list[int]]:
    file = run.workdir / "samples.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [[int(i) for i in r["tokens"][: r["length"]]] for r in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"config.report.texts is {SAMPLES!r}, but {file} cannot be read ({one_line(error)}): "
            f"run --job sample --workdir {run.workdir} first."
        ) from error


def _validation(runs: Sequence[Trained], sequences: int) -> list[Batch]:
    """The blocks of the first run as they are, and their text to runs with other tokenizers or
    lengths."""
    first = runs[0]
    prepared = multihost.in_turn(lambda: prepare(first.config.data))
    if prepared.tokenizer.fingerprint != first.tokenizer.fingerprint:
        raise UserError(
            f"{prepared.folder} was prepared with another tokenizer than {first.workdir} was "
            "trained with: set config.data as in its training, or name a file in "
            "config.report.texts."
        )
    found = [*valid_batches(prepared, first.config.eval.batch_size, sequences)]
    rows = {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}
    rows = {name: a[rows["counted"].any(-1)] for name, a in rows.items()}
    texts = [
        first.tokenizer.decode(ids_L[counted_L].tolist())
        for ids_L, counted_L in zip(rows["tokens"], rows["counted"], strict=True)
    ]
    return [
        _scored(run, rows) if _reads_alike(run, first) else _rows(run, _encode(run, texts))
        for run in runs
    ]


def _reads_alike(run: Trained, first: Trained) -> bool:
    return all(
        a.tokenizer.fingerprint == first.tokenizer.fingerprint
        and a.config.data.length == first.config.data.length
        for a in (run, first)
    )


def _encode(run: Trained, texts: Sequence[str]) -> list[list[int]]:
    """With the marks that blocks of the run start and end with."""
    rules = make_rules(run.config.data, run.tokenizer)
    return [[*rules.start, *run.tokenizer.encode(text), *rules.end] for text in texts]


def _rows(run: Trained, ids: Sequence[Sequence[int]]) -> Batch:
    """Each text from the start of a row; what is left of the row is hidden from it."""
    length = run.config.data.length
    for number, text in enumerate(ids, start=1):
        if len(text) > length:
            raise UserError(
                f"Text {number} has {len(text)} tokens in {run.workdir}, whose data.length is "
                f"{length}: shorten it in config.report.texts, or leave that run out."
            )
    sizes_N1 = np.array([[len(text)] for text in ids])
    absent_NL = np.arange(length) >= sizes_N1
    tokens_NL = np.full(absent_NL.shape, run.tokenizer.eos_id, np.int32)
    tokens_NL[~absent_NL] = [token for text in ids for token in text]
    rows: Batch = {"tokens": tokens_NL, "counted": ~absent_NL}
    if absent_NL.any():
        rows |= {"absent": absent_NL, "segments": absent_NL.astype(np.int32)}
    return _scored(run, rows)


def _scored(run: Trained, rows: Batch) -> Batch:
    """With the first token given where the run generates none."""
    counted_NL = targets_of(rows["counted"], run.config.objective.ignore_first)
    empty_N = ~counted_NL.any(-1)
    if empty_N.any():
        raise UserError(
            f"Text {int(empty_N.argmax()) + 1} has no token that {run.workdir} generates: leave "
            "it out of config.report.texts."
        )
    return rows | {"counted": counted_NL}
