"""MDLM's and BD3-LM's checkpoints against a forward pass in PyTorch, written from a description of
it; Lightning's files, with what they name besides; and files that would run something."""

import contextlib
import json
import math
import os
import pathlib
import pickle
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from lomdm_jax.data.tokenizers import load_tokenizer  # noqa: E402
from lomdm_jax.interop import exporting, pickles  # noqa: E402
from lomdm_jax.main import main, parse  # noqa: E402
from lomdm_jax.models.readout import Logits  # noqa: E402
from lomdm_jax.run import start  # noqa: E402
from lomdm_jax.trained import load  # noqa: E402
from lomdm_jax.training.checkpoint import Checkpoints, by_name  # noqa: E402
from lomdm_jax.training.compiled import steps  # noqa: E402
from lomdm_jax.training.initial import initial  # noqa: E402
from lomdm_jax.training.optimizer import make_optimizer  # noqa: E402
from tests.interop.test_exporting import byte_level, exported, refused  # noqa: E402
from tests.interop.test_importing import command, imported  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent.parent
WIDTH, HEADS, COND, LAYERS, LENGTH, ROWS, MASK = 16, 2, 8, 2, 8, 258, 257


def published():
    """Names and shapes of the parameters, in the order of the modules (mdlm, models/dit.py)."""
    shapes = {
        "backbone.vocab_embed.embedding": (ROWS, WIDTH),
        "backbone.sigma_map.mlp.0.weight": (COND, 256),
        "backbone.sigma_map.mlp.0.bias": (COND,),
        "backbone.sigma_map.mlp.2.weight": (COND, COND),
        "backbone.sigma_map.mlp.2.bias": (COND,),
    }
    for i in range(LAYERS):
        shapes |= {
            f"backbone.blocks.{i}.norm1.weight": (WIDTH,),
            f"backbone.blocks.{i}.attn_qkv.weight": (3 * WIDTH, WIDTH),
            f"backbone.blocks.{i}.attn_out.weight": (WIDTH, WIDTH),
            f"backbone.blocks.{i}.norm2.weight": (WIDTH,),
            f"backbone.blocks.{i}.mlp.0.weight": (4 * WIDTH, WIDTH),
            f"backbone.blocks.{i}.mlp.0.bias": (4 * WIDTH,),
            f"backbone.blocks.{i}.mlp.2.weight": (WIDTH, 4 * WIDTH),
            f"backbone.blocks.{i}.mlp.2.bias": (WIDTH,),
            f"backbone.blocks.{i}.adaLN_modulation.weight": (6 * WIDTH, COND),
            f"backbone.blocks.{i}.adaLN_modulation.bias": (6 * WIDTH,),
        }
    return shapes | {
        "backbone.output_layer.norm_final.weight": (WIDTH,),
        "backbone.output_layer.linear.weight": (ROWS, WIDTH),
        "backbone.output_layer.linear.bias": (ROWS,),
        "backbone.output_layer.adaLN_modulation.weight": (2 * WIDTH, COND),
        "backbone.output_layer.adaLN_modulation.bias": (2 * WIDTH,),
    }


def rotary_frequencies():
    head = WIDTH // HEADS
    return 1.0 / 10000.0 ** (torch.arange(0, head, 2).float() / head)


def weights(seed=0):
    """Random ones, none of them where training starts; the buffer lies where its module does."""
    rng = torch.Generator().manual_seed(seed)
    found = {name: 0.4 * torch.randn(shape, generator=rng) for name, shape in published().items()}
    names = list(found)
    before = names[: names.index("backbone.sigma_map.mlp.2.bias") + 1]
    buffer = {"backbone.rotary_emb.inv_freq": rotary_frequencies()}
    return {name: found[name] for name in before} | buffer | found


def reference(w, tokens_BL, sigma_B, positions, sees=None):
    """The DiT's logits: adaptive layer norm, rotary attention, MLP, residual gates.

    sees: bool [L, L], whom a row sees; None for everyone.
    """
    w = {name.removeprefix("backbone."): a for name, a in w.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"]

    def turned(x):  # [B, L, H, D]: the first half of a head with the second, as complex numbers
        first, second = x.chunk(2, -1)
        angle = positions[:, None].float() * rotary_frequencies()
        turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
        both = torch.complex(first, second) * turn
        return torch.cat([both.real, both.imag], -1)

    frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angle = sigma_B[:, None] * frequency
    embedded = torch.cat([angle.cos(), angle.sin()], -1)
    cond = F.silu(linear(F.silu(linear(embedded, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][tokens_BL]
    for i in range(LAYERS):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(cond, f"{block}.adaLN_modulation")[
            :, None
        ].chunk(6, -1)
        h = norm(x, f"{block}.norm1") * (1 + scale1) + shift1
        q, k, v = linear(h, f"{block}.attn_qkv").unflatten(-1, (3, HEADS, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / math.sqrt(WIDTH // HEADS)
        if sees is not None:
            scores = scores.masked_fill(~sees, -math.inf)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + gate1 * linear(mixed, f"{block}.attn_out")
        h = norm(x, f"{block}.norm2") * (1 + scale2) + shift2
        h = F.gelu(linear(h, f"{block}.mlp.0"), approximate="tanh")
        x = x + gate2 * linear(h, f"{block}.mlp.2")
    shift, scale = linear(cond, "output_layer.adaLN_modulation")[:, None].chunk(2, -1)
    return linear(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")


def block_rule(size):
    """BD3-LM's doubled sequence [x_t, x_0]: a noisy token sees its own noisy block and the clean
    blocks before; a clean one the clean blocks up to its own (bd3lms, models/dit.py)."""
    sees = torch.zeros(2 * LENGTH, 2 * LENGTH, dtype=torch.bool)
    for q in range(2 * LENGTH):
        for k in range(2 * LENGTH):
            q_clean, q_block = q >= LENGTH, q % LENGTH // size
            k_clean, k_block = k >= LENGTH, k % LENGTH // size
            if q_clean:
                sees[q, k] = k_clean and k_block <= q_block
            else:
                sees[q, k] = k_block < q_block if k_clean else k_block == q_block
    return sees


def texts(seed=0):
    rng = np.random.default_rng(seed)
    x_BL = rng.integers(0, 256, (3, LENGTH))
    return x_BL, np.where(rng.random((3, LENGTH)) < 0.5, MASK, x_BL)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The option that names a tokenizer of 257 ids, to which the mask token is added."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(folder)
    return f"data.tokenizer=hf:{folder}"


def hub_folder(folder, w, safe=True, **changes):
    """As the published checkpoints are (bd3lms, push_to_hf.py and models/hf)."""
    folder.mkdir()
    known = {"model_type": "mdlm", "vocab_size": ROWS, "model_length": LENGTH}
    known |= {"hidden_dim": WIDTH, "cond_dim": COND, "n_blocks": LAYERS, "n_heads": HEADS}
    known |= {"dropout": 0.1, "time_conditioning": False}
    (folder / "config.json").write_text(json.dumps(known | changes))
    if safe:
        save_file(w, folder / "model.safetensors")
    else:
        torch.save(w, folder / "pytorch_model.bin")
    return folder


def logits_of(run, z_BL, **more):
    trained = load(run)
    generator = trained.generator
    denoise = jax.jit(lambda params, z, more: generator.module(params).denoise(z, **more)[0])
    return np.asarray(denoise(trained.params, z_BL, more).logits)


def close(found, expected):
    """But for the mask token, which ours never predicts."""
    found, expected = found[..., :MASK], expected.numpy()[..., :MASK]
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=1e-4)


# The network


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mdlm")
    source = hub_folder(folder / "mdlm-owt", weights())
    return imported(source, folder / "run", tokenizer)


def test_an_mdlm_gives_its_logits(run):
    """The noise level that it is told is zero, whatever the time."""
    _, z_BL = texts()
    config = json.loads((run / "config.json").read_text())
    assert config["order"]["name"] == "mdm" and config["data"]["length"] == LENGTH
    assert {k: config["model"][k] for k in ("width", "layers", "heads", "cond_dim")} == {
        "width": WIDTH,
        "layers": LAYERS,
        "heads": HEADS,
        "cond_dim": COND,
    }
    expected = reference(weights(), torch.tensor(z_BL), torch.zeros(3), torch.arange(LENGTH))
    close(logits_of(run, z_BL), expected)
    assert load_tokenizer(run / "tokenizer").mask_id == MASK


def test_the_mask_token_is_left_out_as_mdlm_does(run):
    """SUBS: the mask's logit counts for nothing, and what is revealed is certain."""
    x_BL, z_BL = texts()
    logits_BLV = reference(weights(), torch.tensor(z_BL), torch.zeros(3), torch.arange(LENGTH))
    logits_BLV[..., MASK] += -1e6
    nll_BL = -logits_BLV.log_softmax(-1).gather(-1, torch.tensor(x_BL)[..., None])[..., 0]
    masked_BL = z_BL == MASK
    found_BL, _ = map(np.asarray, Logits(logits_of(run, z_BL)).costs(x_BL, masked_BL))
    np.testing.assert_allclose(found_BL[masked_BL], nll_BL.numpy()[masked_BL], atol=2e-4)


def test_pytorch_gets_the_same_network_back(run):
    """Through our own export: MDLM's tensors, by the same names, and the same logits."""
    from lomdm_jax.interop.modeling_lomdm import load as load_torch

    folder, (_, z_BL) = exported(run), texts()
    network = load_torch(folder)
    state, w = network.state_dict(), weights()
    assert state.keys() == published().keys()
    assert all(torch.equal(state[name], w[name]) for name in state)
    with torch.no_grad():
        found, _ = network(torch.tensor(z_BL))
    close(found.numpy(), reference(w, torch.tensor(z_BL), torch.zeros(3), torch.arange(LENGTH)))
    card = (folder / "README.md").read_text()
    assert "those of `mdlm-owt`, a checkpoint of MDLM" in card and str(run.parent) not in card


def test_a_network_that_is_told_the_noise_is_told_mdlms(tokenizer, tmp_path):
    source = hub_folder(tmp_path / "timed", weights(), time_conditioning=True)
    trained = load(imported(source, tmp_path / "run", tokenizer))
    _, z_BL = texts()
    t_B = np.array([0.1, 0.5, 1.0], np.float32)
    reverse = jax.jit(
        lambda params, z, log_t: trained.generator.reverse(params)(z, log_t)[0].logits
    )
    found = reverse(trained.params, z_BL[None], np.log(t_B))[0]
    sigma_B = -torch.log1p(-(1 - 1e-3) * torch.tensor(t_B))  # mdlm, noise_schedule.py
    close(found, reference(weights(), torch.tensor(z_BL), sigma_B, torch.arange(LENGTH)))


def test_a_bd3lm_gives_its_logits(tokenizer, tmp_path):
    """Noisy text first, clean text behind; both count their positions from zero."""
    w, size = weights(), 2
    w |= {"sampling_eps_min": torch.tensor(0.1), "sampling_eps_max": torch.tensor(0.9)}
    w["backbone.block_diff_mask"] = block_rule(size)
    source = hub_folder(
        tmp_path / "bd3", w, model_type="bd3lm", block_size=size, cross_attn=True, adaln=True
    )
    run = imported(source, tmp_path / "run", tokenizer)
    config = json.loads((run / "config.json").read_text())
    assert config["order"]["name"] == f"block:{size}" and config["objective"]["ignore_first"]
    x_BL, z_BL = texts()
    both = torch.tensor(np.concatenate([z_BL, x_BL], 1))
    positions = torch.arange(LENGTH).repeat(2)
    expected = reference(w, both, torch.zeros(3), positions, block_rule(size))[:, :LENGTH]
    close(logits_of(run, z_BL, context_BL=x_BL), expected)


def test_a_bd3lm_before_its_blocks_is_an_mdlm(tokenizer, tmp_path):
    source = hub_folder(
        tmp_path / "b", weights(), model_type="bd3lm", block_size=LENGTH, cross_attn=False
    )
    run = imported(source, tmp_path / "run", tokenizer)
    config = json.loads((run / "config.json").read_text())
    assert config["order"]["name"] == "mdm" and not config["objective"]["ignore_first"]


@pytest.mark.parametrize(
    ("dtype", "safe"),
    [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)],
)
def test_half_precision_is_widened(tokenizer, tmp_path, dtype, safe):
    w = {name: a.to(dtype) for name, a in weights().items()}
    source = hub_folder(tmp_path / "half", w, safe)
    run = imported(source, tmp_path / "run", tokenizer)
    params = by_name(load(run).params)
    found = exporting.tensors(params)
    assert all(a.dtype == np.float32 for a in params.values())
    assert all(np.array_equal(a, w[name].float().numpy()) for name, a in found.items())


# What else a checkpoint may be


def inert_classes():
    """Modules with classes by the names that Lightning's checkpoints know, only while one is
    written."""
    made = {}
    for name in (
        *("omegaconf.dictconfig.DictConfig", "omegaconf.nodes.AnyNode"),
        *("omegaconf.base.Metadata", "tokenizers.Tokenizer"),
        "transformers.models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast",
    ):
        module, _, own = name.rpartition(".")
        made[name] = type(own, (), {"__module__": module, "__qualname__": own})
    return made


@contextlib.contextmanager
def in_modules(classes):
    """sys.modules with these classes in their modules, and nothing else in those."""
    parts = [name.split(".")[:-1] for name in classes]
    names = {".".join(each[:count]) for each in parts for count in range(1, len(each) + 1)}
    before = {name: sys.modules[name] for name in names & sys.modules.keys()}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    for name, made in classes.items():
        module, _, own = name.rpartition(".")
        setattr(sys.modules[module], own, made)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def lightning_file(file, w, average=None, config=None, step=850_000, **more):
    """A checkpoint as Lightning writes one of these projects: config and tokenizer are objects."""
    classes = inert_classes()

    def held(value):
        if isinstance(value, dict):
            content = {name: held(each) for name, each in value.items()}
            return made("omegaconf.dictconfig.DictConfig", _content=content)
        return made("omegaconf.nodes.AnyNode", _val=value)

    def made(name, **state):
        each = classes[name]()
        each.__dict__.update(state, _metadata=classes["omegaconf.base.Metadata"]())
        return each

    tokenizer = made(
        "transformers.models.gpt2.tokenization_gpt2_fast.GPT2TokenizerFast",
        _tokenizer=made("tokenizers.Tokenizer", bytes=b"{}"),
    )
    settings = CONFIG if config is None else config
    state = {"state_dict": w, "global_step": step, "pytorch-lightning_version": "2.2.1"}
    state["hyper_parameters"] = {"config": held(settings), "tokenizer": tokenizer}
    state["optimizer_states"] = [{"state": {0: {"exp_avg": torch.zeros(3)}}}]
    if average is not None:
        state["ema"] = {"decay": 0.9999, "num_updates": step, "shadow_params": average}
    with in_modules(classes):
        torch.save(state | more, file)
    return file


CONFIG = {
    "backbone": "dit",
    "parameterization": "subs",
    "time_conditioning": False,
    "noise": {"type": "loglinear"},
    "model": {
        "length": LENGTH,
        "hidden_size": WIDTH,
        "cond_dim": COND,
        "n_blocks": LAYERS,
        "n_heads": HEADS,
    },
}
BD3 = {
    "model": CONFIG["model"],
    "block_size": 4,
    "algo": {
        "name": "bd3lm",
        "backbone": "dit",
        "parameterization": "subs",
        "cross_attn": True,
        "ignore_bos": True,
        "time_conditioning": False,
    },
}


def shadow(w):
    """In the order of the parameters, without buffers."""
    return [w[name] for name in published()]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_lightning_checkpoint_gives_its_average_or_its_weights(
    tokenizer, tmp_path, capsys, which, compiled
):
    raw, average = weights(0), weights(1)
    state = {n.replace("backbone.", "backbone._orig_mod.") if compiled else n: raw[n] for n in raw}
    file = lightning_file(tmp_path / "mdlm.ckpt", state, shadow(average))
    run = imported(file, tmp_path / "run", tokenizer, f"import.weights={which}")
    printed = capsys.readouterr().out
    assert ("exponential moving average" in printed) == (which == "ema")
    assert "step 850,000" in printed
    assert Checkpoints(run / "checkpoints", 1, create=False).steps() == [850_000]
    found = exporting.tensors(load(run).params)
    wanted = average if which == "ema" else raw
    assert all(np.array_equal(a, wanted[name].numpy()) for name, a in found.items())


def test_a_lightning_checkpoint_without_an_average_says_so(tokenizer, tmp_path, capsys):
    file = lightning_file(tmp_path / "mdlm.ckpt", weights())
    imported(file, tmp_path / "run", tokenizer)
    assert "not their average" in capsys.readouterr().out


@pytest.mark.parametrize("size", [4, "${model.length}"])
def test_a_lightning_checkpoint_of_a_bd3lm(tokenizer, tmp_path, size):
    """A block size that refers to the length is the length."""
    file = lightning_file(tmp_path / "bd3.ckpt", weights(), config=BD3 | {"block_size": size})
    run = imported(file, tmp_path / "run", tokenizer)
    config = json.loads((run / "config.json").read_text())
    assert config["order"]["name"] == f"block:{LENGTH if size != 4 else 4}"
    assert config["objective"]["ignore_first"]


def test_what_a_checkpoint_does_not_say_is_asked_for(tokenizer, tmp_path, capsys):
    file = lightning_file(tmp_path / "mdlm.ckpt", weights(), config={})
    new = tmp_path / "new"
    assert "config.import.length" in refused(command(file, new, tokenizer), capsys)
    run = imported(file, new, tokenizer, "import.length=4", "import.order=block:2")
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["length"] == 4 and config["order"]["name"] == "block:2"


def test_settings_of_the_command_are_the_runs(tokenizer, tmp_path):
    file = lightning_file(tmp_path / "mdlm.ckpt", weights())
    changes = (tokenizer, "sample.count=3", "objective.ignore_first=true")
    run = imported(file, tmp_path / "run", *changes)
    config = json.loads((run / "config.json").read_text())
    assert config["sample"]["count"] == 3 and config["objective"]["ignore_first"]


# What is refused


def without(w, part):
    return {name: a for name, a in w.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("backbone.blocks.1.mlp.0.bias"), "no tensor backbone.blocks.1.mlp.0.bias"),
        (lambda w: w.pop("backbone.vocab_embed.embedding"), "backbone.vocab_embed.embedding"),
        (lambda w: w.update({"backbone.cls.weight": torch.zeros(2)}), "a tensor backbone.cls"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(2)}), "a tensor lm_head.weight (2,)"),
        (
            lambda w: w.update({"backbone.blocks.0.attn_out.weight": torch.zeros(16, 17)}),
            "backbone.blocks.0.attn_out.weight has the shape (16, 17)",
        ),
        (
            lambda w: w.update({"backbone.blocks.0.norm1.weight": torch.zeros(16).double()}),
            "backbone.blocks.0.norm1.weight is of type float64",
        ),
        (
            lambda w: w.update({"backbone.blocks.0.norm1.weight": torch.zeros(16).short()}),
            "backbone.blocks.0.norm1.weight is of type int16",
        ),
        (
            lambda w: w.update({"backbone.rotary_emb.inv_freq": torch.ones(4)}),
            "backbone.rotary_emb.inv_freq holds other frequencies",
        ),
        (
            lambda w: w.update({"backbone.rotary_emb.inv_freq": rotary_frequencies()[:3]}),
            "backbone.rotary_emb.inv_freq holds other frequencies",
        ),
    ],
)
@pytest.mark.parametrize("form", ["safe", "pickled"])
def test_a_tensor_that_is_not_an_mdlms_is_named(tokenizer, tmp_path, capsys, change, words, form):
    w = weights()
    change(w)
    source = hub_folder(tmp_path / "source", w, form == "safe")
    assert words in refused(command(source, tmp_path / "new", tokenizer), capsys)
    assert not (tmp_path / "new").exists()


def test_a_network_from_left_to_right_is_refused(tokenizer, tmp_path, capsys):
    """As MDLM's and BD3-LM's autoregressive baselines: no noise level, no adaptive norm."""
    w = without(without(weights(), "adaLN"), "sigma_map")
    source = hub_folder(tmp_path / "ar", w)
    message = refused(command(source, tmp_path / "new", tokenizer), capsys)
    assert "no adaLN_modulation" in message and "left to right" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameterization": "sedd"}, "parameterization = 'sedd'"),
        ({"backbone": "dimamba"}, "backbone = 'dimamba'"),
        ({"time_conditioning": True, "noise": {"type": "cosine"}}, "noise.type = 'cosine'"),
        ({"model": CONFIG["model"] | {"n_heads": 4}}, "heads = 2, but its config says 4"),
    ],
)
def test_another_kind_of_model_is_refused(tokenizer, tmp_path, capsys, changes, words):
    file = lightning_file(tmp_path / "other.ckpt", weights(), config=CONFIG | changes)
    assert words in refused(command(file, tmp_path / "new", tokenizer), capsys)


def test_an_average_that_does_not_fit_is_refused(tokenizer, tmp_path, capsys):
    for average, words in (
        (shadow(weights())[:-1], "does not hold an average of each of the 30"),
        ([*shadow(weights())[1:], torch.zeros(1)], "in the place of backbone.vocab_embed"),
        ("none", "does not hold an average"),
    ):
        file = lightning_file(tmp_path / "mdlm.ckpt", weights(), average)
        message = refused(command(file, tmp_path / "new", tokenizer), capsys)
        assert words in message and "config.import.weights=raw" in message


def test_the_tokenizer_is_asked_for(tmp_path, capsys):
    """By the number of rows; one of the hub that is not here is asked for as a folder."""
    source = hub_folder(tmp_path / "source", weights())
    message = refused(command(source, tmp_path / "new"), capsys)
    assert "258 rows" in message and "config.data.tokenizer, such as hf:FOLDER" in message
    w = weights() | {"backbone.vocab_embed.embedding": torch.zeros(50258, WIDTH)}
    w |= {"backbone.output_layer.linear.weight": torch.zeros(50258, WIDTH)}
    w |= {"backbone.output_layer.linear.bias": torch.zeros(50258)}
    source = hub_folder(tmp_path / "gpt2", w, vocab_size=50258)
    message = refused(command(source, tmp_path / "new"), capsys)
    assert "'hf:gpt2'" in message and "config.data.tokenizer=hf:FOLDER" in message
    message = refused(command(source, tmp_path / "new", "data.tokenizer=text8"), capsys)
    assert "has 29 rows" in message and "has 50258" in message


@pytest.mark.parametrize(("name", "rows", "mask"), [("gpt2", 50258, 50257), ("bert", 30522, 103)])
def test_the_mask_token_of_the_papers_tokenizers(tmp_path, name, rows, mask):
    """MDLM's: behind GPT-2's ids; BERT's own."""
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the real vocabularies are not on this machine: no folder {folder}")
    w = weights() | {"backbone.output_layer.linear.bias": torch.zeros(rows)}
    for each in ("vocab_embed.embedding", "output_layer.linear.weight"):
        w[f"backbone.{each}"] = torch.zeros(rows, WIDTH)
    source = hub_folder(tmp_path / "source", w, vocab_size=rows)
    run = imported(source, tmp_path / "run", f"data.tokenizer=hf:{folder}")
    tokenizer = load_tokenizer(run / "tokenizer")
    assert (tokenizer.rows, tokenizer.mask_id) == (rows, mask)


def test_a_folder_or_file_of_another_kind_is_refused(tokenizer, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json cannot be read" in refused(command(empty, tmp_path / "new"), capsys)
    (empty / "config.json").write_text('{"model_type": "mdlm"}')
    message = refused(command(empty, tmp_path / "new"), capsys)
    assert "neither model.safetensors nor pytorch_model.bin" in message
    torch.save(weights(), tmp_path / "bare.pt")
    message = refused(command(tmp_path / "bare.pt", tmp_path / "new"), capsys)
    assert "no checkpoint of Lightning" in message
    (tmp_path / "text.ckpt").write_text("text")
    assert "cannot be read" in refused(command(tmp_path / "text.ckpt", tmp_path / "new"), capsys)
    file = lightning_file(tmp_path / "cut.ckpt", weights())
    file.write_bytes(file.read_bytes()[:5000])
    assert "cut.ckpt cannot be read" in refused(command(file, tmp_path / "new"), capsys)


def test_without_torch_a_pickle_is_not_read(tmp_path, monkeypatch, capsys):
    source = hub_folder(tmp_path / "source", weights(), safe=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refused(command(source, tmp_path / "new"), capsys)


# Files that would run something


class Runs:
    """Pickled, a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(kind, trace):
    return {
        "os.system": lambda: Runs(os.system, f"touch {trace}"),
        "builtins.eval": lambda: Runs(eval, f"open({str(trace)!r}, 'w')"),
        "builtins.exec": lambda: Runs(exec, f"open({str(trace)!r}, 'w')"),
        "pathlib.Path.touch": lambda: Runs(pathlib.Path.touch, trace),
        "builtins.getattr": lambda: Runs(getattr, trace, "touch"),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("os.system", "system"),
        ("builtins.eval", "eval"),
        ("builtins.exec", "exec"),
        ("pathlib.Path.touch", "getattr"),
        ("builtins.getattr", "getattr"),
    ],
)
@pytest.mark.parametrize("form", ["lightning", "hub", "plain pickle"])
def test_a_hostile_file_is_refused_and_does_nothing(tokenizer, tmp_path, capsys, kind, named, form):
    """Whoever unpickles it makes a file; the refusal names what it would have called."""
    trace = tmp_path / "trace"
    evil = hostile(kind, trace)
    if form == "lightning":
        source = lightning_file(tmp_path / "evil.ckpt", weights(), callbacks={"evil": evil})
    elif form == "hub":
        source = hub_folder(tmp_path / "evil", weights() | {"evil": evil}, safe=False)
    else:
        source = tmp_path / "evil.ckpt"
        source.write_bytes(pickle.dumps({"state_dict": {"evil": evil}}, protocol=2))
    message = refused(command(source, tmp_path / "new", tokenizer), capsys)
    assert f"names {named}" in message.replace("posix.", "").replace("builtins.", "")
    assert "refused" in message
    assert not trace.exists() and not (tmp_path / "new").exists()


def test_the_hostile_files_are_hostile(tmp_path):
    """Otherwise the test above would prove nothing."""
    for kind in ("os.system", "builtins.eval", "builtins.exec", "pathlib.Path.touch"):
        trace = tmp_path / kind
        pickle.loads(pickle.dumps(hostile(kind, trace)))
        assert trace.exists(), kind


def test_harmless_names_do_nothing_either(tmp_path):
    """What stands for them keeps its state, whatever it is called with."""
    assert set(map(type, pickles.HARMLESS.values())) == {type, types.FunctionType}
    file = tmp_path / "file"
    torch.save({"made": Runs(list, [1, 2]), "kept": Runs(int, 3)}, file)
    allowed = torch.serialization.get_safe_globals()
    found = pickles.load(file)
    assert all(isinstance(each, pickles.Inert) for each in found.values())
    assert set(torch.serialization.get_safe_globals()) == set(allowed), "nothing stays allowed"


# What comes of it


def test_lomdm_starts_from_an_mdlm(run, tokenizer, tmp_path, capsys):
    """Its backbone is taken bit for bit, the heads of the order are fresh, and it trains."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"A text, number {i}." for i in range(60)))
    changes = f"""
    data.source={tmp_path / "text.txt"} data.directory={tmp_path / "data"} data.vocab_size=0
    data.length={LENGTH} {tokenizer} train.start_from={run} train.batch_size=8 eval.batch_size=8
    model.head_layers=0 model.width={WIDTH} model.layers={LAYERS} model.heads={HEADS}
    model.cond_dim={COND} mesh.data=1 optimizer.warmup_steps=1 train.donate=false data.workers=1
    """
    options = [f"--config.{change}" for change in changes.split()]
    config = parse(["--config", str(ROOT / "configs/quickstart.py:lomdm"), *options]).config
    lomdm, optimizer = start(config, tmp_path / "lomdm"), make_optimizer(config.optimizer)
    with jax.set_mesh(lomdm.mesh):
        checkpoints = Checkpoints(tmp_path / "lomdm" / "checkpoints", 1, create=True)
        state, batches = initial(lomdm, optimizer, checkpoints, "auto")
        found, w = exporting.tensors(jax.device_get(state.params)), weights()
        assert all(np.array_equal(found[name], w[name].numpy()) for name in published())
        step, _ = steps(lomdm, optimizer, state)
        for number in (1, 2, 3):
            batch = lomdm.place_rows(next(batches))
            state, metrics = step(number, state, batch, lomdm.key(0))
            assert np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    checkpoints.close()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("starting from")]
    fresh = line.split("fresh: ")[1].split(", ")
    assert f"step 0 of {run};" in line
    assert {name.split("/")[0] for name in fresh} == {"forward_head", "reverse_head"}
    after = exporting.tensors(jax.device_get(state.params))
    kernel = "backbone.blocks.0.attn_qkv.weight"
    assert not np.array_equal(after[kernel], found[kernel])


@pytest.mark.parametrize(("order", "job"), [("mdm", "score"), ("block:4", "sample")])
def test_an_imported_model_scores_and_samples(tokenizer, tmp_path, order, job):
    file = lightning_file(tmp_path / "mdlm.ckpt", weights())
    run = imported(file, tmp_path / "run", tokenizer, f"import.order={order}", "mesh.data=1")
    options = ["--config.sample.count=2", "--config.score.text=order", "--config.score.orders=2"]
    assert main(["--workdir", str(run), "--job", job, *options]) == 0
    names = {path.name for path in run.iterdir()}
    assert names & {"samples.jsonl", "score.json"}
