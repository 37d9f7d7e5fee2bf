"""One pre-norm decoder; Llama 3, Qwen 2 and Qwen 3 are rows of data (flavors.py).

In: embeddings [B, S, D], positions, a mask, labels. Out: the summed loss, or logits [B, S, V].

Unusual here: it takes embeddings, positions and a mask description rather than tokens alone, since documents
are packed and image tokens are placed into the embeddings first; and its output layer computes the loss, so
that all logits never exist.
Papers: Llama 3 (Dubey et al., 2024), Qwen 2.5 and Qwen 3 (Yang et al., 2024, 2025).

Letters: B slots, S tokens, D width, H heads, G key-value heads, E width of a head.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.layers import rope
from torchtitan.layers.attention import InnerAttention, prepare_mask
from torchtitan.layers.cross_entropy import Fuse, cross_entropy_sum, token_scores, whole_vocabulary
from torchtitan.layers.init import Fill, constant, fan_in
from torchtitan.layers.masks import Mask
from torchtitan.models.decoder.flavors import DecoderConfig


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; biases and norms of q and k as the flavor says."""

    SAME_INPUT = ("wq", "wk", "wv")  # see backward_of

    def __init__(self, config: DecoderConfig, backend: str):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.inner = InnerAttention(backend)
        self.wo = nn.Linear(width, config.dim, bias=False)

    def forward(self, h_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]. cos, sin: rope.angles; mask: what the backend prepared."""
        # -1 and not the number of heads: under tensor parallel a rank holds only some.
        q_BSHE = self.q_norm(self.wq(h_BSD).unflatten(-1, (-1, self.head_dim)))
        k_BSGE = self.k_norm(self.wk(h_BSD).unflatten(-1, (-1, self.head_dim)))
        v_BSGE = self.wv(h_BSD).unflatten(-1, (-1, self.head_dim))
        out_BSHE = self.inner(rope.rotate(q_BSHE, cos, sin), rope.rotate(k_BSGE, cos, sin), v_BSGE, mask)
        return self.wo(out_BSHE.flatten(-2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer, 2020)."""

    SAME_INPUT = ("w1", "w3")  # see backward_of

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, h_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.w2(F.silu(self.w1(h_BSD)) * self.w3(h_BSD))


class Block(nn.Module):
    """One layer: attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, config: DecoderConfig, backend: str):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, backend)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.mlp_dim)

    def forward(self, h_BSD: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]. Arguments as in Attention."""
        h_BSD = h_BSD + self.attention(self.attention_norm(h_BSD), cos, sin, mask)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class LMHead(nn.Linear):
    """The output layer.

    Given labels it returns the loss, made in chunks, and the part of it of each of `sources`; `vocab_group`
    is set where tensor parallel splits its rows, `fuse` where the loss shall not be made as the device makes
    it.
    """

    def __init__(self, dim: int, vocab_size: int, chunk: int, sources: int = 0):
        super().__init__(dim, vocab_size, bias=False)
        self.chunk, self.sources = chunk, sources
        self.vocab_group = None
        self.fuse: Fuse | None = None

    def forward(
        self,
        h_BSD: Tensor,
        labels_BS: Tensor | None = None,
        per_token: bool = False,
        source_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V]; with labels their summed loss, then that of each source, float32 [1 + sources];
        with `per_token` (nll, correct), float32 [B, S, 2].
        """
        weight = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
        if labels_BS is None:
            return whole_vocabulary(F.linear(h_BSD, weight), self.vocab_group)
        args = h_BSD.flatten(0, 1), weight, labels_BS.flatten(), self.chunk, self.vocab_group
        if per_token:
            return token_scores(*args).unflatten(0, labels_BS.shape)
        source_ids_T = None if source_ids_BS is None else source_ids_BS.flatten()
        sources = 0 if source_ids_BS is None else self.sources
        return cross_entropy_sum(*args, source_ids_T, sources, self.fuse)


class Decoder(nn.Module):
    """Embedding, layers, norm and output layer. What a pipeline stage lacks is None, and passed through.

    Layers are numbered in a dictionary so that a stage's weights keep the names they have in the whole model.
    """

    def __init__(
        self, config: DecoderConfig, vocab_size: int, backend: str, loss_chunk: int, sources: int = 0
    ):
        super().__init__()
        self.config = config
        self.backend = backend
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, backend) for i in range(config.layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output: LMHead | None = LMHead(config.dim, vocab_size, loss_chunk, sources)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Tie the output layer to the embedding, again after anything that replaces parameters:
        materialising, tensor parallel.
        """
        if self.config.tied_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        h_BSD: Tensor,
        positions_BS: Tensor,
        mask: Mask,
        labels_BS: Tensor | None = None,
        per_token: bool = False,
        keep_BK: Tensor | None = None,
        source_ids_BS: Tensor | None = None,
    ) -> Tensor:
        """Embeddings to logits or loss (see LMHead); to the residual stream where this stage has no output
        layer. `keep_BK`: the tokens whose logits are wanted, int64; None: all.
        """
        cos, sin = rope.angles(
            positions_BS, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        prepared = prepare_mask(mask, self.backend)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD, cos, sin, prepared)
        if self.norm is None or self.output is None:
            return h_BSD
        if keep_BK is not None:
            h_BSD = h_BSD.gather(1, keep_BK[..., None].expand(-1, -1, h_BSD.shape[-1]))
        return self.output(self.norm(h_BSD), labels_BS, per_token, source_ids_BS)


def initial_weight(name: str, config: DecoderConfig) -> Fill:
    """Embedding and output rows N(0, 1 / dim), so that tied or not the first logits are of order 1.

    Matrices N(0, 1 / fan in), those that write to the residual stream divided by sqrt(2 * layers) (GPT-2);
    norms 1; biases 0.
    """
    if name.endswith("bias"):
        return constant(0.0)
    if "norm" in name:
        return constant(1.0)
    writes_residual = name.endswith(("wo.weight", "w2.weight"))
    return fan_in((2 * config.layers) ** -0.5 if writes_residual else 1.0)
