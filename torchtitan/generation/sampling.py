"""The next token: a function of logits, options and one uniform number.

Options act in the order of `transformers`: repetition penalty, temperature, top-k, top-p, min-p. A draw
inverts the cumulative distribution at a number that belongs to one sample and one of its steps alone, so no
neighbour in a batch, no device and no restart changes what a sample says.

Letters: B sequences, V words.
"""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from torchtitan.generation.options import Sampling

COLDEST, LARGEST = 1e-30, 1e8  # temperature and logit: their ratio is finite
GRID = 32  # bits of a uniform number: few enough that a product with a float64 sum stays below the sum


class SamplingRows:
    """The options of B sequences as tensors [B, 1], so that each row of a batch may have its own."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device):
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Sampling)}
        self.draws = any(row.draws for row in rows)
        self.penalises = any(row.repetition_penalty != 1 for row in rows)
        tensors = {
            name: torch.tensor(values)[:, None].to(device, non_blocking=True)
            for name, values in columns.items()
        }
        self.temperature = tensors["temperature"].float()
        self.top_k, self.top_p, self.min_p = tensors["top_k"], tensors["top_p"], tensors["min_p"]
        self.penalty = tensors["repetition_penalty"].float()


def penalised(logits_BV: Tensor, penalty_B1: Tensor, seen_BV: Tensor) -> Tensor:
    """Logits of words that were there divided by the penalty, or times it where they are negative."""
    less_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    less_BV = less_BV.clamp(-LARGEST, LARGEST)
    return torch.where(seen_BV, less_BV, logits_BV)


def probabilities(logits_BV: Tensor, rows: SamplingRows, seen_BV: Tensor | None = None) -> Tensor:
    """float32 [B, V]: the distribution that a draw is from; a greedy row's is 1 at its likeliest word.

    seen_BV: bool, words of the prompt and the answer so far, for the penalty.
    """
    logits_BV = logits_BV.float()
    if rows.penalises and seen_BV is not None:
        logits_BV = penalised(logits_BV, rows.penalty, seen_BV)
    greedy_B1 = rows.temperature == 0
    scaled_BV = logits_BV / torch.where(greedy_B1, 1.0, rows.temperature.clamp(min=COLDEST))
    sorted_BV, order_BV = scaled_BV.sort(descending=True, stable=True)
    rank_V = torch.arange(sorted_BV.shape[1], device=logits_BV.device)
    # Words as likely as the k-th stay too.
    kth_B1 = sorted_BV.gather(1, rows.top_k.clamp(1, sorted_BV.shape[1]) - 1)
    kept_BV = (rows.top_k == 0) | (sorted_BV >= kth_B1)
    p_BV = sorted_BV.masked_fill(~kept_BV, float("-inf")).softmax(-1)
    before_BV = p_BV.cumsum(-1) - p_BV
    # The sum of many words rounds to 1 before the last of them.
    kept_BV &= (before_BV < rows.top_p) | (rows.top_p >= 1) | (rank_V == 0)
    p_BV = sorted_BV.masked_fill(~kept_BV, float("-inf")).softmax(-1)
    kept_BV &= p_BV >= rows.min_p * p_BV[:, :1]
    kept_BV &= ~greedy_B1 | (rank_V == 0)
    p_BV = sorted_BV.masked_fill(~kept_BV, float("-inf")).softmax(-1)
    return torch.empty_like(p_BV).scatter_(1, order_BV, p_BV)


def draw(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """int64 [B]: the word at which the cumulative probability passes a number in [0, 1)."""
    sum_BV = p_BV.double().cumsum(-1)
    return torch.searchsorted(sum_BV, uniform_B[:, None] * sum_BV[:, -1:], right=True)[:, 0]


def next_tokens(
    logits_BV: Tensor, rows: SamplingRows, uniform_B: Tensor, seen_BV: Tensor | None = None
) -> Tensor:
    """int64 [B]: the next token of each sequence."""
    if rows.draws:
        return draw(probabilities(logits_BV, rows, seen_BV), uniform_B)
    if rows.penalises and seen_BV is not None:
        logits_BV = penalised(logits_BV.float(), rows.penalty, seen_BV)
    return logits_BV.argmax(-1)


def uniforms(seed: int, number: int, steps: int) -> np.ndarray:
    """float64 [steps] in [0, 1): the numbers of sample `number`, the same for any `steps`."""
    bits = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, number], np.uint64)))
    return bits.integers(0, 1 << GRID, steps, dtype=np.uint64) / float(1 << GRID)
