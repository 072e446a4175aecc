"""The peer of speed.py: the network of `--job export` in a plain PyTorch program."""

import json
import resource
import time
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from speed import Case, Work

from lomdm_jax.config import default_config
from lomdm_jax.interop import exporting
from lomdm_jax.interop.modeling_lomdm import LoMDM, Settings, draw_groups, draw_state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
DECAY, CLIP = 0.9999, 1.0
PRODUCT = {"cpu": 2048, "cuda": 8192}
torch._dynamo.config.capture_scalar_outputs = True  # how many groups there are, in one graph


def network(case: Case) -> LoMDM:
    """With what lomdm_jax exports of a fresh config."""
    config = default_config()
    config.data.length, config.order.name = case.length, case.name
    config.model.update({"width": case.width, "layers": case.layers, "heads": case.heads})
    ids = {"vocab_size": case.vocab, "rows": case.vocab + 1, "mask_id": case.vocab}
    tokenizer: Any = types.SimpleNamespace(fingerprint="none", eos_id=0, pad_id=0, **ids)
    values = exporting.settings(exporting.Exported(config, tokenizer, None, 0, {}))
    return LoMDM(Settings.of(json.loads(json.dumps(values)))).to(DEVICE)


def training(case: Case) -> Work:
    model = network(case)
    draw = draw_state if model.settings.one_pass == "state" else draw_groups
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    tokens = torch.randint(case.vocab, (case.batch, case.length), device=DEVICE)
    everything = torch.ones_like(tokens, dtype=torch.bool)
    places = torch.arange(case.batch, device=DEVICE) / case.batch

    @torch.compile
    def loss(uniform: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            forward = model.forward_order(tokens)
            terms = draw(model, forward, tokens, everything, uniform, None)
        return (terms.main + terms.order).sum() / tokens.numel()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss((torch.rand((), device=DEVICE) + places) % 1).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)

    return called(step, tokens.numel())


def sampling(case: Case) -> Work:
    model = network(case).eval()
    model.forward = torch.compile(model.forward)

    def sample() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            model.sample(rows=case.batch, steps=case.steps)

    return called(sample, case.batch * case.length)


def cross_entropy(case: Case) -> Work:
    rows, count = case.vocab + 1, case.batch * case.length
    hidden = torch.randn(count, case.width, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = torch.randn(rows, case.width, device=DEVICE).div_(30).requires_grad_()
    bias = torch.zeros(rows, device=DEVICE, requires_grad=True)
    tokens, where = (torch.randint(n, (count,), device=DEVICE) for n in (rows, 2))

    @torch.compile
    def loss() -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            logits = F.linear(hidden, weight, bias)
        return (F.cross_entropy(logits.float(), tokens, reduction="none") * where).sum()

    def call() -> None:
        hidden.grad = weight.grad = bias.grad = None
        loss().backward()

    return called(call, count)


def attention(case: Case) -> Work:
    shape = (case.batch, case.heads, case.length, case.width // case.heads)
    heads = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in "qkv"]

    def call() -> None:
        mixed = F.scaled_dot_product_attention(*heads, is_causal=case.name == "causal")
        torch.autograd.grad(mixed.float().square().sum(), heads)

    return called(call, case.batch * case.length)


def product(case: Case) -> Work:
    size = PRODUCT[DEVICE]
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    return called(lambda: a @ a, 2 * size**3)


def called(function: Callable[[], Any], tokens: int) -> Work:
    started = time.perf_counter()
    function()
    wait()
    seconds = time.perf_counter() - started

    def run(calls: int) -> None:
        for _ in range(calls):
            function()
        wait()

    chip = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return Work(run, tokens, seconds, 0, chip, f"torch {torch.__version__}", memory)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def memory() -> int:
    """The most bytes that were held."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make(case: Case) -> Work:
    whats = {"cross-entropy": cross_entropy, "product": product, "attention": attention}
    return {"training": training, "sampling": sampling, **whats}[case.what](case)
