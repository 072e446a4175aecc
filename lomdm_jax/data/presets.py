"""The data sets of the papers, with every setting that their numbers depend on.

A preset says all of a recipe, also where it agrees with the defaults of lomdm_jax/config.py, for a
config file may have changed those. Files and lines are of kuleshov-group/mdlm and
kuleshov-group/bd3lms. Data sets that were loading scripts, which the package datasets no longer
runs, are read from the copies that the hub has made of them.
"""

import difflib
from typing import Any

from ml_collections import ConfigDict

from lomdm_jax.errors import UserError

_LM1B = "hf:billion-word-benchmark/lm1b@refs/convert/parquet"
_OPENWEBTEXT = "hf:Skylion007/openwebtext"
_PAPERS = "hf:armanc/scientific_papers@refs/convert/parquet"
_PTB = "hf:ptb-text-only/ptb_text_only@refs/convert/parquet"
_WIKITEXT = "hf:Salesforce/wikitext:wikitext"

# Documents joined and cut into blocks of GPT-2's ids, and nothing added.
_PLAIN: dict[str, Any] = {
    "source": "",
    "split": "",
    "valid_source": "",
    "valid_split": "",
    "column": "text",
    "unit": "auto",
    "streaming": False,
    "keep_empty": False,
    "detokenizer": "none",
    "tokenizer": "hf:gpt2",
    "vocab_size": 0,
    "length": 1024,
    "packing": "wrap",
    "insert_separator": False,
    "separator_id": "eos",
    "insert_bos": False,
    "insert_eos": False,
    "group": 0,
    "count_pads": False,
}
# An end of text after each document, blocks between two of them, 1,000 documents at a time, of
# which none is left out: mdlm dataloader.py:277-300, 419-428.
_MDLM = _PLAIN | {
    "keep_empty": True,
    "insert_separator": True,
    "insert_bos": True,
    "insert_eos": True,
    "group": 1000,
}
# LM1B in BERT's ids, validated on its test split: mdlm dataloader.py:554-555.
_SENTENCES = _MDLM | {
    "source": _LM1B,
    "split": "train",
    "valid_split": "test",
    "detokenizer": "lm1b",
    "tokenizer": "hf:bert-base-uncased",
    "length": 128,
}
# No end of text between documents, while blocks keep theirs: bd3lms
# scripts/zs_ppl/ppl_zs_owt_mdlm.sh. MDLM counts all positions; BD3-LM leaves out the first, which
# is objective.ignore_first.
_ZERO_SHOT = _MDLM | {"insert_separator": False}


def _recipe(base: dict[str, Any], ignore_first: bool = False, **data: Any) -> dict[str, Any]:
    return {"data": base | data, "objective": {"ignore_first": ignore_first}}


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # [CLS] sentence [SEP] and pads, which no number counts: mdlm configs/data/lm1b.yaml,
    # dataloader.py:431-437.
    "lm1b": _recipe(
        _SENTENCES,
        packing="padded",
        insert_separator=False,
        group=0,
    ),
    # [CLS] (101) after each sentence and at both ends of a block, for encode("[SEP]")[0] is [CLS]:
    # bd3lms configs/data/lm1b-wrap.yaml, dataloader.py:437-438, 459. The first id is given:
    # configs/algo/{mdlm,bd3lm}.yaml:8.
    "lm1b-packed": _recipe(
        _SENTENCES,
        ignore_first=True,
        separator_id="101",
    ),
    # mdlm configs/data/openwebtext-split.yaml, dataloader.py:344-355.
    "openwebtext": _recipe(
        _MDLM,
        source=_OPENWEBTEXT,
        split="train[:-100000]",
        valid_split="train[-100000:]",
    ),
    # Blocks without ends of their own: bd3lms scripts/train/train_owt_bd3lm.sh; ends of text are
    # kept: scripts/ppl/ppl_owt_bd3lm.sh. The first id is given: configs/algo/{mdlm,bd3lm}.yaml:8.
    "openwebtext-packed": _recipe(
        _MDLM,
        ignore_first=True,
        source=_OPENWEBTEXT,
        split="train[:-100000]",
        valid_split="train[-100000:]",
        insert_bos=False,
        insert_eos=False,
    ),
    # The file text8 in mattmahoney.net/dc/text8.zip: 90 million characters for training, 5 for
    # validation and 5 for the test of which numbers are published, valid_split = "[95:]"; blocks of
    # 256, as D3PM has them: mdlm dataloader.py:233-238, configs/data/text8.yaml.
    "text8": _recipe(
        _PLAIN,
        source="text8",
        split="[:90]",
        valid_split="[90:95]",
        unit="characters:1000000",
        tokenizer="text8",
        length=256,
    ),
    # A line is a document, blank ones too: mdlm configs/data/wikitext2.yaml, dataloader.py:322-331.
    "wikitext2": _recipe(
        _MDLM,
        source=f"{_WIKITEXT}-2-raw-v1",
        split="train",
        valid_split="validation",
        detokenizer="wikitext",
    ),
    "wikitext103": _recipe(
        _MDLM,
        source=f"{_WIKITEXT}-103-raw-v1",
        split="train",
        valid_split="validation",
        detokenizer="wikitext",
    ),
    # 10 billion tokens, of no paper here; one document in 1,000 to validate on is 10 million.
    "fineweb-edu": _recipe(
        _PLAIN,
        source="hf:HuggingFaceFW/fineweb-edu:sample-10BT",
        split="train",
        valid_share=0.001,
        streaming=True,
        insert_separator=True,
    ),
    # The seven sets on which models of OpenWebText are tried; splits: mdlm dataloader.py:554-557,
    # detokenizers: dataloader.py:385-396, columns: dataloader.py:409-414.
    "zero-shot-ptb": _recipe(
        _ZERO_SHOT,
        valid_source=_PTB,
        valid_split="validation",
        column="sentence",
        detokenizer="ptb",
    ),
    "zero-shot-wikitext": _recipe(
        _ZERO_SHOT,
        valid_source=f"{_WIKITEXT}-103-raw-v1",
        valid_split="validation",
        detokenizer="wikitext",
    ),
    "zero-shot-lm1b": _recipe(
        _ZERO_SHOT,
        valid_source=_LM1B,
        valid_split="test",
        detokenizer="lm1b",
    ),
    # The text of OpenAI's lambada_test.jsonl.
    "zero-shot-lambada": _recipe(
        _ZERO_SHOT,
        valid_source="hf:EleutherAI/lambada_openai:default",
        valid_split="test",
        detokenizer="lambada",
    ),
    "zero-shot-ag-news": _recipe(
        _ZERO_SHOT,
        valid_source="hf:fancyzhx/ag_news",
        valid_split="test",
    ),
    # Articles only, without abstracts.
    "zero-shot-pubmed": _recipe(
        _ZERO_SHOT,
        valid_source=f"{_PAPERS}:pubmed",
        valid_split="validation",
        column="article",
        detokenizer="scientific-papers",
    ),
    "zero-shot-arxiv": _recipe(
        _ZERO_SHOT,
        valid_source=f"{_PAPERS}:arxiv",
        valid_split="validation",
        column="article",
        detokenizer="scientific-papers",
    ),
}


def apply(config: ConfigDict, name: str) -> None:
    """Sets what the preset of this name says, in the sections `data` and `objective`.

    Raises:
        UserError: there is no such preset; names the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS) or sorted(PRESETS)
        raise UserError(
            f"--data is {name!r}: there is no such preset. Near it: {', '.join(near)}; "
            "lomdm_jax/data/presets.py has all of them."
        )
    for section, values in PRESETS[name].items():
        config[section].update(values)
