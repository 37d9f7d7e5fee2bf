"""The training step that transformers makes of the documents of a packed batch: each a row of its own, padded
to the longest, and each image padded to the largest, as its processor and a collator give them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from experiments.vlm.batch import IGNORE
from experiments.vlm.model.config import VLMConfig
from experiments.vlm.model.families import family_of
from experiments.vlm.model.positions import image_ids


def model_of(config: VLMConfig, image_id: int, device: torch.device) -> nn.Module:
    """Random weights, float32, on the device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = family_of(config).write(config, config.decoder.vocab_size, image_id)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values))


def unpacked(tensors: dict[str, Tensor], merged: int) -> dict[str, Tensor]:
    """A batch (experiments/vlm/batch.py) as arguments of the model. `merged`: patches of a visual token."""
    rows, slots = len(tensors["grid_thw"]) // len(tensors["tokens"]), range(len(tensors["tokens"]))
    ids, labels, pictures = [], [], []
    for slot in slots:
        images = dict(_images(tensors, slot * rows, rows))
        documents = tensors["document_ids"][slot]
        for number in range(int(documents.max()) + 1):
            inside = documents == number
            ids.append(tensors["tokens"][slot][inside].long())
            # theirs are those of the tokens themselves, ours of the next
            labels.append(F.pad(tensors["labels"][slot][inside].long()[:-1], (1, 0), value=IGNORE))
            visual = tensors["visual_index"][slot][inside]
            first = {images[cell][0]: images[cell] for cell in (visual[visual >= 0] * merged).tolist()}
            pictures += list(first.values())
    ends = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": ends}
    padded["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    if pictures:
        patches = [((picture.float() / 255) - 0.5) / 0.5 for _, picture, _ in pictures]
        padded["pixel_values"] = pad_sequence(patches, batch_first=True)
        masks = [torch.ones(len(picture), dtype=torch.long) for picture in patches]
        padded["pixel_attention_mask"] = pad_sequence(masks, batch_first=True)
        padded["spatial_shapes"] = torch.tensor([size for _, _, size in pictures])
    return padded


def _images(
    tensors: dict[str, Tensor], first: int, rows: int
) -> Iterator[tuple[int, tuple[tuple[int, int], Tensor, tuple[int, int]]]]:
    """Each patch's place in the slot, with its image: name, patches in raster order, size."""
    for row in range(rows):
        grid, pixels = tensors["grid_thw"][first + row], tensors["pixel_values"][first + row]
        names = image_ids(grid[None])[0]
        for name in range(int(names.max()) + 1):
            cells = (names == name).nonzero().flatten()
            h, w = grid[cells, 1].long(), grid[cells, 2].long()
            size = int(h.max()) + 1, int(w.max()) + 1
            raster = torch.empty_like(pixels[cells])
            raster[h * size[1] + w] = pixels[cells]
            for cell in cells.tolist():
                yield row * len(grid) + cell, ((row, name), raster, size)


class Steps:
    """Forward, backward and AdamW in bfloat16 autocast, as its Trainer does with `bf16=True`."""

    def __init__(self, model: nn.Module, lr: float):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        self.device = next(model.parameters()).device

    def __call__(self, microbatches: list[dict[str, Tensor]]) -> Any:
        """The loss of the last."""
        for arguments in microbatches:
            moved = {name: x.to(self.device, non_blocking=True) for name, x in arguments.items()}
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(**moved, use_cache=False).loss
            (loss / len(microbatches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss
