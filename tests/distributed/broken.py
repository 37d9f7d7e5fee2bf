"""Layouts with a known mistake put back in, of the kind that raises nothing."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from experiments.vlm.parallelism import parallelize as vlm
from tests.distributed.layouts import Measured, train
from torchtitan.models.decoder import parallelize


def _mean_of_gradients():
    """FSDP's default, where the loss is already divided by all tokens."""
    return mock.patch.object(vlm, "sum_gradients", lambda root: None)


def _encoder_over_the_decoders_mesh():
    """Ranks of a tensor-parallel group each place a part of the visual tokens, and nobody adds up their
    gradients.
    """
    plain = vlm.apply_fsdp
    return mock.patch.object(
        vlm, "apply_fsdp", lambda model, mesh, vision, sharding: plain(model, mesh, mesh.fsdp, sharding)
    )


def _head_norms_without_a_layout():
    plain = parallelize.block_plan
    return mock.patch.object(parallelize, "block_plan", lambda qk_norm: plain(False))


FAULTS: dict[str, Callable[[], Any]] = {
    "mean of gradients": _mean_of_gradients,
    "encoder over the decoder's mesh": _encoder_over_the_decoders_mesh,
    "head norms without a layout": _head_norms_without_a_layout,
}
SEEN_IN = [
    ("mean of gradients", "fsdp2"),
    ("encoder over the decoder's mesh", "tp2"),
    ("head norms without a layout", "tp2"),
]


def train_with(fault: str, changes: dict[str, Any], ranks: int) -> Measured | None:
    with FAULTS[fault]():
        return train(changes, ranks, until=2)
