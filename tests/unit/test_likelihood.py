"""Likelihoods through the cache are those of each text read alone and whole."""

import math

import pytest
import torch

from experiments.vlm.evaluate.likelihood import CHUNK, Reader
from experiments.vlm.generate.answering import Answering
from experiments.vlm.generate.prompt import Prompter
from tests.unit.test_generate import BUDGET, PLAN, TOKENIZER, engine, picture, prompter, vlm
from torchtitan.config.errors import UserError
from torchtitan.generation.engine import Request


@torch.no_grad()
def brute(prompt, begin: int) -> list[float]:
    """Natural log-probabilities from `begin` on, without a cache."""
    width = len(prompt.ids)
    logits = vlm()(
        tokens=torch.tensor([prompt.ids]),
        positions=torch.arange(width, dtype=torch.int32)[None],
        document_ids=torch.zeros(1, width, dtype=torch.int32),
        **prompt.tensors(width),
    )[0]
    ids = torch.tensor(prompt.ids[begin:])
    return logits[begin - 1 : -1].log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()


def reader(template: bool = True) -> Reader:
    plain = Prompter(TOKENIZER, PLAN, BUDGET, 400)
    return Reader(Answering(engine(2), prompter() if template else plain, None))


@pytest.mark.parametrize("template", [True, False])
def test_each_choice_equals_the_choice_appended_and_read_alone(template):
    reading = reader(template)
    turns = [("user", [picture(12, 28), "Which is it? ", picture(8, 8, 1)])]
    choices = ["a cat", "a dog that is brown", "a cat"]
    found = reading.choices(turns, choices)
    asked = reading.prompter.prompt(turns)
    for (total, tokens, _), choice in zip(found, choices, strict=True):
        whole = reading.prompter.answered(turns, choice)
        assert whole.ids == asked.ids + TOKENIZER.encode(choice)
        expected = brute(whole, len(asked.ids))
        assert tokens == len(choice) and total == pytest.approx(sum(expected), abs=1e-4)
    assert found[0][0] == pytest.approx(found[2][0], abs=1e-5)
    with pytest.raises(UserError, match="an answer is empty"):
        reading.choices(turns, ["a cat", ""])


def test_a_long_document_is_read_in_chunks():
    reading = reader()
    prompt = reading.prompter.beginning(["word " * 30, picture(20, 20), "more " * 40])
    assert len(prompt.ids) > CHUNK
    assert reading.logprobs(prompt, 1) == pytest.approx(brute(prompt, 1), abs=1e-4)
    assert not math.isnan(sum(reading.logprobs(prompt, 1)))


def test_a_choice_is_greedy_where_the_model_would_write_it():
    reading, seen = reader(), 0
    for number in range(12):
        turns = [("user", [picture(12, 28, number), "Which is it?"])]
        asked = reading.engine.answer([Request(0, reading.prompter.prompt(turns), max_tokens=1)])
        top = [event.answer.ids for event in asked][-1]
        if top and top[0] < 128:  # a character by itself
            character, seen = chr(top[0]), seen + 1
            other = chr(top[0] ^ 1)
            told = reading.choices(turns, [character, other, other + character])
            assert [choice.greedy for choice in told] == [True, False, False]
    assert seen
