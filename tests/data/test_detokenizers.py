"""Detokenizers, and the presets that name them along with the rest of a recipe."""

from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from lomdm_jax.config import default_config
from lomdm_jax.data import sources
from lomdm_jax.data.detokenizers import DETOKENIZERS
from lomdm_jax.data.packing import check_rules, make_rules
from lomdm_jax.data.presets import PRESETS, apply
from lomdm_jax.data.sources import Source
from lomdm_jax.errors import UserError

# One case a rule, then those in which the order of the rules shows.
WIKITEXT = [
    ("the boys ' room", "the boys' room"),
    ("/' 5/ and /' x/", "/'[0-9]/ and /' x/"),
    ("well @-@ known 1 @,@ 000 and 2 @.@ 5", "well-known 1,000 and 2.5"),
    ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
    ("at the end .", "at the end ."),
    ("( a ) [ b c ] { d }", "(a) [b c] {d}"),
    ("(  a  ) ( )", "(a) ()"),
    ("( a ( b ) c )", "(a ( b) c )"),
    ('he said " yes " and " no "', 'he said "yes" and "no"'),
    ("he said ' yes '", "he said 'yes'"),
    ("= Title =", "= Title ="),
    (" = = Part = = ", " == Part == "),
    (" = = = Section = = = ", " === Section === "),
    (" = = = = Paragraph = = = = ", " ==== Paragraph ==== "),
    ("5 ° C", "5°C"),
    ("one \n two", "one\ntwo"),
    ("took N of N", "took 1 of N"),
    ("the dog 's tail", "the dog's tail"),
    # (pairs before " \n": the space inside stays a line's last one)
    ('" a \n b "', '"a\nb"'),
    # ("s '" before the quotes: no closing quote is left for the space after it)
    ("' it is the boys '", "'it is the boys'"),
    # (signs that share a space, which an earlier one leaves to a later one)
    ("a : ; . ! ? , b", "a:;.!?, b"),
    ("(a , )", "(a,)"),
    ("= = = = = x", "===== x"),
    ("5 ° \n C", "5°\nC"),
    ("one \n N two", "one\nN two"),
    ("took N 's", "took 1's"),
    ("N N N ", "N 1 N "),
]
PTB = [
    ("the dog 's tail", "the dog's tail"),
    ("the boys ' room", "the boys' room"),
    ("it does n't", "it doesn't"),
    ("one \n two", "one\ntwo"),
    ("and\\/or", "and/or"),
    ("took N of N", "took 1 of N"),
    (" N N N N N N N N N N N N N N N N N ", " 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 "),
    ("about $ N billion", "about $1 billion"),
    ("the # N bank", "the #1 bank"),
    ("$ 100 and # 12", "$100 and #12"),
    ("<unk> of <unk>", "? of ?"),
    # (" \n " before N: one at the end of a line has no space after it)
    ("up N \n N down", "up N\nN down"),
    # (" 's" before "s ' ")
    ("boys 's ' x", "boys's' x"),
    ("boys ' 's", "boys ''s"),
    ("boys ' n't", "boys'n't"),
    ("one \n n't", "one \nn't"),
]
LM1B = [
    ("see http : / / a.b / c", "see http://a.b/c"),
    ("see https : / / a.b", "see https://a.b"),
    ("the dog 's tail", "the dog's tail"),
    ("it ended . Then it began .", "it ended. Then it began."),
    ("an end ) . Then", "an end ) . Then"),
    ("why ? Because . Why ?", "why? Because. Why?"),
    ("oh ! Oh !", "oh! Oh!"),
    ("a , b : c ; d / e", "a, b: c; d/e"),
    ('he said " yes , no "', 'he said "yes, no"'),
    ("he said ' yes '", "he said 'yes'"),
    ("( a ) [ b ]", "(a) [b]"),
    ("( a ( b ) c )", "( a (b) c )"),
    ("$ 5 and £ 6", "$5 and £6"),
    ("an end .\n", "an end.\n"),
    ("why ?\n", "why?\n"),
    # (the addresses before " : " and " / ")
    ("http : / / : / ", "http://:/"),
    # (" 's" before the quotes: an apostrophe at a word is no quote)
    ("' a 'b '", "' a'b '"),
    ("x a . 's", "x a .'s"),
    # (a word needs a space before it, which the one before may have used up)
    ("a . b . c . d", "a . b. c . d"),
    # (signs that share a space, which an earlier one leaves to a later one)
    ("a ? ! , : ; / b", "a?!,:;/b"),
    ("a ? ?", "a??"),
    ("a ! ?", "a !?"),
    ("a ! !", "a!!"),
    ("a , !", "a ,!"),
    ('" a / "', '" a/"'),
    ("[ a$ ]", "[a$]"),
]
LAMBADA = [
    ("“yes,” he said, “no”", '\n"yes," he said, "no"'),
    ("  \n a b \t\n", "\na b"),
    ("‘a’ 's , .", "\n‘a’ 's , ."),
]
PAPERS = [
    ("the boys ' ( @xmath0 ) , and $ 5 .", "the boys' (@xmath0), and $5."),
    ("ratio 1 / 2 \n of 5 @-@ 6 N cases ?", "ratio 1/2\nof 5-6 1 cases?"),
    # (WikiText's rules first: N has no space after it once a full stop has come up to it)
    ("it took N .", "it took 1."),
    ("what , !", "what,!"),
    ("( 's ) x . y", "('s) x. y"),
]
CASES = {
    "none": [("a  b \n 's <unk> ", "a  b \n 's <unk> ")],
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific-papers": PAPERS,
}


def test_all_are_tried():
    assert CASES.keys() == DETOKENIZERS.keys()


@pytest.mark.parametrize(
    ("name", "text", "expected"), [(name, *case) for name in CASES for case in CASES[name]]
)
def test_a_detokenizer_follows_its_rules_in_their_order(name, text, expected):
    assert DETOKENIZERS[name](text) == expected


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_no_text_becomes_none_but_lambada_s_line_end(name):
    assert DETOKENIZERS[name]("") == ("\n" if name == "lambada" else "")


# Presets

TOKENIZERS = {"hf:gpt2": (50256, 50256), "hf:bert-base-uncased": (101, 102), "text8": (0, 0)}


@pytest.fixture(params=PRESETS)
def name(request):
    return request.param


@pytest.fixture
def config(name):
    config = default_config()
    apply(config, name)
    return config


def rules(data):
    bos, eos = TOKENIZERS[data.tokenizer]
    check_rules(data)
    return make_rules(data, SimpleNamespace(bos_id=bos, eos_id=eos, rows=50258, mask_id=103))


def test_a_preset_sets_known_keys_to_values_of_their_type(name):
    assert PRESETS[name].keys() == {"data", "objective"}
    for section, values in PRESETS[name].items():
        defaults = default_config()[section]
        assert {key: type(value) for key, value in values.items()} == {
            key: type(defaults[key]) for key in values
        }


def test_a_preset_says_all_of_its_recipe(name):
    chosen = set(default_config().data)
    chosen -= {"valid_share", "skip_bad", "mixture", "workers", "directory"}
    assert PRESETS[name]["data"].keys() - {"valid_share"} == chosen
    assert PRESETS[name]["objective"].keys() == {"ignore_first"}


def test_apply_sets_what_a_preset_says_whatever_was_there(name):
    blank = {int: 7, bool: True, str: "x", float: 0.7}
    config = ConfigDict(
        {
            section: {key: blank[type(value)] for key, value in values.items()}
            for section, values in PRESETS[name].items()
        }
    )
    apply(config, name)
    assert config.to_dict() == PRESETS[name]


def test_the_choices_of_a_preset_exist(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_require", lambda *package: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text8").write_text("a")
    data = config.data
    assert data.detokenizer in DETOKENIZERS
    assert data.tokenizer in TOKENIZERS
    assert data.source or data.valid_source
    for source, split in ((data.source, data.split), (data.valid_source, data.valid_split)):
        if source:
            options = {"unit": data.unit, "streaming": data.streaming}
            Source(source, split=split, **options).check("data.source")


def test_a_preset_has_a_valid_split_of_its_own_or_a_share(name, config):
    assert bool(config.data.valid_split) != (name == "fineweb-edu")
    assert bool(config.data.source) != name.startswith("zero-shot-")


ENDS = {
    # name: first and last id of a block, ids after a document, ids of documents in a block, group
    "lm1b": ((101,), (102,), (), 126, 0),
    "lm1b-packed": ((101,), (101,), (101,), 126, 1000),
    "openwebtext": ((50256,), (50256,), (50256,), 1022, 1000),
    "openwebtext-packed": ((), (), (50256,), 1024, 1000),
    "text8": ((), (), (), 256, 0),
    "fineweb-edu": ((), (), (50256,), 1024, 0),
    "wikitext2": ((50256,), (50256,), (50256,), 1022, 1000),
    "wikitext103": ((50256,), (50256,), (50256,), 1022, 1000),
    "zero-shot": ((50256,), (50256,), (), 1022, 1000),
}


def test_blocks_begin_and_end_as_in_the_papers(name, config):
    made = rules(config.data)
    kind = "zero-shot" if name.startswith("zero-shot") else name
    assert (made.start, made.end, made.separator, made.body, made.group) == ENDS[kind]
    assert made.packing == ("padded" if name == "lm1b" else "wrap")
    assert config.objective.ignore_first == name.endswith("-packed")


def test_the_seven_zero_shot_sets_are_there():
    found = {name.removeprefix("zero-shot-") for name in PRESETS if name.startswith("zero-shot-")}
    assert found == {"ptb", "wikitext", "lm1b", "lambada", "ag-news", "pubmed", "arxiv"}


def test_an_unknown_preset_has_near_names():
    with pytest.raises(UserError, match=r"--data is 'openwebtxt': .* Near it: openwebtext"):
        apply(default_config(), "openwebtxt")
    with pytest.raises(UserError, match=r"Near it: fineweb-edu, lm1b, .*zero-shot-wikitext;"):
        apply(default_config(), "?")
