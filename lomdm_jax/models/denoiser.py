"""The network as objectives and samplers use it: backbone, output and the two order heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from lomdm_jax.models.order_head import OrderHead
from lomdm_jax.models.transformer import Sizes, Transformer


class Denoiser(nnx.Module):
    """A backbone and, for a learned order, a forward head (reads x) and a reverse head (reads z).

    The heads see the hidden states through a stop-gradient, so that the order terms train the
    heads only and the cross-entropy trains the backbone only.

    Args:
      sizes: of the backbone; the heads share its width.
      order_heads: whether the order is learned.
    """

    def __init__(self, sizes: Sizes, *, order_heads: bool, rngs: nnx.Rngs):
        self.backbone = Transformer(sizes, rngs=rngs)
        self.order_heads = order_heads
        if order_heads:
            self.forward_head = OrderHead(sizes, rngs=rngs)
            self.reverse_head = OrderHead(sizes, rngs=rngs)

    def denoise(
        self,
        z_BL: jax.Array,
        sigma_B: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, float32 [B, L, vocab_size], and reverse scores, float32 [B, L].

        Args:
          z_BL: token ids, masked positions holding the mask id, int32.
          sigma_B: noise level for time conditioning, float32; None feeds zeros, as MDLM does.
          dropout_keys_B: one key per row to train with dropout; None for none.
        """
        positions_L = jnp.arange(z_BL.shape[1])
        cond_BD = self._condition(z_BL, sigma_B)
        hidden_BLD = self.backbone.hidden(z_BL, cond_BD, positions_L, dropout_keys_B)
        logits_BLV = self.backbone.output_layer(hidden_BLD, cond_BD)
        if not self.order_heads:
            return logits_BLV, jnp.zeros(z_BL.shape, jnp.float32)
        features = jax.lax.stop_gradient((hidden_BLD, cond_BD))
        return logits_BLV, self.reverse_head(*features, positions_L)

    def forward_scores(self, x_BL: jax.Array) -> jax.Array:
        """Scores of the clean sequence x, float32 [B, L]; zeros, for free, if the order is fixed.

        The pass over x carries no gradient and no dropout: its output defines q.
        """
        if not self.order_heads:
            return jnp.zeros(x_BL.shape, jnp.float32)
        positions_L = jnp.arange(x_BL.shape[1])
        cond_BD = self._condition(x_BL, None)
        hidden_BLD = self.backbone.hidden(x_BL, cond_BD, positions_L)
        return self.forward_head(*jax.lax.stop_gradient((hidden_BLD, cond_BD)), positions_L)

    def _condition(self, tokens_BL: jax.Array, sigma_B: jax.Array | None) -> jax.Array:
        sigma_B = jnp.zeros(tokens_BL.shape[0]) if sigma_B is None else sigma_B
        return self.backbone.condition(sigma_B)
