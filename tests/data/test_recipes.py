"""Every preset from end to end, on small data sets in the hub's form: the ids in the blocks are
those written out by hand from the recipe.

Ids of bert-base-uncased: the 1996, cat 4937, sat 2938, on 2006, mat 13523, yes 2748, he 2002,
said 2056, no 2053, "." 1012, "," 1010, [CLS] 101, [SEP] 102, [PAD] 0. Ids of GPT-2: "Hello" 15496,
" Hello" 18435, " world" 995, "The" 464, " cat" 3797, " sat" 3332, "." 13, " ." 764, "Yes" 5297,
"," 11, " said" 531, " 1" 352, " ?" 5633, line end 198, double quote 1, the end of a text 50256.
"""

import dataclasses
import itertools

import pytest

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

from lomdm_jax.config import default_config  # noqa: E402
from lomdm_jax.data.pipeline import valid_batches  # noqa: E402
from lomdm_jax.data.prepare import prepare  # noqa: E402
from lomdm_jax.data.presets import PRESETS, apply  # noqa: E402

CLS, SEP, END = 101, 102, 50256
SENTENCES = ["The cat sat on the mat .", "Yes , he said no ."]
CAT, YES = [1996, 4937, 2938, 2006, 1996, 13523, 1012], [2748, 1010, 2002, 2056, 2053, 1012]
HELLO, SAT = [15496, 995], [464, 3797, 3332, 13]


def as_hub(folder, column, **splits):
    """A data set of parquet files in the form that the hub has them, by split."""
    folder.mkdir()
    for split, texts in splits.items():
        # The other columns that such a set may have must not matter.
        table = pa.table({"id": list(range(len(texts))), column: texts})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.fixture
def make(shared_data, tmp_path):
    """The corpus of a preset on other documents, with some changes."""

    def build(name, length, splits, **changes):
        config = default_config()
        apply(config, name)
        data = config.data
        source = as_hub(tmp_path / "set", data.column, **splits)
        data.update({key: source for key in ("source", "valid_source") if data[key]})
        vocabulary = {"hf:gpt2": "gpt2", "hf:bert-base-uncased": "bert"}[data.tokenizer]
        data.tokenizer = f"hf:{shared_data / vocabulary}"
        data.directory, data.length = str(tmp_path / "prepared"), length
        data.update(changes)
        return prepare(data)

    return build


def blocks(prepared, split="valid"):
    """The ids of every block, without pads."""
    only = prepared.manifest | {"splits": {"valid": prepared.split(split)}}
    batches = valid_batches(dataclasses.replace(prepared, manifest=only), 1)
    return [batch["tokens"][batch["counted"]].tolist() for batch in batches]


def joined(rows):
    return list(itertools.chain.from_iterable(rows))


def test_lm1b_is_a_sentence_between_its_marks_and_pads(make):
    made = make("lm1b", 9, {"train": SENTENCES[::-1], "test": SENTENCES})
    (batch,) = valid_batches(made, 2)
    assert batch["tokens"].tolist() == [[CLS, *CAT, SEP], [CLS, *YES, SEP, 0]]
    assert batch["padding"].tolist() == [[False] * 9, [False] * 8 + [True]]
    assert (batch["counted"] == ~batch["padding"]).all()
    assert made.tokenizer.mask_id == 103 and made.tokenizer.rows == 30522


def test_a_long_sentence_of_lm1b_is_cut_before_its_last_mark(make):
    made = make("lm1b", 8, {"train": SENTENCES[::-1], "test": SENTENCES})
    assert blocks(made) == [[CLS, *CAT[:6], SEP], [CLS, *YES, SEP]]
    assert made.split("valid")["dropped"] == 1


def test_packed_lm1b_has_cls_for_every_mark(make):
    made = make("lm1b-packed", 8, {"train": SENTENCES[::-1], "test": SENTENCES})
    assert blocks(made) == [[CLS, *CAT[:6], CLS], [CLS, CAT[6], CLS, *YES[:4], CLS]]
    assert SEP not in joined(blocks(made))
    assert PRESETS["lm1b-packed"]["objective"] == {"ignore_first": True}
    assert blocks(made, "train") == [[CLS, *YES, CLS], [CLS, CLS, *CAT[:5], CLS]]


OPENWEBTEXT = {"train": ["Hello world", "The cat sat.", "Hello world"]}
LAST = {"split": "train[:-1]", "valid_split": "train[-1:]"}


def test_openwebtext_has_ends_of_text_everywhere(make):
    made = make("openwebtext", 5, OPENWEBTEXT, **LAST)
    assert blocks(made) == [[END, *HELLO, END, END]]
    assert blocks(made, "train") == [[END, *HELLO, END, END], [END, *SAT[:3], END]]
    assert made.split("train")["dropped"] == 2  # "." and an end
    assert PRESETS["openwebtext"]["data"]["split"] == "train[:-100000]"
    assert PRESETS["openwebtext"]["data"]["valid_split"] == "train[-100000:]"


def test_packed_openwebtext_has_none_around_blocks(make):
    made = make("openwebtext-packed", 4, OPENWEBTEXT, **LAST | {"valid_split": "train[-2:]"})
    assert blocks(made, "train") == [[*HELLO, END, SAT[0]], [*SAT[1:], END]]
    assert blocks(made) == [[*SAT], [END, *HELLO, END]]


def test_fineweb_is_streamed_and_held_out_by_content(make):
    texts = [f"Hello world number {number}" for number in range(200)]
    made = make("fineweb-edu", 8, {"train": texts}, valid_share=0.1)
    train, valid = (made.split(split) for split in ("train", "valid"))
    assert train["documents"] + valid["documents"] == 200 and 5 < valid["documents"] < 40
    assert blocks(made)[0][:2] == HELLO


def test_text8_is_one_stream_of_27_symbols(tmp_path):
    words = "the quick brown fox jumps over the lazy dog "
    text = (words * 30)[:1000]
    (tmp_path / "text8").write_text(text)
    config = default_config()
    apply(config, "text8")
    config.data.update(source=str(tmp_path / "text8"), directory=str(tmp_path), length=10)
    config.data.unit = "characters:10"
    made = prepare(config.data)
    ids = [" abcdefghijklmnopqrstuvwxyz".index(symbol) for symbol in text]
    assert joined(blocks(made)) == ids[900:950]
    assert joined(blocks(made, "train")) == ids[:900]
    assert made.tokenizer.byte_lengths[:27].tolist() == [1] * 27


@pytest.mark.parametrize(
    ("name", "split", "texts", "stream"),
    [
        # N is a number, <unk> unknown; no end of text between the two.
        (
            "zero-shot-ptb",
            "validation",
            ["The cat said N <unk>", "Hello world"],
            [464, 3797, 531, 352, 5633, *HELLO],
        ),
        # Lines are documents, blank ones too; " = " of titles stays, but " ," is tightened.
        (
            "zero-shot-wikitext",
            "validation",
            ["", "Yes , said Hello world", "The cat sat ."],
            [5297, 11, 531, 18435, 995, 464, 3797, 3332, 764],
        ),
        ("zero-shot-lm1b", "test", ["The cat sat .", "Hello world"], [*SAT, *HELLO]),
        # Curly quotes made straight, white space stripped, a line end in front.
        ("zero-shot-lambada", "test", ["“Hello world” "], [198, 1, *HELLO, 1]),
        ("zero-shot-ag-news", "test", ["The cat sat.", "Hello world"], [*SAT, *HELLO]),
        ("zero-shot-pubmed", "validation", ["The cat sat .", "Hello world"], [*SAT, *HELLO]),
        ("zero-shot-arxiv", "validation", ["The cat sat .", "Hello world"], [*SAT, *HELLO]),
    ],
)
def test_zero_shot_sets_have_no_ends_between_documents(make, name, split, texts, stream):
    length = 2 + 3
    made = make(name, length, {split: texts, "other": ["not this one"]})
    count = len(stream) // 3
    assert blocks(made) == [[END, *stream[3 * i : 3 * i + 3], END] for i in range(count)]
    entry = made.split("valid")
    assert (entry["tokens"], entry["dropped"]) == (len(stream), len(stream) % 3)
    assert list(made.manifest["splits"]) == ["valid"]
    assert entry["documents"] == len(texts)


def test_a_thousand_documents_are_cut_together(make):
    """The rest of each thousand is dropped, also of the last ones, which are fewer."""
    made = make("zero-shot-ag-news", 9, {"test": ["Hello world"] * 2500})
    entry = made.split("valid")
    assert (entry["documents"], entry["tokens"]) == (2500, 5000)
    assert entry["blocks"] == 2 * (2000 // 7) + 1000 // 7
    assert entry["dropped"] == 2 * (2000 % 7) + 1000 % 7


def test_wikitext_for_training_ends_every_line(make):
    splits = {"train": ["", "The cat sat ."], "validation": ["Hello world", ""]}
    made = make("wikitext2", 5, splits)
    assert blocks(made, "train") == [[END, END, 464, 3797, END], [END, 3332, 764, END, END]]
    assert blocks(made) == [[END, *HELLO, END, END]]
