"""What a checkpoint holds, and how it is put back.

    tensors (torch.distributed.checkpoint)           record (train_state.json)
      model.NAME         weights                       step, tokens, wall_s
      optimizer.NAME     optimizer state               lr_scheduler
      data.SLOT          the loader's position         global_batch_size
      rng.RANK.DEVICE    generator states              model_only, model (its sizes), lora_scale

Names do not depend on the layout, and a slot's position is stored under the slot, so a run goes on at any
number of ranks. Options (learning rates, weight decay) are not stored: those of the job hold.
"""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
)

from torchtitan.components.checkpoint_read import PREFIX, Sizes, require_sizes
from torchtitan.components.loader import Loader, State
from torchtitan.components.lr_scheduler import Schedule
from torchtitan.components.optimizer import Optimizers
from torchtitan.components.weights import named_weights, stored_name
from torchtitan.config.errors import ConfigError
from torchtitan.distributed.collectives import from_all_ranks
from torchtitan.layers.lora import is_adapters

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class TrainState:
    """All that a run goes on from: weights, optimizers, schedule, data, steps taken."""

    parts: list[nn.Module]
    optimizers: Optimizers
    schedule: Schedule
    loader: Loader
    aliases: dict[str, str]  # parameter -> the name it is stored under (tied weights)
    global_batch_size: int
    model_config: Any  # of the experiment; stored, so that no file of the start is needed later
    adapter_scale: float | None  # of the whole model's adapters, see scale_of
    stages: dist.ProcessGroup  # the ranks of a pipeline, this one among them; alone where there is none
    step: int = 0
    tokens: int = 0  # seen so far
    wall_s: float = 0.0  # seconds that this took, validation and checkpoints included
    # the position after the last step that was used
    data: State | Callable[[], State] = field(default_factory=dict)

    def record(self, model_only: bool) -> dict[str, Any]:
        """What is no tensor, as JSON can hold it; stored next to the tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "wall_s": self.wall_s,
            "lr_scheduler": self.schedule.state_dict(),
            "global_batch_size": self.global_batch_size,
            "model_only": model_only,
            **({"lora_scale": self.adapter_scale} if self.adapter_scale else {}),
            "model": as_record(self.model_config),
        }

    def model(self) -> dict[str, Tensor]:
        """References to the weights, by the name that each is stored under."""
        return {PREFIX + name: weight for name, weight in named_weights(self.parts, self.aliases).items()}

    def optimizer(self) -> dict[str, Tensor]:
        """References to the optimizers' tensors.

        They are made (by a step that changes nothing) where there are none yet.
        """
        state: dict[str, Any] = {}
        for part, optimizers in zip(self.parts, self.optimizers.of_part, strict=True):
            if optimizers:
                state.update(get_optimizer_state_dict(part, optimizers, options=FLAT))
        return {
            "optimizer." + stored_name(name.removeprefix("state."), self.aliases): tensor
            for name, tensor in state.items()
            if name.startswith("state.")  # and not param_groups, the options
        }

    def position(self) -> dict[str, Tensor]:
        """The loader's state as uint8 tensors, a piece each, named "data.SLOT"."""
        state = self.data() if callable(self.data) else self.data
        return {
            "data." + name: torch.frombuffer(bytearray(piece), dtype=torch.uint8)
            for name, piece in state.items()
        }

    def generators(self) -> dict[str, Tensor]:
        """This rank's random generators as uint8 tensors, named "rng.RANK.DEVICE"."""
        prefix = f"rng.{dist.get_rank()}."
        states = {prefix + "cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states[prefix + "cuda"] = torch.cuda.get_rng_state()
        return states

    def tensors(self, model_only: bool) -> dict[str, Tensor]:
        """What a checkpoint holds, by name. `model_only`: the weights alone."""
        if model_only:
            return self.model()
        return self.model() | self.optimizer() | self.position() | self.generators()

    def to_fill(self, stored: Sizes, without: set[str], own: bool = True) -> dict[str, Tensor]:
        """Tensors for a checkpoint to be read into: the live weights and optimizer state, fresh buffers for
        the rest. A checkpoint that is not the run's `own` may hold the base alone; adapters are then new.
        """
        weights = self.model()
        if not own and not any(map(is_adapters, stored)):
            weights = {name: weight for name, weight in weights.items() if not is_adapters(name)}
        live = weights | ({} if "optimizer" in without else self.optimizer())
        sizes = {name: tuple(tensor.shape) for name, tensor in live.items()}
        # Compared whole, so that all stages of a pipeline raise, or none.
        require_sizes(dict(ChainMap(*from_all_ranks(sizes, self.stages))), stored)
        names = [] if "data" in without else ["data." + key for key in self.loader.slot_keys()]
        _check_position(names, stored)
        if "train_state" not in without:
            names += [name for name in self.generators() if name in stored]
        return live | {name: torch.empty(stored[name], dtype=torch.uint8) for name in names}

    def restore(self, filled: dict[str, Tensor], record: dict[str, Any], without: set[str]) -> None:
        """Put back what was read into `filled`; weights and optimizer state are in place already."""
        if "train_state" not in without:
            self.step, self.tokens = record["step"], record["tokens"]
            self.wall_s = record.get("wall_s", 0.0)  # older checkpoints have none
        if "lr_scheduler" not in without:
            self.schedule.load_state_dict(record["lr_scheduler"])
        position = {
            n.removeprefix("data."): bytes(t.numpy()) for n, t in filled.items() if n.startswith("data.")
        }
        if position:
            self.loader.load_state_dict(position)
            self.data = position
        for name, tensor in filled.items():
            if name.startswith("rng."):
                (torch.cuda.set_rng_state if name.endswith("cuda") else torch.set_rng_state)(tensor)


def as_record(sizes: Any) -> dict[str, Any]:
    """A dataclass as JSON and as tables of options: fields that are None are left out."""

    def there(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if value is not None}

    return asdict(sizes, dict_factory=there)


def _check_position(names: list[str], stored: Sizes) -> None:
    missing = [name for name in names if name not in stored]
    if missing:
        raise ConfigError(
            f"the checkpoint has no position for {missing[0]}: keep training.global_batch_size, or start the "
            "data anew with checkpoint.exclude_from_loading = ['data']"
        )
