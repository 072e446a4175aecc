"""From documents to a folder of token blocks, written once and checked whenever it is opened."""

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lomdm_jax.data.sources import (
    check_source,
    corpus_version,
    read_documents,
    source_name,
    split_documents,
)
from lomdm_jax.data.tokenizers import SentencePieceTokenizer, train_tokenizer
from lomdm_jax.errors import UserError

FORMAT = 1  # raise it when the files change meaning: older folders are then left alone
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.model"
REMEDY = "Delete the folder and run again to prepare it anew."


@dataclass(frozen=True)
class Prepared:
    """An opened folder of token blocks.

    Attributes:
        folder: where the files are.
        manifest: the content of manifest.json: format, settings, tokenizer (its fingerprint),
            vocab_size, length, dtype (of the records), files (name to bytes), and splits (per
            split: documents; tokens, with the eos of each document, before the last partial block
            is dropped; blocks; sha256 of the blocks' tokens as stored).
        tokenizer: the tokenizer the blocks were made with.
        length: tokens per block.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: SentencePieceTokenizer
    length: int

    def split_path(self, split: str) -> Path:
        """Returns the record file of a split.

        Raises:
            UserError: there is no such split.
        """
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder} has no split {split!r}; its splits: {known}.")
        return self.folder / _split_file(split)

    def require(self, *, length: int, vocab_size: int) -> None:
        """Checks that the folder holds what the settings ask for.

        Raises:
            UserError: it holds another block length or vocabulary; names both values.
        """
        for name, asked in (("length", length), ("vocab_size", vocab_size)):
            held = self.manifest[name]
            if held != asked:
                raise UserError(
                    f"data.{name} is {asked}, but {self.folder} was prepared with {name} {held}. "
                    f"Set data.{name} to {held}, or data.directory to another folder."
                )


def prepare(data: Any) -> Prepared:
    """Opens the prepared corpus these settings ask for, making it first where there is none.

    A directory that itself holds a manifest.json is opened as it is. Otherwise the corpus lives in
    `<directory>/<source's name>-<fingerprint of the settings>`: the same settings find their folder
    again and other settings get another one. Each document is followed by eos, the documents of a
    split are joined and cut in blocks of `length`, and the last partial block is dropped. A folder
    appears under its name only when complete; an interrupted run leaves at most a
    `<name>.partial-*` folder beside it, which is never read.

    Args:
        data: an object with the attributes source, valid_source, tokenizer, vocab_size, length,
            valid_share and directory.

    Raises:
        UserError: bad settings, or a folder that is damaged or does not match them.
    """
    directory = Path(data.directory).expanduser()
    if (directory / MANIFEST_FILE).exists():
        prepared = open_prepared(directory)
        prepared.require(length=data.length, vocab_size=data.vocab_size)
        return prepared
    settings = _settings(data)
    folder = directory / f"{settings['source']}-{_fingerprint(settings)}"
    if not folder.exists():
        _make(folder, settings, data)
    return open_prepared(folder)


def _settings(data: Any) -> dict[str, Any]:
    """What the content of a folder depends on. Files count by content, wherever they lie."""
    names = ("tokenizer", "vocab_size", "length")
    settings = {name: getattr(data, name) for name in names}
    if settings["length"] < 1:
        raise UserError(f"data.length is {settings['length']}; a block needs at least one token.")
    check_source("data.source", data.source)
    settings |= {"source": source_name(data.source), "corpus_version": corpus_version(data.source)}
    if not data.valid_source:
        return settings | {"valid_share": data.valid_share}
    check_source("data.valid_source", data.valid_source)
    version = corpus_version(data.valid_source)
    if version == settings["corpus_version"]:
        raise UserError(
            f"data.valid_source is {data.valid_source!r}, which holds the very text of data.source "
            f"= {data.source!r}: give held-out text, or none to hold out data.valid_share of it."
        )
    return settings | {"valid_source": source_name(data.valid_source), "valid_version": version}


def _fingerprint(settings: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]  # 48 bits: enough to tell folders apart


def _make(folder: Path, settings: dict[str, Any], data: Any) -> None:
    """Writes a folder under a passing name and renames it: whole or not there at all."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _write(partial, settings, data)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise


def _read(data: Any) -> tuple[list[str], list[str]]:
    """The documents to train and to validate on."""
    documents = read_documents(data.source)
    if data.valid_source:
        return documents, read_documents(data.valid_source)
    return split_documents(documents, data.valid_share)


def _write(folder: Path, settings: dict[str, Any], data: Any) -> None:
    train, valid = _read(data)
    _say(f"{settings['source']}: {len(train):,} training and {len(valid):,} validation documents")
    tokenizer = train_tokenizer(settings["tokenizer"], train, settings["vocab_size"])
    tokenizer.save(folder / TOKENIZER_FILE)
    parts = {"train": train, "valid": valid}
    splits = {
        split: _write_split(folder / _split_file(split), documents, tokenizer, settings["length"])
        for split, documents in parts.items()
    }
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "length": settings["length"],
        "dtype": _record_dtype(tokenizer.vocab_size),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "splits": splits,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _write_split(
    path: Path, documents: Sequence[str], tokenizer: SentencePieceTokenizer, length: int
) -> dict[str, Any]:
    """Writes the record file of a split and returns its entry in the manifest."""
    tokens_N = _token_stream(documents, tokenizer)
    blocks_ML = _blocks(tokens_N, length, path.stem)
    _write_records(path, blocks_ML)
    _say(f"{path.stem}: {len(tokens_N):,} tokens, {len(blocks_ML):,} blocks")
    return {
        "documents": len(documents),
        "tokens": len(tokens_N),
        "blocks": len(blocks_ML),
        "sha256": hashlib.sha256(blocks_ML.tobytes()).hexdigest(),
    }


def _say(line: str) -> None:
    print(f"prepare: {line}", flush=True)


def _split_file(split: str) -> str:
    return f"{split}.array_record"


def _record_dtype(vocab_size: int) -> str:
    """Little-endian, and the narrowest type that also holds the mask id."""
    return "<u2" if vocab_size + 1 <= 2**16 else "<u4"


def _token_stream(documents: Sequence[str], tokenizer: SentencePieceTokenizer) -> np.ndarray:
    """Returns [N] in the records' dtype: the documents' ids joined, each followed by eos."""
    dtype = np.dtype(_record_dtype(tokenizer.vocab_size))
    parts = [np.array([*tokenizer.encode(text), tokenizer.eos_id], dtype) for text in documents]
    return np.concatenate([np.zeros(0, dtype), *parts])  # the empty part: no documents, no tokens


def _blocks(tokens_N: np.ndarray, length: int, split: str) -> np.ndarray:
    """Returns [M, L]: the stream cut in blocks, the last partial one dropped."""
    count = len(tokens_N) // length
    if not count:
        raise UserError(
            f"The {split} split has {len(tokens_N)} tokens, too few for one block of data.length "
            f"{length}; give a smaller data.length, a longer corpus or another data.valid_share."
        )
    return tokens_N[: count * length].reshape(count, length)


def _write_records(path: Path, blocks_ML: np.ndarray) -> None:
    # A read inflates its whole group, but also visits the index of every group: in 1.3 million
    # blocks of 32 tokens it takes 3 ms with one block to a group and 0.03 ms with 256.
    group = max(1, 2**14 // blocks_ML[0].nbytes)
    with contextlib.closing(ArrayRecordWriter(str(path), f"group_size:{group}")) as writer:
        for block_L in blocks_ML:
            writer.write(block_L.tobytes())


def open_prepared(folder: str | Path) -> Prepared:
    """Opens a prepared folder after checking its manifest, its files' sizes and its tokenizer.

    Raises:
        UserError: something is missing, cut short or changed; names the file and the remedy.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    for name, expected in manifest["files"].items():
        _check_size(folder / name, expected)
    tokenizer = SentencePieceTokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"{folder / TOKENIZER_FILE} is not the tokenizer the blocks were made with: SHA-256 "
            f"{tokenizer.fingerprint}, manifest {manifest['tokenizer']}. {REMEDY}"
        )
    return Prepared(folder, manifest, tokenizer, manifest["length"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or unreadable ({error}). {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a corpus of format {FORMAT}. {REMEDY}")
    return manifest


def _check_size(path: Path, expected: int) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing; the manifest says {expected} bytes. {REMEDY}")
    found = path.stat().st_size
    if found != expected:
        raise UserError(f"{path} has {found} bytes where {expected} are expected. {REMEDY}")
