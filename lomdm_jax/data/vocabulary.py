"""What all tokenizers share: special ids, what each id shows, and long texts in parts."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lomdm_jax.errors import UserError

# Names that special tokens go by, the first one found counts.
WELL_KNOWN = {
    "eos_id": ("<|endoftext|>", "[SEP]", "</s>"),
    "bos_id": ("[CLS]", "<s>", "<|endoftext|>"),
    "pad_id": ("[PAD]", "<pad>"),
    "mask_id": ("[MASK]", "<mask>"),
    "unk_id": ("[UNK]", "<unk>"),
}
MASK_TEXT = "\u25a2"
UNKNOWN_TEXT = "\ufffd"
_EOS_TEXT = "\u23ce"
# Encoders need tens of bytes per character of the text they are given at once.
_PART = 1_000_000  # characters


class Vocabulary:
    """The ids of a tokenizer, each with its text; a tokenizer adds `_encode` and `save`.

    Attributes:
        vocab_size: number of ids of the tokenizer itself.
        mask_id: its own mask id, or vocab_size.
        rows: rows of a table of tokens, max(vocab_size, mask_id + 1).
        eos_id, bos_id, pad_id: end and start of a document, and filling of a block; the latter two
            equal eos_id where the tokenizer has none.
        byte_lengths: int32 [rows], UTF-8 bytes of original text each id stands for, 0 for a
            special id and for unk. None where ids do not tell. Read-only.
        fingerprint: SHA-256, in hex, of all that the ids depend on.
    """

    def __init__(
        self,
        texts: Sequence[bytes],
        *,
        fingerprint: str,
        eos_id: int,
        bos_id: int = -1,
        pad_id: int = -1,
        mask_id: int = -1,
        unk_id: int = -1,
        lossless: bool = True,
    ) -> None:
        """Takes the text of every id, empty for special ones and unk; -1 is an id that is not
        there, and `lossless` says that the texts of encoded ids, joined, are the original."""
        self.vocab_size = len(texts)
        self.mask_id = mask_id if mask_id >= 0 else self.vocab_size
        self.rows = max(self.vocab_size, self.mask_id + 1)
        self.eos_id = eos_id
        self.bos_id = bos_id if bos_id >= 0 else eos_id
        self.pad_id = pad_id if pad_id >= 0 else eos_id
        self.fingerprint = fingerprint
        shown = [*texts, b""][: self.rows]
        self.byte_lengths: np.ndarray | None = _lengths(shown) if lossless else None
        shown[self.mask_id] = MASK_TEXT.encode()
        if unk_id >= 0:
            shown[unk_id] = UNKNOWN_TEXT.encode()
        self._shown = shown

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, never a special one; a long text is encoded in parts.

        Raises:
            UserError: the text has what this tokenizer has no ids for, or is no Unicode text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"A text has {text[error.start]!r} at position {error.start}, half of a character "
                "without its other half: give text that was read as UTF-8."
            ) from error
        return [token for part in split_text(text) for token in self._encode(part)]

    def _encode(self, part: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids in 0..rows-1: mask shows as U+25A2, other special ids as nothing.

        Bytes that are no UTF-8, and unk, show as U+FFFD.

        Raises:
            UserError: an id is outside 0..rows-1.
        """
        return b"".join(self._shown[i] for i in self._checked(ids)).decode(errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns each id's own display text: eos as U+23CE, a byte that is no UTF-8 as "<0xE2>".

        Raises:
            UserError: an id is outside 0..rows-1.
        """
        return [
            _EOS_TEXT if i == self.eos_id else self._shown[i].decode(errors=_BYTE_NAMES)
            for i in self._checked(ids)
        ]

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.rows:
                raise UserError(f"Token id {i} is outside 0..{self.rows - 1} of this tokenizer.")
        return checked


def _lengths(texts: Sequence[bytes]) -> np.ndarray:
    lengths_V = np.array([*map(len, texts)], dtype=np.int32)
    lengths_V.flags.writeable = False
    return lengths_V


def _byte_names(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


_BYTE_NAMES = "lomdm_byte_names"
codecs.register_error(_BYTE_NAMES, _byte_names)


def split_text(text: str, limit: int = _PART) -> Iterator[str]:
    """Yields the parts of a text, each of at most `limit` characters, that join to the text.

    It is cut before a run of spaces that follows no other white space, as late as possible: a place
    where tokenizers part words anyway, so that the ids of the parts are those of the whole. Where
    there is no such place it is cut at the limit.
    """
    start = 0
    while len(text) - start > limit:
        end = _cut(text, start, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _cut(text: str, start: int, end: int) -> int:
    cut = text.rfind(" ", start + 1, end + 1)
    while cut >= 0 and text[cut - 1].isspace():
        cut = text.rfind(" ", start + 1, cut)
    return cut if cut >= 0 else end
