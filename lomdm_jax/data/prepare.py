"""From documents to a folder of token blocks, written once and checked whenever it is opened."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomdm_jax.data.detokenizers import DETOKENIZERS
from lomdm_jax.data.packing import check_rules, make_rules
from lomdm_jax.data.shards import PROGRESS_FILE, Task, TooLittleText, write_split, write_whole
from lomdm_jax.data.sources import Source, check_share, is_valid
from lomdm_jax.data.tokenizers import (
    Tokenizer,
    check_tokenizer,
    identity,
    load_tokenizer,
    make_tokenizer,
    needs_text,
)
from lomdm_jax.errors import UserError

FORMAT = 2  # raise it when the files change meaning: older folders are then left alone
MANIFEST_FILE = "manifest.json"
REMEDY = "Delete the folder and run again to prepare it anew."
# What the blocks depend on, beside the documents themselves.
_RULES = (
    *("split", "valid_split", "column", "unit", "keep_empty", "skip_bad", "detokenizer"),
    *("tokenizer", "vocab_size", "length", "packing", "insert_separator", "separator_id"),
    *("insert_bos", "insert_eos", "group"),
)


@dataclass(frozen=True)
class Prepared:
    """An opened folder of token blocks.

    Attributes:
        folder: where the files are.
        manifest: the content of manifest.json: format, settings, tokenizer (its fingerprint),
            vocab_size, length, dtype (of the records), files (name to bytes), and splits (per
            split: documents and skipped ones; characters; tokens, separators included; dropped
            tokens, in no block; blocks; shards, as [name, blocks, bytes]; sha256 of the records'
            tokens, joined; unigram_entropy of them, in nats per token).
        tokenizer: the tokenizer the blocks were made with.
        length: tokens per block.
        count_pads: whether pads count as text; see `pipeline`.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    length: int
    count_pads: bool = False

    @property
    def packing(self) -> str:
        """How documents became blocks; see `packing.Rules`."""
        return self.manifest["settings"]["packing"]

    def split(self, name: str) -> dict[str, Any]:
        """The manifest's entry of a split.

        Raises:
            UserError: there is no such split.
        """
        if name not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder} has no split {name!r}; its splits: {known}.")
        return self.manifest["splits"][name]

    def passport(self, name: str) -> dict[str, Any]:
        """What a number that was measured on a split must say of it, JSON-able."""
        settings, entry = self.manifest["settings"], self.split(name)
        counts = ("documents", "skipped", "tokens", "dropped", "blocks", "sha256")
        own_source = name == "valid" and settings["valid_source"]
        return {
            "source": settings["valid_source" if own_source else "source"],
            "split": settings["valid_split" if name == "valid" else "split"] or name,
            "tokenizer": settings["tokenizer"],
            "tokenizer_sha256": self.tokenizer.fingerprint,
            "length": self.length,
            "packing": self.packing,
            **{key: entry[key] for key in counts},
        }

    def require(self, *, length: int, vocab_size: int) -> None:
        """Checks that the folder holds what the settings ask for; 0 asks for no vocab_size.

        Raises:
            UserError: it holds another block length or vocabulary; names both values.
        """
        for name, asked in (("length", length), ("vocab_size", vocab_size)):
            held = self.manifest[name]
            if asked and held != asked:
                raise UserError(
                    f"data.{name} is {asked}, but {self.folder} was prepared with {name} {held}. "
                    f"Set data.{name} to {held}, or data.directory to another folder."
                )


def check(data: Any) -> None:
    """Checks the config section `data` without reading documents.

    Raises:
        UserError: names the key, its value and the remedy.
    """
    check_rules(data)
    check_tokenizer(data.tokenizer, data.vocab_size)
    if data.detokenizer not in DETOKENIZERS:
        known = ", ".join(DETOKENIZERS)
        raise UserError(f"data.detokenizer is {data.detokenizer!r}; use one of {known}.")
    if (Path(data.directory).expanduser() / MANIFEST_FILE).exists():
        return  # opened as it is
    if not (data.source or data.valid_source):
        raise UserError("data.source and data.valid_source are empty: name one.")
    for key, source in sources_of(data).items():
        source.check("data.valid_source" if key == "valid" and data.valid_source else "data.source")
    if not _has_own_valid(data):
        check_share(data.valid_share)
    if not data.source and needs_text(data.tokenizer):
        raise UserError(
            f"data.tokenizer is {data.tokenizer!r}, which is made from text, but data.source is "
            "empty: name one, or a tokenizer that exists."
        )


def sources_of(data: Any) -> dict[str, Source]:
    """Where the documents of each split are; of held-out text, both are the same."""
    names = {"train": data.source, "valid": data.valid_source or data.source}
    splits = {
        "train": data.split,
        "valid": data.valid_split if _has_own_valid(data) else data.split,
    }
    return {
        split: Source(
            name,
            split=splits[split],
            column=data.column,
            unit=data.unit,
            streaming=data.streaming,
            keep_empty=data.keep_empty,
            skip_bad=data.skip_bad,
        )
        for split, name in names.items()
        if name
    }


def _has_own_valid(data: Any) -> bool:
    """Whether there is text to validate on that is not held out from the training text."""
    return bool(data.valid_source or data.valid_split)


def prepare(data: Any) -> Prepared:
    """Opens the prepared corpus these settings ask for, making it first where there is none.

    A directory that itself holds a manifest.json is opened as it is. Otherwise the corpus lives in
    `<directory>/<source's name>-<fingerprint of the settings>`: the same settings find their folder
    again and other settings get another one. A folder appears under its name only when complete;
    an interrupted run leaves `<name>.partial` beside it, and the next one goes on there.

    Args:
        data: the config section `data` (lomdm_jax/config.py).

    Raises:
        UserError: bad settings or documents, a full disk, or a folder that is damaged or does not
            match the settings.
    """
    directory = Path(data.directory).expanduser()
    if (directory / MANIFEST_FILE).exists():
        prepared = open_prepared(directory, count_pads=data.count_pads)
        prepared.require(length=data.length, vocab_size=data.vocab_size)
        return prepared
    check(data)
    settings = _settings(data)
    folder = directory / f"{_name(data)}-{_fingerprint(settings)}"
    if not folder.exists():
        _make(folder, settings, data)
    return open_prepared(folder, count_pads=data.count_pads)


def _name(data: Any) -> str:
    return next(iter(sources_of(data).values())).label()


def _settings(data: Any) -> dict[str, Any]:
    """What the content of a folder depends on. Files count by content, wherever they lie."""
    sources = sources_of(data)
    settings = {name: getattr(data, name) for name in _RULES}
    versions = {split: source.version() for split, source in sources.items()}
    labels = {split: source.label() for split, source in sources.items()}
    settings |= _tokenizer_settings(data.tokenizer)
    settings |= {"source": labels.get("train", ""), "valid_source": ""}
    settings |= {"corpus_version": versions.get("train", "")}
    if data.valid_source:
        settings |= {"valid_source": labels["valid"], "valid_version": versions["valid"]}
    if not _has_own_valid(data):
        settings["valid_share"] = data.valid_share
    elif len({(s.split, versions[split]) for split, s in sources.items()}) < len(sources):
        key, value = (
            ("valid_source", data.valid_source)
            if data.valid_source
            else ("valid_split", data.valid_split)
        )
        raise UserError(
            f"data.{key} is {value!r}, which holds the very text of data.source = {data.source!r}: "
            "give held-out text, or none to hold out data.valid_share of it."
        )
    return settings


def _tokenizer_settings(name: str) -> dict[str, str]:
    """Of files the name without the folder that they lie in: they count by content."""
    version, (kind, colon, where) = identity(name), name.partition(":")
    name = f"{kind}{colon}{Path(where).name}" if version else name
    return {"tokenizer": name, "tokenizer_version": version}


def _fingerprint(settings: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]  # 48 bits: enough to tell folders apart


def _make(folder: Path, settings: dict[str, Any], data: Any) -> None:
    """Writes a folder under a passing name and renames it: whole or not there at all."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        if folder.exists():  # another process has made it meanwhile
            _remove_if_empty(partial)
            return
        try:
            if not (partial / MANIFEST_FILE).exists():  # not killed between that and the renaming
                _write(partial, settings, data)
        except TooLittleText:  # the same settings would find no more another time
            shutil.rmtree(partial)
            raise
        for path in partial.glob(f"*.{PROGRESS_FILE}"):
            path.unlink()
        partial.rename(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work in the folder; a killed one is not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _write(folder: Path, settings: dict[str, Any], data: Any) -> None:
    """All files, the manifest last; goes on from what an interrupted run left."""
    sources = sources_of(data)
    tokenizer, total = _tokenizer(folder, data, sources)
    rules, dtype = make_rules(data, tokenizer), record_dtype(tokenizer)
    splits = {}
    for split, source in sources.items():
        share = None if _has_own_valid(data) else data.valid_share
        known = total if split == "train" or share is not None else 0
        task = Task(folder, split, source, share, data.detokenizer, rules, dtype, known)
        splits[split] = write_split(task, tokenizer, data.workers or os.cpu_count() or 1)
        print(f"prepare: {describe(split, splits[split])}", flush=True)
    files = sorted(path for path in folder.iterdir() if not path.name.endswith(PROGRESS_FILE))
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "length": settings["length"],
        "dtype": dtype,
        "files": {path.name: path.stat().st_size for path in files},
        "splits": splits,
    }
    write_whole(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _tokenizer(folder: Path, data: Any, sources: dict[str, Source]) -> tuple[Tokenizer, int]:
    """The tokenizer, made and saved unless the folder has it, and how many documents were read to
    make it."""
    with contextlib.suppress(UserError):
        return load_tokenizer(folder), 0
    count, share = 0, None if _has_own_valid(data) else data.valid_share

    def training_documents() -> Iterator[str]:
        nonlocal count
        count = 0
        for text in sources["train"].documents():
            count += 1
            if text is not None and not (share and is_valid(text, share)):
                yield DETOKENIZERS[data.detokenizer](text)

    print(f"prepare: {_name(data)} with {data.tokenizer}", flush=True)
    tokenizer = make_tokenizer(data.tokenizer, data.vocab_size, training_documents)
    tokenizer.save(folder)
    return tokenizer, count


def describe(split: str, entry: dict[str, Any]) -> str:
    """One line for people."""
    line = f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, "
    line += f"{entry['blocks']:,} blocks, {entry['dropped']:,} tokens dropped"
    return line + (f", {entry['skipped']:,} bad documents skipped" if entry["skipped"] else "")


def record_dtype(tokenizer: Tokenizer) -> str:
    """Little-endian, and the narrowest type that also holds the mask id."""
    return "<u2" if tokenizer.rows <= 2**16 else "<u4"


def open_prepared(folder: str | Path, count_pads: bool = False) -> Prepared:
    """Opens a prepared folder after checking its manifest, its files' sizes and its tokenizer.

    Raises:
        UserError: something is missing, cut short or changed; names the file and the remedy.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    for name, expected in manifest["files"].items():
        _check_size(folder / name, expected)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"The tokenizer in {folder} is not the one that the blocks were made with: SHA-256 "
            f"{tokenizer.fingerprint}, manifest {manifest['tokenizer']}. {REMEDY}"
        )
    return Prepared(folder, manifest, tokenizer, manifest["length"], count_pads)


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
