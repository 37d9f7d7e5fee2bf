"""Which module of the decoder gets which layout. How a layout works: torchtitan/distributed."""

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from torchtitan.distributed import tensor_parallel as tp
from torchtitan.models.decoder.model import Decoder


def block_plan(qk_norm: bool, split: bool = True) -> dict[str, ParallelStyle]:
    """Module of a block -> its tensor-parallel style.

    `qk_norm`: as in DecoderConfig; `split`: the sequence is split between blocks.
    """
    plan = {
        "attention": tp.gathered(arguments=4, split=split),
        # With norms on the heads of q and k the layout must reach those, or their gradients would be those of
        # one rank's heads.
        "attention.wq": tp.columns(to_local=not qk_norm),
        "attention.wk": tp.columns(to_local=not qk_norm),
        "attention.wv": tp.columns(),
        "attention.wo": tp.rows(split),
        "feed_forward": tp.gathered(arguments=1, split=split),
        "feed_forward.w1": tp.columns(),
        "feed_forward.w3": tp.columns(),
        "feed_forward.w2": tp.rows(split),
    }
    if split:
        plan |= {"attention_norm": tp.norm(), "ffn_norm": tp.norm()}
    if qk_norm:
        plan |= {"attention.q_norm": tp.head_norm(), "attention.k_norm": tp.head_norm()}
    return plan


def apply_tensor_parallel(decoder: Decoder, mesh: DeviceMesh, split: bool = True) -> None:
    """Lay the decoder out with sequence parallel and a vocabulary-parallel loss: [B, S / tp, D] between
    blocks, placing included. Not `split`: [B, S, D], forward only, for answers, whose single newest token no
    group can share.

    A pipeline stage lacks some of these modules.
    """
    for layer in decoder.layers.values():
        tp.split(layer, mesh, block_plan(decoder.config.qk_norm, split))
    ends = {"tok_embeddings": tp.embedding(split), "output": tp.VocabularyParallel(split)}
    if split:
        ends["norm"] = tp.norm(to_local=True)
    tp.split(
        decoder, mesh, {name: style for name, style in ends.items() if getattr(decoder, name) is not None}
    )
    # Each style made parameters of its own; untied they would drift apart without an error.
    decoder.tie_weights()
