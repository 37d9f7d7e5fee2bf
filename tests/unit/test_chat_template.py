"""Conversations to token ids and loss, equal to transformers'
`apply_chat_template(return_assistant_tokens_mask=True)`.
"""

import importlib.metadata
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.vlm.data import chat_template
from experiments.vlm.data.chat_template import BUILT_IN, load_chat_template
from experiments.vlm.data.document import BOS, Document, Image, ImageValue, Special, Text, Turn
from experiments.vlm.data.image import ImagePlan
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sample import make_sample
from tests.tiny_data import Characters
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.errors import ConfigError

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SPECIALS += ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "[INST]", "[/INST]"]

# The loop over a content's typed items, as vision-language templates have it.
ITEMS = """{% if message.content is string %}{{ message.content }}{% else %}
{%- for item in message.content %}{% if item.type == 'image' %}
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}"""
TEMPLATES = {
    "chatml": BUILT_IN["chatml"].source,
    "llama3": BUILT_IN["llama3"].source,
    "typed items": "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}" + ITEMS + "<|im_end|>{% endgeneration %}\n\n"
    "{% else %}" + ITEMS + "<|im_end|>\n\n{% endif %}{% endfor %}",
    "items only": "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% for item in message.content %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ item.text + '<|im_end|>' }}{% endgeneration %}{% "
    "else %}{{ item.text }}"
    "{% endif %}{% endfor %}{% endfor %}",
    "the end of turn is not generated": "{% for message in messages %}{{ message.role + ': ' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{{ "
    "'<|im_end|>' }}"
    "{% else %}{{ message.content }}{% endif %}{{ '\n' }}{% endfor %}",
    "a generated half": "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content[:2] }}"
    "{% endgeneration %}-{% generation %}{{ message.content[2:] + '<|im_end|>' }}{% endgeneration %}{% else "
    "%}{{ message.content }}"
    "{% endif %}{{ '\n' }}{% endfor %}",
    "mistral": "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{% generation %}{{ ' ' + message.content | trim + eos_token }}{% "
    "endgeneration %}"
    "{% endif %}{% endfor %}",
    "thoughts of the last answer only": "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{% if '</think>' in message.content and not "
    "loop.last %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ message.content }}{% endif %}{{ "
    "'<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}",
}
# In these the answer begins where generation does, so that finding it by rendering gives the same mask.
FOUND_ALIKE = ["chatml", "llama3", "items only", "thoughts of the last answer only"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small byte-level BPE, saved the way transformers saves tokenizers."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    # tokens may cross words
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        [f"{role}\n\n{text}" for role in ("user", "assistant\nA") for text in ("A cat.", "\nHello", " a")],
        trainer,
    )
    made.add_tokens([tokenizers.AddedToken(token, special=False) for token in ("<think>", "</think>")])
    path = tmp_path_factory.mktemp("tokenizer")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    fast.save_pretrained(path)
    return path, fast, load_tokenizer(str(path))


def load(folder, source):
    """The template as a file next to the tokenizer."""
    (folder / "chat_template.jinja").write_text(source)
    load_chat_template.cache_clear()
    return load_chat_template(str(folder / "chat_template.jinja"))


def tokens_of(parts, tokenizer):
    """Ids and loss as a sample gets them; an image is one visual token and its marks."""
    images = [Image(part.value, 32, 32) if isinstance(part, ImageValue) else part for part in parts]
    sample = make_sample(Document("key", images, conversation=True), tokenizer, ImagePlan())
    return sample.tokens.tolist(), sample.targets.tolist()


def in_transformers(fast, source, turns, typed=False, **variables):
    """Ids and mask. `variables`: of the template.

    Skips before transformers 5.24: of an answer's last character they mask the first token alone, where it
    takes several.
    """
    version = importlib.metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) < (5, 24):
        pytest.skip("transformers before 5.24 mask only the first token of an answer's last character")
    messages = []
    for turn in turns:
        items = [
            {"type": "image"} if isinstance(part, ImageValue) else {"type": "text", "text": part}
            for part in turn.content
        ]
        messages.append({"role": turn.role, "content": items if typed or len(items) > 1 else turn.content[0]})
    # transformers makes tokens of contents that spell them, unless it is asked not to.
    options = {"return_assistant_tokens_mask": True, "return_dict": True, "tokenize": True}
    out = fast.apply_chat_template(messages, chat_template=source, **options, **variables)
    return list(out["input_ids"]), [bool(value) for value in out["assistant_masks"]]


CONVERSATION = [
    Turn("user", ["What is it?\n"]),
    Turn("assistant", ["A cat."]),
    Turn("user", [" And\nthat? 😀"]),
    Turn("assistant", ["<think>\nHm.\n</think>\n\n\nHello 😀"]),
    Turn("user", ["a"]),
    Turn("assistant", ["<think>\na\n</think>\n\nA dog. "]),
]
TEXTS = st.text(st.sampled_from("aA .\n\té😀<|>[]/"), min_size=1, max_size=12)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_loss_equal_those_of_transformers(folder, name):
    path, fast, tokenizer = folder
    template = load(path, TEMPLATES[name])
    assert tokens_of(template.render(CONVERSATION), tokenizer) == in_transformers(
        fast, TEMPLATES[name], CONVERSATION, name == "items only"
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4),
)
def test_ids_and_loss_equal_those_of_transformers_whatever_is_said(folder, name, contents):
    path, fast, tokenizer = folder
    turns = [turn for asked, said in contents for turn in (Turn("user", [asked]), Turn("assistant", [said]))]
    template = load(path, TEMPLATES[name])
    assert tokens_of(template.render(turns), tokenizer) == in_transformers(
        fast, TEMPLATES[name], turns, name == "items only"
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FOUND_ALIKE), contents=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_without_generation_blocks_answers_are_found_exactly(folder, name, contents):
    path, fast, tokenizer = folder
    turns = [turn for asked, said in contents for turn in (Turn("user", [asked]), Turn("assistant", [said]))]
    bare = load(path, TEMPLATES[name].replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    assert tokens_of(bare.render(turns), tokenizer) == in_transformers(
        fast, TEMPLATES[name], turns, name == "items only"
    )


@pytest.mark.parametrize("character", ["本", "é", "😀"])
def test_every_token_of_an_answers_last_character_carries_loss(character):
    source = TEMPLATES["the end of turn is not generated"].replace("<|im_end|>", "")
    parts = chat_template.ChatTemplate(chat_template.TemplateFile(source, ())).render(
        [Turn("assistant", ["a" + character])]
    )
    ids, loss = tokens_of(parts, Characters())
    assert [id for id, carries in zip(ids, loss, strict=True) if carries] == list(("a" + character).encode())


def test_several_images_in_several_turns_stand_where_the_template_puts_them(folder):
    path, fast, tokenizer = folder
    turns = [
        Turn("user", [ImageValue("1.jpg"), "What is it?\n", ImageValue("2.jpg", 1)]),
        Turn("assistant", ["A cat."]),
        Turn("user", ["And ", ImageValue("3.jpg", 2), "?"]),
        Turn("assistant", ["A dog."]),
    ]
    parts = load(path, TEMPLATES["typed items"]).render(turns)
    assert tokens_of(parts, tokenizer) == in_transformers(fast, TEMPLATES["typed items"], turns)
    assert [part.value for part in parts if isinstance(part, ImageValue)] == ["1.jpg", "2.jpg", "3.jpg"]


@pytest.fixture(scope="module")
def without_bos(folder, tmp_path_factory):
    """The same tokenizer, but that no token of it is its bos."""
    import transformers

    path = tmp_path_factory.mktemp("without_bos")
    fast = transformers.AutoTokenizer.from_pretrained(folder[0])
    fast.bos_token = None
    fast.save_pretrained(path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None}))
    return path, fast, load_tokenizer(str(path))


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("which", ["folder", "without_bos"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_built_in_templates_give_what_transformers_gives_with_and_without_bos(request, name, which, images):
    _, fast, tokenizer = request.getfixturevalue(which)
    pictures = [ImageValue(f"{number}.jpg", number) for number in range(images)]
    turns = [
        Turn("system", ["Be brief."]),
        Turn("user", [*pictures[:2], " What is it? "]),
        Turn("assistant", ["A cat."]),
        Turn("user", ["And ", *pictures[2:], "?"]),
        Turn("assistant", [" A dog. "]),
    ]
    ours = tokens_of(load_chat_template(name).render(turns), tokenizer)
    shown = {"image_token": "<|vision_start|><|image_pad|><|vision_end|>"}
    assert ours == in_transformers(fast, BUILT_IN[name].source, turns, **shown)
    assert (ours[0][0] == fast.convert_tokens_to_ids("<s>")) == (which == "folder")


@pytest.mark.parametrize("name", ["chatml", "items only"])
def test_a_template_that_knows_no_images_gets_them_where_they_stand(folder, name):
    image = ImageValue("1.jpg")
    parts = load(folder[0], TEMPLATES[name]).render(
        [Turn("user", ["Look: ", image, " what?"]), Turn("assistant", ["A cat."])]
    )
    place = parts.index(image)
    assert parts[place - 1].text.endswith("Look: ") and parts[place + 1] == Text(" what?", False)


@pytest.mark.parametrize(
    "spelling", ["<|im_end|>", "<s>", "<|image_pad|>", "\U000f0000", "\U000f0002", "\U000f1000"]
)
@pytest.mark.parametrize("name", ["chatml", "typed items", "mistral"])
def test_what_a_user_spells_like_a_token_stays_text(folder, name, spelling):
    path, _, tokenizer = folder
    said = f"a{spelling}b {spelling}{spelling}"
    parts = load(path, TEMPLATES[name]).render([Turn("user", [said]), Turn("assistant", ["A cat."])])
    plain = load(path, TEMPLATES[name]).render([Turn("user", ["said"]), Turn("assistant", ["A cat."])])
    assert [type(part) for part in parts] == [type(part) for part in plain]
    assert [part.text for part in parts if isinstance(part, Text)] == [
        p.text.replace("said", said) for p in plain if isinstance(p, Text)
    ]
    assert tokenizer.special_id(spelling) not in tokens_of(parts[1:2], tokenizer)[0]


def test_an_assistant_does_not_end_its_turn_by_what_it_says(folder):
    parts = load(folder[0], TEMPLATES["chatml"]).render(
        [Turn("user", ["a"]), Turn("assistant", ["b<|im_end|>c"])]
    )
    assert [part for part in parts if part.loss] == [Text("b<|im_end|>c"), Special("<|im_end|>", True)]


def test_chatml_by_hand():
    turns = [Turn("system", ["Be brief."]), Turn("user", ["Hi"]), Turn("assistant", [" Yes? "])]
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    assert load_chat_template("chatml").render(turns) == [
        Special(BOS),
        *(start, Text("system\nBe brief.", False), end, Text("\n", False)),
        *(start, Text("user\nHi", False), end, Text("\n", False)),
        *(start, Text("assistant\n", False), Text(" Yes? "), Special("<|im_end|>", True), Text("\n", False)),
    ]


def test_llama3_by_hand():
    head, tail, end = Special("<|start_header_id|>"), Special("<|end_header_id|>"), Special("<|eot_id|>")
    assert load_chat_template("llama3").render([Turn("user", [" Hi\n"]), Turn("assistant", ["Yes?"])]) == [
        Special(BOS),
        *(head, Text("user", False), tail, Text("\n\nHi", False), end),
        *(
            head,
            Text("assistant", False),
            tail,
            Text("\n\n", False),
            Text("Yes?"),
            Special("<|eot_id|>", True),
        ),
    ]


def test_a_tokenizer_config_brings_its_template(folder, tmp_path):
    config = {"chat_template": TEMPLATES["llama3"], "bos_token": "<s>", "added_tokens_decoder": {}}
    config["added_tokens_decoder"] = {
        str(n): {"content": token, "special": True} for n, token in enumerate(SPECIALS)
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    turns = [Turn("user", ["Hi"]), Turn("assistant", ["Yes?"])]
    expected = [Special("<s>"), *load_chat_template("llama3").render(turns)[1:]]
    assert load_chat_template(str(tmp_path / "tokenizer_config.json")).render(turns) == expected
    config["chat_template"] = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": TEMPLATES["llama3"]},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_chat_template.cache_clear()
    assert load_chat_template(str(tmp_path / "tokenizer_config.json")).render(turns) == expected


def test_a_lonely_jinja_file_is_searched_for_its_tokens(tmp_path):
    (tmp_path / "mine.jinja").write_text(BUILT_IN["chatml"].source)
    turns = [Turn("user", ["Hi <|im_end|>"]), Turn("assistant", ["Yes?"])]
    assert load_chat_template(str(tmp_path / "mine.jinja")).render(turns) == load_chat_template(
        "chatml"
    ).render(turns)


def test_a_date_does_not_depend_on_the_day(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ strftime_now('%d %b %Y') }} " + BUILT_IN["chatml"].source)
    parts = load_chat_template(str(tmp_path / "mine.jinja")).render(
        [Turn("user", ["Hi"]), Turn("assistant", ["Yes?"])]
    )
    assert parts[0] == Text("26 Jul 2024 ", False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.jinja", None),
        ("broken.jinja", "{% for %}"),
        ("silent.jinja", "{% for message in messages %}{{ message.role }}{% endfor %}"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", "[1"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_by_name(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    load_chat_template.cache_clear()
    with pytest.raises(ConfigError, match=name):
        load_chat_template(str(tmp_path / name))


def test_a_conversation_that_the_template_refuses_is_rejected(folder):
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}"
        + TEMPLATES["chatml"]
    )
    template = load(folder[0], source)
    with pytest.raises(Rejected, match="begin with a user") as error:
        template.render([Turn("assistant", ["A"])])
    assert error.value.reason == "chat_template"


def test_a_template_that_hides_a_message_is_told():
    template = chat_template.ChatTemplate(chat_template.TemplateFile("{{ messages[0].content }}", ()))
    with pytest.raises(Rejected, match="hides an answer"):
        template.render([Turn("user", ["Hi"]), Turn("assistant", ["Yes?"])])
    with pytest.raises(Rejected, match="0 of 1 images"):
        template.render([Turn("user", ["Hi"]), Turn("user", [ImageValue("1.jpg")])])


@pytest.mark.parametrize("first", [0xFFFFC, 0x10FFFE])
def test_more_spellings_than_there_are_characters_for_lose_none(monkeypatch, first):
    monkeypatch.setattr(chat_template, "ESCAPED", first)
    turns = [Turn("user", ["<|im_end|>" * 4])]
    try:
        parts = load_chat_template("chatml").render(turns, prompt=True)
    except Rejected:
        assert first > 0x100000
    else:
        assert any("<|im_end|>" * 4 in part.text for part in parts if isinstance(part, Text))
