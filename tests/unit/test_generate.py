"""A VLM answers with a cache what it answers when it reads everything anew, images of any size and number."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.vlm.batch import BatchShape
from experiments.vlm.config import Data
from experiments.vlm.data.chat_template import load_chat_template
from experiments.vlm.data.document import Document, Picture, Text, Turn
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.packing import Budget
from experiments.vlm.data.sample import make_sample
from experiments.vlm.data.tiles import TilesConfig
from experiments.vlm.generate.forward import CachedVLM
from experiments.vlm.generate.layout import check_layout
from experiments.vlm.generate.prompt import Prompt, Prompter
from experiments.vlm.generate.record import content_of, prompt_of
from experiments.vlm.model.config import ProjectorConfig, VLMConfig
from experiments.vlm.model.vlm import VLM
from tests.reference.small_run import DECODERS, ENCODER
from tests.tiny_data import Characters
from torchtitan.config.errors import ConfigError, UserError
from torchtitan.config.layout import Degrees
from torchtitan.generation.engine import Engine, Request, common_prefix
from torchtitan.generation.kv_cache import KVCache
from torchtitan.generation.options import Sampling

CPU = torch.device("cpu")
PLAN = ImagePlan(patch_size=4, merge_size=2, min_patches=4, max_patches=32)
BUDGET = Budget(200, 2, 64)
TOKENIZER = Characters()


def vlm(decoder: str = "qwen3") -> VLM:
    config = VLMConfig(ENCODER, ProjectorConfig(48), DECODERS[decoder])
    model = VLM(config, TOKENIZER.vocab_size, "sdpa", 64)
    model.init_weights(3)
    return model.eval()


def picture(height: int, width: int, seed: int = 0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return Picture(file.getvalue(), f"{height}x{width}.png")


def prompter(most_tokens: int = 400, template: str | None = "chatml") -> Prompter:
    return Prompter(TOKENIZER, PLAN, BUDGET, most_tokens, load_chat_template(template) if template else None)


def engine(sequences: int, model: VLM | None = None, **options) -> Engine:
    model = model or vlm()
    config, cache = model.config.decoder, KVCache(sequences, 420, CPU)
    cache.attach(model.decoder.layers.values(), config.kv_heads, config.head_dim, torch.float32)
    shape = BatchShape(1, 0, BUDGET.patch_rows, BUDGET.patches_per_row, PLAN.patch_size)
    return Engine(CachedVLM(model, shape), cache, TOKENIZER, [TOKENIZER.eos_id], **options)


def prompts() -> list[Prompt]:
    make = prompter()
    four = [picture(9, 30, 1), picture(16, 16, 2), picture(40, 8, 3), picture(21, 21, 4)]
    return [
        make.beginning(["once upon"]),
        make.beginning([picture(17, 23)]),
        make.beginning(["a ", *four, " and b"]),
        make.conversation([("user", [picture(8, 40, 5), "What is it?"])]),
        make.conversation([("system", ["Be short."]), ("user", ["Who?"])]),
    ]


@torch.no_grad()
def slowly(prompt: Prompt, tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy ids, each from all before it without a cache, and the log-probabilities of those ids."""
    model, ids, logprobs = vlm(), [], []
    for _ in range(tokens):
        all_ids = torch.tensor([[*prompt.ids, *ids]])
        width = all_ids.shape[1]
        logits = model(
            tokens=all_ids,
            positions=torch.arange(width, dtype=torch.int32)[None],
            document_ids=torch.zeros(1, width, dtype=torch.int32),
            **prompt.tensors(width),
        )[0, -1]
        ids.append(int(logits.argmax()))
        logprobs.append(logits.log_softmax(-1)[ids[-1]])
    return ids, torch.stack(logprobs)


def answers(engine: Engine, prompts: list[Prompt], tokens: int = 6):
    requests = [Request(i, prompt, max_tokens=tokens) for i, prompt in enumerate(prompts)]
    ended = {e.answer.request.number: e.answer for e in engine.answer(requests) if e.answer.ended}
    return [ended[i] for i in range(len(prompts))]


@pytest.mark.parametrize("sequences", [1, 4])
def test_cached_equals_uncached_with_none_one_and_four_images(sequences):
    for prompt, answer in zip(prompts(), answers(engine(sequences), prompts()), strict=True):
        ids, logprobs = slowly(prompt, 6)
        assert answer.ids == ids[: len(answer.ids)] and (answer.ended == "stop" or len(answer.ids) == 6)
        torch.testing.assert_close(
            torch.tensor(answer.logprobs), logprobs[: len(answer.ids)], atol=1e-4, rtol=0
        )


def test_the_same_draws_whoever_is_beside():
    def drawn(engine: Engine, numbers: list[int]) -> dict[int, list[int]]:
        sampling = Sampling(1.0, top_p=0.95)
        requests = [Request(n, prompts()[n], sampling, seed=1, max_tokens=8) for n in numbers]
        return {e.answer.request.number: e.answer.ids for e in engine.answer(requests) if e.answer.ended}

    together = drawn(engine(4), [0, 1, 2, 3, 4])
    assert all(drawn(engine(2), [number]) == {number: together[number]} for number in range(5))


@pytest.mark.parametrize("text", ["", "and", "an <image> and <image>"])
def test_a_line_of_a_file_asks_as_the_command_does_where_there_are_no_conversations(tmp_path, text):
    make, shown = prompter(template=None), [picture(9, 30, 1), picture(16, 16, 2)]
    for number, image in enumerate(shown):
        (tmp_path / f"{number}.png").write_bytes(image.data)
    record = {"prompt": text, "images": ["0.png", "1.png"]}
    line = prompt_of(record, ImageValues(str(tmp_path), Data()), make)
    assert line.identity == make.prompt([("user", content_of(text, shown))]).identity
    if text:
        words = ["an ", *shown[:1], " and ", *shown[1:]] if "<image>" in text else [*shown, "and"]
        assert content_of(text, shown) == words
    with pytest.raises(UserError, match="1 times <image>, 2 images"):
        content_of("<image>", shown)


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml", "llama3"])
def test_what_was_said_is_the_beginning_of_the_next_prompt(template):
    """Vicuna's model writes the space that its template has before an answer."""
    make, lead = prompter(template=template), " " if template == "vicuna_v1" else ""
    turns = [("user", ["Who?"])]
    read = [*make.conversation(turns).ids, *TOKENIZER.encode(f"{lead}A cat.")]
    for answer in (f"{lead}A cat.", "A cat."):
        following = make.conversation([*turns, ("assistant", [answer]), ("user", ["And?"])])
        assert following.ids[: len(read)] == read


def test_a_prompt_is_the_beginning_of_the_finished_document():
    make, image = prompter(), picture(12, 20)
    turns = [("user", ["one ", image, " two"])]
    finished = [Turn("user", ["one ", "two"]), Turn("assistant", ["An answer."])]
    told = prompter().conversation([("user", ["one ", "two"])]).ids
    document = Document("", load_chat_template("chatml").render(finished), conversation=True)
    whole = make_sample(document, TOKENIZER, PLAN)
    assert whole.tokens.tolist()[: len(told)] == told
    assert whole.tokens.tolist()[len(told) :][:10] == TOKENIZER.encode("An answer.")
    assert not whole.targets[: len(told)].any() and whole.targets[len(told)]
    begun = make.beginning(["once ", "more"]).ids
    assert begun == make_sample(Document("", [Text("once more")]), TOKENIZER, PLAN).tokens.tolist()[:-1]
    assert make.conversation(turns).ids.count(TOKENIZER.begin_image_id) == 1


def test_an_image_that_is_cut_otherwise_beside_another_is_read_anew():
    plan = ImagePlan(4, 2, 4, 16, "tiles", image_size=16, cut=TilesConfig(((1, 2), (2, 1)), 9, alone=True))
    make = Prompter(TOKENIZER, plan, Budget(400, 9, 64), 400, load_chat_template("chatml"))
    turns = [("user", [picture(16, 40), "First?"])]
    one = make.conversation(turns)
    two = make.conversation([*turns, ("assistant", ["."]), ("user", [picture(9, 9, 1), "Second?"])])
    assert not np.array_equal(one.pixel_values[0], two.pixel_values[0])
    assert common_prefix(one.identity, two.identity) == one.ids.index(TOKENIZER.begin_image_id)


def test_a_second_turn_equals_the_whole_conversation_from_the_start():
    make, running = prompter(), engine(1, reuse=True)
    turns = [("user", [picture(10, 24), "First?"])]
    for question in (["Second, ", picture(24, 10, 1), "?"], ["Third?"]):
        said = answers(running, [make.conversation(turns)])[0]
        turns += [("assistant", [TOKENIZER.decode(said.ids)]), ("user", question)]
    held = list(running.read[0])
    prompt = make.conversation(turns)
    got, expected = answers(running, [prompt])[0], answers(engine(1), [prompt])[0]
    assert got.ids == expected.ids
    assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert len(held) > 60 and running.read[0][:40] == held[:40]


def test_another_image_of_the_same_size_is_not_taken_for_the_first():
    make, running = prompter(), engine(1, reuse=True)
    first, second = (make.conversation([("user", [picture(12, 12, seed), "?"])]) for seed in (1, 2))
    assert first.ids == second.ids and first.identity != second.identity
    answers(running, [first])
    got, expected = answers(running, [second])[0], answers(engine(1), [second])[0]
    assert got.ids == expected.ids and got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_what_cannot_be_answered_is_told_before_anything_is_computed():
    make = prompter()
    with pytest.raises(UserError, match="bad.jpg: Pillow does not open"):
        make.beginning([picture(9, 9), Picture(b"no image", "bad.jpg")])
    with pytest.raises(UserError, match="cut.png: the image ends before its last row"):
        make.beginning([picture(9, 9), Picture(picture(60, 60).data[:-3000], "cut.png")])
    with pytest.raises(
        UserError, match=r"the prompt has \d+ tokens with its 1 images, more than the 12 that"
    ):
        prompter(12).beginning([picture(9, 90), "too much"])
    with pytest.raises(UserError, match="9 images of 144 patches do not fit 2 x 64"):
        make.beginning([picture(64, 64)] * 9)
    with pytest.raises(UserError, match="no chat template"):
        Prompter(TOKENIZER, PLAN, BUDGET, 99).conversation([("user", ["?"])])


def test_layouts_that_cannot_compute_one_token_are_refused():
    check_layout(Degrees(1, 4, 1, 2, 1))
    with pytest.raises(ConfigError, match="context_parallel_degree = 2: answers are generated with data and"):
        check_layout(Degrees(1, 1, 2, 1, 1))
