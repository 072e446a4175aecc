"""Exports: names both ways, what each file says, the card's own commands, and what is kept safe."""

import ast
import functools
import json
import os
import pathlib
import re
import shutil
import stat
import sys

import jax
import numpy as np
import pytest
import safetensors
import tokenizers

from lomdm_jax.config import default_config, validate
from lomdm_jax.data.huggingface import HuggingFaceTokenizer
from lomdm_jax.data.sentence_piece import train_sentencepiece
from lomdm_jax.data.tokenizers import make_tokenizer
from lomdm_jax.distributed import multihost
from lomdm_jax.errors import UserError
from lomdm_jax.interop import exporting, files
from lomdm_jax.main import main
from lomdm_jax.trained import load, save
from lomdm_jax.training.checkpoint import Checkpoints, by_name, model_facts
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import init_state

ORDERS = (
    *("mdm", "cosine", "ar", "permutation:3", "block:4", "block:4 ranked", "genmd4", "lomdm"),
    *("walk", "lomdm-order", "lomdm-ranked"),
)
TEXT = "The order in which a text is written is part of what is learned. " * 20
TOKENIZERS = ("bytes", "characters", "text8", "hf", "sentencepiece-bpe")


def tokenizer_of(kind):
    if kind == "hf":
        return byte_level()
    if kind == "sentencepiece-bpe":
        return train_sentencepiece([TEXT + str(i) for i in range(40)], 300, "bpe")
    return make_tokenizer(kind, 0, lambda: [TEXT])


def byte_level():
    """A tokenizer like GPT-2's, without merges: 256 bytes, and an end of text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = {"eos_id": 256, "bos_id": 256, "pad_id": -1, "mask_id": -1, "unk_id": -1}
    return HuggingFaceTokenizer(made.to_str(), special)


def config_of(order, tokenizer="bytes", length=8):
    config = default_config()
    config.order.name, *ranked = order.split()
    config.objective.name = "order"
    config.model.update(width=16, layers=1, heads=2, cond_dim=8, head_layers=1)
    config.model.layout = "ranked" if ranked else "own"
    config.data.update(length=length, tokenizer=tokenizer, vocab_size=0)
    config.train.random_steps = 1 if "walk" in order or "lomdm-" in order else 0
    config.mesh.data = 1
    return config


def random_params(config, rows):
    """Far from where they start; nothing to compile."""
    rng = np.random.default_rng(0)
    shapes = exporting.parameter_shapes(config, rows)
    return jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape).astype(a.dtype), shapes)


@functools.cache
def params_of(order):
    return random_params(config_of(order), 20)


def make_run(folder, config, tokenizer=None, *, steps=(3,), evaluation=None):
    """A run's folder as training leaves it, with a checkpoint of each of these steps."""
    tokenizer = tokenizer or tokenizer_of(config.data.tokenizer)
    folder.mkdir(exist_ok=True)
    save(folder, config, tokenizer)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    checkpoints = Checkpoints(folder / "checkpoints", len(steps), create=True)
    params = random_params(config, tokenizer.rows)
    for step in steps:
        ema = jax.tree.map(lambda a, step=step: a + 0.01 * step, params)
        state = init_state(params, make_optimizer(config.optimizer))
        state = state.replace(ema=ema, step=np.int32(step))
        facts = model_facts(config, tokenizer) | {"data": [["abc" * 20, 1.0]]}
        checkpoints.save(jax.tree.map(jax.numpy.asarray, state), {"position": 1}, facts)
    checkpoints.close()
    return folder


def evaluation_of(length=8):
    """What --job evaluate writes."""
    bound = {"nats_per_token": 2.5, "standard_error": 0.01, "draw_error": None, "perplexity": 12.0}
    bound |= {"perplexity_standard_error": 0.1, "bits_per_byte": None}
    found = {f"{name}_{key}": v for name in ("nelbo", "nelbo_order") for key, v in bound.items()}
    passport = {"source": "stdlib", "split": "valid", "length": length, "sha256": "f" * 64}
    passport["uncounted_tokens"] = {"padding": 3, "given": 0}
    counts = {"sequences": 4, "tokens": 29, "draws": 2, "estimator": "order"}
    return found | counts | {"data": passport}


def exported(run, *options):
    """The folder that --job export makes of a run."""
    assert main(["--workdir", str(run), "--job", "export", *options]) == 0
    return run / "export"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(arguments, capsys):
    """The one-paragraph message of a command that must fail."""
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    return message


# Names


def test_names_and_shapes_are_mdlms():
    """Written out for one block; kernels [in, out] become weights [out, in]."""
    config = config_of("mdm")
    block, out = "backbone.blocks.0.", "backbone.output_layer."
    assert exporting.shapes(config, 258) == {
        "backbone.vocab_embed.embedding": (258, 16),
        "backbone.sigma_map.mlp.0.weight": (8, 256),
        "backbone.sigma_map.mlp.0.bias": (8,),
        "backbone.sigma_map.mlp.2.weight": (8, 8),
        "backbone.sigma_map.mlp.2.bias": (8,),
        f"{block}norm1.weight": (16,),
        f"{block}attn_qkv.weight": (48, 16),
        f"{block}attn_out.weight": (16, 16),
        f"{block}norm2.weight": (16,),
        f"{block}mlp.0.weight": (64, 16),
        f"{block}mlp.0.bias": (64,),
        f"{block}mlp.2.weight": (16, 64),
        f"{block}mlp.2.bias": (16,),
        f"{block}adaLN_modulation.weight": (96, 8),
        f"{block}adaLN_modulation.bias": (96,),
        f"{out}norm_final.weight": (16,),
        f"{out}linear.weight": (258, 16),
        f"{out}linear.bias": (258,),
        f"{out}adaLN_modulation.weight": (32, 8),
        f"{out}adaLN_modulation.bias": (32,),
    }


@pytest.mark.parametrize("order", ORDERS)
def test_names_go_both_ways_for_every_array(order):
    """And lie in memory as they are named."""
    params = params_of(order)
    found = exporting.tensors(params)
    assert {name: a.shape for name, a in found.items()} == exporting.shapes(config_of(order), 20)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in found.values())
    back = exporting.parameters(found)
    assert back.keys() == by_name(params).keys()
    for name, a in by_name(params).items():
        np.testing.assert_array_equal(back[name], a)
    assert exporting.tensors(by_name(params)).keys() == found.keys()


def test_every_rule_is_needed_and_what_has_none_is_an_error():
    used = set()
    for order in ORDERS:
        for name in by_name(params_of(order)):
            *module, last = name.split("/")
            rules = [
                rule
                for rule in exporting.RULES
                if last == rule.ours and re.search(f"(^|/)({rule.module})$", "/".join(module))
            ]
            assert len(rules) == 1, name
            used.add(rules[0])
    assert used == set(exporting.RULES)
    with pytest.raises(KeyError, match="no rule"):
        exporting.tensors({"backbone": {"surprise": np.zeros(1)}})
    with pytest.raises(KeyError, match="no rule"):
        exporting.parameters({"backbone.norm1.kernel": np.zeros(1)})


# Files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of lomdm with two checkpoints and an evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = config_of("lomdm", "hf")
    config.data.source = "stdlib"
    return make_run(folder, config, byte_level(), steps=(3, 7), evaluation=evaluation_of())


def test_an_export_has_the_average_of_the_chosen_step_and_all_files(run, capsys):
    folder = exported(run)
    assert {path.name for path in folder.iterdir()} == {
        *("model.safetensors", "config.json", "README.md", "evaluation.json", "modeling_lomdm.py"),
        *("tokenizer.json", "special_ids.json", "tokenizer_config.json"),
    }
    printed = capsys.readouterr().out
    assert f"exported step 7 to {folder}" in printed
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        kernel = file.get_tensor("backbone.blocks.0.attn_qkv.weight")
    expected = by_name(random_params(config_of("lomdm"), 258))
    np.testing.assert_allclose(
        kernel, expected["backbone/blocks/0/attn_qkv/kernel"].T + 0.07, rtol=1e-5
    )
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (folder / "config.json").stat().st_mode
    )
    known = json.loads((folder / "config.json").read_text())
    assert known["lomdm_jax"]["step"] == 7 and known["vocab_size"] == 258
    assert (known["mask_id"], known["eos_id"], known["pad_id"]) == (257, 256, 256)
    assert known["order"] == {"name": "lomdm", "c1": 0.7, "c2": 0.65, "exponent": 1.0}
    assert known["layout"] == "full" and known["scores"] == "position" and not known["walks"]
    assert known["lomdm_jax"]["facts"] == {
        "vocab_size": 257,
        "tokenizer": byte_level().fingerprint,
        "data": [["abc" * 20, 1.0]],
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of mdm, which is the quickest."""
    return make_run(tmp_path_factory.mktemp("runs") / "plain", config_of("mdm"))


def test_an_older_step_takes_no_evaluation_that_may_be_of_another(run, capsys):
    folder = exported(run, "--config.checkpoint.restore=3")
    assert "evaluation.json may be of another step than 3" in capsys.readouterr().out
    assert not (folder / "evaluation.json").exists()
    assert json.loads((folder / "config.json").read_text())["lomdm_jax"]["step"] == 3
    assert "How well it does" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("order", "layout", "groups", "one_pass"),
    [
        ("mdm", "full", None, "state"),
        ("ar", "causal", [0, 1, 2, 3, 4, 5, 6, 7], "groups"),
        ("block:4", "ranked", [0, 0, 0, 0, 1, 1, 1, 1], "groups"),
        ("block:4 ranked", "ranked", [0, 0, 0, 0, 1, 1, 1, 1], "order"),
        ("lomdm-ranked", "ranked", None, "order"),
    ],
)
def test_config_json_holds_what_the_network_is_made_with(order, layout, groups, one_pass):
    config, tokenizer = config_of(order), make_tokenizer("bytes", 0, tuple)
    known = exporting.settings(exporting.Exported(config, tokenizer, {}, 0, {}))
    known = json.loads(json.dumps(known))
    assert (known["layout"], known["groups"], known["one_pass"]) == (layout, groups, one_pass)


def test_config_json_is_json_and_gives_the_config_back():
    """JSON has no infinity: sample.dependence is one by default."""

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    config = config_of("mdm")
    config.sample.prompt = "inf"  # a text remains one
    facts = model_facts(config, make_tokenizer("bytes", 0, tuple)) | {"sample.threshold": 0.5}
    exported = exporting.Exported(config, make_tokenizer("bytes", 0, tuple), {}, 0, facts)
    text = json.dumps(exporting.settings(exported))
    origin = json.loads(text, parse_constant=no_constant)["lomdm_jax"]
    assert exporting.restored(origin["config"]) == config.to_dict()
    assert exporting.restored({"sample.dependence": "inf"}) == {"sample.dependence": float("inf")}
    assert set(origin["facts"]) == {"vocab_size", "tokenizer", "sample.threshold"}


def test_the_classes_for_transformers_are_in_the_modelling_file():
    source = pathlib.Path(exporting.__file__).with_name(exporting.MODELING).read_text()
    classes = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}
    assert {name.removeprefix("modeling_lomdm.") for name in exporting.AUTO_MAP.values()} <= classes


# PyTorch


@pytest.fixture
def in_folder(monkeypatch):
    """Go into a folder as the card asks; its modelling file is imported anew."""
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.set_num_threads(1)  # so little work is done sooner by one

    def go(folder):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "modeling_lomdm", raising=False)

    yield go
    sys.modules.pop("modeling_lomdm", None)


@pytest.mark.parametrize(
    "order", ["lomdm", "permutation:3", "block:4", "block:4 ranked", "genmd4", "lomdm-ranked"]
)
def test_pytorch_reads_an_export_and_gives_the_same_logits(order, tmp_path, in_folder):
    folder = exported(make_run(tmp_path / "run", config_of(order)))
    in_folder(folder)
    import torch
    from modeling_lomdm import load as load_torch

    trained, network = load(tmp_path / "run"), load_torch(folder)
    rng = np.random.default_rng(1)
    x_BL = rng.integers(0, 256, (2, 8))
    z_BL = np.where(rng.random((2, 8)) < 0.5, trained.tokenizer.mask_id, x_BL)
    rank_BL = rng.permuted(np.tile(np.arange(8), (2, 1)), axis=1)
    whole = trained.generator.one_pass == "order"
    extra = {"context_BL": x_BL, "rank_BL": rank_BL} if whole else {"context_BL": x_BL}
    denoise = jax.jit(lambda params, z, extra: trained.generator.module(params).denoise(z, **extra))
    expected = denoise(trained.params, z_BL, extra)[0].logits
    with torch.no_grad():
        found, _ = network.denoise(
            torch.tensor(z_BL), **{name: torch.tensor(a) for name, a in extra.items()}
        )
    mask = trained.tokenizer.mask_id  # which counts nowhere, and of ours is -inf
    found, expected = (np.delete(np.asarray(a), mask, -1) for a in (found, expected))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize(
    ("kind", "order"),
    [*zip(TOKENIZERS, ("lomdm", "ar", "block:4", "mdm", "lomdm-ranked"), strict=True)],
)
def test_the_commands_of_the_card_run(kind, order, tmp_path, in_folder, capsys):
    """In PyTorch and through transformers, from the folder, with text and back."""
    pytest.importorskip("transformers", reason="needs transformers")
    config = config_of(order, kind, length=16)
    config.objective.ignore_first = order == "mdm"
    folder = exported(make_run(tmp_path / "run", config, tokenizer_of(kind)))
    in_folder(folder)
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2 + (kind == "hf")
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (
        names["texts"].shape == (2, 16)
        and not (names["texts"] == names["model"].settings.mask_id).any()
    )
    sample, prompt = names["decode"](names["texts"][0].tolist()), names["prompt"].tolist()
    assert sample.startswith("the" if kind == "text8" else "The")
    assert prompt == tokenizer_of(kind).encode("the" if kind == "text8" else "The")
    assert names["logits"].isneginf().sum() == 2 * 16
    assert ("targets[:, 0] = False" in card) == (order == "mdm")


def test_transformers_gives_the_tokenizers_ids(run, in_folder):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    found = transformers.AutoTokenizer.from_pretrained(exported(run))
    assert found("The é", add_special_tokens=False).input_ids == byte_level().encode("The é")
    assert (found.mask_token_id, found.eos_token_id, found.pad_token_id) == (257, 256, 256)
    assert len(found) == 258


# The card


def test_the_card_says_what_is_known(run):
    card = (exported(run) / "README.md").read_text()
    for words in (
        *("| order | `lomdm`: as learned from the context", "c1 = 0.7, c2 = 0.65"),
        *("258 rows with the mask token, 257", f"SHA-256 {byte_level().fingerprint[:12]}"),
        *("`stdlib`", "abcabcabcabc (weight 1)", "| 7 of 512 sequences |"),
        *("| `nelbo_order` | 2.5000 ± 0.0100 | 12.00 ± 0.10 | not known |", "29 tokens, 2 draws"),
        *("Apache License 2.0", "--job import"),
    ):
        assert words in card, words
    assert str(run) not in card and "run/" not in card, "nothing of where it was made"


def test_an_evaluation_of_little_or_long_ago_is_shown_as_far_as_it_goes(tmp_path):
    """One sequence has no standard error, and an older report no passport."""
    found = evaluation_of() | {"nelbo_standard_error": None, "nelbo_order_nats_per_token": None}
    del found["data"]
    folder = exported(make_run(tmp_path / "run", config_of("mdm"), evaluation=found))
    card = (folder / "README.md").read_text()
    assert "| `nelbo` | 2.5000 | 12.00 ± 0.10 | not known |" in card
    assert "| `nelbo_order` | not known |" in card


def test_a_local_tokenizer_is_named_without_its_folder(tmp_path):
    config = config_of("mdm", f"hf:{tmp_path}/secret/mine")
    config.train.start_from = f"{tmp_path}/secret/first"
    folder = exported(make_run(tmp_path / "run", config, byte_level()))
    card = (folder / "README.md").read_text()
    assert "`hf:mine`" in card and "another run, `first`" in card and "secret" not in card


# Safety


def test_nothing_but_an_earlier_export_is_overwritten(plain, tmp_path, capsys):
    command = [
        "--workdir",
        str(plain),
        "--job",
        "export",
        f"--config.export.folder={tmp_path / 'e'}",
    ]
    assert main(command) == 0
    first = content(tmp_path / "e")
    (tmp_path / "e" / "model.safetensors").write_bytes(b"old")
    assert main(command) == 0 and content(tmp_path / "e") == first
    (tmp_path / "e" / "notes.txt").write_text("mine")
    capsys.readouterr()
    message = refused(command, capsys)
    assert "config.export.folder" in message and "notes.txt" in message
    (tmp_path / "e" / "notes.txt").unlink()
    (tmp_path / "e" / "config.json").write_text('{"model_type": "bert"}')
    assert "no config.json of an export" in refused(command, capsys)
    shutil.rmtree(tmp_path / "e")
    (tmp_path / "e").write_text("a file")
    assert "is a file" in refused(command, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e"], "nothing is left beside"
    workdir = ["--workdir", str(plain), "--job", "export", f"--config.export.folder={plain}"]
    assert "which is not empty" in refused(workdir, capsys)


def test_an_export_that_is_interrupted_leaves_the_earlier_one(plain, tmp_path, monkeypatch):
    folder = exported(plain)
    before = content(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting.card, "text", interrupted)
    assert main(["--workdir", str(plain), "--job", "export"]) == 130
    assert content(folder) == before
    monkeypatch.undo()
    (folder.with_name(".export.new")).mkdir()  # what a kill leaves
    assert content(exported(plain)) == before
    assert not [path for path in plain.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    message = pytest.raises(UserError, match=r"new could not be written: .*No space left")
    with message, files.whole(tmp_path / "new"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_only_the_leader_writes(plain, monkeypatch):
    shutil.rmtree(plain / "export", ignore_errors=True)
    trained = load(plain)
    from lomdm_jax.jobs.export import export

    monkeypatch.setattr(multihost, "leads", lambda: False)
    with jax.set_mesh(trained.mesh):
        assert export(trained) == plain / "export" and not (plain / "export").exists()


def test_a_run_whose_data_are_elsewhere_can_still_be_exported(tmp_path, capsys):
    """And sampled: nothing but the folder is needed. What trains is refused before it starts."""
    config = config_of("mdm")
    config.data.source = str(tmp_path / "gone.txt")
    validate(config)
    run = make_run(tmp_path / "run", config)
    exported(run)
    capsys.readouterr()
    assert "gone.txt" in refused(["--workdir", str(run), "--job", "evaluate"], capsys)
    assert os.listdir(run / "export")
