"""Tokenizers without learnt pieces: one id for a character or a byte."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lomdm_jax.data.vocabulary import Vocabulary
from lomdm_jax.errors import UserError

SYMBOLS_FILE = "symbols.json"
_TEXT8 = " abcdefghijklmnopqrstuvwxyz"


class _Symbols(Vocabulary):
    """Ids that a short description determines, which is also what is saved."""

    def __init__(
        self, description: dict[str, str], texts: Sequence[bytes], *, eos_id: int, unk_id: int = -1
    ) -> None:
        self._description = json.dumps(description)
        fingerprint = hashlib.sha256(self._description.encode()).hexdigest()
        super().__init__(texts, fingerprint=fingerprint, eos_id=eos_id, unk_id=unk_id)

    def save(self, folder: str | Path) -> None:
        """Writes symbols.json into the folder."""
        (Path(folder) / SYMBOLS_FILE).write_text(self._description)


class CharacterTokenizer(_Symbols):
    """One id per character: 0 is eos, 1 is unk, and the alphabet follows from 2.

    A character outside the alphabet becomes unk, and is lost. unk counts as 0 bytes of text, so
    that bits per byte come out too high rather than too low.
    """

    def __init__(self, alphabet: str) -> None:
        """Takes the characters in the order of their ids, each once."""
        texts = [b"", b"", *(character.encode() for character in alphabet)]
        description = {"tokenizer": "characters", "alphabet": alphabet}
        super().__init__(description, texts, eos_id=0, unk_id=1)
        self._ids = {character: i for i, character in enumerate(alphabet, start=2)}

    def _encode(self, part: str) -> list[int]:
        return [self._ids.get(character, 1) for character in part]


class Text8Tokenizer(_Symbols):
    """The 27 symbols of text8: 0 is the space, 1 to 26 are a to z, and 27 is eos."""

    def __init__(self) -> None:
        texts = [*(symbol.encode() for symbol in _TEXT8), b""]
        super().__init__({"tokenizer": "text8"}, texts, eos_id=len(_TEXT8))
        self._ids = {symbol: i for i, symbol in enumerate(_TEXT8)}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of text8's symbols.

        Raises:
            UserError: another character; names it and its position, counted from 0.
        """
        if stranger := re.search("[^ a-z]", text):
            raise UserError(
                f"The character {stranger[0]!r} at position {stranger.start()} of a document is "
                "none of text8's, a to z and the space: prepare the text so, or choose "
                "data.tokenizer 'characters' or 'bytes'."
            )
        return super().encode(text)

    def _encode(self, part: str) -> list[int]:
        return [self._ids[symbol] for symbol in part]


class ByteTokenizer(_Symbols):
    """The bytes of UTF-8: ids 0 to 255, and 256 is eos."""

    def __init__(self) -> None:
        texts = [*(bytes([byte]) for byte in range(256)), b""]
        super().__init__({"tokenizer": "bytes"}, texts, eos_id=256)

    def _encode(self, part: str) -> list[int]:
        return list(part.encode())


def collect_characters(documents: Iterable[str]) -> CharacterTokenizer:
    """Returns the tokenizer of all characters of the documents, sorted by code point.

    Raises:
        UserError: no documents.
    """
    alphabet: set[str] = set()
    for text in documents:
        alphabet.update(text)
    if not alphabet:
        raise UserError(
            "data.tokenizer 'characters' needs a document to take them from; none came."
        )
    return CharacterTokenizer("".join(sorted(alphabet)))


def load_symbols(path: Path) -> _Symbols:
    """Reads a symbols.json.

    Raises:
        OSError, ValueError, KeyError, TypeError: the file is missing or says something else.
    """
    description = json.loads(path.read_text())
    makers = {"characters": CharacterTokenizer, "text8": Text8Tokenizer, "bytes": ByteTokenizer}
    return makers[description.pop("tokenizer")](**description)
