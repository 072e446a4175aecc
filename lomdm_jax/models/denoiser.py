"""The network as objectives and samplers use it: backbone, output and the two order heads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lomdm_jax.models.order_head import OrderHead, TokenHead, WalkHead
from lomdm_jax.models.transformer import Sizes, Transformer
from lomdm_jax.models.visibility import View, causal, doubled, full


class Denoiser(nnx.Module):
    """A backbone and, for a learned order, a forward head (reads x) and a reverse head (reads z).

    The heads see the hidden states through a stop-gradient, so that the order terms train the
    heads only and the cross-entropy trains the backbone only. GenMD4 has one rate per vocabulary
    entry instead, and its reverse rates train the backbone too.

    Args:
      sizes: of the backbone; the heads share its width.
      mask_id: id of the mask token.
      head_layers: blocks in each order head.
      scores: what the order is learned from: "position" for a score per position from the two
        heads, "token" for one per vocabulary entry, "none" for a fixed order.
      walks: whether it holds a table over the neighbours.
      groups: the group of each position if the order is fixed, 0 first, and attention is to
        follow it; None for bidirectional attention. One position per group is a causal model with
        a shift, more are BD3-LM's doubled sequence; see `visibility`.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        mask_id: int,
        scores: str,
        head_layers: int = 1,
        walks: bool = False,
        groups: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        self.backbone = Transformer(sizes, rngs=rngs)
        self.mask_id, self.scores, self.groups = mask_id, scores, groups
        if walks:
            self.walk_head = WalkHead()
        if scores == "token":
            self.token_head = TokenHead(sizes.vocab_size)
        if scores == "position":
            self.forward_head = OrderHead(sizes, head_layers, rngs=rngs)
            self.reverse_head = OrderHead(sizes, head_layers, rngs=rngs)

    def denoise(
        self,
        z_BL: jax.Array,
        sigma_B: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        context_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, float32 [B, L, vocab_size], and reverse scores, float32 [B, L].

        Args:
          z_BL: token ids, masked positions holding the mask id, int32.
          sigma_B: noise level for time conditioning, float32; None feeds zeros, as MDLM does.
          dropout_keys_B: one key per row to train with dropout; None for none.
          context_BL: with `groups`, what a position sees of the groups before its own: the clean
            text, to learn all groups in one pass. None for z itself, right for the group that is
            being revealed. Without `groups` a position sees z.
        """
        tokens_BQ, view, places_L = self._layout(z_BL, z_BL if context_BL is None else context_BL)
        cond_BD = self._condition(z_BL, sigma_B)
        hidden_BQD = self.backbone.hidden(tokens_BQ, cond_BD, view, dropout_keys_B)
        hidden_BLD = hidden_BQD if places_L is None else hidden_BQD[:, places_L]
        logits_BLV = self.backbone.output_layer(hidden_BLD, cond_BD)
        if self.scores == "none":
            return logits_BLV, jnp.zeros(z_BL.shape, jnp.float32)
        if self.scores == "token":
            is_mask_V = jnp.arange(logits_BLV.shape[-1]) == self.mask_id
            return self.token_head.reverse(jnp.where(is_mask_V, -jnp.inf, logits_BLV))
        features = jax.lax.stop_gradient((hidden_BLD, cond_BD))
        return logits_BLV, self.reverse_head(*features, view)

    def forward_scores(self, x_BL: jax.Array) -> jax.Array:
        """Scores of the clean sequence x, float32 [B, L]; zeros, for free, if the order is fixed.

        The pass over x carries no gradient and no dropout: its output defines q.
        """
        if self.scores == "none":
            return jnp.zeros(x_BL.shape, jnp.float32)
        if self.scores == "token":
            return self.token_head.forward(x_BL)
        view, cond_BD = full(x_BL.shape[1]), self._condition(x_BL, None)
        hidden_BLD = self.backbone.hidden(x_BL, cond_BD, view)
        return self.forward_head(*jax.lax.stop_gradient((hidden_BLD, cond_BD)), view)

    def _layout(
        self, z_BL: jax.Array, context_BL: jax.Array
    ) -> tuple[jax.Array, View, np.ndarray | None]:
        """Input tokens [B, Q], who sees whom, and where each position's output stands."""
        length = z_BL.shape[1]
        if self.groups is None:
            return z_BL, full(length), None
        group_L = np.asarray(self.groups)
        if len(set(self.groups)) < length:
            tokens_BQ = jnp.concatenate([z_BL, context_BL], axis=1)
            return tokens_BQ, doubled(group_L), np.arange(length)
        # In the order of generation, each slot holds the token before the one that it predicts.
        before_BL = context_BL[:, np.argsort(group_L)[:-1]]
        start_B1 = jnp.full_like(z_BL[:, :1], self.mask_id)
        return jnp.concatenate([start_B1, before_BL], axis=1), causal(length), group_L

    def _condition(self, tokens_BL: jax.Array, sigma_B: jax.Array | None) -> jax.Array:
        sigma_B = jnp.zeros(tokens_BL.shape[0]) if sigma_B is None else sigma_B
        return self.backbone.condition(sigma_B)
