"""LLaVA's templates: ids as LlavaProcessor's on its authors' strings, loss on answers and their ends."""

import string

import numpy as np
import pytest
from PIL import Image as PILImage

from experiments.vlm.data.chat_template import ends_of, load_chat_template
from experiments.vlm.data.document import Document, Image, ImageValue, Turn
from experiments.vlm.data.image_plan import ImagePlan
from experiments.vlm.data.sample import make_sample
from torchtitan.components.tokenizer import load_tokenizer

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PLANS = {
    "llava": ImagePlan(7, 1, 4, 1024, "padded", extra=1, image_size=28, marked=False),
    "llava_next": ImagePlan(7, 1, 4, 1024, "tiles", extra=1, image_size=28, marked=False, newline=True),
}
SIZES = [(30, 40), (90, 20), (7, 80)]  # pixels of the images, in turn
A, B, C = (ImageValue(number) for number in range(3))
TALKS = [
    (
        [Turn("user", [A, "\nWhat is it?"]), Turn("assistant", ["A cat."])],
        "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>",
    ),
    (
        [
            Turn("user", ["First ", A, " then ", B, C, "\ncompare."]),
            Turn("assistant", ["They differ.\n\n- in colour"]),
            Turn("user", ["How?"]),
            Turn("assistant", ["So."]),
        ],
        "USER: First <image> then <image><image>\ncompare. ASSISTANT: They differ.\n\n- in colour</s>"
        "USER: How? ASSISTANT: So.</s>",
    ),
    (
        [Turn("user", ["No picture"]), Turn("assistant", [" spaced "])],
        "USER: No picture ASSISTANT:  spaced </s>",
    ),
]


@pytest.fixture(scope="module", params=PLANS)
def spoken(request, tmp_path_factory):
    """A tokenizer of Llama 2's kind, which writes a space before each text, the processor with it, and what
    images become.
    """
    import tokenizers
    from tokenizers import normalizers
    from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    named = ["<unk>", "<s>", "</s>"]
    symbols = [*named, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=symbols, show_progress=False)
    made.train_from_iterator(
        [SYSTEM, "USER: ASSISTANT: What is it? A cat. compare", *string.printable], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    folder = tmp_path_factory.mktemp("llava")
    fast.save_pretrained(folder)
    square, plan = {"height": 28, "width": 28}, PLANS[request.param]
    options = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if request.param == "llava":
        images = LlavaImageProcessorPil(do_pad=True, size=square, crop_size=square)
        return load_tokenizer(str(folder)), LlavaProcessor(images, fast, **options), plan
    pinpoints = [[28 * n for n in grid] for grid in plan.cut.grids]
    tiles = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=pinpoints)
    return load_tokenizer(str(folder)), LlavaNextProcessor(tiles, fast, **options), plan


def tokens_of(name: str, turns, spoken, prompt: bool = False):
    tokenizer, _, plan = spoken
    parts = load_chat_template(name).render(turns, prompt)
    sized = [
        Image(part.value, *SIZES[part.value]) if isinstance(part, ImageValue) else part for part in parts
    ]
    return make_sample(Document("key", sized, conversation=True), tokenizer, plan)


def theirs(spoken, text: str) -> list[int]:
    shown = [np.zeros((*size, 3), np.uint8) for size in SIZES[: text.count("<image>")]]
    images = [PILImage.fromarray(pixels) for pixels in shown]
    made = spoken[1](text=text, images=images or None, add_special_tokens=False)
    return np.asarray(made["input_ids"]).reshape(-1).tolist()


def _learned(sample, tokenizer) -> str:
    """Its targets without spaces, which this tokenizer writes in its own way."""
    text = tokenizer.decode(sample.tokens[sample.targets].tolist())
    return text.replace(" ", "").replace("▁", "").replace("<0x0A>", "\n")


@pytest.mark.parametrize(("turns", "text"), TALKS)
def test_vicuna_has_the_ids_of_the_processor_and_loss_on_answers_and_their_ends(spoken, turns, text):
    tokenizer = spoken[0]
    sample = tokens_of("vicuna_v1", turns, spoken)
    assert sample.tokens.tolist() == theirs(spoken, f"<s>{SYSTEM} {text}")
    answers = "".join(turn.content[0] + "</s>" for turn in turns if turn.role == "assistant")
    assert _learned(sample, tokenizer) == answers.replace(" ", "")
    told = tokens_of("vicuna_v1", [Turn("system", ["Be brief."]), *turns], spoken)
    assert told.tokens.tolist() == theirs(spoken, f"<s>Be brief. {text}")
    asked = tokens_of("vicuna_v1", turns[:1], spoken, prompt=True)
    assert asked.tokens.tolist() == theirs(spoken, f"<s>{SYSTEM} {text.partition('ASSISTANT:')[0]}ASSISTANT:")
    assert ends_of(tokenizer, load_chat_template("vicuna_v1")) == [tokenizer.eos_id]


def test_plain_is_the_image_its_caption_and_a_line_break(spoken):
    tokenizer = spoken[0]
    turns = [Turn("user", ["Describe ", A, " briefly."]), Turn("assistant", ["A cat."])]
    sample = tokens_of("plain", turns, spoken)
    assert sample.tokens.tolist() == theirs(spoken, "<s><image>A cat.\n")
    assert _learned(sample, tokenizer) == "Acat.\n"
