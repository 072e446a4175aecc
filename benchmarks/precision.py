"""Whether samplers draw the tail: frequencies of rare tokens against their probabilities.

python benchmarks/precision.py [--draws 24000000] [--out benchmarks]

First the token draw itself, on a hundred tokens of probability 1e-8 each beside one of almost 1:
as the library does it, and with the default precision of jax.random.categorical, whose Gumbel
noise comes from uniforms of 23 bits. Then every sampler, on three rare tokens of 3.3e-7 each, with
a model that always gives the same probabilities: tokens must come out with those, in every order.
The p-value is of a chi-square test on the body and the tail, which has a mass of 1e-6 in both.
Writes precision.md.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orders_table import as_markdown
from scipy import stats

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from lomdm_jax.models.readout import Logits
from lomdm_jax.orders.schedule import Power
from lomdm_jax.sampling.ancestral import Ancestral
from lomdm_jax.sampling.best import SCORES, Best
from lomdm_jax.sampling.blocks import InBlocks
from lomdm_jax.sampling.contexts import Whole
from lomdm_jax.sampling.driver import row_keys
from lomdm_jax.sampling.tokens import Filter, draw_tokens

MASS, ROWS, LENGTH = 1e-6, 100_000, 4
CHOOSERS = {
    **{f"{by}, one by one": Best(by) for by in SCORES},
    "race, 2 at a time": Best("race", 2),
    "ancestral, 16 even steps": Ancestral(16),
    "ancestral, 16 linear steps": Ancestral(16, "linear"),
    "ancestral, 16 cosine steps": Ancestral(16, "cosine"),
    "remasking, 8 linear steps": Ancestral(8, "linear", 0.5),
    "race in blocks of 2": Best("race"),
}


class Same(NamedTuple):
    """A model that gives every position the same tokens, and all the same rate."""

    logits: Any
    mask_id: int

    def reverse(self, params: Any) -> Callable[..., Any]:
        def call(z_KBL: jax.Array, log_t_B: jax.Array) -> tuple[Logits, Power]:
            logits = jnp.broadcast_to(jnp.asarray(self.logits), (*z_KBL.shape, self.mask_id + 1))
            return Logits(logits), Power(jnp.zeros(z_KBL.shape))

        return call


def with_tail(rare: int) -> np.ndarray:
    """Probabilities of one common and `rare` rare tokens."""
    return np.array([1 - MASS, *[MASS / rare] * rare])


def draws(mode: str, total: int) -> tuple[np.ndarray, float]:
    """Common and rare tokens among so many draws, and the seconds it took."""
    p, size = with_tail(100), 100_000
    logits = jnp.tile(jnp.log(jnp.asarray(p, jnp.float32)), (1, size, 1))

    @jax.jit
    def rare(key: jax.Array) -> jax.Array:
        if mode == "high":
            return jnp.sum(draw_tokens(key[None], logits) > 0)
        return jnp.sum(jax.random.categorical(key, logits, mode=mode) > 0)

    began = time.perf_counter()
    count = sum(int(rare(key)) for key in jax.random.split(jax.random.key(0), total // size))
    return np.array([total - count, count]), time.perf_counter() - began


def sampled(name: str, total: int) -> tuple[np.ndarray, float]:
    """The same of the tokens that a sampler writes."""
    logits = jnp.append(jnp.log(jnp.asarray(with_tail(3), jnp.float32)), -jnp.inf)
    size = 2 if "blocks" in name else LENGTH
    context = functools.partial(Whole, Same(logits, 4), length=LENGTH, window=LENGTH, size=size)
    sampler = InBlocks(lambda params: context(params), CHOOSERS[name], Filter(), 4).sampler()
    nothing = jnp.zeros((ROWS, LENGTH), jnp.int32)

    @jax.jit
    def rare(key: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        keys_B = row_keys(key, jnp.arange(ROWS))
        return jnp.sum(sampler(None, keys_B, tokens_BT, tokens_BT > 0).tokens_BT > 0)

    began, rounds = time.perf_counter(), total // (ROWS * LENGTH)
    count = sum(int(rare(key, nothing)) for key in jax.random.split(jax.random.key(1), rounds))
    written = rounds * ROWS * LENGTH
    return np.array([written - count, count]), time.perf_counter() - began


def row(name: str, found: np.ndarray, seconds: float) -> list[str]:
    expected = found.sum() * np.array([1 - MASS, MASS])
    p = stats.chisquare(found, expected).pvalue
    cells = [name, f"{found.sum():,}", f"{expected[1]:.1f}", f"{found[1]}", f"{p:.2g}"]
    print(*cells, f"{seconds:.0f} s", sep=" | ", flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draws", type=int, default=24_000_000, help="tokens of each row")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    options = parser.parse_args()
    table = [["what draws", "tokens", "rare ones expected", "found", "p-value"]]
    for mode, name in (("high", "the draw of the library"), ("low", "jax.random's default")):
        table.append(row(f"{name}, 100 of 1e-8", *draws(mode, options.draws)))
    for name in CHOOSERS:
        table.append(row(name, *sampled(name, options.draws)))
    (options.out / "precision.md").write_text(as_markdown(table))


if __name__ == "__main__":
    main()
