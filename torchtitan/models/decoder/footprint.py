"""What a decoder keeps and sends in one forward and backward of a rank, in closed form. Imports no torch.

Letters: t tokens of this rank, whole between a block's gather and scatter; r = t / tp on the residual stream; e bytes of an
activation. What autograd keeps was counted in the blocks (tests/unit/test_estimate.py does it again).
"""

from dataclasses import dataclass

from torchtitan.models.decoder.flavors import DecoderConfig

FLOAT32 = 4


@dataclass(frozen=True)
class Share:
    """One forward on one rank."""

    slots: int
    seq_len: int
    cp: int
    tp: int
    method: str  # of context parallel
    bytes: int  # e
    fused_norm: bool  # RMSNorm as one kernel (GPU): keeps its input; else copies in float32, two where its weight trains
    trains: bool = True  # only a weight's own gradient needs the input of its product

    @property
    def tokens(self) -> float:
        return self.slots * self.seq_len / self.cp

    @property
    def residual(self) -> float:
        return self.tokens / self.tp

    def norm(self, elements: float) -> float:
        return elements * (self.bytes if self.fused_norm else (1 + self.trains) * FLOAT32)


def attention_kept(config: DecoderConfig, share: Share) -> float:
    e, t = share.bytes, share.tokens
    width, kv_width = config.heads * config.head_dim / share.tp, config.kv_heads * config.head_dim / share.tp
    # Gathered keys and values are those of whole slots.
    keys = t * share.cp if share.method == "allgather" else t
    kept = share.norm(share.residual * config.dim) + e * t * config.dim * share.trains
    kept += e * (2 * t * width + 2 * keys * kv_width) + FLOAT32 * t * config.heads / share.tp
    if config.qk_norm:
        kept += share.norm(t * (width + kv_width))
    if share.cp > 1 and share.method == "ulysses":
        kept += e * t * width  # the output before and after it changes hands
    return kept


def mlp_kept(config: DecoderConfig, share: Share) -> float:
    t, wide = share.tokens, config.mlp_dim / share.tp
    return share.norm(share.residual * config.dim) + share.bytes * t * (3 * wide + (config.dim + wide) * share.trains)


def layer_kept(config: DecoderConfig, share: Share) -> float:
    return attention_kept(config, share) + mlp_kept(config, share)


def layer_kept_selective(config: DecoderConfig, share: Share) -> float:
    """Of a block that keeps products, attention and gathers alone: input, gathered inputs, q k v, attention, wo, w1, w3."""
    e, t = share.bytes, share.tokens
    width, kv_width = config.heads * config.head_dim / share.tp, config.kv_heads * config.head_dim / share.tp
    keys = 2 * kv_width * (t * share.cp if share.cp > 1 and share.method == "allgather" else 0)
    gathered = 2 * t * config.dim if share.tp > 1 else 0
    products = t * (width + 2 * kv_width) + t * config.dim + 2 * t * config.mlp_dim / share.tp + t * config.dim
    return e * (share.residual * config.dim + products + keys + gathered + t * width) + FLOAT32 * t * config.heads / share.tp


def layer_input(config: DecoderConfig, share: Share) -> float:
    return share.bytes * share.residual * config.dim


def layer_working(config: DecoderConfig, share: Share) -> float:
    """Gradients in a block at their most: those of w1 and w3, of the product of which they are factors, and of the residual
    stream; the block has then freed the product itself."""
    return share.bytes * share.tokens * (2 * config.mlp_dim / share.tp + 2 * config.dim)


def layer_sent(config: DecoderConfig, share: Share) -> dict[str, float]:
    """Bytes of one layer, forward and backward."""
    e, t = share.bytes, share.tokens
    around = (share.tp - 1) / share.tp
    kv_width = config.kv_heads * config.head_dim / share.tp
    width = config.heads * config.head_dim / share.tp
    sent = {"tp all-gather and reduce-scatter": 8 * around * e * t * config.dim}
    if share.cp > 1 and share.method == "allgather":
        sent["cp keys and values"] = 2 * (share.cp - 1) * 2 * e * t * kv_width
    elif share.cp > 1:
        sent["cp all-to-all"] = 2 * (share.cp - 1) / share.cp * e * t * (2 * width + 2 * kv_width)
    return sent


def head_kept(config: DecoderConfig, vocab_size: int, share: Share) -> float:
    """Norm, and the gradients that the loss makes in its forward: of its input, and of the weight in float32."""
    gradients = share.bytes * share.tokens * config.dim + FLOAT32 * vocab_size / share.tp * config.dim * share.trains
    return share.norm(share.residual * config.dim) + gradients


def head_forward(config: DecoderConfig, vocab_size: int, share: Share, chunk: int) -> float:
    """Logits of a chunk of tokens in float32, their gradient and, where the model is not float32, a copy; one product for the weight."""
    e, rows = share.bytes, vocab_size / share.tp
    logits = min(chunk, share.tokens) * rows * (FLOAT32 + (e if e != FLOAT32 else 0) + e)
    return logits + e * rows * config.dim * share.trains + share.bytes * share.tokens * config.dim


def head_backward(config: DecoderConfig, vocab_size: int, share: Share) -> float:
    """The weight's gradient scaled, beside the one kept."""
    return FLOAT32 * vocab_size / share.tp * config.dim * share.trains
