"""A LoMDM checkpoint in PyTorch: network, order, bounds, samplers and loading, all in this file.

It needs torch, safetensors to load a folder, and nothing else:

    import torch
    from modeling_lomdm import load

    model = load("folder", device="cuda")
    mask = model.settings.mask_id
    # Text is int64 ids [rows, positions] of the tokenizer in the folder.
    bound = model.nelbo(tokens, draws=16)           # -log p(text) <= bound.mean, nats per row
    texts = model.sample(rows=4).tokens             # exact: one token per call of the network
    texts = model.sample(rows=4, steps=32).tokens   # 32 steps at most, several tokens in each
    # What is given stays, wherever it stands; the mask id is what is to be filled.
    filled = model.sample(torch.where(blank, mask, tokens), temperature=0.8, top_p=0.95).tokens

`model(z)` gives the logits of every position of partly masked text, and what the order is read off.
Parameters are float32. `torch.autocast` in bfloat16 and `torch.compile` work; a bound should be
computed in float32. A `torch.Generator` must be of the device of the parameters.

With transformers installed, `AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)`
gives the same network with the same methods. In config.json "auto_map" then says
{"AutoConfig": "modeling_lomdm.LoMDMConfig", "AutoModel": "modeling_lomdm.LoMDMModel",
"AutoModelForMaskedLM": "modeling_lomdm.LoMDMForMaskedLM"}.

The model is an order-expressive masked diffusion model (arXiv 2602.02112) on MDLM's network
(kuleshov-group/mdlm, models/dit.py). Letters in names are shapes: B rows, L positions, V
vocabulary, D width, H heads, K positions of a block, Q tokens that are read, S slots of a memory.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
except ImportError:  # all but the Auto classes works without
    PreTrainedModel = None  # type: ignore[assignment, misc]

# What each order is learned from (`Settings.scores`), whether a table over the neighbours joins it,
# and its clock (`Schedule.clock`). "block" and "permutation" are followed by a colon and a number.
ORDERS = {
    "mdm": ("none", False, "power"),
    "cosine": ("none", False, "cosine"),
    **dict.fromkeys(("ar", "r2l", "block", "permutation"), ("none", False, "windows")),
    "genmd4": ("token", False, "power"),
    "lomdm": ("position", False, "power"),
    "walk": ("none", True, "none"),
    "lomdm-order": ("position", True, "none"),
    "lomdm-ranked": ("pointer", True, "none"),
}
CHOICES = {
    "layout": ("full", "causal", "ranked"),
    "one_pass": ("state", "groups", "order"),
    "time_conditioning": (False, True),
    "walks": (False, True),
}
GRIDS = ("even", "linear", "cosine")
Rng = torch.Generator | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a network and its order are: keys of config.json, where others are not looked at.

    vocab_size: rows of the token table, the mask token included.
    length: tokens per sequence in training.
    width, layers, heads, cond_dim: of the backbone; width is a multiple of 2 * heads.
    order: "name", one of ORDERS, and "c1", "c2", "exponent".
    objective: "eps" and "reconstruction_share" of the continuous bound.
    head_layers: blocks in each order head, or in the posterior pointer.
    time_conditioning: whether the network is told the noise level.
    layout: "full" for two-sided attention over a partly masked text; "causal" for a causal model
      with a shift, in a fixed order; "ranked" for queries and contents, in any order.
    groups: the group of each position, 0 is revealed first; None for an order without groups.
    scores: what the order is learned from: "none", "position", "token" or "pointer".
    walks: whether a table over the neighbours joins the scores.
    one_pass: what a pass scores: one "state", all "groups", or a whole "order".
    """

    vocab_size: int
    mask_id: int
    length: int
    width: int
    layers: int
    heads: int
    cond_dim: int
    layout: str
    one_pass: str
    order: Mapping[str, Any]
    objective: Mapping[str, Any]
    head_layers: int = 1
    eos_id: int | None = None
    pad_id: int | None = None
    time_conditioning: bool = False
    groups: tuple[int, ...] | None = None
    scores: str = "none"
    walks: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """From the content of config.json.

        Raises:
          ValueError: a key is missing, or a value or a combination cannot be; it names the key.
        """
        fields = dataclasses.fields(cls)
        for field in fields:
            if field.name not in values and field.default is dataclasses.MISSING:
                raise ValueError(f"config.json has no {field.name}: export the model again.")
        found = {f.name: values[f.name] for f in fields if f.name in values}
        groups = found.get("groups")
        return cls(**found | {"groups": None if groups is None else tuple(groups)})

    def __post_init__(self) -> None:
        self._check_values()
        self._check_order()
        self._check_layout()

    def _require(self, holds: bool, key: str, remedy: str) -> None:
        if not holds:
            raise ValueError(f"config.json: {key} is {getattr(self, key)!r}, but {remedy}")

    def _check_values(self) -> None:
        for key in ("vocab_size", "length", "width", "layers", "heads", "cond_dim", "head_layers"):
            value, least = getattr(self, key), int(key != "head_layers")
            holds = type(value) is int and value >= least
            self._require(holds, key, f"it must be a whole number, {least} or more.")
        for key, values in CHOICES.items():
            named = ", ".join(json.dumps(value) for value in values)
            self._require(getattr(self, key) in values, key, f"it must be one of {named}.")
        for key in ("mask_id", "eos_id", "pad_id"):
            value, last = getattr(self, key), self.vocab_size - 1
            holds = type(value) is int and 0 <= value <= last
            holds |= value is None and key != "mask_id"
            self._require(holds, key, f"ids run from 0 to {last}.")
        even = self.width % (2 * self.heads) == 0
        self._require(even, "width", f"it must be a multiple of 2 * heads = {2 * self.heads}.")

    def _check_order(self) -> None:
        parts = {
            "order": ("name", "c1", "c2", "exponent"),
            "objective": ("eps", "reconstruction_share"),
        }
        for key, needed in parts.items():
            holds = isinstance(getattr(self, key), Mapping) and {*needed} <= {*getattr(self, key)}
            self._require(holds, key, f"it must hold {', '.join(needed)}.")
        inside = all(0 < self.objective[key] < 1 for key in parts["objective"])
        self._require(inside, "objective", "its values must lie between 0 and 1.")
        order, known = self.order, ", ".join(ORDERS)
        self._require(self.kind in ORDERS, "order", f"its name must be one of {known}.")
        for key, value in zip(("scores", "walks"), ORDERS[self.kind], strict=False):
            holds = getattr(self, key) == value
            self._require(holds, key, f"it is {value!r} of the order {order['name']!r}.")
        holds = self.kind != "lomdm" or order["c1"] > order["c2"] >= 0
        self._require(holds, "order", "exponents are positive only for c1 > c2 >= 0.")
        holds = self.kind != "mdm" or order["exponent"] > 0
        self._require(holds, "order", "its exponent must be above zero.")

    def _check_layout(self) -> None:
        groups, grouped = self.groups, ORDERS[self.kind][2] == "windows"
        holds = (groups is not None) == grouped
        self._require(holds, "groups", f"order is {self.order['name']!r}.")
        holds = groups is None or {*groups} == {*range(len({*groups}))}
        holds &= groups is None or len(groups) == self.length
        self._require(holds, "groups", f"it must give each of {self.length} positions 0, 1, ...")
        holds = self.layout != "causal" or (groups is not None and len({*groups}) == self.length)
        self._require(holds, "layout", "it needs a group for each position.")
        holds = self.scores in ("none", "pointer") and not self.time_conditioning
        if self.layout != "ranked":
            holds = self.scores != "pointer"
        self._require(holds, "layout", "this order reads something else.")

    @property
    def kind(self) -> str:
        """The name of the order up to its number."""
        return str(self.order["name"]).partition(":")[0]


# Orders


class Weights(NamedTuple):
    """An order without its clock: the next position is i with probability exp(log_w_i) over the
    sum, among the masked positions of the lowest group that is left.

    log_w: float32 [..., L]. group: int64 [..., L].
    neighbours: float32 [..., 2, 2], what is added by whether the left and the right neighbour are
      revealed. moves: float32 [..., L, 2 W + 1], what is added after the reveal of j: to position
      i moves[..., j, W + i - j], at most W either way. None for none.
    """

    log_w: Tensor
    group: Tensor
    neighbours: Tensor | None = None
    moves: Tensor | None = None

    @property
    def stepwise(self) -> bool:
        """Whether they change with every reveal."""
        return self.neighbours is not None or self.moves is not None

    def at(self, masked: Tensor, last: Tensor | None = None) -> "Weights":
        """The weights where `masked`, bool [..., L], is hidden and `last`, int64 [...], was
        revealed last (-1 for none). What lies beyond the edges counts as revealed."""
        log_w = self.log_w
        if self.neighbours is not None:
            log_w = log_w + _of_neighbours(self.neighbours, masked)
        if self.moves is not None and last is not None:
            log_w = log_w + _of_move(self.moves, last)
        return Weights(log_w, self.group)

    def after(self, first: Tensor) -> "Weights":
        """The same order, but with the positions `first`, bool [..., L], before all others."""
        later = self.group.amax(-1, keepdim=True) + 1
        return self._replace(group=self.group + torch.where(first, 0, later))

    def flattened(self, temperature: float) -> "Weights":
        """Every log-weight divided by the temperature."""
        parts = {name: a for name, a in self._asdict().items() if a is not None and name != "group"}
        return self._replace(**{name: a / temperature for name, a in parts.items()})


def _of_neighbours(table: Tensor, masked: Tensor) -> Tensor:
    edge = torch.zeros_like(masked[..., :1])
    shown = ~torch.cat([edge, masked, edge], -1)
    index = 2 * shown[..., :-2].long() + shown[..., 2:].long()
    table = table.flatten(-2)[..., None, :].expand(*masked.shape, 4)
    return table.gather(-1, index[..., None])[..., 0]


def _of_move(moves: Tensor, last: Tensor) -> Tensor:
    length, size = moves.shape[-2:]
    here = last.clamp(min=0)[..., None, None].expand(*last.shape, 1, size)
    row = moves.expand(*last.shape, length, size).gather(-2, here)[..., 0, :]
    window, where_L = size // 2, torch.arange(length, device=moves.device)
    distance = (where_L - last[..., None]).clamp(-window, window) + window
    return torch.where(last[..., None] >= 0, row.gather(-1, distance), 0.0)


class Schedule(NamedTuple):
    """Which position comes next, and when: m_i(t), the probability that i is masked at time t,
    which runs from 0 (clean) to 1 (all masked).

    clock: "power" for m = t^exp(log_w); "cosine" for sin(pi t / 2); "windows" for groups one after
      another, group k of G while t falls from 1 - k/G to 1 - (k + 1)/G; "none" for rates that
      follow what is revealed, where no position has an m of its own.
    """

    weights: Weights
    clock: str = "power"

    def at(self, masked: Tensor) -> "Schedule":
        """The schedule in the state where `masked`, bool [..., L], is hidden."""
        return Schedule(self.weights.at(masked)) if self.clock == "none" else self

    def log_mask(self, log_t: Tensor) -> Tensor:
        """log m, [..., L], from log t, [...]."""
        if self.clock == "windows":
            return self._left(log_t).clamp(0, 1).log()
        if self.clock == "power":
            return self.weights.log_w.exp() * log_t[..., None]
        self._check_clock()
        # Below t = 1e-4 the sine is its argument to rounding, also where t itself underflows.
        sine = (math.pi / 2 * log_t.clamp(min=-9.0).exp()).sin().log()
        log_m = torch.where(log_t > -9.0, sine, math.log(math.pi / 2) + log_t)
        return log_m[..., None] + self.weights.log_w

    def log_velocity(self, log_t: Tensor) -> Tensor:
        """log of d/dt log m, the rate of the bound, [..., L]; -inf where nothing is revealed."""
        if self.clock == "windows":
            left, groups = self._left(log_t), self.weights.group.amax(-1, keepdim=True) + 1
            return torch.where((left > 0) & (left <= 1), torch.log(groups / left), -math.inf)
        if self.clock == "power":
            return self.weights.log_w - log_t[..., None]
        self._check_clock()
        angle = math.pi / 2 * log_t.clamp(min=-9.0).exp()
        slope = torch.log(math.pi / 2 * angle.cos().clamp(min=0.0) / angle.sin())
        return torch.where(log_t > -9.0, slope, -log_t)[..., None] + self.weights.log_w

    def _left(self, log_t: Tensor) -> Tensor:
        """Share of each group's window that is still ahead, outside [0, 1] if it is not on."""
        groups = self.weights.group.amax(-1, keepdim=True) + 1
        return groups * log_t.exp()[..., None] - (groups - 1 - self.weights.group)

    def _check_clock(self) -> None:
        if self.clock == "none":
            raise ValueError("an order that follows what is revealed has no clock: use time_free.")


def norm_sig(scores_BL: Tensor) -> Tensor:
    """sigmoid of the centred scores minus its mean over the sequence, inside (-1, 1)."""
    squashed = torch.sigmoid(scores_BL - scores_BL.mean(-1, keepdim=True))
    return squashed - squashed.mean(-1, keepdim=True)


def unmask_probability(schedule: Schedule, log_t: Tensor, log_s: Tensor) -> Tensor:
    """Probability [..., L] that a position masked at t is revealed by s < t: 1 - m(s)/m(t)."""
    log_m_s = schedule.log_mask(log_s)
    kept = log_m_s - schedule.log_mask(log_t)
    return torch.where(log_m_s.isneginf(), 1.0, -torch.expm1(kept))


def log_shares(log_rate: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """log of each active rate over their sum, [..., L], -inf elsewhere; and the log-sum, [...].
    Both are zero where none is active."""
    some = active.any(-1, keepdim=True)
    log_rate = torch.where(active, log_rate, torch.where(some, -math.inf, 0.0))
    log_sum = log_rate.logsumexp(-1, keepdim=True)
    return torch.where(some, log_rate - log_sum, 0.0), torch.where(some, log_sum, 0.0)[..., 0]


def next_log_shares(weights: Weights, masked: Tensor, last: Any = None) -> tuple[Tensor, Tensor]:
    """log-probability that each position comes next, and the log-sum; see `Weights.at`."""
    group = torch.where(masked, weights.group, torch.iinfo(torch.int64).max)
    able = masked & (weights.group == group.amin(-1, keepdim=True))
    return log_shares(weights.at(masked, last).log_w, able)


def reveal_log_probabilities(weights: Weights, rank_BL: Tensor) -> Tensor:
    """log-probability (nats) that each position comes when it does, float32 [B, L], by position."""
    order_BL, rows = rank_BL.argsort(-1), len(rank_BL)
    last_BL = F.pad(order_BL, (1, 0), value=-1)[:, :-1]
    steps_N = torch.arange(rank_BL.shape[1], device=rank_BL.device)
    masked_BNL = rank_BL[:, None] >= steps_N[:, None]
    spread: Any = (a if a is None else a.expand(rows, *a.shape[1:])[:, None] for a in weights)
    share_BNL, _ = next_log_shares(Weights(*spread), masked_BNL, last_BL)
    return share_BNL.gather(-1, order_BL[..., None])[..., 0].gather(-1, rank_BL)


def gumbel(like: Tensor, rng: Rng) -> Tensor:
    """Gumbel noise of this shape, in float64: float32 would cut off the tail near 16 nats."""
    noise = torch.empty(like.shape, dtype=torch.float64, device=like.device)
    return -noise.exponential_(generator=rng).clamp_(min=1e-300).log_()


def race_ranks(
    weights: Weights, targets_BL: Tensor, rng: Rng, last_B: Any = None, reveals: Any = None
) -> Tensor:
    """Draw one order per row: ranks, int64 [B, L], 0 first. What is no target comes before all
    others, as it stands in the text.

    last_B: the position revealed last, -1 for none; None for the last that is no target.
    reveals: how many are of interest; weights that change with every reveal are drawn so far only,
      and later positions have rank L. None for all.
    """
    if weights.stepwise:
        return _walk_ranks(weights, targets_BL, rng, last_B, reveals)
    key_BL = torch.where(targets_BL, -weights.log_w - gumbel(weights.log_w, rng), 0.0)
    order_BL = key_BL.argsort(dim=-1, stable=True)
    group_BL = torch.where(targets_BL, weights.group, -1).gather(-1, order_BL)
    return order_BL.gather(-1, group_BL.argsort(dim=-1, stable=True)).argsort(-1)


def _walk_ranks(
    weights: Weights, targets_BL: Tensor, rng: Rng, last_B: Any, reveals: Any
) -> Tensor:
    given_BL, length = ~targets_BL, targets_BL.shape[1]
    where_L, before_B = torch.arange(length, device=targets_BL.device), given_BL.sum(-1)
    rank_BL = torch.where(given_BL, given_BL.cumsum(-1) - 1, length)
    if last_B is None:
        last_B = torch.where(given_BL, where_L, -1).amax(-1)
    for step in range(length if reveals is None else min(reveals, length)):
        masked_BL = rank_BL == length
        share_BL, _ = next_log_shares(weights, masked_BL, last_B)
        next_B = (share_BL + gumbel(share_BL, rng)).argmax(-1)
        chosen_BL = masked_BL & (where_L == next_B[:, None])
        rank_BL = torch.where(chosen_BL, (before_B + step)[:, None], rank_BL)
        last_B = torch.where(chosen_BL.any(-1), next_B, last_B)
    return rank_BL


def remove_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Logits with the mask token's set to -inf: it is never predicted."""
    is_mask_V = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return torch.where(is_mask_V, -math.inf, logits)


# The network


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return x_BLD * (1 + scale_B1D) + shift_B1D


def frequencies(count: int, device: torch.device) -> Tensor:
    """From 1 down to nearly 1e-4, float32."""
    return torch.exp(-math.log(10000.0) * torch.arange(count, device=device) / count)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Halves of [B, L, ..., D / H] rotated by their position, in float32."""
    cos, sin = turn
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Plain(NamedTuple):
    """Everyone sees everyone; or, if causal, itself and what stands before it.

    turn: cosines and sines of the rotary positions, float32 [L, 1, 1, D / 2H] or [B, ...].
    """

    turn: tuple[Tensor, Tensor]
    causal: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Any) -> Tensor:
        """Mix the values; all are [B, H, L, D / H]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class Ranked(NamedTuple):
    """Queries, then contents, [2 L]. A query sees the contents of lower ranks and itself, or the
    queries of its rank; a content sees those of its own and of lower ranks.

    asked, known: bool [B or 1, 1, L, 2 L] and [..., L], whom queries and contents see.
    """

    turn: tuple[Tensor, Tensor]
    asked: Tensor
    known: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Any) -> Tensor:
        (query, content), (_, key), (_, value) = (a.chunk(2, 2) for a in (q, k, v))
        asked = F.scaled_dot_product_attention(query, k, v, attn_mask=self.asked)
        known = F.scaled_dot_product_attention(content, key, value, attn_mask=self.known)
        return torch.cat([asked, known], 2)


def ranked(turn: tuple[Tensor, Tensor], rank_BL: Tensor, together: bool) -> Ranked:
    """The view of ranks, [B or 1, L]; together: whether queries of one rank see each other."""
    asking, other = rank_BL[:, None, :, None], rank_BL[:, None, None, :]
    where_L = torch.arange(rank_BL.shape[1], device=rank_BL.device)
    same = other == asking if together else (where_L == where_L[:, None]).expand_as(other < asking)
    return Ranked(turn, torch.cat([same, other < asking], -1), other <= asking)


class Cached(NamedTuple):
    """A few tokens that are written into slots of a memory and see some of it.

    slots: int64 [Q] or [B, Q], where each is written. sees: bool [B or 1, 1, Q, S].
    """

    turn: tuple[Tensor, Tensor]
    slots: Tensor
    sees: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, memory: Any) -> Tensor:
        if not memory:  # keys and values, [B, S, H, D / H] each
            shape = (k.shape[0], self.sees.shape[-1], k.shape[1], k.shape[3])
            memory += [k.new_zeros(shape), v.new_zeros(shape)]
        rows_B1 = torch.arange(len(k), device=k.device)[:, None]
        for kept, new in zip(memory, (k, v), strict=True):
            kept[rows_B1, self.slots] = new.transpose(1, 2)
        k, v = (kept.transpose(1, 2) for kept in memory)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.sees)


View = Plain | Ranked | Cached


def zero_linear(width: int, out: int) -> nn.Linear:
    """A Linear that starts at zero."""
    linear = nn.Linear(width, out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def mlp(width: int, hidden: int, last: nn.Linear) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), last)


class Norm(nn.Module):
    """Layer norm in float32 with a scale only."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return F.layer_norm(x_BLD.float(), self.weight.shape, self.weight, eps=1e-5)


class Block(nn.Module):
    """Attention and MLP, each behind an adaptive layer norm and a gate that starts at zero."""

    def __init__(self, s: Settings):
        super().__init__()
        self.heads = s.heads
        self.norm1 = Norm(s.width)
        self.attn_qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.attn_out = nn.Linear(s.width, s.width, bias=False)
        self.norm2 = Norm(s.width)
        self.mlp = mlp(s.width, 4 * s.width, nn.Linear(4 * s.width, s.width))
        self.adaLN_modulation = zero_linear(s.cond_dim, 6 * s.width)

    def forward(self, x_BLD: Tensor, cond_BD: Tensor, view: View, memory: Any = None) -> Tensor:
        modulation_B1D = self.adaLN_modulation(cond_BD)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_B1D.chunk(6, -1)
        h_BLD = self._attend(modulate(self.norm1(x_BLD), shift1, scale1), view, memory)
        x_BLD = x_BLD + gate1 * h_BLD
        return x_BLD + gate2 * self.mlp(modulate(self.norm2(x_BLD), shift2, scale2))

    def _attend(self, h_BLD: Tensor, view: View, memory: Any) -> Tensor:
        qkv = self.attn_qkv(h_BLD).unflatten(-1, (3, self.heads, -1))
        q, k = rotate(qkv[:, :, :2], view.turn).transpose(1, 3).unbind(2)
        mixed = view.attend(q, k, qkv[:, :, 2].transpose(1, 2), memory)
        return self.attn_out(mixed.transpose(1, 2).flatten(2))


def blocks(s: Settings, count: int) -> nn.ModuleList:
    return nn.ModuleList(Block(s) for _ in range(count))


class TimestepEmbedder(nn.Module):
    """Noise level sigma, [B], to [B, cond_dim]."""

    def __init__(self, s: Settings):
        super().__init__()
        last = nn.Linear(s.cond_dim, s.cond_dim)
        self.mlp = nn.Sequential(nn.Linear(256, s.cond_dim), nn.SiLU(), last)

    def forward(self, sigma_B: Tensor) -> Tensor:
        angle_BD = sigma_B[:, None] * frequencies(128, sigma_B.device)
        return self.mlp(torch.cat([angle_BD.cos(), angle_BD.sin()], -1))


class Embedding(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(s.vocab_size, s.width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.embedding)


class OutputLayer(nn.Module):
    def __init__(self, s: Settings):
        super().__init__()
        self.norm_final = Norm(s.width)
        self.linear = zero_linear(s.width, s.vocab_size)
        self.adaLN_modulation = zero_linear(s.cond_dim, 2 * s.width)

    def forward(self, x_BLD: Tensor, cond_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond_BD)[:, None].chunk(2, -1)
        return self.linear(modulate(self.norm_final(x_BLD), shift, scale)).float()


class Transformer(nn.Module):
    """Tokens to hidden states, and those to logits: MDLM's DiT, with its names."""

    def __init__(self, s: Settings):
        super().__init__()
        self.head_size = s.width // s.heads
        self.vocab_embed = Embedding(s)
        self.sigma_map = TimestepEmbedder(s)
        self.blocks = blocks(s, s.layers)
        self.output_layer = OutputLayer(s)

    def condition(self, sigma_B: Tensor | None = None) -> Tensor:
        """Conditioning vector, [B, cond_dim]; for None that of zero, [1, cond_dim]."""
        if sigma_B is None:
            sigma_B = torch.zeros(1, device=self.vocab_embed.embedding.device)
        return F.silu(self.sigma_map(sigma_B))

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions, [L] or [B, L]; see `Plain`."""
        frequency_D = frequencies(self.head_size // 2, positions.device)
        angle = positions[..., None, None, None] * frequency_D
        return angle.cos(), angle.sin()

    def forward(self, tokens_BL: Tensor, cond_BD: Tensor, view: View, memory: Any = None) -> Tensor:
        """Hidden states [B, L, width]; the residual stream is float32. memory: see `Cached`."""
        x_BLD = self.vocab_embed(tokens_BL)
        for index, block in enumerate(self.blocks):
            x_BLD = block(x_BLD, cond_BD, view, None if memory is None else memory[index])
        return x_BLD


class OrderHead(nn.Module):
    """Blocks, then an MLP to a score per position that starts at zero: a random order."""

    def __init__(self, s: Settings):
        super().__init__()
        self.blocks = blocks(s, s.head_layers)
        self.norm = Norm(s.width)
        self.mlp = mlp(s.width, s.width, zero_linear(s.width, 1))

    def forward(self, x_BLD: Tensor, cond_BD: Tensor, view: View) -> Tensor:
        for block in self.blocks:
            x_BLD = block(x_BLD, cond_BD, view)
        return self.mlp(self.norm(x_BLD))[..., 0].float()


class Pointed(NamedTuple):
    """What a pointer says of each row: log_w [B, L], neighbours and moves; see `Weights`."""

    log_w: Tensor
    neighbours: Tensor
    moves: Tensor


class Pointer(nn.Module):
    """Which position comes next, from the one that was revealed last: tables over positions, over
    neighbours and over distances, and a term over the distance read off a hidden state."""

    WINDOW = 16  # distances are told apart up to here
    RATE = 30.0  # what the tables hold counts so many times

    def __init__(self, s: Settings, layers: int):
        super().__init__()
        distances = 2 * self.WINDOW + 1
        self.position = nn.Parameter(torch.zeros(s.length))
        self.distance = nn.Parameter(torch.zeros(distances))
        self.neighbours = nn.Parameter(torch.zeros(2, 2))
        self.blocks = blocks(s, layers)
        self.norm = Norm(s.width)
        self.content = zero_linear(s.width, distances)

    def forward(self, x_BLD: Tensor, cond_BD: Tensor, view: View) -> Pointed:
        for block in self.blocks:
            x_BLD = block(x_BLD, cond_BD, view)
        return self.tables(len(x_BLD))._replace(moves=self.moves(x_BLD))

    def tables(self, rows: int) -> Pointed:
        """What it says as long as no content is read."""
        moves = self.distance.expand(len(self.position), -1)
        tables = (self.RATE * a for a in (self.position, self.neighbours, moves))
        return Pointed(*(a.expand(rows, *a.shape) for a in tables))

    def moves(self, x_BLD: Tensor) -> Tensor:
        """float32 [..., 2 W + 1], a row for each content."""
        return self.content(self.norm(x_BLD)).float() + self.RATE * self.distance


class LoMDM(nn.Module):
    """A network with an order. Its heads read hidden states through a stop-gradient."""

    def __init__(self, settings: Settings):
        super().__init__()
        self._build(settings)

    def _build(self, s: Settings) -> None:
        self.settings = s
        self.backbone = Transformer(s)
        if s.walks:
            self.walk_head = nn.ParameterDict({"table": torch.zeros(2, 2)})
        if s.scores == "token":
            self.token_head = nn.ParameterDict({"log_rate": torch.zeros(s.vocab_size)})
        if s.scores == "position":
            self.forward_head, self.reverse_head = OrderHead(s), OrderHead(s)
        if s.scores == "pointer":
            self.posterior_head, self.prior_head = Pointer(s, s.head_layers), Pointer(s, 0)

    def forward(
        self,
        z_BL: Tensor,
        log_t_B: Tensor | None = None,
        context_BL: Tensor | None = None,
        rank_BL: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Logits, float32 [B, L, V], and what the reverse order is read off, float32 [B, L], or
        `Pointed`: see `schedule`.

        Args:
          z_BL: int64 ids, the mask id where the text is hidden.
          log_t_B: log of the time, for time conditioning; None feeds a noise level of zero.
          context_BL: on the causal and the ranked layout, what a position sees of those before
            it: the clean text, to score all in one pass. None for z itself.
          rank_BL: on the ranked layout, when each position is revealed, int64, 0 first. None for
            the groups; where a pass scores an order, for the text of z from left to right, after
            which each hidden position is asked as if it alone came next.
        """
        hidden_BQD, cond_BD, view = self.encode(z_BL, log_t_B, context_BL, rank_BL)
        logits_BLV = self.backbone.output_layer(self.at_positions(hidden_BQD, z_BL), cond_BD)
        scores, hidden_BQD, cond_BD = self.settings.scores, hidden_BQD.detach(), cond_BD.detach()
        if scores == "position":
            return logits_BLV, self.reverse_head(hidden_BQD, cond_BD, view)
        if scores == "pointer":
            return logits_BLV, self.prior_head(hidden_BQD[:, z_BL.shape[1] :], cond_BD, view)
        if scores == "token":  # revealed at the rate sum p_v w_v, and then v in these shares
            log_p_BLV = remove_mask(logits_BLV, self.settings.mask_id).log_softmax(-1)
            logits_BLV = log_p_BLV + self.token_head["log_rate"]
            return logits_BLV, logits_BLV.logsumexp(-1)
        return logits_BLV, torch.zeros_like(z_BL, dtype=torch.float32)

    denoise = forward  # of subclasses as well, whose `forward` is transformers'

    def encode(self, z_BL: Tensor, log_t_B=None, context_BL=None, rank_BL=None):
        """Hidden states [B, Q, width] of what attention sees, conditioning and view; args as of
        `forward`."""
        sigma_B = None
        if self.settings.time_conditioning and log_t_B is not None:  # MDLM's log-linear noise
            sigma_B = -torch.log1p(-(1 - 1e-3) * log_t_B.exp())
        cond_BD = self.backbone.condition(sigma_B)
        tokens_BQ, view = self._layout(z_BL, z_BL if context_BL is None else context_BL, rank_BL)
        return self.backbone(tokens_BQ, cond_BD, view), cond_BD, view

    def _layout(self, z_BL: Tensor, context_BL: Tensor, rank_BL: Any) -> tuple[Tensor, View]:
        """Input tokens [B, Q], and who sees whom."""
        s, where_L = self.settings, torch.arange(z_BL.shape[1], device=z_BL.device)
        if s.layout == "full":
            return z_BL, Plain(self.backbone.turn(where_L))
        if s.layout == "causal":  # each slot holds the token before the one that it predicts
            if not self._left_to_right:
                context_BL = context_BL[:, self.groups(z_BL).argsort()]
            before_BL = F.pad(context_BL[:, :-1], (1, 0), value=s.mask_id)
            return before_BL, Plain(self.backbone.turn(where_L), causal=True)
        together = s.one_pass == "groups"
        if rank_BL is None:
            rank_BL = self.groups(z_BL)[None] if together else _as_given(z_BL != s.mask_id)
        view = ranked(self.backbone.turn(where_L.repeat(2)), rank_BL, together)
        return torch.cat([z_BL, context_BL], 1), view

    def at_positions(self, hidden_BQD: Tensor, z_BL: Tensor) -> Tensor:
        """The state of each position of the text, [B, L, width]."""
        if self.settings.layout == "causal" and not self._left_to_right:
            return hidden_BQD[:, self.groups(z_BL)]
        return hidden_BQD[:, : z_BL.shape[1]]

    @property
    def _left_to_right(self) -> bool:
        return self.settings.groups == tuple(range(self.settings.length))

    def groups(self, like_BL: Tensor) -> Tensor:
        """The group of each position, int64 [L]."""
        groups = self.settings.groups or ()
        return torch.tensor(groups[: like_BL.shape[1]], device=like_BL.device)

    def forward_order(self, x_BL: Tensor) -> Schedule:
        """The forward schedule of the clean text x: it may look at all of it."""
        s = self.settings
        if s.scores == "none":
            return self.schedule(torch.zeros_like(x_BL, dtype=torch.float32))
        if s.scores == "token":
            return self.schedule(self.token_head["log_rate"][x_BL])
        view = Plain(self.backbone.turn(torch.arange(x_BL.shape[1], device=x_BL.device)))
        with torch.no_grad():
            cond_BD = self.backbone.condition()
            if s.scores == "pointer":
                x_BLD = self.backbone.vocab_embed(x_BL)
            else:
                x_BLD = self.backbone(x_BL, cond_BD, view)
        head = self.posterior_head if s.scores == "pointer" else self.forward_head
        return self.schedule(head(x_BLD, cond_BD, view))

    def reverse(self, *args: Any) -> tuple[Tensor, Schedule]:
        """Logits and the reverse schedule of masked text; args as of `forward`."""
        logits_BLV, scores = self.denoise(*args)
        return logits_BLV, self.schedule(scores)

    def schedule(self, scores: Tensor | Pointed) -> Schedule:
        """From what a pass scores, [B, L], to the schedule of the order."""
        log_w = scores.log_w if isinstance(scores, Pointed) else scores
        order, kind = self.settings.order, self.settings.kind
        group, clock = torch.zeros_like(log_w, dtype=torch.int64), ORDERS[kind][2]
        if clock == "windows":
            group = group + self.groups(log_w)
        if kind == "mdm":
            log_w = torch.full_like(log_w, math.log(order["exponent"]))
        if kind == "lomdm":
            log_w = torch.log(order["c1"] + order["c2"] * norm_sig(log_w))
        if clock != "none":
            return Schedule(Weights(log_w, group), clock)
        log_w = log_w.log_softmax(-1) + math.log(log_w.shape[-1])  # a mean exponent of 1
        table = self.walk_head["table"].detach().expand(*log_w.shape[:-1], 2, 2)
        if not isinstance(scores, Pointed):
            return Schedule(Weights(log_w, group, table), clock)
        return Schedule(Weights(log_w, group, table + scores.neighbours, scores.moves), clock)

    def recall(self, tokens_BQ, positions, slots, sees, memory) -> Tensor:
        """Hidden states [B, Q, width] of tokens that are written into slots of a memory, see
        `Cached`; positions are int64 [Q] or [B, Q], sees is bool [Q, S] or [B, Q, S]."""
        sees = sees.expand(1, -1, -1) if sees.ndim == 2 else sees
        view = Cached(self.backbone.turn(positions), slots, sees[:, None])
        return self.backbone(tokens_BQ, self.backbone.condition(), view, memory)

    def predict(self, hidden_BQD: Tensor) -> Tensor:
        """Logits, float32 [B, Q, V], of such hidden states."""
        return self.backbone.output_layer(hidden_BQD, self.backbone.condition())

    def check(self, tokens_BL: Tensor) -> Tensor:
        """The same as int64, if the model can score or fill such text.

        Raises:
          ValueError: it cannot.
        """
        s = self.settings
        if tokens_BL.ndim != 2 or tokens_BL.is_floating_point():
            raise ValueError("text must be whole numbers, [rows, positions].")
        length = tokens_BL.shape[1]
        some = {*(s.groups or ())[:length]}
        exact = s.scores == "pointer" or some != {*range(len(some))}
        if not 0 < length <= s.length or (exact and length < s.length):
            order = f"in the order {s.order['name']!r}"
            raise ValueError(f"text has {length} positions, but the model {s.length}, {order}.")
        if ((tokens_BL < 0) | (tokens_BL >= s.vocab_size)).any():
            raise ValueError(f"ids must run from 0 to {s.vocab_size - 1}.")
        return tokens_BL.long()

    @torch.no_grad()
    def nelbo(
        self, tokens_BL: Tensor, targets_BL: Any = None, *, draws: int = 8, generator: Rng = None
    ) -> "Bound":
        """An upper bound on -log p of each row, estimated; see `Bound`.

        Args:
          tokens_BL: int ids.
          targets_BL: bool, what is scored; all the rest is given. None for all.
          draws: estimates of each row, spread evenly over times, or over numbers of masks.

        Raises:
          ValueError: the text is not of the model, or there are no draws.
        """
        tokens_BL = self.check(tokens_BL)
        if draws < 1:
            raise ValueError(f"draws is {draws}, but one estimate or more is needed.")
        if targets_BL is None:
            targets_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
        start_B = torch.rand(len(tokens_BL), device=tokens_BL.device, generator=generator)
        found, one_pass = [], self.settings.one_pass
        draw = {"state": draw_state, "groups": draw_groups, "order": draw_order}[one_pass]
        forward = self.forward_order(tokens_BL)
        for number in range(draws):
            uniform_B = (start_B + number / draws) % 1
            found.append(draw(self, forward, tokens_BL, targets_BL, uniform_B, generator))
        return bound_of(Terms(*map(torch.stack, zip(*found, strict=True))))

    @torch.no_grad()
    def sample(
        self,
        given_BL: Tensor | None = None,
        *,
        rows: int = 1,
        reveal: int = 1,
        steps: int = 0,
        grid: str = "even",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Rng = None,
    ) -> "Samples":
        """Fill text.

        Args:
          given_BL: int ids that stay, and the mask id at what is to be filled, anywhere and in
            each row elsewhere. None for `rows` of nothing.
          reveal: positions per call of the network, drawn by the order's own race; 1 is exact.
          steps: above 0, of each group, instead of the race: each step reveals positions with the
            probability that they are revealed in it. Not where a pass scores an order.
          grid: of the steps: "even" in the expected number of reveals, "linear" in time, "cosine".
          temperature, top_k, top_p: see `Filter`.

        Raises:
          ValueError: the text or the settings are not of the model.
        """
        s = self.settings
        if given_BL is None:
            device = self.backbone.vocab_embed.embedding.device
            given_BL = torch.full((rows, s.length), s.mask_id, device=device)
        z_BL = self.check(given_BL).clone()
        _check_sampling(s, reveal, steps, grid)
        draw = Draw(s.mask_id, Filter(temperature, top_k, top_p).checked(), generator)
        if s.one_pass == "order":
            return fill_in_order(self, z_BL, reveal, draw)
        context = {"full": Whole, "causal": Causal, "ranked": Groups}[s.layout](self, z_BL)
        choose = Ancestral(steps, grid) if steps else Race(reveal)
        return fill_in_blocks(context, choose, draw)


def _as_given(given_BL: Tensor) -> Tensor:
    """Ranks of what is given from left to right, then one for all others."""
    return torch.where(given_BL, given_BL.cumsum(-1) - 1, given_BL.sum(-1, keepdim=True))


# Bounds


class Terms(NamedTuple):
    """The terms of the bound, float32 [B], in nats per row: of the tokens, of the order, of the
    clock, and of what is left to be revealed at the end of time."""

    main: Tensor
    order: Tensor
    clock: Tensor
    reconstruction: Tensor


class Bound(NamedTuple):
    """Of each row, float32 [B], nats: the terms, means over draws; mean, which is main + order +
    reconstruction and bounds -log p(text); and its standard error over draws, as if they were
    independent, nan for one. The clock belongs to the bound of arXiv 2602.02112; text has none."""

    terms: Terms
    mean: Tensor
    error: Tensor


def bound_of(terms: Terms) -> Bound:
    """From the terms of N draws, [N, B]."""
    total_NB = terms.main + terms.order + terms.reconstruction
    count, error_B = len(total_NB), torch.full_like(total_NB[0], math.nan)
    if count > 1:
        error_B = total_NB.std(0) / math.sqrt(count)
    return Bound(Terms(*(term_NB.mean(0) for term_NB in terms)), total_NB.mean(0), error_B)


class Times(NamedTuple):
    """log t, the importance weight, and whether the draw stands at the end, t = eps; any shape."""

    log_t: Tensor
    weight: Tensor
    at_end: Tensor


def times(uniform: Tensor, eps: float, share: float) -> Times:
    """Times in [eps, 1] from uniforms in [0, 1), of which a share stands at eps."""
    at_end = uniform < share
    t = eps + (1 - eps) * ((uniform - share) / (1 - share)).clamp(min=0.0)
    weight = torch.where(at_end, 1 / share, (1 - eps) / (1 - share))
    return Times(torch.where(at_end, eps, t).log(), weight, at_end)


def token_nll(logits_BLV: Tensor, tokens_BL: Tensor, mask_id: int) -> Tensor:
    """Cross-entropy in nats, float32 [B, L], of all tokens but the mask."""
    logits_BVL = remove_mask(logits_BLV, mask_id).transpose(1, 2)
    return F.cross_entropy(logits_BVL, tokens_BL, reduction="none")


def _look(model: LoMDM, tokens_BL: Tensor, mask_BL: Tensor, *args: Any) -> tuple[Tensor, Schedule]:
    """Cross-entropies [B, L] and the reverse schedule of masked text."""
    mask_id = model.settings.mask_id
    logits_BLV, backward = model.reverse(torch.where(mask_BL, mask_id, tokens_BL), *args)
    return token_nll(logits_BLV, tokens_BL, mask_id), backward


def continuous(
    model: LoMDM, forward: Schedule, tokens_BL: Tensor, mask_BL: Tensor, at: Times
) -> Terms:
    """The continuous-time estimate (arXiv 2602.02112), and what is revealed at once at the end.

    mask_BL: each target independently with probability m(t) of the forward schedule.
    """
    nll_BL, backward = _look(model, tokens_BL, mask_BL, at.log_t)
    rates = [schedule.log_velocity(at.log_t) for schedule in (forward, backward)]
    ours, theirs = (log_shares(rate, mask_BL & ~rate.isneginf()) for rate in rates)
    active_BL = mask_BL & ~rates[0].isneginf()
    rate_B = torch.where(active_BL.any(-1) & ~at.at_end, at.weight * ours[1].exp(), 0.0)
    main, order, clock = (rate_B * a for a in _per_reveal(nll_BL, active_BL, ours, theirs))
    left_B = at.weight * torch.where(mask_BL, nll_BL, 0.0).sum(-1)
    return Terms(main, order, clock, torch.where(at.at_end, left_B, 0.0))


def time_free(
    model: LoMDM,
    forward: Schedule,
    tokens_BL: Tensor,
    targets_BL: Tensor,
    mask_BL: Tensor,
    temperature: float = 1.0,
) -> Terms:
    """The time-free estimate: a race instead of a clock.

    mask_BL: the last of the targets in an order drawn from the forward weights, as many as are
      drawn uniformly from 1 to all.
    temperature: of both orders, in training; the bound is that of the flattened orders.
    """
    nll_BL, backward = _look(model, tokens_BL, mask_BL)
    ours, theirs = (
        next_log_shares(schedule.weights.flattened(temperature), mask_BL)
        for schedule in (forward, backward)
    )
    terms = _per_reveal(nll_BL, mask_BL & ~ours[0].isneginf(), ours, theirs)
    main, order, clock = (targets_BL.sum(-1) * term_B for term_B in terms)
    return Terms(main, order, clock, torch.zeros_like(main))


def _per_reveal(nll_BL: Tensor, active_BL: Tensor, ours, theirs) -> tuple[Tensor, Tensor, Tensor]:
    """Main, order and clock of the next reveal, [B], from log-shares and log-sums of rates: with
    shares w and sums S they are  w CE,  w log(w / ŵ)  and  log(S/Ŝ) - 1 + Ŝ/S."""
    share_BL, log_ratio_B = ours[0].exp(), ours[1] - theirs[1]
    excess_BL = torch.where(active_BL, ours[0] - theirs[0], 0.0)
    main_B, order_B = (
        torch.where(active_BL, share_BL * a_BL, 0.0).sum(-1) for a_BL in (nll_BL, excess_BL)
    )
    return main_B, order_B, torch.expm1(-log_ratio_B) + log_ratio_B


def all_groups(model: LoMDM, tokens_BL: Tensor, mask_BL: Tensor, weight_BL: Tensor) -> Terms:
    """All groups of a fixed order in one pass: the sum of weight times cross-entropy.

    mask_BL, weight_BL: in each group some of its targets, at random, with the weight of all over
      masked ones, if the number is drawn uniformly from 1 to all; or each with probability t and
      weight 1 / t.
    """
    nll_BL, _ = _look(model, tokens_BL, mask_BL, None, tokens_BL)
    main_B = torch.where(mask_BL, weight_BL * nll_BL, 0.0).sum(-1)
    nothing_B = torch.zeros_like(main_B)
    return Terms(main_B, nothing_B, nothing_B, nothing_B)


def all_ranks(
    model: LoMDM, forward: Schedule, tokens_BL: Tensor, targets_BL: Tensor, rank_BL: Tensor
) -> Terms:
    """A whole order in one pass, of what is given and then of the targets.

    rank_BL: int64; of the targets drawn from the forward weights, after what is given.
    """
    everything_BL = torch.ones_like(targets_BL)
    nll_BL, backward = _look(model, tokens_BL, everything_BL, None, tokens_BL, rank_BL)
    excess_BL = torch.zeros_like(nll_BL)
    if forward.weights.moves is not None:  # else both have the same order
        excess_BL = reveal_log_probabilities(forward.weights, rank_BL)
        excess_BL = excess_BL - reveal_log_probabilities(backward.weights, rank_BL)
    main_B, order_B = (torch.where(targets_BL, a, 0.0).sum(-1) for a in (nll_BL, excess_BL))
    return Terms(main_B, order_B, torch.zeros_like(main_B), torch.zeros_like(main_B))


def draw_state(model, forward, tokens_BL, targets_BL, uniform_B, rng) -> Terms:
    """One draw of `time_free`; of `continuous` if the network is told the time."""
    if model.settings.time_conditioning:
        eps, share = (model.settings.objective[k] for k in ("eps", "reconstruction_share"))
        at = times(uniform_B, eps, share)
        uniform_BL = torch.rand(targets_BL.shape, device=tokens_BL.device, generator=rng)
        mask_BL = targets_BL & (uniform_BL.log() < forward.log_mask(at.log_t))
        return continuous(model, forward, tokens_BL, mask_BL, at)
    count_B = targets_BL.sum(-1)
    masked_B = torch.minimum((uniform_B * count_B).long() + 1, count_B)
    rank_BL = race_ranks(forward.weights, targets_BL, rng)
    mask_BL = rank_BL >= (targets_BL.shape[1] - masked_B)[:, None]
    return time_free(model, forward, tokens_BL, targets_BL, mask_BL)


def draw_groups(model, forward, tokens_BL, targets_BL, uniform_B, rng) -> Terms:
    """One draw of `all_groups`."""
    group_BL, rank_BL = forward.weights.group, race_ranks(forward.weights, targets_BL, rng)
    count = int(group_BL.max()) + 1
    zeros_BG = rank_BL.new_zeros(len(rank_BL), count)
    ends_BL = torch.where(targets_BL, rank_BL + 1, 0)
    size_BL = zeros_BG.scatter_add(1, group_BL, targets_BL.long()).gather(1, group_BL)
    end_BL = zeros_BG.scatter_reduce(1, group_BL, ends_BL, "amax").gather(1, group_BL)
    masked_BL = ((uniform_B[:, None] + group_BL / count) % 1 * size_BL).long() + 1
    masked_BL = torch.minimum(masked_BL, size_BL)
    mask_BL = targets_BL & (rank_BL >= end_BL - masked_BL)
    return all_groups(model, tokens_BL, mask_BL, size_BL / masked_BL)


def draw_order(model, forward, tokens_BL, targets_BL, uniform_B, rng) -> Terms:
    """One draw of `all_ranks`."""
    z_BL = torch.where(targets_BL, model.settings.mask_id, tokens_BL)
    given_BL = given_ranks(model, z_BL, ~targets_BL, rng)
    rank_BL = race_ranks(forward.weights, targets_BL, rng, _last(given_BL))
    rank_BL = torch.where(targets_BL, rank_BL, given_BL)
    return all_ranks(model, forward, tokens_BL, targets_BL, rank_BL)


def given_ranks(model: LoMDM, z_BL: Tensor, given_BL: Tensor, rng: Rng) -> Tensor:
    """When each given position is read, int64 [B, L], L for all others: as the order would reveal
    them if there were nothing else, which is what the network has met."""
    weights, nothing_B = model.forward_order(z_BL).weights.after(given_BL), z_BL[:, 0] * 0 - 1
    rank_BL = race_ranks(weights, torch.ones_like(given_BL), rng, nothing_B)
    return torch.where(given_BL, rank_BL, z_BL.shape[1])


def _last(rank_BL: Tensor) -> Tensor:
    """The position that was read last, int64 [B]; -1 for none. Ranks of L are not read."""
    known_BL = torch.where(rank_BL < rank_BL.shape[1], rank_BL, -1)
    top_B, where_B = known_BL.max(-1)
    return torch.where(top_B >= 0, where_B, -1)


# Samplers


class Samples(NamedTuple):
    """Filled text, int64 [B, L]; the step (1, 2, ...) of its row that revealed each position, int64
    [B, L], 0 for what was given; and how often the network was asked, for all rows together."""

    tokens: Tensor
    revealed: Tensor
    calls: int


class Filter(NamedTuple):
    """What is drawn from instead of the model's own probabilities: logits over the temperature (0
    for the likeliest), of the `top_k` likeliest (0 for all), and of the likeliest that together
    have the probability `top_p`, the one that crosses it included."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def checked(self) -> "Filter":
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(f"{self}: temperature and top_k from 0, top_p above 0 and at most 1.")
        return self

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Logits with -inf for what may not be drawn."""
        if self.temperature == 0:
            best_N1 = logits_NV.argmax(-1, keepdim=True)
            return torch.full_like(logits_NV, -math.inf).scatter(-1, best_N1, 0.0)
        logits_NV = logits_NV / self.temperature
        if 0 < self.top_k < logits_NV.shape[-1]:
            least_N1 = logits_NV.topk(self.top_k).values[..., -1:]
            logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)
        if self.top_p < 1:
            sorted_NV = logits_NV.sort(-1, descending=True).values
            share_NV = sorted_NV.softmax(-1)
            out_NV = share_NV.cumsum(-1) - share_NV >= self.top_p
            out_NV[..., 0] = False  # the likeliest stays, whatever the rounding
            least_N1 = sorted_NV.masked_fill(out_NV, math.inf).amin(-1, keepdim=True)
            logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -math.inf)
        return logits_NV


class Draw(NamedTuple):
    """How tokens are drawn."""

    mask_id: int
    filter: Filter
    rng: Rng

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """One token each, int64 [N]."""
        logits_NV = self.filter(remove_mask(logits_NV, self.mask_id))
        return (logits_NV + gumbel(logits_NV, self.rng)).argmax(-1)


def _check_sampling(s: Settings, reveal: int, steps: int, grid: str) -> None:
    if reveal < 1 or steps < 0 or (reveal > 1 and steps):
        raise ValueError(f"reveal is {reveal} and steps is {steps}: set one of them, above zero.")
    if grid not in GRIDS:
        raise ValueError(f"grid is {grid!r}, but it must be one of {', '.join(GRIDS)}.")
    if steps and s.one_pass == "order":
        raise ValueError(f"steps is {steps}, but this model knows no times: use reveal.")
    if s.time_conditioning and not steps:
        raise ValueError("this network is told the time, so it needs a grid of times: set steps.")


class Race(NamedTuple):
    """So many positions, drawn without replacement by the order's own weights."""

    reveal: int

    def __call__(
        self, schedule: Schedule, hidden_BK: Tensor, log_t_B: Tensor, step: int, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """What is revealed, bool [B, K], and log of the time after."""
        log_share_BK, _ = next_log_shares(schedule.weights, hidden_BK)
        able_BK = hidden_BK & ~log_share_BK.isneginf()
        score_BK = (log_share_BK + gumbel(log_share_BK, rng)).masked_fill(~able_BK, -math.inf)
        best = score_BK.topk(min(self.reveal, score_BK.shape[1])).indices
        return torch.zeros_like(hidden_BK).scatter(1, best, True) & able_BK, log_t_B


class Ancestral(NamedTuple):
    """Each position with the probability 1 - m(s)/m(t) of a step of a grid of times."""

    steps: int
    grid: str

    def __call__(
        self, schedule: Schedule, hidden_BK: Tensor, log_t_B: Tensor, step: int, rng: Rng
    ) -> tuple[Tensor, Tensor]:
        """As of `Race`."""
        log_s_B, share = torch.full_like(log_t_B, -math.inf), (step + 1) / self.steps
        if share < 1 and self.grid == "even":
            log_s_B = even_progress(schedule, hidden_BK, log_t_B, self.steps - step)
        elif share < 1:
            s = 1 - share if self.grid == "linear" else math.cos(math.pi / 2 * share)
            log_s_B = torch.full_like(log_t_B, math.log(s))
        chance_BK = unmask_probability(schedule, log_t_B, log_s_B)
        uniform_BK = torch.rand(chance_BK.shape, device=chance_BK.device, generator=rng)
        return hidden_BK & (uniform_BK < chance_BK), log_s_B


def even_progress(schedule: Schedule, masked_BL: Tensor, log_t_B: Tensor, left: int) -> Tensor:
    """log s, float32 [B], by which (masked positions) / left are revealed in expectation: bisection
    on the logarithm of log(t/s), whose range, e^-15 to e^9, holds any step of small exponents."""
    low_B, high_B = torch.full_like(log_t_B, -15.0), torch.full_like(log_t_B, 9.0)
    for _ in range(40):
        middle_B = (low_B + high_B) / 2
        chance_BL = unmask_probability(schedule, log_t_B, log_t_B - middle_B.exp())
        short_B = torch.where(masked_BL, chance_BL, 0.0).sum(-1) < masked_BL.sum(-1) / left
        low_B = torch.where(short_B, middle_B, low_B)
        high_B = torch.where(short_B, high_B, middle_B)
    return log_t_B - ((low_B + high_B) / 2).exp()


class Whole:
    """A model that reads the state z anew at every call: one block of all positions."""

    def __init__(self, model: LoMDM, z_BL: Tensor):
        self.model, self.z_BL, self.sees_time = model, z_BL, model.settings.time_conditioning
        self.blocks = [torch.arange(z_BL.shape[1], device=z_BL.device)]

    def look(self, block: int, log_t_B: Tensor) -> tuple[Tensor, Schedule]:
        """Logits [B, K, V] of a block and its schedule in this state, parameters [B, K]."""
        logits_BLV, schedule = self.model.reverse(self.z_BL, log_t_B)
        return logits_BLV, schedule.at(self.z_BL == self.model.settings.mask_id)


class Remembering:
    """A model of groups with a key-value cache of what it has read of the text z."""

    sees_time = False

    def __init__(self, model: LoMDM, z_BL: Tensor):
        self.model, self.z_BL, self.read = model, z_BL, 0
        self.memory: list[Any] = [[] for _ in model.backbone.blocks]
        group_L = model.groups(z_BL)
        self.order, sizes = group_L.argsort(stable=True), group_L.bincount().tolist()
        self.blocks = list(self.order.split(sizes))
        asked = group_L.new_full((max(sizes),), len(sizes))
        self.held_S = torch.cat([group_L[self.order], asked])  # the group in each slot

    def look(self, block: int, log_t_B: Tensor) -> tuple[Tensor, Schedule]:
        """As of `Whole`; inside a block the order is random."""
        logits_BKV = self._ask(block)
        log_w, group = logits_BKV[..., 0] * 0, torch.zeros_like(logits_BKV[..., 0]).long()
        return logits_BKV, Schedule(Weights(log_w, group))

    def _ask(self, block: int) -> Tensor:
        raise NotImplementedError


class Causal(Remembering):
    """Slot n holds the token before the n-th position, and a mask token before the first."""

    def _ask(self, block: int) -> Tensor:
        slots_Q = torch.arange(self.read, block + 1, device=self.z_BL.device)
        before_BL = F.pad(self.z_BL[:, self.order], (1, 0), value=self.model.settings.mask_id)
        sees = self.held_S <= slots_Q[:, None]
        hidden_BQD = self.model.recall(before_BL[:, slots_Q], slots_Q, slots_Q, sees, self.memory)
        self.read = block + 1
        return self.model.predict(hidden_BQD[:, -1:])


class Groups(Remembering):
    """A slot for each position, by group; then those for what is asked, which sees itself and all
    groups before."""

    def _ask(self, block: int) -> Tensor:
        slots_S = torch.arange(len(self.held_S), device=self.z_BL.device)
        new_Q = slots_S[self.read : sum(map(len, self.blocks[:block]))]
        if len(new_Q):
            self._see(self.order[new_Q], new_Q, self.held_S <= self.held_S[new_Q, None])
            self.read += len(new_Q)
        length, places_K = len(self.order), self.blocks[block]
        asked_K = slots_S[length : length + len(places_K)]
        sees_S = (self.held_S < block) | ((slots_S >= length) & (slots_S <= asked_K[-1]))
        return self.model.predict(self._see(places_K, asked_K, sees_S.expand(len(asked_K), -1)))

    def _see(self, places_Q: Tensor, slots_Q: Tensor, sees: Tensor) -> Tensor:
        tokens_BQ = self.z_BL[:, places_Q]
        return self.model.recall(tokens_BQ, places_Q, slots_Q, sees, self.memory)


def fill_in_blocks(context: Any, choose: Race | Ancestral, draw: Draw) -> Samples:
    """Fill the context's text, block after block; a step that reveals nothing costs no call."""
    z_BL, calls = context.z_BL, 0
    revealed_BL, steps_B = torch.zeros_like(z_BL), torch.zeros_like(z_BL[:, 0])
    for block, places_K in enumerate(context.blocks):
        log_t_B, step, seen = torch.zeros(len(z_BL), device=z_BL.device), 0, None
        while (hidden_BK := z_BL[:, places_K] == draw.mask_id).any():
            if seen is None:
                seen, calls = context.look(block, log_t_B), calls + 1
            reveal_BK, log_t_B = choose(seen[1], hidden_BK, log_t_B, step, draw.rng)
            rows, which = reveal_BK.nonzero(as_tuple=True)
            steps_B, step = steps_B + hidden_BK.any(-1), step + 1
            z_BL[rows, places_K[which]] = draw(seen[0][rows, which])
            revealed_BL[rows, places_K[which]] = steps_B[rows]
            seen = None if len(rows) or context.sees_time else seen
    return Samples(z_BL, revealed_BL, calls)


def fill_in_order(model: LoMDM, z_BL: Tensor, reveal: int, draw: Draw) -> Samples:
    """Fill text on the ranked layout: what is revealed is read once and remembered. A call asks for
    the next `reveal` positions of each row's order, of which none sees another."""
    reader, revealed_BL, calls = Reader(model, z_BL, reveal), torch.zeros_like(z_BL), 0
    rank_BL, length = given_ranks(model, z_BL, z_BL != draw.mask_id, draw.rng), z_BL.shape[1]
    places_BQ = rank_BL.argsort(-1)[:, : int((rank_BL < length).sum(-1).max())]
    slots_BQ = rank_BL.gather(1, places_BQ)
    while (rank_BL == length).any():
        if slots_BQ.numel():
            reader.read(places_BQ, slots_BQ)
        places_BQ, slots_BQ = _next(reader.weights, rank_BL, reveal, draw.rng)
        logits_BQV, calls = reader.ask(places_BQ, slots_BQ[:, :1]), calls + 1
        rows, which = (slots_BQ < length).nonzero(as_tuple=True)
        places = places_BQ[rows, which]
        z_BL[rows, places] = draw(logits_BQV[rows, which])
        rank_BL[rows, places], revealed_BL[rows, places] = slots_BQ[rows, which], calls
    return Samples(z_BL, revealed_BL, calls)


def _next(weights: Weights, rank_BL: Tensor, reveal: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """The next positions of each row, int64 [B, Q], and their ranks, L where there is none."""
    length, masked_BL = rank_BL.shape[1], rank_BL == rank_BL.shape[1]
    drawn_BL = race_ranks(weights, masked_BL, rng, _last(rank_BL), reveal)
    order_BL = torch.where(masked_BL, drawn_BL, -1).argsort(dim=-1, stable=True)
    done_B1 = (~masked_BL).sum(-1, keepdim=True)
    slots_BQ = done_B1 + torch.arange(reveal, device=rank_BL.device)
    return order_BL.gather(1, slots_BQ.clamp(max=length - 1)), slots_BQ.clamp(max=length)


class Reader:
    """The memory of the ranked layout: a slot for each rank, then those for what is asked, the
    first of which also takes what is not to be kept.

    weights: of the order, as far as what is read tells.
    """

    def __init__(self, model: LoMDM, z_BL: Tensor, reveal: int):
        self.model, self.z_BL, self.length = model, z_BL, z_BL.shape[1]
        self.memory: list[Any] = [[] for _ in model.backbone.blocks]
        self.slots_S = torch.arange(self.length + reveal, device=z_BL.device)
        scores: Tensor | Pointed = torch.zeros_like(z_BL, dtype=torch.float32)
        if model.settings.scores == "pointer":
            scores = model.prior_head.tables(len(z_BL))
            scores = scores._replace(moves=scores.moves.clone())
        self.weights = model.schedule(scores).weights

    def read(self, places_BQ: Tensor, slots_BQ: Tensor) -> None:
        """Read the text at these places into their slots; what has slot L does not count."""
        sees, tokens_BQ = self.slots_S <= slots_BQ[..., None], self.z_BL.gather(1, places_BQ)
        hidden_BQD = self.model.recall(tokens_BQ, places_BQ, slots_BQ, sees, self.memory)
        if self.weights.moves is not None:
            rows, which = (slots_BQ < self.length).nonzero(as_tuple=True)
            moves = self.model.prior_head.moves(hidden_BQD[rows, which])
            self.weights.moves[rows, places_BQ[rows, which]] = moves

    def ask(self, places_BQ: Tensor, done_B1: Tensor) -> Tensor:
        """Logits [B, Q, V] of positions, each as if it alone came next after so many reveals."""
        asked_Q = self.slots_S[self.length :]
        sees = (self.slots_S < done_B1[..., None]) | (self.slots_S == asked_Q[:, None])
        masks_BQ = torch.full_like(places_BQ, self.model.settings.mask_id)
        hidden_BQD = self.model.recall(masks_BQ, places_BQ, asked_Q, sees, self.memory)
        return self.model.predict(hidden_BQD)


# Loading


def load(folder: str | Path, device: str | torch.device = "cpu") -> LoMDM:
    """The model of a folder with config.json and model.safetensors, ready to be used.

    Raises:
      ValueError: a file is damaged, or they do not belong together; it names what is wrong.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, file = (Path(folder) / name for name in ("config.json", "model.safetensors"))
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        tensors = load_file(file, device=str(device))
    except (SafetensorError, ValueError) as error:
        broken = file if isinstance(error, SafetensorError) else config
        raise ValueError(f"{broken} is damaged or cut short ({error}): copy it again.") from error
    with torch.device("meta"):  # nothing is allocated twice
        model = LoMDM(Settings.of(values))
    _check_tensors(tensors, model.state_dict(), file)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise ValueError(f"{file} has no tensor {name}, which its config.json asks for.")
        if name not in wanted:
            raise ValueError(f"{file} has a tensor {name}, of which its config.json knows nothing.")
        for what in ("shape", "dtype"):
            ours, theirs = getattr(found[name], what), getattr(wanted[name], what)
            if ours != theirs:
                raise ValueError(f"{file}: {name} has {what} {ours}, but it should have {theirs}.")


if PreTrainedModel is not None:

    class LoMDMConfig(PretrainedConfig):
        """Holds the keys of config.json; `Settings` says which there are."""

        model_type = "lomdm"

    class LoMDMPreTrained(LoMDM, PreTrainedModel):
        """The same network, with its parameters under the same names."""

        config_class = LoMDMConfig

        def __init__(self, config: LoMDMConfig):
            PreTrainedModel.__init__(self, config)
            self._build(Settings.of(config.to_dict()))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Modules start as they are made."""

        @classmethod
        def from_pretrained(cls, *args: Any, **options: Any) -> Any:
            """As of transformers, but what does not fit is an error."""
            asked = options.pop("output_loading_info", False)
            found: Any = super().from_pretrained(*args, **options, output_loading_info=True)
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if found[1][what]:
                    raise ValueError(f"the checkpoint has {what}: {sorted(found[1][what])}.")
            if {parameter.dtype for parameter in found[0].parameters()} != {torch.float32}:
                raise ValueError("dtype must be torch.float32: use torch.autocast for bfloat16.")
            return found if asked else found[0]

    class LoMDMModel(LoMDMPreTrained):
        """Partly masked text to hidden states."""

        def forward(self, input_ids: Tensor, attention_mask=None) -> Any:  # type: ignore[override]
            _check_attention(attention_mask)
            hidden_BLD = self.at_positions(self.encode(input_ids)[0], input_ids)
            return BaseModelOutput(last_hidden_state=hidden_BLD)

    class LoMDMForMaskedLM(LoMDMPreTrained):
        """Partly masked text to logits, -inf for the mask token; `labels`, -100 where none counts,
        give the mean cross-entropy, which is no bound: `nelbo` is."""

        def forward(self, input_ids: Tensor, attention_mask=None, labels=None) -> Any:  # type: ignore[override]
            _check_attention(attention_mask)
            logits_BLV = remove_mask(self.denoise(input_ids)[0], self.settings.mask_id)
            loss = None
            if labels is not None:
                loss = F.cross_entropy(logits_BLV.transpose(1, 2), labels)
            return MaskedLMOutput(loss=loss, logits=logits_BLV)


def _check_attention(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError(
            "attention_mask hides positions, but the model was trained to see all of them: pass "
            "texts of one length, and the mask token where they are to be filled."
        )
