"""What lmms-eval asks is answered as the same prompts alone; its own classes are stood in for here."""

import importlib
import io
import sys
import types
from dataclasses import dataclass

import pytest
from PIL import Image

from experiments.vlm.config import Data
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.evaluate.lmms_requests import LmmsRequests, answer_options, notes
from experiments.vlm.generate.prompt import Prompter
from tests.unit.test_evaluate import answering, one_process  # noqa: F401
from tests.unit.test_generate import BUDGET, PLAN, TOKENIZER, engine, picture, prompter
from tests.unit.test_likelihood import brute
from torchtitan.config.errors import ConfigError, UserError
from torchtitan.generation.engine import Request
from torchtitan.generation.options import Sampling

TOKENS = 5
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "temperature": 0, "top_p": 0, "until": ["\n\n"]}
SHOWN = [picture(9, 30, 1), picture(16, 16, 2), picture(40, 8, 3)]
DOCUMENTS = [
    {"images": [], "text": "Who?"},
    {"images": [0], "text": "What is it?"},
    {"images": [1, 2], "text": "first <image> and <image>?"},
    {"images": [2, 0], "text": "Which?"},
]


@dataclass
class Instance:
    args: tuple


def opened(number: int) -> Image.Image:
    return Image.open(io.BytesIO(SHOWN[number].data))


def visuals(document):
    return [opened(number) for number in document["images"]]


def asked(chat: bool = False) -> LmmsRequests:
    images = ImageValues("/", Data())
    return LmmsRequests(answering(), images, lambda task, split, number: DOCUMENTS[number], chat)


def simple(number: int, options=GREEDY) -> Instance:
    return Instance((DOCUMENTS[number]["text"], options, visuals, number, "shapes", "test"))


def alone(turns) -> str:
    """What the model says to a prompt by itself."""
    request = Request(0, prompter().prompt(turns), max_tokens=TOKENS)
    return [event.answer.text.given for event in engine(1).answer([request])][-1]


def test_the_simple_interface_places_images_as_training_data_do():
    told = asked().said([simple(number) for number in (3, 0, 2, 1)], several=False)
    first, second, third = SHOWN
    assert told == [
        [alone([("user", [third, "\n", first, "\nWhich?"])])],
        [alone([("user", ["Who?"])])],
        [alone([("user", ["first ", second, " and ", third, "?"])])],
        [alone([("user", [first, "\nWhat is it?"])])],
    ]
    assert len({text for (text,) in told}) == 4


def test_the_chat_interface_asks_the_messages_of_the_task():
    def messages(document):
        shown = [{"type": "image", "url": image} for image in visuals(document)]
        question = [{"type": "text", "text": document["text"]}, *shown]
        return [{"role": "system", "content": "Be short."}, {"role": "user", "content": question}]

    requests = [Instance(("", messages, GREEDY, number, "shapes", "test")) for number in (1, 0)]
    assert asked(chat=True).said(requests, several=False) == [
        [alone([("system", ["Be short."]), ("user", ["What is it?", SHOWN[0]])])],
        [alone([("system", ["Be short."]), ("user", ["Who?"])])],
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_further_rounds_follow_from_what_was_said(chat):
    """As many rounds as the document's number, and one."""

    def question(document, text):
        return [{"role": "user", "content": [{"type": "text", "text": text}]}]

    def goes_on(document, previous_output=None, round_idx=None, previous_round_info=0):
        if round_idx is None:
            return question(document, document["text"])
        assert len(previous_output) == round_idx and (previous_round_info or 0) == round_idx - 1
        over = round_idx > DOCUMENTS.index(document)
        text = f"After {previous_output[-1]!r}?"
        what = (question(document, text),) if chat else (None, text)
        return *((None,) * len(what) if over else what), over, previous_output, round_idx

    numbers = (2, 0, 3, 1)
    if chat:
        requests = [Instance(("", goes_on, GREEDY, number, "shapes", "test")) for number in numbers]
    else:
        requests = [
            Instance((DOCUMENTS[n]["text"], GREEDY, lambda document: [], goes_on, n, "shapes", "test"))
            for n in numbers
        ]
    told = asked(chat).said(requests, several=True)
    for number, said in zip(numbers, told, strict=True):
        assert len(said) == number + 1
        texts = [DOCUMENTS[number]["text"], *(f"After {text!r}?" for text in said)]
        assert said == [alone([("user", [text])]) for text in texts[:-1]]


def test_answers_that_are_drawn_depend_on_document_and_repetition_alone():
    options = GREEDY | {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "seed": 3}
    requests = [simple(1, options)] * 2 + [simple(2, options)]
    whole = asked().said(requests, several=False)
    assert whole[0] != whole[1] and asked().said([requests[0]], several=False) == whole[:1]
    assert asked().said([requests[2], requests[1]], several=False) == [whole[2], whole[0]]
    other_seed = asked().said([simple(1, options | {"seed": 4})], several=False)
    assert other_seed[0] != whole[0]


def test_losses_are_those_of_each_choice_read_alone():
    choices = [" a cat", " two dogs", lambda document: document["text"]]
    requests = [
        Instance((DOCUMENTS[number]["text"], choice, visuals, number, "shapes", "test"))
        for number in (1, 2)
        for choice in choices
    ]
    expected = []
    for content in ([SHOWN[0], "\nWhat is it?"], ["first ", SHOWN[1], " and ", SHOWN[2], "?"]):
        turns = [("user", content)]
        for choice in ("a cat", "two dogs", DOCUMENTS[1 if content[0] is SHOWN[0] else 2]["text"]):
            expected.append(brute(prompter().answered(turns, choice), len(prompter().prompt(turns).ids)))
    whole = [-sum(logprobs) for logprobs in expected]
    assert [loss for loss, _ in asked().losses(requests, by_token=False)] == pytest.approx(whole, abs=1e-4)
    by_token = [-sum(logprobs) / len(logprobs) for logprobs in expected]
    told = asked().losses(requests, by_token=True)
    assert [loss for loss, _ in told] == pytest.approx(by_token, abs=1e-5)
    assert not any(greedy for _, greedy in told)


def test_a_model_without_conversations_keeps_the_delimiter_before_a_choice():
    requests = asked()
    requests.answering.prompter.template = None
    plain, text = Prompter(TOKENIZER, PLAN, BUDGET, 400), "It is"
    ((loss, _),) = requests.losses([Instance((text, " a cat", None, 0, "shapes", "test"))], by_token=False)
    whole = plain.beginning([text, " a cat"])
    assert loss == pytest.approx(-sum(brute(whole, 1 + len(text))), abs=1e-4)
    ((unconditional, _),) = requests.losses([Instance(("I", "t"))], by_token=False)
    assert unconditional == pytest.approx(-sum(brute(plain.beginning(["It"]), 2)), abs=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "sampling", "most", "stops"),
    [
        (GREEDY, Sampling(), 5, ()),
        ({"until": "###"}, Sampling(), 99, ("###",)),
        ({"until": None, "max_new_tokens": 4096, "do_sample": True}, Sampling(temperature=1.0), 99, ()),
        ({"temperature": 0.2, "top_p": None, "num_beams": 1}, Sampling(temperature=0.2), 99, ()),
        ({"temperature": 1, "do_sample": False, "repetition_penalty": 2},
         Sampling(repetition_penalty=2), 99, ()),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "until": ["\n\n", "a"]},
         Sampling(0.7, top_k=5, top_p=0.9), 99, ("a",)),
    ],
)  # fmt: skip
def test_generation_kwargs_become_options(kwargs, sampling, most, stops):
    assert answer_options(kwargs, 99) == (sampling, most, stops)


def test_what_of_a_task_is_not_followed_is_told_once(caplog):
    caplog.set_level("INFO", "torchtitan")
    options = GREEDY | {"image_aspect_ratio": "pad"}
    asked().said([simple(0, options), simple(1, options)], several=False)
    (told,) = [record.message for record in caplog.records]
    assert "image_aspect_ratio = 'pad' changes nothing" in told
    assert notes(GREEDY, 420) == []
    (told,) = notes({"max_new_tokens": 500}, 420)
    assert "500: an answer ends earlier, where 420 tokens are full" in told


@pytest.mark.parametrize(
    ("visual", "options", "told"),
    [
        ({"type": "video", "url": "a.mp4"}, GREEDY, "shapes, document 0.*asks for a video"),
        ("/nowhere/a.png", GREEDY, "shapes, document 0.*/nowhere/a.png"),
        (None, GREEDY | {"num_beams": 4}, "shapes, document 0.*num_beams = 4"),
        (None, GREEDY | {"temperature": 2, "do_sample": True, "top_p": 3}, "shapes, document 0.*top_p = 3"),
    ],
)
def test_what_cannot_be_asked_names_the_document(visual, options, told):
    request = Instance(("What?", options, lambda document: visual, 0, "shapes", "test"))
    with pytest.raises(UserError, match=told):
        asked().said([request], several=False)


def test_a_prompt_that_is_too_long_names_the_document():
    request = Instance(("long " * 200, " a", None, 0, "shapes", "test"))
    with pytest.raises(UserError, match="shapes, document 0: the prompt has"):
        asked().losses([request], by_token=True)


@pytest.fixture
def plugin(monkeypatch):
    """The plugin over a stand-in for lmms-eval, its model not opened but that of these tests."""

    class lmms:
        is_simple = True

        def __init__(self):
            self.task_dict = {}

        def clean(self):
            pass

    def manifest(name, **paths):
        return types.SimpleNamespace(model_id=name, **paths)

    held = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.models": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"GenerationResult": lambda text: ("told", text)},
        "lmms_eval.models.registry_v2": {"ModelManifest": manifest},
    }
    for name, values in held.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module("experiments.commands.lmms_plugin")
    module.opened_with = []

    def opened(*how, reuse):
        assert not reuse
        module.opened_with.append(how)
        return answering()

    monkeypatch.setattr("experiments.commands.model_options.use_checkpoint", lambda job, name: None)
    monkeypatch.setattr("experiments.vlm.generate.answering.open_answering", opened)
    yield module
    del sys.modules["experiments.commands.lmms_plugin"]


def test_the_entry_point_names_both_classes(plugin):
    declared = plugin.manifest()
    assert declared.model_id == "torchtitan_vlm"
    for path, is_simple in ((declared.simple_class_path, True), (declared.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).is_simple is is_simple


def test_the_classes_answer_every_kind_of_request(plugin):
    arguments = {"job.config_file": "vlm_debug", "training.seq_len": 128, "max_tokens": 12, "by_token": False}
    model = plugin.SimpleModel(batch_size="4", device="cpu", chat_template="chatml", **arguments)
    ((job, _, checkpoint, template, sequences, places),) = plugin.opened_with
    assert (checkpoint, template, sequences, places, job.training.seq_len) == (None, "chatml", 4, 140, 128)
    model.task_dict["shapes"] = {"test": DOCUMENTS}
    assert model.generate_until([simple(1)]) == [alone([("user", [SHOWN[0], "\nWhat is it?"])])]
    choice = Instance(("Who?", " a", visuals, 0, "shapes", "test"))
    ((_, (loss, greedy)),) = model.loglikelihood([choice])
    assert (loss, greedy) == asked().losses([choice], by_token=False)[0]

    def over(document, previous_output, round_idx, previous_round_info):
        return None, None, True, [*previous_output, "end"], 0

    rounds = Instance(("Who?", GREEDY, lambda document: [], over, 0, "shapes", "test"))
    assert model.generate_until_multi_round([rounds]) == [[alone([("user", ["Who?"])]), "end"]]
    assert (model._rank, model._world_size, model.device.type) == (0, 1, "cpu")
    model.clean()
    assert not hasattr(model, "requests")


def test_model_args_become_options(plugin, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    given = {"pretrained": str(tmp_path / "hf"), "checkpoint.enable": False, "by_token": True, "seed": 3}
    assert plugin.as_argv(given) == [
        "--hf", str(tmp_path / "hf"), "--checkpoint.no_enable", "--by_token", "--seed", "3",
    ]  # fmt: skip
    assert plugin.as_argv({"pretrained": str(tmp_path)}) == ["--job.dump_folder", str(tmp_path)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"batch_size": "auto"}, "--batch_size auto"),
        ({"max_batch_size": 4}, "--max_batch_size"),
        ({"device": "cuda:0"}, "--device cuda:0: this process has cpu"),
        ({"parallelism.tensor_parallel_degree": 2}, "tensor_parallel_degree = 2: each process of lmms-eval"),
        ({"batchsize": 3}, "batchsize"),
    ],
)
def test_what_a_model_cannot_be_opened_with_is_told(plugin, monkeypatch, arguments, told):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=told):
        plugin.SimpleModel(**{"job.config_file": "vlm_debug"} | arguments)
