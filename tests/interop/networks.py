"""Tiny networks with random parameters, the same in JAX and in PyTorch."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lomdm_jax.config import default_config
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.interop import exporting
from lomdm_jax.interop.modeling_lomdm import LoMDM, Settings
from lomdm_jax.objectives import nelbo

torch.set_num_threads(1)  # of what these tests do, threads would only wait for one another

ROWS = 6
EPS, SHARE = 0.05, 0.25  # a coarse end of time, so that weights, and with them rounding, stay small
NAMES = (
    *("mdm", "mdm2", "cosine", "ar", "r2l", "block:2", "permutation:3", "genmd4", "lomdm", "walk"),
    *("lomdm-order", "lomdm-ranked"),
)
RANKED = ("mdm", "ar", "block:2", "walk")  # those that have another layout of their own


@functools.cache
def network(name, layout="own", length=6, vocab=5, sharp=1.0, dtype="float32", **sizes):
    """A network of an order: config, params (JAX), values (of config.json), generator (JAX) and
    model (PyTorch). "mdm2" is mdm with the exponent 2; `sharp` scales the logits."""
    config = default_config()
    config.model.update({"width": 16, "layers": 1, "heads": 2, "cond_dim": 8} | sizes)
    config.model.update({"layout": layout, "dropout": 0.0, "dtype": dtype})
    config.order.name, config.order.exponent = name.replace("mdm2", "mdm"), 1.0 + (name == "mdm2")
    config.objective.update({"eps": EPS, "reconstruction_share": SHARE})
    config.data.length = length
    shapes = jax.eval_shape(lambda: init_params(config, vocab + 1, jax.random.key(0)))
    params, values = randomised(shapes, sharp), settings(config, vocab)
    model = LoMDM(Settings.of(values))
    model.load_state_dict(tensors(params))
    generator = make_generator(config, vocab + 1, vocab)
    return types.SimpleNamespace(
        config=config, params=params, values=values, generator=generator, model=model
    )


def randomised(shapes, sharp):
    """Random numbers everywhere, also where a network starts at zero."""
    draw = np.random.default_rng(1)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        size = leaf.shape[0] ** -0.5 if "kernel" in name else 0.3
        if name.endswith(("position']", "distance']", "neighbours']")):  # count thirty times
            size /= 15
        if "output_layer']['linear" in name:
            size *= sharp
        if "content" in name:  # so that pointers heed what they read
            size *= 3
        return ((1.0 if "scale" in name else 0.0) + size * draw.normal(size=leaf.shape)).astype(
            "f4"
        )

    return jax.tree_util.tree_map_with_path(fill, shapes)


def settings(config, vocab):
    """The content of an exported config.json, as it is read."""
    ids = {"vocab_size": vocab, "rows": vocab + 1, "mask_id": vocab, "eos_id": 0, "pad_id": 0}
    tokenizer = types.SimpleNamespace(fingerprint="none", **ids)
    values = exporting.settings(exporting.Exported(config, tokenizer, None, 7, {}))
    return json.loads(json.dumps(values))


def tensors(params):
    """Parameters, or their gradients, by PyTorch's names."""
    return {name: torch.tensor(a) for name, a in exporting.tensors(params).items()}


def th(a):
    """A JAX array in PyTorch."""
    a = np.array(a)
    return torch.from_numpy(a.astype(np.int64) if a.dtype == np.int32 else a)


def close(ours, theirs, what, atol=1e-4):
    ours = ours.detach().numpy() if torch.is_tensor(ours) else np.asarray(ours)
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=0, atol=atol, err_msg=what)


def batch_for(net):
    """Rows of random text, of which a few positions are given."""
    length, vocab = net.config.data.length, net.generator.mask_id
    keys = jax.random.split(jax.random.key(3), 4)
    tokens = jax.random.randint(keys[0], (ROWS, length), 0, vocab)
    targets = jax.random.bernoulli(keys[1], 0.8, (ROWS, length)).at[:, 1].set(True)
    uniform = jnp.mod(jnp.arange(ROWS) / ROWS + 0.1, 1.0)
    return nelbo.Batch(tokens, targets, jax.random.split(keys[2], ROWS), uniform)
