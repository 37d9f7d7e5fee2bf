"""What is generated is what a decoder says that reads the whole text anew for each token."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.reference.small_run import VOCAB
from tests.unit.test_kv_cache import CPU, cached, decoder, whole
from tests.unit.test_synchronisation import Trap
from torchtitan.generation.answer_text import AnswerText
from torchtitan.generation.engine import Answer, Engine, Request
from torchtitan.generation.options import Sampling
from torchtitan.generation.sampling import SamplingRows, next_tokens, uniforms
from torchtitan.layers.masks import Mask

END = 7


class Letters:
    """Token i is character i + 160; token 200 and up are the bytes of a longer one."""

    pad_id = 0
    hidden: dict[int, str] = {}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(id + 160) for id in ids)


@dataclass(frozen=True)
class Words:
    ids: list[int]
    rich: bool = False

    @property
    def identity(self) -> list[int]:
        return self.ids

    def rest(self, start: int) -> "Words":
        return Words(self.ids[start:])


class Plain:
    """A decoder of text as an engine runs it, which counts the shapes that it meets."""

    def __init__(self, model):
        self.model = model
        self.shapes = []

    def __call__(self, tokens: Tensor, where: dict, keep: Tensor, prompt, rich: bool) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        mask = Mask(where["document_ids"], True, where["kv_document_ids"], where["rows"], where["kv_rows"])
        h = self.model.tok_embeddings(tokens)
        return self.model(h, where["positions"], mask, keep_BK=keep[:, None])[:, 0]


def engine(sequences: int, places: int | None = None, **options) -> Engine:
    model = decoder("qwen3")
    cache = cached(model, sequences) if places is None else cached(model, sequences, places)
    return Engine(Plain(model), cache, Letters(), [END], **options)


def answers(engine: Engine, requests) -> dict[int, Answer]:
    """By number; the pieces of text add up to the text of the ids."""
    texts, ended = {}, {}
    for event in engine.answer(requests):
        number = event.answer.request.number
        texts[number] = texts.get(number, "") + event.text
        if event.answer.ended:
            ended[number] = event.answer
    for number, answer in ended.items():
        if not answer.request.stops:
            assert texts[number] == Letters().decode(answer.ids)
    return ended


@torch.no_grad()
def slowly(request: Request) -> tuple[list[int], list[float], str]:
    """One token after the other, each from the whole text, without a cache."""
    model, ids, logprobs = decoder("qwen3"), [], []
    numbers = torch.tensor(uniforms(request.seed, request.number, request.max_tokens))
    for step in range(request.max_tokens):
        text = [*request.prompt.ids, *ids]
        logits = whole(model, text)[-1:]
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, torch.tensor(text)] = True
        id = int(next_tokens(logits, SamplingRows([request.sampling], CPU), numbers[step : step + 1], seen))
        if id == END:
            return ids, logprobs, "stop"
        ids.append(id)
        logprobs.append(float(logits.log_softmax(-1)[0, id]))
    return ids, logprobs, "length"


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (1, 6, 3, 9, 2, 4, 7)]
    samplings = [Sampling(), Sampling(1.0), Sampling(0.7, top_k=9), Sampling(repetition_penalty=1.6)]
    return [
        Request(number, Words(ids), samplings[number % 4], seed=5, max_tokens=2 + 3 * (number % 5))
        for number, ids in enumerate(prompts)
    ]


def test_answers_are_those_of_reading_the_whole_text_anew():
    for number, answer in answers(engine(3), requests()).items():
        ids, logprobs, ended = slowly(requests()[number])
        assert (answer.ids, answer.ended) == (ids, ended)
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_alone_or_beside_others_in_any_order_an_answer_is_the_same():
    together = answers(engine(4), requests())
    assert together.keys() == set(range(7))
    backwards = answers(engine(2), requests()[::-1])
    for number, request in enumerate(requests()):
        alone = answers(engine(1), [request])[number]
        assert alone.ids == together[number].ids == backwards[number].ids


@pytest.mark.parametrize("places, longer, widths", [(64, [], {64}), (300, [70, 290], {64, 256, 300})])
def test_few_shapes_ever_reach_the_model(places, longer, widths):
    running = engine(3, places)
    answers(running, requests() + [Request(n, Words([1] * n), max_tokens=2) for n in longer])
    assert set(running.forward.shapes) == {(1, width) for width in widths} | {(3, 1)}


@pytest.mark.parametrize("sequences", [1, 3])
def test_nothing_is_compiled_again_after_the_second_token(sequences):
    """Guards are the same whatever makes the kernels, so no time is spent on making them fast."""
    running = engine(sequences, 64)
    for block in running.forward.model.layers.values():
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    graphs = []
    for _ in running.answer(requests()):
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(graphs) > 30 and graphs[0] < graphs[-1] == graphs[1 + sequences]


def test_a_token_asks_the_device_for_nothing_but_what_was_chosen():
    """What was chosen goes through `tolist`, which is no operation and is there once."""
    running = engine(3, 64)
    with Trap() as trap:
        answers(running, requests())
    assert any("segment_attention" in name for name in trap.seen)


def test_requests_that_come_later_are_taken_in():
    arriving = iter([requests()[0], None, None, requests()[1], None, requests()[2]])
    assert answers(engine(2), arriving).keys() == {0, 1, 2}


def test_an_answer_ends_where_the_sequence_is_full():
    request = replace(requests()[3], max_tokens=1000, sampling=Sampling())
    answer = answers(engine(1, 16), [request])[3]
    # The last token that is chosen needs no place.
    assert answer.ended == "stop" or len(answer.ids) == 16 - 9 + 1


def test_nobody_waits_for_an_answer_that_is_cancelled():
    running, seen = engine(1), []
    for event in running.answer(requests()[3:5]):
        seen.append(event)
        event.answer.cancelled = event.answer.request.number == 3
    assert len([event for event in seen if event.answer.request.number == 3]) <= 2
    assert seen[-1].answer.request.number == 4 and seen[-1].answer.ended


def test_ranks_that_share_a_model_make_the_same_calls():
    first, second = engine(2, 64), engine(2, 64)

    def lockstep(running: Engine, mine: list[Request], others: list[list[int]]):
        turn = iter(others)
        calls = []

        def agree(numbers: list[int]) -> list[int]:
            calls.append(numbers)
            theirs = next(turn, [0] * len(numbers))
            return [max(a, b) for a, b in zip(numbers, theirs, strict=True)]

        running.agree = agree
        return answers(running, mine), calls

    # Rank 1 has nothing at all: it makes every call of rank 0, with empty rows, and ends with it.
    got, calls = lockstep(first, requests()[:3], [])
    nothing, followed = lockstep(second, [], calls)
    assert not nothing and len(followed) == len(calls)
    assert second.forward.shapes == first.forward.shapes and got.keys() == {0, 1, 2}


class Pieces:
    hidden = {9: "<|end|>", 8: "<|image|>"}

    def decode(self, ids):
        return "".join(("xa", "b", "cx", "yz", "a")[id] for id in ids)


def given(text: AnswerText, ids) -> str:
    said = ""
    for id in ids:
        said += text.add(id)
        if text.stopped:
            break
    return said + text.finish()


@pytest.mark.parametrize("stop", ["ab", "abc", "c", "xyz"])
def test_a_stop_string_is_cut_exactly_wherever_tokens_meet(stop):
    for ids in ([0, 1, 2, 3], [4, 4, 1, 2, 3, 0], [0, 0, 1, 1], [2, 3, 2, 3]):
        assert given(AnswerText(Pieces(), [stop]), ids) == Pieces().decode(ids).split(stop)[0]


def test_special_tokens_are_not_shown_and_may_be_what_stops():
    assert given(AnswerText(Pieces()), [8, 0, 9, 1, 8, 2]) == "xabcx"
    assert given(AnswerText(Pieces(), ["ac"]), [0, 8, 2, 3]) == "x"  # what is shown decides
    stopped = AnswerText(Pieces(), ["<|end|>", "ab"])
    assert given(stopped, [8, 1, 0, 9, 3]) == "bxa" and stopped.stopped


def test_no_half_character_is_given_out():
    class Bytes:
        hidden = {}

        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = AnswerText(Bytes())
    pieces = [text.add(byte) for byte in "a本b".encode()]
    assert pieces == ["a", "", "", "本", "b"]
    assert text.add("é".encode()[0]) == "" and text.finish() == "\ufffd"


def test_a_prompt_whose_reading_failed_is_read_anew():
    running, request = engine(1, reuse=True), replace(requests()[3], sampling=Sampling())
    works = running.forward

    def fails(*_) -> Tensor:
        raise MemoryError

    running.forward = fails
    with pytest.raises(MemoryError):
        answers(running, [request])
    running.forward = works
    assert answers(running, [request])[3].ids == answers(engine(1), [request])[3].ids
