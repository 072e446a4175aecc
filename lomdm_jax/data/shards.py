"""One split, from documents to record files: in parallel, in order, and resumed where it stopped.

Documents are read one after another and encoded in chunks, by as many processes as there are
workers; the blocks are cut and written by this process, in the documents' order. So the files do
not depend on the number of workers. After each file the state is saved, and an interrupted run goes
on from there.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lomdm_jax.data.detokenizers import DETOKENIZERS
from lomdm_jax.data.packing import Packer, Rules
from lomdm_jax.data.sources import Source, is_valid
from lomdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from lomdm_jax.errors import UserError

CHUNK = 1_000_000  # characters that a worker gets at a time; a longer document is one chunk
SHARD = 2**26  # tokens after which a file is complete
FEW = 8  # so many chunks are encoded by this process, sooner than others would have started
SAY_EVERY = 5.0  # seconds
PROGRESS_FILE = "progress.json"


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all, also after a kill."""
    passing = path.with_name(f"new.{PROGRESS_FILE}")
    passing.write_text(text)
    passing.replace(path)


class TooLittleText(UserError):
    """There is not one block."""


class Task(NamedTuple):
    """A split that is to be written.

    folder: where its files go; the tokenizer is saved there.
    split: name of the split.
    source: where its documents are.
    share: of the documents, that are held out for validation by content hash; None to take all.
    detokenizer: a key of DETOKENIZERS.
    rules: how documents become blocks.
    dtype: of the ids in the files.
    total: how many documents the source has, for the time left; 0 if that is not known.
    """

    folder: Path
    split: str
    source: Source
    share: float | None
    detokenizer: str
    rules: Rules
    dtype: str
    total: int = 0


class Encoded(NamedTuple):
    """A chunk: the ids of its documents joined, each followed by the separator, [N]; how many ids
    each document has, int64 [D]; characters of text; documents read and skipped."""

    tokens_N: np.ndarray
    lengths_D: np.ndarray
    characters: int
    read: int
    skipped: int


@dataclasses.dataclass
class Progress:
    """What was done up to the end of the last complete file.

    read: documents that the source gave; skipped: the bad ones among them.
    documents, characters, tokens: of what the split holds, separators counted as tokens.
    dropped: tokens in no block.
    carry: tokens that wait for the next block; at the end they are dropped as well.
    shards: [name, blocks, bytes] of each file.
    """

    read: int = 0
    skipped: int = 0
    documents: int = 0
    characters: int = 0
    tokens: int = 0
    dropped: int = 0
    carry: list[int] = dataclasses.field(default_factory=list)
    shards: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    done: bool = False

    @property
    def blocks(self) -> int:
        return sum(blocks for _, blocks, _ in self.shards)

    def count(self, chunk: Encoded, packer: Packer) -> None:
        self.read, self.skipped = self.read + chunk.read, self.skipped + chunk.skipped
        self.documents, self.dropped = packer.documents, packer.dropped
        self.characters += chunk.characters
        self.tokens += len(chunk.tokens_N)
        self.carry = packer.carry_N.tolist()

    def save(self, folder: Path, split: str) -> None:
        write_whole(folder / f"{split}.{PROGRESS_FILE}", json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path, split: str) -> "Progress":
        """What was saved, or the start."""
        path = folder / f"{split}.{PROGRESS_FILE}"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


class Chunk(NamedTuple):
    """Consecutive documents, and the number of the first; None where one was skipped."""

    first: int
    texts: list[str | None]


class Encoder(NamedTuple):
    """What a worker does."""

    tokenizer: Tokenizer
    task: Task

    def __call__(self, chunk: Chunk) -> Encoded:
        task, documents, characters = self.task, [], 0
        kept = [(i, text) for i, text in enumerate(chunk.texts, chunk.first) if self._takes(text)]
        skipped = chunk.texts.count(None)
        for index, text in kept:
            ids_N = self._ids(index, text)
            skipped += ids_N is None
            if ids_N is not None:
                documents.append(ids_N)
                characters += len(text)
        tokens_N = np.concatenate([np.zeros(0, task.dtype), *documents])
        lengths_D = np.array([len(ids_N) for ids_N in documents], np.int64)
        return Encoded(tokens_N, lengths_D, characters, len(chunk.texts), skipped)

    def _takes(self, text: str | None) -> TypeGuard[str]:
        """Whether the document belongs to the split."""
        if text is None or self.task.share is None:
            return text is not None
        return is_valid(text, self.task.share) == (self.task.split == "valid")

    def _ids(self, index: int, text: str) -> np.ndarray | None:
        """[N] with the separator; None for one that the tokenizer refuses, if it may be skipped."""
        task = self.task
        try:
            ids = self.tokenizer.encode(DETOKENIZERS[task.detokenizer](text))
        except UserError as error:
            if task.source.skip_bad:
                return None
            where = f"Document {index} (the first is 0) of {task.source.name}"
            raise UserError(f"{where}: {error}") from error
        return np.array([*ids, *task.rules.separator], task.dtype)


class Tally:
    """What is known of the records written: their hash, and how often each id occurs."""

    def __init__(self, rows: int) -> None:
        self._hash, self._counts_V = hashlib.sha256(), np.zeros(rows, np.int64)

    def add(self, stream_N: np.ndarray) -> None:
        self._hash.update(stream_N.tobytes())
        self._counts_V += np.bincount(stream_N, minlength=len(self._counts_V))

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def unigram_entropy(self) -> float:
        """Nats per token: the loss of the best model that ignores context altogether."""
        share_V = self._counts_V[self._counts_V > 0] / self._counts_V.sum()
        return float(-(share_V * np.log(share_V)).sum())


def write_split(task: Task, tokenizer: Tokenizer, workers: int) -> dict[str, Any]:
    """Writes the files of a split, or those that are missing; returns its entry in the manifest.

    Raises:
        UserError: a document cannot be read, a worker died, the disk is full, or there is too
            little text for one block.
    """
    progress = Progress.load(task.folder, task.split)
    tally, say = Tally(tokenizer.rows), _Speaker(task, progress)
    for name, _, _ in progress.shards:
        tally.add(_records(task.folder / name, task.dtype))
    if not progress.done:
        with _disk(task, progress), _encoded(task, tokenizer, progress, workers) as chunks:
            _write_shards(task, chunks, progress, tally, say)
    if not progress.blocks:
        raise _too_few(task, progress)
    return _entry(task, progress, tally)


def _write_shards(
    task: Task,
    chunks: Iterable[Encoded],
    progress: Progress,
    tally: Tally,
    say: Callable[[], None],
) -> None:
    """All chunks, a file at a time; progress is saved after each."""
    carry_N = np.array(progress.carry, task.dtype)
    packer = Packer(task.rules, carry_N, progress.documents, progress.dropped)
    chunks = iter(chunks)
    while (shard := _Shard(task, len(progress.shards))).fill(chunks, packer, progress, tally, say):
        progress.shards.append(shard.close())
        progress.save(task.folder, task.split)
    progress.dropped += len(progress.carry)
    progress.carry, progress.done = [], True
    progress.save(task.folder, task.split)


class _Shard:
    """A record file in the making; nothing is opened before there is a block for it."""

    def __init__(self, task: Task, number: int) -> None:
        self.path = task.folder / shard_name(task.split, number)
        # A read visits the index of every group, and reads its group whole.
        block = task.rules.length * np.dtype(task.dtype).itemsize
        # Uncompressed: 1.8 times the size, and a block is read in 10 microseconds instead of 35.
        self._options = f"group_size:{max(1, 2**14 // block)},uncompressed"
        self._writer: ArrayRecordWriter | None = None
        self._blocks, self._tokens = 0, 0

    def fill(
        self,
        chunks: Iterator[Encoded],
        packer: Packer,
        progress: Progress,
        tally: Tally,
        say: Callable[[], None],
    ) -> bool:
        """Write chunks until the file is large enough; whether there were any blocks."""
        for chunk in chunks:
            blocks = packer.add(chunk.tokens_N, chunk.lengths_D)
            progress.count(chunk, packer)
            if blocks:
                self._write(blocks)
                tally.add(np.concatenate(blocks))
            say()
            if self._tokens >= SHARD:
                break
        return self._blocks > 0

    def _write(self, blocks: list[np.ndarray]) -> None:
        self._writer = self._writer or ArrayRecordWriter(str(self.path), self._options)
        for block_L in blocks:
            self._writer.write(block_L.tobytes())
        if not self._writer.ok():
            self.close()  # which says why
        self._blocks += len(blocks)
        self._tokens += sum(map(len, blocks))

    def close(self) -> tuple[str, int, int]:
        """Name, blocks and bytes, once all is on the disk."""
        assert self._writer is not None
        self._writer.close()
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return self.path.name, self._blocks, self.path.stat().st_size


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.array_record"


def _records(path: Path, dtype: str) -> np.ndarray:
    """All ids of a file, joined."""
    with contextlib.closing(ArrayRecordReader(str(path))) as reader:
        return np.frombuffer(b"".join(reader.read(0, reader.num_records())), dtype)


def _chunks(documents: Iterable[str | None], first: int) -> Iterator[Chunk]:
    """Documents in order, about CHUNK characters at a time; the first has this number."""
    texts: list[str | None] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text or "") + 1
        if size >= CHUNK:
            yield Chunk(first, texts)
            first, texts, size = first + len(texts), [], 0
    if texts:
        yield Chunk(first, texts)


@contextlib.contextmanager
def _encoded(
    task: Task, tokenizer: Tokenizer, progress: Progress, workers: int
) -> Iterator[Iterator[Encoded]]:
    """The chunks that are left, encoded, in order."""
    documents = itertools.islice(task.source.documents(), progress.read, None)
    chunks = _chunks(documents, progress.read)
    first = list(itertools.islice(chunks, FEW))
    chunks = itertools.chain(first, chunks)
    if workers == 1 or len(first) < FEW:
        yield map(Encoder(tokenizer, task).__call__, chunks)
        return
    # Not forked: the parent may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        try:
            yield _in_order(pool, chunks, 2 * workers)
        except BrokenExecutor as error:
            raise UserError(
                f"A worker that encodes {task.source.name} died, most likely for want of memory: "
                "lower data.workers and run again; what is complete is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_encoder: Encoder


def _start_worker(task: Task) -> None:
    global _encoder
    _encoder = Encoder(load_tokenizer(task.folder), task)


def _encode(chunk: Chunk) -> Encoded:
    return _encoder(chunk)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[Chunk], ahead: int) -> Iterator[Encoded]:
    """As many chunks at work as `ahead`, no more in memory."""
    waiting: deque[Any] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_encode, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _disk(task: Task, progress: Progress) -> Iterator[None]:
    """Turns what a full disk gives into a message."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        name = shard_name(task.split, len(progress.shards))
        raise UserError(
            f"{task.folder / name} cannot be written: {error}. Free some space (or choose another "
            f"data.directory) and run again: {len(progress.shards)} complete files are kept."
        ) from error


def _too_few(task: Task, progress: Progress) -> TooLittleText:
    return TooLittleText(
        f"The {task.split} split of {task.source.name} has {progress.documents} documents and "
        f"{progress.tokens} tokens, too few for one block of data.length {task.rules.length}; give "
        "a smaller data.length, a longer corpus or another data.valid_share."
    )


def _entry(task: Task, progress: Progress, tally: Tally) -> dict[str, Any]:
    counts = dataclasses.asdict(progress)
    for name in ("carry", "done", "read"):
        del counts[name]
    found = {"blocks": progress.blocks, "sha256": tally.sha256}
    return counts | found | {"unigram_entropy": tally.unigram_entropy}


class _Speaker:
    """Says how far it is, every few seconds."""

    def __init__(self, task: Task, progress: Progress) -> None:
        self._task, self._progress = task, progress
        self._first = progress.read, progress.characters
        self._started = self._shown = time.perf_counter()

    def __call__(self) -> None:
        now = time.perf_counter()
        if now - self._shown >= SAY_EVERY:
            self._shown = now
            print(f"prepare: {self._line(now - self._started)}", flush=True)

    def _line(self, seconds: float) -> str:
        progress, total = self._progress, self._task.total
        read, characters = progress.read - self._first[0], progress.characters - self._first[1]
        line = (
            f"{self._task.split}: {progress.read:,} documents, {progress.tokens:,} tokens, "
            f"{characters / seconds / 1e6:.1f} million characters/s"
        )
        if not total:
            return line
        left = timedelta(seconds=round(seconds * (total - progress.read) / max(read, 1)))
        return f"{line}, {progress.read / total:.0%}, left {left}"
