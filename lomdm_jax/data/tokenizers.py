"""Text to token ids and back, without loss."""

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

from lomdm_jax.errors import UserError

_SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
_MASK_TEXT = "\u25a2"
_EOS_TEXT = "\u23ce"
_UNKNOWN_TEXT = "\ufffd"
# 256 byte pieces, unk and eos come before any learnt piece; below this hardly any would be left.
_SMALLEST_VOCAB = 300
_CHARACTERS = 4_000_000  # of the text a tokenizer is trained on


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback, plus one mask id after its vocabulary.

    Attributes:
        vocab_size: number of ids the model itself has (unk, eos, 256 bytes, learnt pieces).
        mask_id: the extra id, equal to vocab_size; encode never gives it.
        eos_id: the id that ends a document; encode never gives it.
        byte_lengths: int32 [vocab_size + 1], UTF-8 bytes of original text each id stands for;
            0 for unk, eos and mask, 1 for a byte piece. Read-only.
        fingerprint: SHA-256 of the model, in hex.
    """

    def __init__(self, model: bytes) -> None:
        """Reads a serialized SentencePiece model.

        Raises:
            UserError: the bytes are no SentencePiece model with byte fallback and an eos.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"Not a readable SentencePiece model ({len(model)} bytes).") from error
        self._model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.mask_id: int = self.vocab_size
        self.eos_id: int = self._processor.eos_id()
        self.fingerprint: str = hashlib.sha256(model).hexdigest()
        self._space_ids = [self._byte_id(byte) for byte in _SPACE.encode()]
        if self.eos_id < 0 or not all(map(self._processor.is_byte, self._space_ids)):
            raise UserError("This SentencePiece model lacks an eos or byte pieces; train one here.")
        original = [self._original_bytes(i) for i in range(self.mask_id)]
        self.byte_lengths = np.array([*map(len, original), 0], dtype=np.int32)
        self.byte_lengths.flags.writeable = False
        original[self._processor.unk_id()] = _UNKNOWN_TEXT.encode()
        self._shown_bytes = [*original, _MASK_TEXT.encode()]

    def _byte_id(self, byte: int) -> int:
        return self._processor.piece_to_id(f"<0x{byte:02X}>")

    def _original_bytes(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # the two hex digits of "<0xE2>"
        return piece.replace(_SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; decode gives exactly the text back.

        SentencePiece would read a literal U+2581 as a space, so that one is spelt in bytes.
        """
        ids: list[int] = []
        for i, part in enumerate(text.split(_SPACE)):
            ids += self._space_ids if i else []
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids in 0..mask_id: mask shows as U+25A2, eos as nothing.

        Bytes that are no UTF-8, and unk, show as U+FFFD.

        Raises:
            UserError: an id is outside 0..mask_id.
        """
        shown = b"".join(self._shown_bytes[i] for i in self._checked(ids))
        return shown.decode(errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns each id's own display text: a byte piece as "<0xE2>", eos as U+23CE.

        Raises:
            UserError: an id is outside 0..mask_id.
        """
        return [self._display(i) for i in self._checked(ids)]

    def _display(self, token: int) -> str:
        if token == self.eos_id:
            return _EOS_TEXT
        if token != self.mask_id and self._processor.is_byte(token):
            return self._processor.id_to_piece(token)
        return self._shown_bytes[token].decode()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i <= self.mask_id:
                raise UserError(f"Token id {i} is outside 0..{self.mask_id} of this tokenizer.")
        return checked

    def save(self, path: str | Path) -> None:
        """Writes the model to a file that `load` and SentencePiece's own tools read."""
        Path(path).write_bytes(self._model)

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Reads a model file.

        Raises:
            UserError: the file is missing or holds no fitting model; names the file.
        """
        try:
            return cls(Path(path).read_bytes())
        except (OSError, UserError) as error:
            raise UserError(f"Tokenizer file {path} cannot be used: {error}") from error


def train_sentencepiece(
    documents: Sequence[str], vocab_size: int, model_type: str = "unigram"
) -> SentencePieceTokenizer:
    """Trains a lossless tokenizer in memory; the same documents give the same model, bit for bit.

    Args:
        documents: the training texts.
        vocab_size: number of ids in all: unk, eos, 256 bytes and the learnt pieces.
        model_type: "unigram" or "bpe".

    Raises:
        UserError: no documents, or vocab_size is too small or too large for them.
    """
    if not documents or vocab_size < _SMALLEST_VOCAB:
        raise UserError(
            f"Cannot train a tokenizer with data.vocab_size {vocab_size} on {len(documents)} "
            f"documents; give at least {_SMALLEST_VOCAB} (256 go to bytes) and one document."
        )
    try:
        return SentencePieceTokenizer(_train_model(documents, vocab_size, model_type))
    except RuntimeError as error:
        raise UserError(
            f"data.vocab_size {vocab_size} does not fit these {len(documents)} documents; "
            f"choose another size. SentencePiece says: {error}"
        ) from error


def _train_model(documents: Sequence[str], vocab_size: int, model_type: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        # Nothing of the text may be lost: no normalisation, no space added or taken away, and
        # bytes for every character without a piece.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,  # runs of spaces (indentation) as single pieces
        character_coverage=0.9995,  # the rarest characters go to bytes, not to pieces of their own
        unk_id=0,
        eos_id=1,
        bos_id=-1,  # no begin-of-sentence and no padding id
        pad_id=-1,
        # In bytes; longer documents would be left out of training.
        max_sentence_length=1 + max(len(document.encode()) for document in documents),
        num_threads=1,  # the number of threads changes rounding, and so the model
        minloglevel=2,  # errors only
    )
    return model.getvalue()


TOKENIZERS: dict[str, Callable[[Sequence[str], int], SentencePieceTokenizer]] = {
    "sentencepiece-bpe": partial(train_sentencepiece, model_type="bpe"),
    "sentencepiece-unigram": partial(train_sentencepiece, model_type="unigram"),
}


def train_tokenizer(name: str, documents: Sequence[str], vocab_size: int) -> SentencePieceTokenizer:
    """Trains the named tokenizer (a key of TOKENIZERS).

    Of a large corpus it reads every n-th document, as many as hold about 4 million characters:
    more change few pieces and take minutes.

    Raises:
        UserError: no tokenizer has this name, or vocab_size does not fit the documents.
    """
    if name not in TOKENIZERS:
        known = ", ".join(sorted(TOKENIZERS))
        raise UserError(f"data.tokenizer is {name!r}; known tokenizers: {known}.")
    every = -(-sum(map(len, documents)) // _CHARACTERS) or 1
    return TOKENIZERS[name](documents[::every], vocab_size)
