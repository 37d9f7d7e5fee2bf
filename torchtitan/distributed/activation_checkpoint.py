"""Activation checkpointing (Chen et al., 2016): keep a block's inputs and compute the rest again in backward.

`full` keeps nothing else. `selective` with "op" keeps the outputs of matrix products, attention and
collectives, which are expensive to compute, and computes the rest again; with an integer n it treats every
n-th block as `full` and leaves the others.
"""

from functools import partial

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torchtitan.config.recomputation import Recomputation

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

# Gathers are here too: without them context parallel would send keys and values once more in backward.
_EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    c10d.all_gather_into_tensor.default,
    c10d.reduce_scatter_tensor.default,
    c10d.all_to_all_single.default,
}


def _expensive_operators() -> set:
    """Those and our own attention, which is known once a model was built (torchtitan/layers registers it)."""
    own = getattr(torch.ops.torchtitan, "segment_attention", None)
    return _EXPENSIVE | ({own.default} if own is not None else set())


def _keep_expensive(expensive: set, context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in expensive else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpoint(blocks: nn.ModuleDict, recomputation: Recomputation) -> None:
    """Wrap the blocks in place, before compile and FSDP."""
    # The generators' state need not be kept where nothing random happens.
    random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in blocks.modules())
    keep_inputs = partial(checkpoint_wrapper, preserve_rng_state=random)
    policy = partial(_keep_expensive, _expensive_operators())
    contexts = partial(create_selective_checkpoint_contexts, policy)
    wrappers = {"inputs": keep_inputs, "expensive": partial(keep_inputs, context_fn=contexts)}
    for number, block in list(blocks.items()):
        kept = recomputation.kept(number)
        if kept != "all":
            blocks[number] = wrappers[kept](block)
