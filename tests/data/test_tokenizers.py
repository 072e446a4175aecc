"""The tokenizer loses nothing, says how long its pieces are, and is the same every time."""

import hashlib

import numpy as np
import pytest

from lomdm_jax.data.tokenizers import (
    TOKENIZERS,
    SentencePieceTokenizer,
    train_sentencepiece,
    train_tokenizer,
)
from lomdm_jax.errors import UserError

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "tab\there\r\nand \x00\x01\x7f control",
    "\n\n\n   \n",
    "a literal \u2581\u2581 space mark, and \u2585",
    "e\u0301 is not \u00e9; \ufeffmark; full\uff21width; \u2047",
    "\U0001f469\u200d\U0001f469\u200d\U0001f466 \U0001f1e9\U0001f1ea \u4f60\u597d \U0010ffff",
    "</s><unk><0x0A> written out",
]


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request, documents):
    return train_tokenizer(request.param, documents, 512)


def test_every_text_comes_back_and_its_bytes_add_up(tokenizer, documents):
    for text in [*documents, *ODD_TEXTS]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
        assert tokenizer.eos_id not in ids and tokenizer.mask_id not in ids


def test_ids_and_lengths_of_the_special_tokens(tokenizer):
    assert tokenizer.vocab_size == tokenizer.mask_id == 512
    assert tokenizer.byte_lengths.dtype == np.int32 and len(tokenizer.byte_lengths) == 513
    assert tokenizer.byte_lengths[[tokenizer.eos_id, tokenizer.mask_id]].tolist() == [0, 0]
    assert (tokenizer.byte_lengths == 0).sum() == 3  # unk, eos and mask


def test_decode_and_pieces_take_any_ids(tokenizer):
    assert tokenizer.decode([tokenizer.mask_id]) == "\u25a2"
    first_byte = tokenizer.encode("\u4f60")[0]
    assert tokenizer.decode([first_byte, tokenizer.mask_id]) == "\ufffd\u25a2"
    everything = list(range(tokenizer.mask_id + 1))
    assert isinstance(tokenizer.decode(np.array(everything[::-1])), str)
    assert len(tokenizer.pieces(everything)) == len(everything)


def test_pieces_show_each_token(tokenizer):
    ids = [*tokenizer.encode("the\n  end \u4f60"), tokenizer.eos_id, tokenizer.mask_id]
    pieces = tokenizer.pieces(ids)
    assert pieces[-5:] == ["<0xE4>", "<0xBD>", "<0xA0>", "\u23ce", "\u25a2"]
    assert "".join(pieces[:-5]) == "the\n  end "


@pytest.mark.parametrize("token", [-1, 513])
def test_an_id_out_of_range_is_refused(tokenizer, token):
    with pytest.raises(UserError, match=f"Token id {token} is outside 0..512"):
        tokenizer.decode([token])


def test_training_twice_gives_the_same_model_in_silence(documents, tmp_path, capfd):
    first, second = (train_sentencepiece(documents, 400, "unigram") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert train_sentencepiece(documents, 401, "unigram").fingerprint != first.fingerprint
    assert capfd.readouterr() == ("", "")
    first.save(tmp_path / "model")
    loaded = SentencePieceTokenizer.load(tmp_path / "model")
    assert loaded.fingerprint == hashlib.sha256((tmp_path / "model").read_bytes()).hexdigest()
    assert loaded.encode(documents[0]) == first.encode(documents[0])


def test_a_document_longer_than_sentencepiece_takes_by_default_is_learnt_from(documents):
    long = " ".join(documents)
    assert len(long) > 4192  # SentencePiece's own limit, in bytes
    assert train_sentencepiece([long], 512, "bpe").vocab_size == 512


@pytest.mark.parametrize("vocab_size", [0, 299, 50_000])
def test_a_vocabulary_that_does_not_fit_is_refused(documents, vocab_size):
    with pytest.raises(UserError, match=f"data.vocab_size {vocab_size} "):
        train_sentencepiece(documents, vocab_size, "bpe")


def test_no_documents_and_unknown_names_are_refused(documents):
    with pytest.raises(UserError, match="on 0 documents"):
        train_sentencepiece([], 512)
    with pytest.raises(UserError, match="'words'; known tokenizers: sentencepiece-bpe, "):
        train_tokenizer("words", documents, 512)


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "junk").write_bytes(b"not a model")
    for name in ("junk", "absent"):
        with pytest.raises(UserError, match=f"{name} cannot be used"):
            SentencePieceTokenizer.load(tmp_path / name)
