"""SentencePiece models: trained here without loss, or made by others."""

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from lomdm_jax.data.vocabulary import WELL_KNOWN, Vocabulary
from lomdm_jax.errors import UserError

MODEL_FILE = "tokenizer.model"
_SPACE = "\u2581"  # SentencePiece writes a space inside a piece as this character
# 256 byte pieces, unk and eos come before any learnt piece; below this hardly any would be left.
_SMALLEST_VOCAB = 300


class SentencePieceTokenizer(Vocabulary):
    """A SentencePiece model, with an extra mask id after its vocabulary unless it has one.

    Special ids are those the model declares, or its control pieces of well-known names ([SEP],
    <mask>). A model without any eos gets an extra one after its pieces, which counts as an id of
    the tokenizer: eos_id = vocab_size - 1.

    A model keeps the text exactly if it neither normalises nor adds a space and has a piece for
    every byte, as those trained here. Of others byte_lengths is None, and decode may differ from
    the encoded text; if they add a space in front of a text, it does so once more in each part of
    one of over a million characters.
    """

    def __init__(self, model: bytes) -> None:
        """Reads a serialized SentencePiece model.

        Raises:
            UserError: the bytes are no SentencePiece model.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"Not a readable SentencePiece model ({len(model)} bytes).") from error
        self._model = model
        # Some models set a space before every text, which belongs to no text that is decoded.
        self._prefix = " " if self._processor.normalize("a").startswith(_SPACE) else ""
        self._byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        special = self._special_ids()
        extra = [b""] * (special["eos_id"] == self._processor.vocab_size())
        super().__init__(
            [*map(self._text, range(self._processor.vocab_size())), *extra],
            fingerprint=hashlib.sha256(model).hexdigest(),
            lossless=self._keeps_text(),
            **special,
        )

    def _special_ids(self) -> dict[str, int]:
        special = {role: self._control_id(names) for role, names in WELL_KNOWN.items()}
        for role in ("eos_id", "bos_id", "pad_id", "unk_id"):
            declared = getattr(self._processor, role)()
            special[role] = declared if declared >= 0 else special[role]
        if special["eos_id"] < 0:
            special["eos_id"] = self._processor.vocab_size()
        return special

    def _control_id(self, names: Sequence[str]) -> int:
        """The first of these that is a control piece, which no text gives; -1 if none is."""
        ids = map(self._processor.piece_to_id, names)
        return next((i for i in ids if self._processor.is_control(i)), -1)

    def _text(self, token: int) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # the two hex digits of "<0xE2>"
        return piece.replace(_SPACE, " ").encode()

    def _keeps_text(self) -> bool:
        """Whether every character passes, and spaces in front, behind and in a row."""
        codes = np.r_[:0xD800, 0xE000:0x110000].astype("<u4")  # all but surrogates
        text = f"  {codes.tobytes().decode('utf-32-le')}  e\u0301 "
        normal = self._processor.normalize(text)
        return normal == text.replace(" ", _SPACE) and all(
            map(self._processor.is_byte, self._byte_ids)
        )

    def _encode(self, part: str) -> list[int]:
        """SentencePiece would read a literal U+2581 as a space, so that one is spelt in bytes."""
        if self.byte_lengths is None:
            return self._processor.encode(part)
        ids: list[int] = []
        for i, text in enumerate(part.split(_SPACE)):
            ids += [self._byte_ids[byte] for byte in _SPACE.encode()] if i else []
            ids += self._processor.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """As for every tokenizer, without the space that a model sets before each text."""
        return super().decode(ids).removeprefix(self._prefix)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.model into the folder, which SentencePiece's own tools read."""
        (Path(folder) / MODEL_FILE).write_bytes(self._model)


def check_vocab_size(vocab_size: int) -> None:
    """Raises the UserError of a size that is too small to train a tokenizer of."""
    if vocab_size < _SMALLEST_VOCAB:
        raise UserError(
            f"data.vocab_size {vocab_size} is too small to train a tokenizer; give at least "
            f"{_SMALLEST_VOCAB} (256 go to bytes)."
        )


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
    check_vocab_size(vocab_size)
    if not documents:
        raise UserError("Cannot train a tokenizer on 0 documents; give at least one.")
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
