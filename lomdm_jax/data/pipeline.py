"""Batches of token blocks: an endless shuffled stream to train on, one pass to validate on.

A batch is a dict of arrays [B, L], the rows of this process:

tokens: int32 ids.
counted: bool; what is scored.
padding: bool, only of "padded" blocks whose pads are not counted: pads, which are masked and
    revealed like tokens but never scored (MDLM's LM1B).
segments: int32, only of blocks packed as "documents": which document a position belongs to.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from lomdm_jax.data.packing import segments
from lomdm_jax.data.prepare import REMEDY, Prepared, open_prepared
from lomdm_jax.errors import UserError

Batch = dict[str, np.ndarray]
Mixture = Sequence[tuple[Prepared, float]]

# Each element read ahead is a whole batch, at some 20 microseconds per row on one thread: far less
# than a training step. More threads were no faster (they share Python's lock) and four batches
# cover a stall.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
# Reads are at random: nothing is read ahead, and nothing waits for other threads.
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_PAD = -1  # stands for a pad until a batch is complete


class _Blocks:
    """Random access to the blocks of a split, each int32 [L] and checked as it is decoded."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        shards = prepared.split(split)["shards"]
        self._readers = [_reader(str(prepared.folder / name), blocks) for name, blocks, _ in shards]
        self._paths = [prepared.folder / name for name, _, _ in shards]
        self._ends = np.cumsum([blocks for _, blocks, _ in shards])
        self._dtype = np.dtype(prepared.manifest["dtype"])
        self._length, self._padded = prepared.length, prepared.packing == "padded"
        self._vocab_size = prepared.tokenizer.vocab_size

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[shard - 1]) if shard else 0)
        try:
            (record,) = self._readers[shard].read([place])
        except RuntimeError as error:  # the file's own checksums: some bytes have changed
            raise self._damaged(shard, place, f"cannot be read: {error}") from error
        return self._checked(record, shard, place)

    def _checked(self, record: bytes, shard: int, place: int) -> np.ndarray:
        expected, size = self._length * self._dtype.itemsize, len(record)
        if size != expected and not (
            self._padded and 0 < size < expected and size % self._dtype.itemsize == 0
        ):
            fault = f"has {size} bytes where {expected} are expected"
            raise self._damaged(shard, place, fault)
        tokens_N = np.frombuffer(record, self._dtype).astype(np.int32)
        largest = int(tokens_N.max())
        if largest >= self._vocab_size:
            raise self._damaged(shard, place, f"holds id {largest}, not below {self._vocab_size}")
        if size == expected:
            return tokens_N
        return np.pad(tokens_N, (0, self._length - len(tokens_N)), constant_values=_PAD)

    def _damaged(self, shard: int, place: int, fault: str) -> UserError:
        return UserError(f"Record {place} of {self._paths[shard]} {fault}. {REMEDY}")


def _reader(path: str, blocks: int) -> ArrayRecordReader:
    try:
        # Not Grain's own source: it logs an error for any group of more than one record.
        reader = ArrayRecordReader(path, _RANDOM_ACCESS, file_reader_buffer_size=2**15)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read: {error}. {REMEDY}") from error
    if reader.num_records() != blocks:
        found = reader.num_records()
        raise UserError(f"{path} has {found} records where {blocks} are expected. {REMEDY}")
    return reader


def open_mixture(text: str) -> Mixture:
    """What the config key `data.mixture` names: "FOLDER=WEIGHT,FOLDER=WEIGHT", prepared folders.

    Raises:
        UserError: the text has another form, a weight is not above zero, or a folder is damaged.
    """
    mixture = []
    for part in filter(None, text.split(",")):
        folder, _, weight = part.rpartition("=")
        try:
            known = folder.strip(), float(weight)
        except ValueError:
            known = "", 0.0
        if not known[0] or not 0 < known[1] < float("inf"):
            raise UserError(
                f"data.mixture has the part {part!r}; give FOLDER=WEIGHT with a weight above zero, "
                "such as runs/data/wiki-0123456789ab=0.5, several of them with commas between."
            )
        mixture.append((open_prepared(known[0]), known[1]))
    return mixture


class _Share:
    """Of an endless stream of rows, cut into batches of `total`, those at the places `own`."""

    def __init__(self, rows: grain.MapDataset, total: int, own: np.ndarray) -> None:
        self._rows, self._total, self._own = rows, total, own.tolist()

    def __len__(self) -> int:
        return len(self._rows) // self._total * len(self._own)

    def __getitem__(self, index: int) -> np.ndarray:
        batch, place = divmod(index, len(self._own))
        return self._rows[batch * self._total + self._own[place]]


def train_batches(
    prepared: Prepared,
    batch_size: int,
    seed: int,
    own: np.ndarray | None = None,
    mixture: Mixture = (),
) -> grain.DatasetIterator[Batch]:
    """Returns endless training batches, a pure function of (seed, index of the batch).

    Every epoch visits every block once, in an order of its own; a batch may span two epochs. With
    several processes each holds some rows of the global batch, which is the one that a process
    alone would get. The iterator's get_state() is a small JSON-able dict that is the same on every
    process, however many there are; set_state() on a fresh iterator, of any number of processes,
    goes on exactly there.

    Args:
        prepared: the corpus; its train split is read.
        batch_size: rows of the global batch, B.
        seed: of the shuffle, 0 <= seed < 2**32.
        own: which of them to give, int [R] (see `mesh.own_rows`); None for all.
        mixture: further corpora and their weights, the first one's being 1. Rows are dealt from
            all of them in fixed proportion, each with epochs of its own.

    Returns:
        An iterator of batches of R rows.

    Raises:
        UserError: batch_size does not fit, or a corpus of the mixture has another tokenizer,
            length or packing; when read, a record that is damaged.
    """
    blocks = [_Blocks(corpus, "train") for corpus, _ in ((prepared, 1.0), *mixture)]
    most = sum(map(len, blocks))
    if not 1 <= batch_size <= most:
        raise UserError(
            f"The batch size is {batch_size}; it must be from 1 to {most}, the training blocks in "
            f"{prepared.folder}."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"The data seed is {seed}; it must be from 0 to {2**32 - 1}.")
    for corpus, _ in mixture:
        _check_alike(prepared, corpus)
    shuffled = [grain.MapDataset.source(b).seed(seed).shuffle().repeat() for b in blocks]
    weights = [1.0, *(weight for _, weight in mixture)]
    rows = grain.MapDataset.mix(shuffled, weights) if mixture else shuffled[0]
    own = np.arange(batch_size) if own is None else own
    share = grain.MapDataset.source(_Share(rows, batch_size, own))
    # There is no remainder in an endless stream; drop_remainder has Grain count batches in whole
    # numbers, where rounding up overflows.
    batches = share.batch(len(own), drop_remainder=True)
    return iter(batches.map(lambda a: as_batch(prepared, a)).to_iter_dataset(_READ_OPTIONS))


def _check_alike(first: Prepared, other: Prepared) -> None:
    for name in ("tokenizer", "length", "packing"):
        ours, theirs = (_facts(corpus)[name] for corpus in (first, other))
        if ours != theirs:
            raise UserError(
                f"data.mixture holds {other.folder}, prepared with {name} {theirs}, but "
                f"{first.folder} has {ours}: prepare both with the same."
            )


def _facts(corpus: Prepared) -> dict[str, Any]:
    facts = {"tokenizer": corpus.tokenizer.fingerprint, "length": corpus.length}
    return facts | {"packing": corpus.packing}


def as_batch(prepared: Prepared, tokens_BL: np.ndarray) -> Batch:
    """The batch of these rows, in which -1 stands for a pad; see above."""
    padding_BL = tokens_BL == _PAD
    tokens_BL = np.where(padding_BL, prepared.tokenizer.pad_id, tokens_BL).astype(np.int32)
    batch = {"tokens": tokens_BL, "counted": ~padding_BL}
    if prepared.count_pads:
        batch["counted"] = np.ones_like(padding_BL)
    elif prepared.packing == "padded":
        batch["padding"] = padding_BL
    if prepared.packing == "documents":
        batch["segments"] = segments(tokens_BL, prepared.tokenizer.eos_id)
    return batch


def shapes(data: Any, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch.

    data: what has `packing` and `count_pads`: a corpus, or the config section `data`.
    """
    kinds = {"tokens": np.int32, "counted": np.bool_}
    if data.packing == "padded" and not data.count_pads:
        kinds["padding"] = np.bool_
    if data.packing == "documents":
        kinds["segments"] = np.int32
    return {name: jax.ShapeDtypeStruct((rows, length), kind) for name, kind in kinds.items()}


def valid_batches(prepared: Prepared, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """Returns one pass over the validation blocks, in file order.

    Args:
        prepared: the corpus; its valid split is read.
        batch_size: rows per batch, B.
        limit: at most this many blocks; 0 for all.

    Returns:
        An iterator of batches. The last one is filled up with rows of zeros and False.

    Raises:
        UserError: batch_size is below 1 or limit below 0; a record that is damaged.
    """
    if batch_size < 1 or limit < 0:
        raise UserError(
            f"Validation batch size {batch_size} and limit {limit}: give a batch size of at least "
            "1 and a limit of at least 0 (0 reads every block)."
        )
    blocks = _Blocks(prepared, "valid")
    count = min(limit or len(blocks), len(blocks))
    return (
        _filled_batch(prepared, blocks, range(start, min(start + batch_size, count)), batch_size)
        for start in range(0, count, batch_size)
    )


def _filled_batch(prepared: Prepared, blocks: _Blocks, indices: range, batch_size: int) -> Batch:
    batch = as_batch(prepared, np.stack([blocks[i] for i in indices]))
    missing = ((0, batch_size - len(indices)), (0, 0))
    return {name: np.pad(rows, missing) for name, rows in batch.items()}
