"""Which blocks of a tower keep their activations for the backward pass, and which compute them again."""

from typing import Literal, NamedTuple

Mode = Literal["none", "selective", "full"]
Kept = Literal["all", "expensive", "inputs"]


class Recomputation(NamedTuple):
    """The options of one tower in [activation_checkpoint]."""

    mode: str = "none"
    option: str = "op"
    full_layers: int = 0
    selective_layers: int = 0

    def kept(self, number: str) -> Kept:
        """What the block of this number, counted in the whole tower, keeps: every layout chooses the same."""
        place = int(number)
        if self.mode == "selective" and self.option != "op":
            return "all" if place % int(self.option) else "inputs"
        if self.mode == "full" or place < self.full_layers:
            return "inputs"
        return "expensive" if self.mode == "selective" or place < self.until else "all"

    @property
    def until(self) -> int:
        """The first block after those that full_layers and selective_layers name."""
        return self.full_layers + self.selective_layers
