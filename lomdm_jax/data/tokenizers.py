"""Text to token ids and back: what every tokenizer does, and the names they go by."""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from lomdm_jax.data import huggingface
from lomdm_jax.data.sentence_piece import (
    MODEL_FILE,
    SentencePieceTokenizer,
    check_vocab_size,
    train_sentencepiece,
)
from lomdm_jax.data.symbols import (
    SYMBOLS_FILE,
    ByteTokenizer,
    Text8Tokenizer,
    collect_characters,
    load_symbols,
)
from lomdm_jax.errors import UserError


class Tokenizer(Protocol):
    """What every tokenizer has; `vocabulary.Vocabulary` says more of each.

    Attributes:
        vocab_size: ids of the tokenizer itself, without a mask id that is added.
        mask_id: its own ([MASK], <mask>) if it has one, otherwise vocab_size.
        rows: rows of a token table, max(vocab_size, mask_id + 1).
        eos_id: ends a document.
        bos_id: starts one; eos_id where the tokenizer has none.
        pad_id: fills up a block; eos_id where the tokenizer has none.
        byte_lengths: int32 [rows], UTF-8 bytes of original text that each id stands for; None if
            the ids do not tell.
        fingerprint: SHA-256, in hex, of all that the ids depend on.
    """

    vocab_size: int
    mask_id: int
    rows: int
    eos_id: int
    bos_id: int
    pad_id: int
    byte_lengths: np.ndarray | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, never a special one."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a display text of each id."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files into a folder, for `load_tokenizer`."""
        ...


_TRAINED = {"sentencepiece-bpe": "bpe", "sentencepiece-unigram": "unigram"}
_FIXED: dict[str, Callable[[], Tokenizer]] = {"text8": Text8Tokenizer, "bytes": ByteTokenizer}
_CHARACTERS = "characters"
_SAMPLE = 4_000_000  # characters of the text a tokenizer is trained on


def make_tokenizer(name: str, vocab_size: int, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """Makes or opens the named tokenizer.

    Of a large corpus a tokenizer is trained on every n-th document, as many as hold about 4 million
    characters: more change few pieces and take minutes.

    Args:
        name: data.tokenizer, one of
            "sentencepiece-bpe", "sentencepiece-unigram": trained on the documents;
            "characters": the characters of the documents;
            "text8": its 27 symbols; "bytes": the bytes of UTF-8;
            "sentencepiece:PATH": a SentencePiece model file;
            "hf:NAME": a Hugging Face tokenizer, a local folder or a name on the hub.
        vocab_size: ids to train; of other tokenizers 0, or exactly what they have.
        documents: gives a fresh iterator over the training documents each time; called by those
            that are trained (twice) and by "characters" (once).

    Raises:
        UserError: no tokenizer has this name, it cannot be opened, or vocab_size does not fit.
    """
    if name in _TRAINED:
        check_vocab_size(vocab_size)
        return train_sentencepiece(_sample(documents), vocab_size, _TRAINED[name])
    if name == _CHARACTERS:
        return _of_size(name, vocab_size, collect_characters(documents()))
    return _of_size(name, vocab_size, _open(name))


def check_tokenizer(name: str, vocab_size: int) -> None:
    """Checks what can be known before the documents are read, and without a network.

    Raises:
        UserError: as make_tokenizer.
    """
    if name in _TRAINED:
        check_vocab_size(vocab_size)
    elif not (needs_text(name) or huggingface.is_on_hub(name)):
        _of_size(name, vocab_size, _open(name))


def needs_text(name: str) -> bool:
    """Whether make_tokenizer takes the named tokenizer from the documents."""
    return name in _TRAINED or name == _CHARACTERS


def _open(name: str) -> Tokenizer:
    """A tokenizer that needs no documents."""
    kind, _, place = name.partition(":")
    if name in _FIXED:
        return _FIXED[name]()
    if kind == "sentencepiece" and place:
        return _load(Path(place).expanduser(), _read_model)
    if kind == "hf" and place:
        return huggingface.from_huggingface(place)
    known = ", ".join([*_TRAINED, _CHARACTERS, *_FIXED, "sentencepiece:PATH", "hf:NAME"])
    raise UserError(f"data.tokenizer is {name!r}; known tokenizers: {known}.")


def _of_size(name: str, vocab_size: int, tokenizer: Tokenizer) -> Tokenizer:
    if vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(
            f"data.vocab_size is {vocab_size}, but tokenizer {name!r} has {tokenizer.vocab_size} "
            f"ids: set data.vocab_size to 0, which takes its own, or to {tokenizer.vocab_size}."
        )
    return tokenizer


def _sample(documents: Callable[[], Iterable[str]]) -> list[str]:
    every = -(-sum(map(len, documents())) // _SAMPLE) or 1
    return list(itertools.islice(documents(), None, None, every))


def identity(name: str) -> str:
    """Returns what the ids depend on beyond the tokenizer's name: for a file, or a local folder,
    the SHA-256 of its content in hex, and "" for others.

    Raises:
        UserError: the file cannot be read.
    """
    kind, _, place = name.partition(":")
    path = Path(place).expanduser()
    if kind == "sentencepiece" and place:
        return _load(path, _read_model).fingerprint
    if kind == "hf" and place and path.is_dir():
        return _digest([path / file for file in huggingface.FILES if (path / file).exists()])
    return ""


def _digest(paths: Iterable[Path]) -> str:
    parts = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Opens the tokenizer that was saved in a folder.

    Raises:
        UserError: there is none, or its file is damaged; names the file.
    """
    loaders: dict[str, Callable[[Path], Tokenizer]] = {
        MODEL_FILE: _read_model,
        huggingface.CONFIG_FILE: huggingface.load_huggingface,
        SYMBOLS_FILE: load_symbols,
    }
    for path, load in ((Path(folder) / file, load) for file, load in loaders.items()):
        if path.exists():
            return _load(path, load)
    raise UserError(f"{folder} holds no tokenizer: none of {', '.join(loaders)} is there.")


def _read_model(path: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(path.read_bytes())


def _load(path: Path, load: Callable[[Path], Tokenizer]) -> Tokenizer:
    try:
        return load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Tokenizer file {path} cannot be used: {error}") from error
