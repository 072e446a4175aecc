"""Loading: with nothing but torch and safetensors, with transformers, and what is wrong with it."""

import json
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs torch")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors")

from lomdm_jax.interop import modeling_lomdm  # noqa: E402
from lomdm_jax.interop.modeling_lomdm import LoMDM, Settings, load  # noqa: E402
from tests.interop.networks import NAMES, network, tensors  # noqa: E402

TOKENS = torch.tensor([[1, 5, 3, 0, 5, 2], [5, 5, 5, 4, 4, 0]])


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, network("lomdm"))


def write(folder, net, found=None):
    """The files of an export that are read here."""
    folder.mkdir(exist_ok=True)
    found = tensors(net.params) if found is None else found
    safetensors_torch.save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(net.values))
    shutil.copy(modeling_lomdm.__file__, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_all_of_the_model(name, tmp_path):
    net = network(name)
    model = load(write(tmp_path, net))
    assert not model.training and model.settings == net.model.settings
    same(model, net.model)


def same(ours, theirs):
    """The same parameters, and what they make of text, up to how memory is aligned."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(ours.denoise(TOKENS), theirs.denoise(TOKENS), strict=True):
        torch.testing.assert_close(a, b)


ALONE = """
import sys
for name in ("transformers", "jax", "flax", "numpy", "lomdm_jax"):
    sys.modules[name] = None
import torch
from modeling_lomdm import load
model, tokens = load("."), torch.tensor([[1, 2, 3, 0, 1, 2]])
bound = model.nelbo(tokens, draws=2)
assert bound.mean.isfinite().all() and bound.error.isfinite().all()
assert (model.sample(rows=3).tokens < 5).all() and (model.sample(rows=3, steps=2).tokens < 5).all()
given = torch.where(torch.tensor([1, 0, 0, 1, 0, 0]) > 0, tokens, model.settings.mask_id)
assert (model.sample(given, temperature=0.8, top_p=0.9).tokens[:, [0, 3]] == given[:, [0, 3]]).all()
assert "transformers" not in {name for name, module in sys.modules.items() if module}
"""


def test_the_file_stands_alone(folder):
    """In another process, where neither this package nor JAX, NumPy or transformers exist."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], cwd=folder, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def damaged(folder, change):
    found = tensors(network("lomdm").params)
    change(found)
    return write(folder, network("lomdm"), found)


NAME = "backbone.blocks.0.attn_qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), f"no tensor {NAME}"),
        (lambda t: t.update(strange=torch.zeros(2)), "a tensor strange"),
        (lambda t: t.update({NAME: t[NAME].T.contiguous()}), rf"{NAME} has shape .*16, 48"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), f"{NAME} has dtype torch.bfloat16"),
    ],
)
def test_what_is_wrong_with_a_tensor_is_said_with_its_name(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(damaged(tmp_path, change))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_cut_short_is_named(name, size, folder):
    file = folder / name
    file.write_bytes(file.read_bytes().rstrip()[:size])
    with pytest.raises(ValueError, match=f"{name} is damaged or cut short"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": None}, "width is None"),
        ({"width": 15}, "width is 15.*multiple of 2"),
        ({"heads": True}, "heads is True"),
        ({"mask_id": 6}, "mask_id is 6.*from 0 to 5"),
        ({"layout": "square"}, "layout is 'square'.*ranked"),
        ({"layout": "ranked"}, "layout is 'ranked'"),
        ({"layout": "causal"}, "layout is 'causal'"),
        ({"groups": [0] * 6}, "groups is"),
        ({"scores": "none"}, "scores is 'none'.*'position'"),
        ({"walks": True}, "walks is True"),
        ({"order": {"name": "lomdm"}}, "order is .*c1"),
        ({"order": {"name": "lom", "c1": 1, "c2": 0, "exponent": 1}}, "its name must be one of"),
        ({"order": {"name": "lomdm", "c1": 0.1, "c2": 0.2, "exponent": 1}}, "c1 > c2"),
        ({"objective": {"eps": 0, "reconstruction_share": 0.1}}, "objective is .*between 0 and 1"),
    ],
)
def test_wrong_settings_are_named(changes, message, folder):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        load(folder)
    del values[next(iter(changes))]
    if next(iter(changes)) in ("width", "heads", "mask_id", "layout", "order"):
        with pytest.raises(ValueError, match=f"has no {next(iter(changes))}"):
            Settings.of(values)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ar", {"groups": None}),
        ("ar", {"groups": [0, 1, 2]}),
        ("ar", {"groups": [0, 0, 1, 2, 3, 4]}),
    ],
)
def test_wrong_groups_are_named(name, changes):
    with pytest.raises(ValueError, match=r"(groups|layout) is"):
        Settings.of(network(name).values | changes)


# With transformers


@pytest.fixture
def auto(monkeypatch, tmp_path):
    """The package, whose copies of a folder's code go into a folder of the test."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return transformers


@pytest.mark.parametrize("name", ["lomdm", "ar", "lomdm-ranked"])
def test_transformers_loads_the_same_model(name, auto, tmp_path):
    net = network(name)
    folder, options = write(tmp_path / f"{name}_model", net), {"trust_remote_code": True}
    assert auto.AutoConfig.from_pretrained(folder, **options).model_type == "lomdm"
    options["output_loading_info"] = True
    model, info = auto.AutoModelForMaskedLM.from_pretrained(folder, **options)
    assert not any(info.values()), info
    same(model, net.model)
    logits = model(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    torch.testing.assert_close(logits[..., :5], net.model(TOKENS)[0][..., :5])
    assert (logits[..., 5] == -torch.inf).all()
    base, info = auto.AutoModel.from_pretrained(folder, **options)
    assert not any(info.values()), info
    hidden = base(TOKENS).last_hidden_state
    torch.testing.assert_close(base.predict(hidden), net.model(TOKENS)[0])
    assert (model.sample(rows=3).tokens < 5).all()
    assert model.nelbo(TOKENS.clamp(max=4)).mean.shape == (2,)


def test_labels_give_the_cross_entropy_of_what_counts(auto, folder):
    model = auto.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    labels = torch.full_like(TOKENS, -100)
    labels[0, 1], labels[1, 2] = 2, 3
    log_p = network("lomdm").model(TOKENS)[0][..., :5].log_softmax(-1)
    wanted = -(log_p[0, 1, 2] + log_p[1, 2, 3]) / 2
    torch.testing.assert_close(model(TOKENS, labels=labels).loss, wanted)


def test_a_padded_batch_is_refused(auto, folder):
    model = auto.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    padded = torch.ones_like(TOKENS)
    padded[0, -1] = 0
    with pytest.raises(ValueError, match="attention_mask hides"):
        model(TOKENS, attention_mask=padded)


def test_what_transformers_saves_is_loaded_again(auto, folder, tmp_path):
    model = auto.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        model.backbone.vocab_embed.embedding += 1
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.settings == network("lomdm").model.settings
    same(again, model)
    options = {"trust_remote_code": True}
    same(auto.AutoModelForMaskedLM.from_pretrained(tmp_path / "again", **options), model)


def test_transformers_too_refuses_a_checkpoint_that_does_not_fit(auto, tmp_path):
    whole, folder = write(tmp_path / "whole", network("lomdm")), tmp_path / "short"
    damaged(folder, lambda t: t.pop(NAME))
    options = {"trust_remote_code": True}
    with pytest.raises(ValueError, match=f"missing_keys.*{NAME}"):
        auto.AutoModelForMaskedLM.from_pretrained(folder, **options)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32"):
        auto.AutoModel.from_pretrained(whole, dtype=torch.bfloat16, **options)


def test_a_fresh_model_is_uniform_and_its_order_random():
    model = LoMDM(Settings.of(network("lomdm").values))
    logits, scores = model(TOKENS)
    assert (logits == 0).all() and (scores == 0).all()
