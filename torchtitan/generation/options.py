"""How the next token is chosen: options, with their help. Imports no torch."""

import math
from dataclasses import dataclass

from torchtitan.config.errors import UserError


@dataclass
class Sampling:
    """How the next token of a sequence is chosen. Raises UserError for a value out of its range."""

    temperature: float = 0.0  # 0: the most likely token, always
    top_k: int = 0  # of the k most likely tokens alone; 0: of all
    top_p: float = 1.0  # of the fewest likeliest tokens that together have this probability (Holtzman, 2020)
    min_p: float = 0.0  # of tokens at least so likely, relative to the likeliest (Nguyen et al., 2024)
    repetition_penalty: float = 1.0  # above 1: tokens that were there are less likely (Keskar et al., 2019)

    def __post_init__(self) -> None:
        for name, fine, rule in (
            ("temperature", 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0 <= self.top_p <= 1, ">= 0 and <= 1"),
            ("min_p", 0 <= self.min_p <= 1, ">= 0 and <= 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0 and finite"),
        ):
            if not fine:
                raise UserError(f"{name} = {getattr(self, name)}: must be {rule}")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0
