"""The next token is drawn from the distribution that transformers makes of the same options."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from torchtitan.config.errors import UserError
from torchtitan.generation.options import Sampling
from torchtitan.generation.sampling import SamplingRows, next_tokens, probabilities, uniforms

CPU = torch.device("cpu")
OPTIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"), values, strict=True))
    for values in itertools.product((0.7, 1.0, 1.9), (0, 1, 5), (0.0, 0.3, 0.9, 1.0), (0.0, 0.2), (1.0, 1.3))
]


def expected(logits_BV: torch.Tensor, sampling: Sampling, seen: list[list[int]]) -> torch.Tensor:
    steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(torch.tensor(seen), logits_BV.clone()).softmax(-1)


def mask_of(seen: list[list[int]], words: int) -> torch.Tensor:
    mask = torch.zeros(len(seen), words, dtype=torch.bool)
    return mask.scatter_(1, torch.tensor(seen), True)


def chance(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of counts at least as far from the expected ones, by Pearson's chi-square."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def test_each_option_and_all_together_give_the_distribution_of_transformers():
    logits = torch.randn(len(OPTIONS), 40, generator=torch.Generator().manual_seed(0)) * 3
    seen = [[number % 40, (number * 7) % 40] for number in range(len(OPTIONS))]
    samplings = [Sampling(**options) for options in OPTIONS]
    got = probabilities(logits, SamplingRows(samplings, CPU), mask_of(seen, 40))
    for number, sampling in enumerate(samplings):
        one = expected(logits[number : number + 1], sampling, seen[number : number + 1])
        torch.testing.assert_close(got[number : number + 1], one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[30], OPTIONS[-1], {"temperature": 1.0}], ids=str)
def test_draws_are_as_frequent_as_they_are_likely(options):
    sampling, draws = Sampling(**options), 20_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 1.5
    p = probabilities(logits, SamplingRows([sampling], CPU), mask_of([[2]], 12))[0].double()
    numbers = torch.tensor([uniforms(3, number, 2)[1] for number in range(draws)])
    rows = SamplingRows([sampling] * draws, CPU)
    tokens = next_tokens(logits.expand(draws, -1), rows, numbers, mask_of([[2]], 12).expand(draws, -1))
    counts = torch.bincount(tokens, minlength=12)
    assert counts[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert chance(counts[p > 0], p[p > 0] / p.sum() * draws) > 1e-4


def test_a_row_says_the_same_whoever_is_beside_it():
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(2))
    samplings = [Sampling(0.8, top_k=number, top_p=1 - number / 10) for number in range(5)] + [Sampling()]
    numbers = torch.tensor([uniforms(0, number, 1)[0] for number in range(6)])
    together = next_tokens(logits, SamplingRows(samplings, CPU), numbers)
    for i in range(6):
        alone = next_tokens(logits[i : i + 1], SamplingRows([samplings[i]], CPU), numbers[i : i + 1])
        assert alone == together[i]
    assert together[5] == logits[5].argmax()


def test_greedy_takes_the_likeliest_and_heeds_the_penalty():
    logits, rows = torch.tensor([[2.0, 1.9, -1.0]]), SamplingRows([Sampling(repetition_penalty=1.5)], CPU)
    none = torch.zeros(1, dtype=torch.float64)
    assert next_tokens(logits, rows, none, mask_of([[1]], 3)) == 0
    assert next_tokens(logits, rows, none, mask_of([[0]], 3)) == 1


def test_a_temperature_near_zero_draws_the_likeliest():
    logits, numbers = torch.tensor([[1.0, 30.0, -2.0]]), torch.tensor([0.9], dtype=torch.float64)
    for temperature in (1e-3, 1e-37, 1e-40, 1e-45, 1e-46, 1e-300):
        assert next_tokens(logits, SamplingRows([Sampling(temperature)], CPU), numbers).tolist() == [1]
        for penalty in (1e-44, 1e-30, 1e30, 1e300):
            rows = SamplingRows([Sampling(temperature, repetition_penalty=penalty)], CPU)
            assert next_tokens(logits, rows, numbers, mask_of([[0, 2]], 3)).tolist() == [int(penalty > 1)]


def test_without_top_p_the_tail_of_a_large_vocabulary_can_be_drawn():
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    p = probabilities(logits, SamplingRows([Sampling(1.0)], CPU))
    torch.testing.assert_close(p, logits.softmax(-1), atol=0, rtol=1e-5)


def test_the_first_and_the_last_uniform_number_draw_words_that_can_be_drawn():
    logits = torch.tensor([[-30.0, 5.0, 5.0, -30.0]]).repeat(2, 1)
    rows = SamplingRows([Sampling(1.0, top_k=2)] * 2, CPU)
    assert next_tokens(logits, rows, torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)).tolist() == [1, 2]


def test_uniform_numbers_belong_to_seed_sample_and_step():
    assert np.array_equal(uniforms(1, 2, 5), uniforms(1, 2, 9)[:5])
    others = [uniforms(1, 3, 5), uniforms(2, 2, 5), uniforms(1, 2, 10)[5:]]
    assert not any(np.array_equal(uniforms(1, 2, 5), other) for other in others)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_p": 1.5},
        {"min_p": 2},
        {"top_k": -1},
        {"repetition_penalty": math.inf},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_told_by_its_name(options):
    with pytest.raises(UserError, match=f"{next(iter(options))} = .*: must be"):
        Sampling(**options)


def test_every_seed_has_numbers_of_its_own():
    seeds = (0, 1, -1, -5, -600, 2**63 - 1, 2**63 + 1, 2**63 + 2)
    drawn = {tuple(uniforms(seed, number, 3)) for seed in seeds for number in (0, 3)}
    assert len(drawn) == 2 * len(seeds)
