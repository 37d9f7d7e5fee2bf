"""The model with its cache, as an engine runs it (torchtitan/generation/engine.py)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments.vlm.batch import FIELDS, BatchShape
from experiments.vlm.generate.prompt import Prompt
from torchtitan.components.loader import Tensors


class CachedVLM:
    """Logits of a VLM whose layers hold a KVCache. `shape`: of a prompt's images, one slot."""

    def __init__(self, model: nn.Module, shape: BatchShape):
        self.model = model
        self.shape = shape

    def __call__(
        self, tokens: Tensor, where: Tensors, keep: Tensor, prompt: Prompt | None, rich: bool
    ) -> Tensor:
        """See engine.Forward. Where no rank's prompt has images, the encoder does not run."""
        return self.several(tokens, where, keep[:, None], prompt, rich)[:, 0]

    def several(
        self, tokens: Tensor, where: Tensors, keep: Tensor, prompt: Prompt | None, rich: bool
    ) -> Tensor:
        """Logits [R, K, V] of the tokens `keep`, int64 [R, K]."""
        images = self._images(prompt, tokens.shape[1]) if rich else {}
        placed = {name: tensor.to(tokens.device) for name, tensor in images.items()}
        return self.model(tokens, **where, **placed, keep=keep)

    def _images(self, prompt: Prompt | None, width: int) -> Tensors:
        if prompt is not None:
            return prompt.tensors(width)
        shape = replace(self.shape, seq_len=width)
        fields = {name: FIELDS[name] for name in ("visual_index", "pixel_values", "grid_thw")}
        return {
            name: torch.full(shape.of(name), field.padding, dtype=getattr(torch, field.dtype))
            for name, field in fields.items()
        }
