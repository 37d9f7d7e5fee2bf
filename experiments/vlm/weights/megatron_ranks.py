"""The files of Megatron's tensor-parallel ranks, and their tensors as they are with one rank.

A rank holds its rows of the maps into heads and MLP (gate above up, where it is gated), its columns of the
maps out of them, and its rows of the vocabulary. What is not cut is the same in every file.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from torchtitan.config.errors import require
from torchtitan.models.hf.torch_files import open_torch, require_kind

FILE = "model_optim_rng.pt"
# Modules that are cut -> the dimension of their weights. A bias is cut with rows alone.
ROWS, COLUMNS = 0, 1
CUT = {
    "linear_qkv": ROWS,
    "linear_fc1": ROWS,
    "linear_proj": COLUMNS,
    "linear_fc2": COLUMNS,
    "word_embeddings": ROWS,
    "output_layer": ROWS,
}
IGNORED = re.compile(r".*(_extra_state|position_ids|inv_freq)")  # what is computed, or kept for 8-bit numbers


class MegatronRanks:
    """The state dicts of all ranks, and their tensors as they are with one."""

    def __init__(self, folder: Path):
        """Opens the last step. Raises ConfigError where files are missing, damaged or of two models."""
        steps = sorted(path for path in folder.glob("iter_*") if path.is_dir())
        folder = steps[-1] if steps else folder
        places = sorted(path.parent.name for path in folder.glob(f"mp_rank_*/{FILE}"))
        require(bool(places), f"{folder}: holds no mp_rank_00/{FILE}")
        expected = [f"mp_rank_{number:02d}" for number in range(len(places))]
        parts = f"{folder}: has {', '.join(places)}, not {', '.join(expected)}: a rank is missing, or it is"
        require(places == expected, f"{parts} cut by layers too: write it with pipeline parallel 1")
        self.folder, self.states = folder, [self._open(folder / place / FILE) for place in places]
        first = self.states[0]
        for place, state in zip(places, self.states, strict=True):
            other = sorted(first.keys() ^ state.keys())
            other = other or [name for name in state if state[name].shape != first[name].shape]
            require(not other, f"{folder}: mp_rank_00 and {place} differ in {other[:1]}: of two models?")

    @staticmethod
    def _open(path: Path) -> dict[str, Tensor]:
        held = open_torch(path)
        table = held.get("model", held)
        require(isinstance(table, Mapping) and bool(table), f"{path}: has no table `model`")
        known = {name: value for name, value in table.items() if not IGNORED.fullmatch(name)}
        other = [name for name, value in known.items() if not isinstance(value, Tensor)]
        require(not other, f"{path}: {other[:1]} is no tensor")
        for name, tensor in known.items():
            require_kind(path, name, tensor)
        return known

    def dimension(self, name: str) -> int | None:
        """The dimension along which a tensor is cut; None: every rank has it whole."""
        module, _, kind = name.rpartition(".")
        dim = CUT.get(module.rpartition(".")[2])
        return None if kind not in ("weight", "bias") or (dim == COLUMNS and kind == "bias") else dim

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape, dim = list(self.states[0][name].shape), self.dimension(name)
        if dim is not None:
            shape[dim] *= len(self.states)
        return tuple(shape)

    def whole(self, name: str, halves: bool = False) -> Tensor:
        """The whole tensor. `halves`: each rank has rows of two maps, one above the other. Raises ConfigError
        where ranks differ in a tensor that is not cut.
        """
        each, dim = [state[name] for state in self.states], self.dimension(name)
        if dim is None:
            same = all(torch.equal(each[0], other) for other in each[1:])
            require(same, f"{self.folder}: {name} is not the same in all ranks")
            return each[0]
        if halves:
            each = [half for number in (0, 1) for half in (rows.chunk(2)[number] for rows in each)]
        return torch.cat(each, dim)
