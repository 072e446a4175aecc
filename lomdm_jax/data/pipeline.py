"""Batches of token blocks: an endless shuffled stream to train on, one pass to validate on."""

from collections.abc import Iterator

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from lomdm_jax.data.prepare import REMEDY, Prepared
from lomdm_jax.errors import UserError

Batch = dict[str, np.ndarray]

# Each element read ahead is a whole batch, at some 20 microseconds per row on one thread: far less
# than a training step. More threads were no faster (they share Python's lock) and four batches
# cover a stall.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
# Reads are at random: nothing is read ahead, and nothing waits for other threads.
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class _Blocks:
    """Random access to the blocks of a split, each int32 [L] and checked as it is decoded."""

    def __init__(self, prepared: Prepared, split: str) -> None:
        self._path = prepared.split_path(split)
        try:
            # Not Grain's own source: it logs an error for any group of more than one record.
            self._records = ArrayRecordReader(
                str(self._path), _RANDOM_ACCESS, file_reader_buffer_size=2**15
            )
        except RuntimeError as error:
            raise UserError(f"{self._path} cannot be read: {error}. {REMEDY}") from error
        self._dtype = np.dtype(prepared.manifest["dtype"])
        self._length = prepared.length
        self._vocab_size = prepared.tokenizer.vocab_size

    def __len__(self) -> int:
        return self._records.num_records()

    def __getitem__(self, index: int) -> np.ndarray:
        try:
            (record,) = self._records.read([index])
        except RuntimeError as error:  # the file's own checksums: some bytes have changed
            raise self._damaged(index, f"cannot be read: {error}") from error
        expected = self._length * self._dtype.itemsize
        if len(record) != expected:
            raise self._damaged(index, f"has {len(record)} bytes where {expected} are expected")
        tokens_L = np.frombuffer(record, self._dtype).astype(np.int32)
        largest = int(tokens_L.max())
        if largest >= self._vocab_size:
            raise self._damaged(index, f"holds id {largest}, not below {self._vocab_size}")
        return tokens_L

    def _damaged(self, index: int, fault: str) -> UserError:
        return UserError(f"Record {index} of {self._path} {fault}. {REMEDY}")


def train_batches(
    prepared: Prepared,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Returns endless training batches, a pure function of (seed, index of the batch).

    Every epoch visits every block once, in an order of its own; a batch may span two epochs. With
    several processes each holds its rows of the global batch: joined in process order they are the
    batch one process alone would get. The iterator's get_state() is a small JSON-able dict that
    is the same on every process; set_state() on a fresh iterator with the same arguments goes on
    exactly there.

    Args:
        prepared: the corpus; its train split is read.
        batch_size: rows of the global batch, B.
        seed: of the shuffle, 0 <= seed < 2**32.
        process_index: which process this is.
        process_count: how many processes share each batch; must divide batch_size.

    Returns:
        An iterator of {"tokens": int32 [B / process_count, L], "counted": bool of the same shape,
        all True}.

    Raises:
        UserError: batch_size does not fit; when read, a record that is damaged.
    """
    blocks = _Blocks(prepared, "train")
    if not 1 <= batch_size <= len(blocks) or batch_size % process_count:
        raise UserError(
            f"The batch size is {batch_size}; it must be from 1 to {len(blocks)} (the training "
            f"blocks in {prepared.folder}) and a multiple of the {process_count} process(es)."
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"The data seed is {seed}; it must be from 0 to {2**32 - 1}.")
    shuffled = grain.MapDataset.source(blocks).seed(seed).shuffle().repeat()
    # Small batches dealt to the processes in turn: global batch i is small batches
    # i * process_count .. (i + 1) * process_count - 1. There is no remainder in an endless stream;
    # drop_remainder has Grain count batches in whole numbers, where rounding up overflows.
    small = shuffled.batch(batch_size // process_count, drop_remainder=True)
    shares = small[process_index::process_count]
    return iter(shares.map(_all_counted).to_iter_dataset(_READ_OPTIONS))


def _all_counted(tokens_BL: np.ndarray) -> Batch:
    return {"tokens": tokens_BL, "counted": np.ones(tokens_BL.shape, dtype=bool)}


def valid_batches(prepared: Prepared, batch_size: int, limit: int = 0) -> Iterator[Batch]:
    """Returns one pass over the validation blocks, in file order.

    Args:
        prepared: the corpus; its valid split is read.
        batch_size: rows per batch, B.
        limit: at most this many blocks; 0 for all.

    Returns:
        An iterator of {"tokens": int32 [B, L], "counted": bool [B, L]}. The last batch is
        filled up with rows of zeros whose counted is False.

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
        _filled_batch(blocks, range(start, min(start + batch_size, count)), batch_size)
        for start in range(0, count, batch_size)
    )


def _filled_batch(blocks: _Blocks, indices: range, batch_size: int) -> Batch:
    rows_RL = np.stack([blocks[i] for i in indices])
    missing = ((0, batch_size - len(rows_RL)), (0, 0))
    return {name: np.pad(rows, missing) for name, rows in _all_counted(rows_RL).items()}


def unigram_entropy(prepared: Prepared, split: str = "valid") -> float:
    """Returns the entropy of a split's token frequencies, in nats per token.

    The loss of the best model that ignores context altogether; every trained one must beat it.

    Raises:
        UserError: there is no such split, or a record is damaged.
    """
    blocks = _Blocks(prepared, split)
    counts_V = np.zeros(prepared.tokenizer.vocab_size, dtype=np.int64)
    for i in range(len(blocks)):
        counts_V += np.bincount(blocks[i], minlength=len(counts_V))
    share_V = counts_V[counts_V > 0] / counts_V.sum()
    return float(-(share_V * np.log(share_V)).sum())
