"""What each tokenizer does to a text: ids known from elsewhere, nothing lost that need not be."""

import io
import itertools
import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import sentencepiece

from lomdm_jax.data import tokenizers
from lomdm_jax.data.tokenizers import (
    SentencePieceTokenizer,
    check_tokenizer,
    identity,
    load_tokenizer,
    make_tokenizer,
    needs_text,
    train_sentencepiece,
)
from lomdm_jax.data.vocabulary import split_text
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
    "<|endoftext|>[CLS] a [SEP]<mask>[MASK] [PAD]",
]
TRAINED = ["sentencepiece-bpe", "sentencepiece-unigram"]
EXACT = [*TRAINED, "characters", "bytes", "gpt2"]


@pytest.fixture(scope="module", params=TRAINED)
def trained(request, build):
    return build(request.param)


@pytest.fixture(scope="module", params=EXACT)
def exact(request, build):
    return build(request.param)


@pytest.fixture(scope="module", params=[*EXACT, "text8", "bert"])
def tokenizer(request, build):
    return build(request.param)


@pytest.fixture(scope="module")
def gpt2(build):
    return build("gpt2")


@pytest.fixture(scope="module")
def bert(build):
    return build("bert")


@pytest.fixture(scope="module")
def build(request, documents):
    """Makes a tokenizer once; "gpt2" and "bert" are those of the shared data."""
    made = {}

    def build(kind):
        if kind not in made:
            name, size = kind, 512 if kind in TRAINED else 0
            if kind in ("gpt2", "bert"):
                name = hugging(request.getfixturevalue("shared_data") / kind)
            made[kind] = make_tokenizer(name, size, lambda: [*documents, *ODD_TEXTS])
        return made[kind]

    return build


def hugging(folder):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    return f"hf:{folder}"


def nothing():
    raise AssertionError("this tokenizer needs no documents")


# Every tokenizer


def test_ids_are_in_range_and_never_special(tokenizer):
    texts = ["a plain text"] if tokenizer.vocab_size == 28 else ODD_TEXTS
    special = {getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "bos", "pad")}
    ids = {token for text in texts for token in tokenizer.encode(text)}
    assert not ids & special and ids <= set(range(tokenizer.vocab_size))
    assert special <= set(range(tokenizer.rows))
    assert tokenizer.rows == max(tokenizer.vocab_size, tokenizer.mask_id + 1)


def test_a_saved_or_pickled_tokenizer_is_the_same(tokenizer, tmp_path):
    text = "a plain text"
    if tokenizer.vocab_size != 28:
        text += " ".join(ODD_TEXTS)
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint and len(copy.fingerprint) == 64
        assert copy.encode(text) == tokenizer.encode(text)
        assert (copy.eos_id, copy.bos_id) == (tokenizer.eos_id, tokenizer.bos_id)
        assert (copy.pad_id, copy.mask_id) == (tokenizer.pad_id, tokenizer.mask_id)


def test_every_tokenizer_has_its_own_fingerprint(build):
    kinds = [*TRAINED, "characters", "bytes", "text8"]
    assert len({build(kind).fingerprint for kind in kinds}) == len(kinds)


def test_decode_and_pieces_take_any_ids(tokenizer):
    everything = np.arange(tokenizer.rows)[::-1]
    assert isinstance(tokenizer.decode(everything), str)
    assert len(tokenizer.pieces(everything)) == tokenizer.rows
    assert tokenizer.pieces([tokenizer.mask_id, tokenizer.eos_id]) == ["\u25a2", "\u23ce"]
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == ""
    assert tokenizer.decode([tokenizer.mask_id]).strip() == "\u25a2"


def test_an_id_out_of_range_is_refused(tokenizer):
    for token in (-1, tokenizer.rows):
        with pytest.raises(UserError, match=f"Token id {token} is outside 0..{tokenizer.rows - 1}"):
            tokenizer.decode([token])
        with pytest.raises(UserError, match=f"Token id {token} "):
            tokenizer.pieces([token])


def test_half_a_surrogate_pair_is_refused(exact):
    with pytest.raises(UserError, match=r"'\\ud800' at position 2"):
        exact.encode("ab\ud800")


# Those that keep the text


def test_every_text_comes_back_and_its_bytes_add_up(exact, documents):
    for text in [*documents, *ODD_TEXTS]:
        ids = exact.encode(text)
        assert exact.decode(ids) == text
        assert exact.byte_lengths[ids].sum() == len(text.encode())


def test_special_ids_stand_for_no_bytes(exact):
    assert exact.byte_lengths.dtype == np.int32 and exact.byte_lengths.shape == (exact.rows,)
    assert exact.byte_lengths[[exact.eos_id, exact.mask_id]].tolist() == [0, 0]
    assert not exact.byte_lengths.flags.writeable


@pytest.mark.parametrize("kind", ["bytes", "gpt2", *TRAINED])
def test_bytes_that_are_no_character_alone_are_shown_as_bytes(build, kind):
    tokenizer = build(kind)
    ids = tokenizer.encode("\U0010ffff")
    assert "".join(tokenizer.pieces(ids)) == "<0xF4><0x8F><0xBF><0xBF>"
    assert tokenizer.decode([ids[0], tokenizer.mask_id]) == "\ufffd\u25a2"


# Trained here


def test_ids_of_the_special_tokens_of_a_trained_one(trained):
    assert trained.vocab_size == trained.mask_id == 512 and trained.rows == 513
    assert trained.eos_id == trained.bos_id == trained.pad_id == 1
    assert (trained.byte_lengths == 0).sum() == 3  # unk, eos and mask


def test_pieces_show_each_token(trained):
    ids = [*trained.encode("the\n  end \u4f60"), trained.eos_id, trained.mask_id]
    pieces = trained.pieces(ids)
    assert pieces[-5:] == ["<0xE4>", "<0xBD>", "<0xA0>", "\u23ce", "\u25a2"]
    assert "".join(pieces[:-5]) == "the\n  end "


def test_training_twice_gives_the_same_model_in_silence(documents, capfd):
    some = documents[:150]  # a second's worth
    first, second = (train_sentencepiece(some, 400, "unigram") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert train_sentencepiece(some, 401, "unigram").fingerprint != first.fingerprint
    assert capfd.readouterr() == ("", "")


def test_of_a_large_corpus_every_nth_document_is_learnt_from(documents, monkeypatch):
    characters = sum(map(len, documents))
    monkeypatch.setattr(tokenizers, "_SAMPLE", characters * 2 // 7)  # so every fourth
    calls = []

    def fresh():
        calls.append(1)
        return iter(documents)

    made = make_tokenizer("sentencepiece-bpe", 400, fresh)
    assert made.fingerprint == train_sentencepiece(documents[::4], 400, "bpe").fingerprint
    assert len(calls) == 2


def test_a_document_longer_than_sentencepiece_takes_by_default_is_learnt_from(documents):
    long = " ".join(documents)
    assert len(long) > 4192  # SentencePiece's own limit, in bytes
    assert train_sentencepiece([long], 512, "bpe").vocab_size == 512


@pytest.mark.parametrize("vocab_size", [0, 299, 50_000])
def test_a_vocabulary_that_does_not_fit_is_refused(documents, vocab_size):
    with pytest.raises(UserError, match=f"data.vocab_size {vocab_size} "):
        make_tokenizer("sentencepiece-bpe", vocab_size, lambda: documents)
    if vocab_size < 300:
        with pytest.raises(UserError, match=f"data.vocab_size {vocab_size} "):
            check_tokenizer("sentencepiece-bpe", vocab_size)


@pytest.mark.parametrize("name", TRAINED)
def test_no_documents_are_refused(name):
    with pytest.raises(UserError, match="on 0 documents"):
        make_tokenizer(name, 512, list)
    with pytest.raises(UserError, match="'characters' needs a document"):
        make_tokenizer("characters", 0, list)


# SentencePiece models of others


def foreign(folder, **options):
    """The path of a model trained as others do, with SentencePiece's own defaults."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog and a cat"] * 20),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 40, **options},
    )
    path = folder / "foreign.model"
    path.write_bytes(model.getvalue())
    return path


def test_a_foreign_model_keeps_its_special_ids_but_not_the_text(tmp_path):
    path = foreign(tmp_path, pad_id=3, control_symbols=["<mask>"])
    tokenizer = make_tokenizer(f"sentencepiece:{path}", 0, nothing)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.mask_id == 4 and tokenizer.rows == tokenizer.vocab_size
    assert tokenizer.byte_lengths is None
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode("the  cat ") == processor.encode("the cat")
    assert tokenizer.decode(tokenizer.encode("the  cat ")) == "the cat"
    assert tokenizer.decode([4, *processor.encode("dog")]) == "\u25a2 dog"


def test_a_model_without_eos_gets_an_extra_one(tmp_path):
    path = foreign(tmp_path, eos_id=-1, bos_id=-1)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    tokenizer = make_tokenizer(f"sentencepiece:{path}", pieces + 1, nothing)
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.pad_id == pieces
    assert tokenizer.vocab_size == tokenizer.mask_id == pieces + 1
    assert tokenizer.pieces([pieces, pieces + 1]) == ["\u23ce", "\u25a2"]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).eos_id == pieces


EXACTLY = dict(
    vocab_size=300,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    byte_fallback=True,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ],
)
def test_byte_lengths_are_there_only_if_nothing_of_a_text_is_lost(tmp_path, change):
    path = foreign(tmp_path, **{**EXACTLY, **change})
    tokenizer = make_tokenizer(f"sentencepiece:{path}", 0, nothing)
    assert (tokenizer.byte_lengths is not None) == (change == {})
    text = "  the  \uff21cat e\u0301 \u4f60 "
    assert (tokenizer.decode(tokenizer.encode(text)) == text) == (
        change in ({}, {"add_dummy_prefix": True})
    )


# Characters and bytes


def test_text8_counts_from_the_space():
    tokenizer = make_tokenizer("text8", 28, nothing)
    assert tokenizer.encode(" abz") == [0, 1, 2, 26]
    assert tokenizer.decode([8, 5, 12, 12, 15, 0, 23]) == "hello w"
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.rows) == (27, 28, 29)
    assert tokenizer.byte_lengths.tolist() == [1] * 27 + [0, 0]


def test_a_real_text8_comes_back(shared_data):
    text = (shared_data / "text8" / "text8_first3M.txt").read_text()[:100_000]
    tokenizer = make_tokenizer("text8", 0, nothing)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("character", ["A", "\n", "1", "\u00e9"])
def test_a_character_that_text8_lacks_is_named_with_its_position(character):
    tokenizer = make_tokenizer("text8", 0, nothing)
    with pytest.raises(UserError, match="position 1500000 of a document") as error:
        tokenizer.encode("a" * 1_500_000 + character + "b" * 600_000)
    assert repr(character) in str(error.value)


def test_the_alphabet_is_sorted_and_a_stranger_is_unknown():
    tokenizer = make_tokenizer("characters", 5, lambda: ["ba", "\u00e9b"])
    assert tokenizer.encode("ab\u00e9") == [2, 3, 4]
    assert tokenizer.encode("axb") == [2, 1, 3]
    assert tokenizer.decode([2, 1, 3]) == "a\ufffdb"
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.mask_id) == (0, 5, 5)
    assert tokenizer.byte_lengths.tolist() == [0, 0, 1, 1, 2, 0]


def test_bytes_are_their_own_ids():
    tokenizer = make_tokenizer("bytes", 257, nothing)
    assert tokenizer.encode("A\u00e9") == [65, 195, 169]
    assert (tokenizer.eos_id, tokenizer.mask_id) == (256, 257)


# Hugging Face


def test_gpt2_gives_the_ids_known_from_elsewhere(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.vocab_size == gpt2.mask_id == 50257 and gpt2.rows == 50258
    assert gpt2.eos_id == gpt2.bos_id == gpt2.pad_id == 50256
    assert gpt2.pieces([15496, 995]) == ["Hello", " world"]
    assert gpt2.byte_lengths[[15496, 995]].tolist() == [5, 6]


def test_gpt2_counts_tiny_shakespeare(gpt2, shared_data):
    text = (shared_data / "shakespeare" / "tinyshakespeare.txt").read_text()
    assert len(gpt2.encode(text)) == 338_025


def test_bert_gives_the_ids_known_from_elsewhere(bert):
    assert bert.encode("hello world") == bert.encode("H\u00e9llo  W\u00f6rld\n") == [7592, 2088]
    assert (bert.bos_id, bert.eos_id, bert.mask_id, bert.pad_id) == (101, 102, 103, 0)
    assert bert.vocab_size == bert.rows == 30522 and bert.byte_lengths is None
    assert bert.encode("\u2603") == [100]  # [UNK]


def test_bert_puts_pieces_together(bert):
    ids = bert.encode("Tokenizers work.")
    assert bert.pieces(ids) == [" token", "izer", "s", " work", "."]
    masked = [101, *ids[:3], 103, ids[-1], 102, 0, 0]
    assert bert.decode(masked) == "tokenizers \u25a2."
    assert bert.decode([7592, 100]) == "hello \ufffd"


def test_a_cased_bert_keeps_its_case(bert, shared_data, tmp_path):
    shutil.copy(shared_data / "bert" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = make_tokenizer(hugging(tmp_path), 0, nothing)
    assert cased.encode("hello") == [7592] and cased.encode("Hello") == [100]


def test_the_text_of_a_special_token_is_text(gpt2, bert):
    assert gpt2.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert bert.encode("[SEP]") == bert.encode("[ sep ]") == [1031, 19802, 1033]


@pytest.fixture
def saved_gpt2(gpt2, tmp_path):
    """A folder with GPT-2 in one file, as the hub has it, and a function that changes that file."""
    gpt2.save(tmp_path)
    (tmp_path / "special_ids.json").unlink()

    def change(**entries):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
        return make_tokenizer(hugging(tmp_path), 0, nothing)

    return tmp_path, change


def added(token, number, special=True):
    spaces = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, "special": special, **spaces}


def test_a_file_that_adds_special_tokens_or_cuts_texts_does_neither(gpt2, saved_gpt2):
    _, change = saved_gpt2
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = change(added_tokens=[added("<|endoftext|>", 50256)], truncation=cut)
    text = "<|endoftext|> is an ordinary text here, and not cut after four"
    assert tokenizer.encode(text) == gpt2.encode(text)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == gpt2.encode(text)
    assert tokenizer.eos_id == 50256 and tokenizer.byte_lengths is not None


def test_special_tokens_are_those_that_the_folder_names(saved_gpt2):
    folder, change = saved_gpt2
    tokens = [added("<end>", 50257), added("<start>", 50258), added("    ", 50259, special=False)]
    (folder / "tokenizer_config.json").write_text('{"eos_token": "!", "bos_token": "<start>"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}}')
    tokenizer = change(added_tokens=tokens)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (50257, 50258, 50257)
    assert tokenizer.vocab_size == tokenizer.mask_id == 50260
    assert tokenizer.byte_lengths[50257:].tolist() == [0, 0, 4, 0]
    assert tokenizer.decode(tokenizer.encode("a    <end>")) == "a    <end>"


@pytest.mark.parametrize(
    "entries",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    ],
)
def test_a_byte_level_tokenizer_that_changes_the_text_has_no_byte_lengths(saved_gpt2, entries):
    tokenizer = saved_gpt2[1](**entries)
    assert tokenizer.byte_lengths is None
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def unigram(folder):
    """A tokenizer whose pieces hold its special tokens, as those made from SentencePiece do."""
    package = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    letters = [(letter, -3.0) for letter in "\u2581ab</>smk"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<mask>", 0.0), *letters]
    tokenizer = package.Tokenizer(package.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = package.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = package.decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens(["</s>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_special_tokens_among_the_pieces_are_not_given_for_their_text(tmp_path):
    unigram(tmp_path)
    tokenizer = make_tokenizer(hugging(tmp_path), 0, nothing)
    assert (tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (1, 2, 1)
    text = "a</s> <mask></s>b"
    ids = tokenizer.encode(text)
    assert not {1, 2} & set(ids) and tokenizer.decode(ids) == text
    assert tokenizer.pieces([3, 4, 0]) == [" ", "a", "\ufffd"]


def test_a_tokenizer_without_an_end_of_document_is_refused(saved_gpt2):
    folder, change = saved_gpt2
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<other>"))
    with pytest.raises(UserError, match="no token ends a document; name one, eos_token"):
        change()


def test_what_hugging_face_cannot_give_is_said_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    # A name of three parts is none of the hub's, which is found without asking it.
    for name in (hugging(tmp_path), "hf:no/such/folder"):
        with pytest.raises(UserError, match=f"'{name}' cannot be used(.|\n)*a local folder"):
            make_tokenizer(name, 0, nothing)
    check_tokenizer("hf:no/such/folder", 0)  # the hub is not asked before it must be
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        check_tokenizer(f"hf:{tmp_path}", 0)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        check_tokenizer(f"hf:{tmp_path}", 0)


# Long texts


def test_parts_join_to_the_text_and_start_where_words_do():
    text = "one two  three\n four \u3000 five" * 50
    for limit in (17, 30, 100):
        parts = list(split_text(text, limit))
        assert "".join(parts) == text and max(map(len, parts)) <= limit
        for left, right in itertools.pairwise(parts):
            assert right[0] == " " and not left[-1].isspace()
    assert list(split_text("", 3)) == [""] and list(split_text("abc", 3)) == ["abc"]
    assert list(split_text("abc def", 3)) == ["abc", " de", "f"]
    assert list(split_text("abcdefgh", 3)) == ["abc", "def", "gh"]
    assert list(split_text(" " * 7, 3)) == ["   ", "   ", " "]


def test_parts_of_a_text_have_the_ids_of_the_whole(tokenizer, documents):
    text = "\n\n".join([*documents[:40], *ODD_TEXTS])
    if tokenizer.vocab_size == 28:
        text = "".join(symbol for symbol in text if symbol in " abcdefghij")
    parts = list(split_text(text, 300))
    assert len(parts) > len(text) / 300
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_a_long_text_is_encoded_in_parts(monkeypatch):
    tokenizer = make_tokenizer("bytes", 0, nothing)
    sizes = []
    monkeypatch.setattr(tokenizer, "_encode", lambda part: sizes.append(len(part)) or [1])
    assert tokenizer.encode("long " * 500_000) == [1, 1, 1]
    assert sizes == [999_999, 1_000_000, 500_001]


# Names, sizes, files


@pytest.mark.parametrize("name", ["words", "sentencepiece", "sentencepiece:", "hf", "hf:", ""])
def test_unknown_names_are_refused(name):
    for use in (lambda: check_tokenizer(name, 0), lambda: make_tokenizer(name, 0, nothing)):
        with pytest.raises(UserError, match=f"{name!r}; known tokenizers: sentencepiece-bpe, "):
            use()


@pytest.mark.parametrize("name", ["bytes", "text8", "characters"])
def test_a_size_that_is_not_the_tokenizers_own_is_refused(name):
    own = make_tokenizer(name, 0, lambda: ["abc"]).vocab_size
    assert make_tokenizer(name, own, lambda: ["abc"]).vocab_size == own
    with pytest.raises(UserError, match=f"data.vocab_size is 512, but .* has {own} ids"):
        make_tokenizer(name, 512, lambda: ["abc"])


def test_a_size_is_checked_before_the_documents_are_read():
    check_tokenizer("characters", 0)
    check_tokenizer("text8", 28)
    with pytest.raises(UserError, match=r"data.vocab_size is 512, but .* has 257 ids"):
        check_tokenizer("bytes", 512)


def test_the_names_that_need_text():
    names = [*TRAINED, "characters", "text8", "bytes", "hf:gpt2", "sentencepiece:x.model"]
    assert [name for name in names if needs_text(name)] == [*TRAINED, "characters"]


def test_identity_is_the_content_of_files(tmp_path):
    path = foreign(tmp_path)
    same = path.rename(tmp_path / "other.model")
    first = identity(f"sentencepiece:{same}")
    assert first == SentencePieceTokenizer(same.read_bytes()).fingerprint
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    before = identity(f"hf:{tmp_path}")
    (tmp_path / "weights.bin").write_text("not the tokenizer's")
    assert identity(f"hf:{tmp_path}") == before and len(before) == 64
    (tmp_path / "special_tokens_map.json").write_text("{}")
    assert identity(f"hf:{tmp_path}") != before
    for name in ("bytes", "text8", "characters", "sentencepiece-bpe", "hf:gpt2"):
        assert identity(name) == ""


def test_a_model_file_that_is_none_is_named(tmp_path):
    (tmp_path / "junk").write_bytes(b"not a model")
    for use in (lambda name: check_tokenizer(name, 0), identity):
        for file in ("junk", "absent"):
            with pytest.raises(UserError, match=f"{file} cannot be used"):
                use(f"sentencepiece:{tmp_path / file}")


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json", "symbols.json"])
@pytest.mark.parametrize("content", ["junk", "{}", "[]", '{"tokenizer": "none"}', '{"a": 1}'])
def test_a_damaged_saved_tokenizer_is_named(tmp_path, file, content):
    (tmp_path / "special_ids.json").write_text(content)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=f"{file} cannot be used"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"none of tokenizer.model, tokenizer.json, symbols.json"):
        load_tokenizer(tmp_path)
