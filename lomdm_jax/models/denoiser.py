"""The network as objectives and samplers use it: backbone, output and the heads of the order."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lomdm_jax.models.order_head import OrderHead, Pointed, Pointer, TokenHead, WalkHead
from lomdm_jax.models.readout import Logits, Readout
from lomdm_jax.models.transformer import Sizes, Transformer
from lomdm_jax.models.visibility import Cached, View, causal, full, ranked


class Denoiser(nnx.Module):
    """A backbone and, for a learned order, a forward head (reads x) and a reverse head (reads z).

    The heads see the hidden states through a stop-gradient, so that the order terms train the
    heads only and the cross-entropy trains the backbone only. GenMD4 has one rate per vocabulary
    entry instead, and its reverse rates train the backbone too. On the ranked layout the two are
    pointers: the posterior sees all of x, through its blocks if it has any, the prior what is
    revealed so far.

    Args:
      sizes: of the backbone; the heads share its width.
      length: positions of a sequence; matters to pointers only.
      mask_id: id of the mask token.
      head_layers: blocks in each order head; of pointers, in the posterior only.
      scores: what the order is learned from: "position" for a score per position from the two
        heads, "token" for one per vocabulary entry, "pointer" for which position follows which,
        "none" for a fixed order.
      walks: whether it holds a table over the neighbours.
      layout: "full" for bidirectional attention; "causal" for a causal model with a shift, in a
        fixed order of single positions; "ranked" for queries and contents, in any order.
      groups: of "causal", and of "ranked" where no ranks are passed: the group of each position,
        0 first.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        length: int = 1,
        mask_id: int,
        scores: str,
        head_layers: int = 1,
        walks: bool = False,
        layout: str = "full",
        groups: tuple[int, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        self.backbone = Transformer(sizes, rngs=rngs)
        self.mask_id, self.scores, self.layout, self.groups = mask_id, scores, layout, groups
        if walks:
            self.walk_head = WalkHead()
        if scores == "token":
            self.token_head = TokenHead(sizes.vocab_size)
        if scores == "position":
            self.forward_head = OrderHead(sizes, head_layers, rngs=rngs)
            self.reverse_head = OrderHead(sizes, head_layers, rngs=rngs)
        if scores == "pointer":
            self.posterior_head = Pointer(sizes, length, head_layers, rngs=rngs)
            self.prior_head = Pointer(sizes, length, 0, rngs=rngs)

    def denoise(
        self,
        z_BL: jax.Array,
        sigma_B: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        context_BL: jax.Array | None = None,
        rank_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
    ) -> tuple[Readout | Logits, jax.Array | Pointed]:
        """What is said of the tokens at [B, L], and reverse scores, float32 [B, L] (of a pointer,
        see `Pointed`). The mask token is never predicted: its logit is -inf.

        Args:
          z_BL: token ids, masked positions holding the mask id, int32.
          sigma_B: noise level for time conditioning, float32; None feeds zeros, as MDLM does.
          dropout_keys_B: one key per row to train with dropout; None for none.
          context_BL: on the layouts that follow an order, what a position sees of those before
            it: the clean text, to learn all of them in one pass. None for z itself, right for the
            group that is being revealed. On the full layout a position sees z.
          rank_BL: on the ranked layout, when each position is revealed, int32, 0 first; None for
            the groups.
          segments_BL: which document of the row each position belongs to, int32; None for one.
            Nothing is seen of other documents, but the order remains one of the whole row, and a
            pointer may move from one document to another.
        """
        context_BL = z_BL if context_BL is None else context_BL
        tokens_BQ, view, places = self._layout(z_BL, context_BL, rank_BL, segments_BL)
        cond_BD = self._condition(z_BL, sigma_B)
        hidden_BQD = self.backbone.hidden(tokens_BQ, cond_BD, view, dropout_keys_B)
        hidden_BLD = hidden_BQD if places is None else hidden_BQD[places]
        tokens = self._readout(hidden_BLD, cond_BD)
        if self.scores == "none":
            return tokens, jnp.zeros(z_BL.shape, jnp.float32)
        if self.scores == "token":
            logits_BLV, scores_BL = self.token_head.reverse(tokens.logits)
            return Logits(logits_BLV), scores_BL
        features = jax.lax.stop_gradient((hidden_BQD, cond_BD))
        if self.scores == "pointer":
            return tokens, self.prior_head(features[0][:, z_BL.shape[1] :], cond_BD, view)
        return tokens, self.reverse_head(*features, view)

    def forward_scores(
        self, x_BL: jax.Array, segments_BL: jax.Array | None = None
    ) -> jax.Array | Pointed:
        """Scores of the clean sequence x, as of `denoise`; zeros, for free, if the order is fixed.

        The pass over x carries no gradient and no dropout: its output defines q. A pointer reads
        the token table instead of making a pass.
        """
        if self.scores == "none":
            return jnp.zeros(x_BL.shape, jnp.float32)
        if self.scores == "token":
            return self.token_head.forward(x_BL)
        view, cond_BD = full(x_BL.shape[1], segments_BL), self._condition(x_BL, None)
        if self.scores == "pointer":
            embedded_BLD = self.backbone.vocab_embed(x_BL)
            return self.posterior_head(*jax.lax.stop_gradient((embedded_BLD, cond_BD)), view)
        hidden_BLD = self.backbone.hidden(x_BL, cond_BD, view)
        return self.forward_head(*jax.lax.stop_gradient((hidden_BLD, cond_BD)), view)

    def recall(
        self, tokens_BQ: jax.Array, view: Cached, memories: Sequence[Any]
    ) -> tuple[jax.Array, Sequence[Any]]:
        """Hidden states [B, Q, width] of a few tokens that see what is remembered, and what is
        remembered afterwards: the layouts that follow an order, without what they read before."""
        cond_BD = self._condition(tokens_BQ, None)
        return self.backbone.recall(tokens_BQ, cond_BD, view, memories)

    def predict(self, hidden_BQD: jax.Array) -> jax.Array:
        """Logits, float32 [B, Q, vocab_size], of such hidden states; -inf at the mask token."""
        return self._readout(hidden_BQD, self._condition(hidden_BQD, None)).logits

    def moves(self, hidden_BQD: jax.Array) -> jax.Array | None:
        """What a pointer says of the moves from each content, float32 [B, Q, 2 W + 1]; None where
        there is no pointer."""
        return self.prior_head.moves(hidden_BQD) if self.scores == "pointer" else None

    def _layout(
        self,
        z_BL: jax.Array,
        context_BL: jax.Array,
        rank_BL: jax.Array | None,
        segments_BL: jax.Array | None,
    ) -> tuple[jax.Array, View, Any]:
        """Input tokens [B, Q], who sees whom, and the index [B, Q] of each position's output."""
        length = z_BL.shape[1]
        if self.layout == "full":
            return z_BL, full(length, segments_BL), None
        if self.layout == "ranked":
            rank = jnp.asarray(self.groups)[None] if rank_BL is None else rank_BL
            tokens_BQ = jnp.concatenate([z_BL, context_BL], axis=1)
            return tokens_BQ, ranked(rank, segments_BL), np.s_[:, np.arange(length)]
        assert self.groups is not None
        if segments_BL is not None:
            return self._documents(context_BL, segments_BL)
        # In the order of generation, each slot holds the token before the one that it predicts.
        before_BL = context_BL[:, np.argsort(self.groups)[:-1]]
        start_B1 = jnp.full_like(z_BL[:, :1], self.mask_id)
        tokens_BQ = jnp.concatenate([start_B1, before_BL], axis=1)
        return tokens_BQ, causal(length), np.s_[:, np.asarray(self.groups)]

    def _documents(
        self, context_BL: jax.Array, segments_BL: jax.Array
    ) -> tuple[jax.Array, View, Any]:
        """The causal layout, one document after another, each in its own order from a start."""
        group_BL = jnp.broadcast_to(jnp.asarray(self.groups), segments_BL.shape)
        order_BQ = jnp.lexsort((group_BL, segments_BL))
        text_BQ, segment_BQ = (
            jnp.take_along_axis(a, order_BQ, axis=1) for a in (context_BL, segments_BL)
        )
        goes_on = segment_BQ[:, 1:] == segment_BQ[:, :-1]
        before = jnp.where(goes_on, text_BQ[:, :-1], self.mask_id)
        tokens_BQ = jnp.pad(before, ((0, 0), (1, 0)), constant_values=self.mask_id)
        rows = jnp.arange(len(order_BQ))[:, None]
        return tokens_BQ, causal(order_BQ.shape[1], segment_BQ), (rows, jnp.argsort(order_BQ))

    def _readout(self, hidden_BLD: jax.Array, cond_BD: jax.Array) -> Readout:
        tokens = self.backbone.output_layer(hidden_BLD, cond_BD)
        return tokens._replace(bias=jnp.asarray(tokens.bias).at[self.mask_id].set(-jnp.inf))

    def _condition(self, tokens_BL: jax.Array, sigma_B: jax.Array | None) -> jax.Array:
        sigma_B = jnp.zeros(tokens_BL.shape[0]) if sigma_B is None else sigma_B
        return self.backbone.condition(sigma_B)
