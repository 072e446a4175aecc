"""Blocks of every rule, against lists written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from lomdm_jax.data.packing import Packer, Rules, check_rules, make_rules, segments
from lomdm_jax.errors import UserError

NO_TOKENS = np.zeros(0, np.int64)
DOCUMENTS = [[11, 12, 13], [21], [], [41, 42, 43, 44, 45], [51, 52]]


def packed(rules, documents, chunks=1):
    """The blocks, what waits at the end, and what was dropped."""
    packer, blocks = Packer(rules, NO_TOKENS), []
    for part in np.array_split(np.arange(len(documents)), chunks):
        ids = [[*documents[i], *rules.separator] for i in part]
        lengths = np.array([len(text) for text in ids], np.int64)
        tokens = np.array([token for text in ids for token in text], np.int64)
        blocks += [block.tolist() for block in packer.add(tokens, lengths)]
    return blocks, packer.carry_N.tolist(), packer.dropped


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize(
    ("rules", "blocks", "carry", "dropped"),
    [
        (
            Rules("wrap", 4, separator=(9,)),
            [[11, 12, 13, 9], [21, 9, 9, 41], [42, 43, 44, 45], [9, 51, 52, 9]],
            [],
            0,
        ),
        (
            Rules("wrap", 5, separator=(9,), start=(7,), end=(8,)),
            [
                [7, 11, 12, 13, 8],
                [7, 9, 21, 9, 8],
                [7, 9, 41, 42, 8],
                [7, 43, 44, 45, 8],
                [7, 9, 51, 52, 8],
            ],
            [9],
            0,
        ),
        (Rules("wrap", 4), [[11, 12, 13, 21], [41, 42, 43, 44]], [45, 51, 52], 0),
        # Groups of two documents: what is left of each is dropped, of the last one it waits.
        (Rules("wrap", 3, group=2), [[11, 12, 13], [41, 42, 43]], [51, 52], 3),
        (Rules("wrap", 2, group=1), [[11, 12], [41, 42], [43, 44], [51, 52]], [], 3),
        (
            Rules("padded", 4, start=(7,), end=(8,)),
            [[7, 11, 12, 8], [7, 21, 8], [7, 8], [7, 41, 42, 8], [7, 51, 52, 8]],
            [],
            4,
        ),
        (Rules("padded", 3), [[11, 12, 13], [21], [41, 42, 43], [51, 52]], [], 2),
    ],
)
def test_blocks_are_those_of_the_rules_however_documents_come(
    rules, blocks, carry, dropped, chunks
):
    assert packed(rules, DOCUMENTS, chunks) == (blocks, carry, dropped)


def test_every_token_is_in_a_block_or_waits_or_is_dropped():
    rng = np.random.default_rng(0)
    documents = [rng.integers(100, size=size).tolist() for size in rng.integers(40, size=300)]
    flat = [token for text in documents for token in text]
    blocks, carry, _ = packed(Rules("wrap", 7), documents, 9)
    assert [token for block in blocks for token in block] + carry == flat
    blocks, carry, dropped = packed(Rules("wrap", 7, group=10), documents, 9)
    assert len(blocks) * 7 + len(carry) + dropped == len(flat)


def test_a_separator_belongs_to_the_document_that_it_ends():
    tokens = np.array([[1, 2, 9, 3, 9, 9, 4, 5], [9, 1, 1, 1, 1, 1, 1, 9]])
    expected = [[0, 0, 0, 1, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1]]
    found = segments(tokens, 9)
    assert found.dtype == np.int32 and found.tolist() == expected


def settings(**changes):
    known = {
        "packing": "wrap",
        "length": 8,
        "separator_id": "eos",
        "insert_separator": True,
        "insert_bos": False,
        "insert_eos": False,
        "group": 0,
    }
    return SimpleNamespace(**known | changes)


TOKENIZER = SimpleNamespace(eos_id=102, bos_id=101, mask_id=103, rows=200)


def test_rules_name_ids_of_the_tokenizer():
    assert make_rules(settings(), TOKENIZER) == Rules("wrap", 8, separator=(102,))
    marked = settings(insert_bos=True, insert_eos=True, separator_id="101", group=5)
    assert make_rules(marked, TOKENIZER) == Rules("wrap", 8, (101,), (101,), (101,), 5)
    plain = settings(insert_separator=False)
    assert make_rules(plain, TOKENIZER) == Rules("wrap", 8)
    padded = settings(packing="padded", insert_bos=True, insert_eos=True)
    assert make_rules(padded, TOKENIZER) == Rules("padded", 8, (), (101,), (102,))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packing": "tight"}, "data.packing is 'tight'; use one of wrap, documents, padded"),
        ({"separator_id": "[CLS]"}, r"data.separator_id is '\[CLS\]'; give an id"),
        ({"length": 1, "insert_bos": True}, "data.length is 1; a block needs at least one token"),
        ({"packing": "documents", "separator_id": "5"}, "data.packing is 'documents'"),
        ({"packing": "documents", "insert_eos": True}, "data.packing is 'documents'"),
        ({"packing": "padded", "group": 1000}, "data.group is 1000"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(changes, words):
    check_rules(settings())
    with pytest.raises(UserError, match=words):
        check_rules(settings(**changes))


@pytest.mark.parametrize("bad", ["103", "200"])
def test_a_separator_that_is_no_id_of_text_is_refused(bad):
    with pytest.raises(UserError, match=f"data.separator_id is {bad}; give an id below 200"):
        make_rules(settings(separator_id=bad), TOKENIZER)
