"""Records that ask, from files of every kind and in every spelling."""

import gzip
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from experiments.vlm.config import Data
from experiments.vlm.data.document import Picture
from experiments.vlm.data.formats.record_shard import ImageValues
from experiments.vlm.evaluate.questions import Questions
from experiments.vlm.evaluate.tasks import TASKS, Question, right_choice
from experiments.vlm.generate.record import turns_of
from tests.samples import write_jsonl, write_tar
from tests.unit.test_evaluate import records, write
from tests.unit.test_generate import picture
from torchtitan.config.errors import ConfigError, UserError


def read(folder: Path, records: list[dict], documents: bool = False) -> list[Question]:
    """The questions of a file of these records."""
    write_jsonl(folder / "asked.jsonl", records)
    data = Data(cache_folder=str(folder / "cache"))
    questions = Questions(str(folder / "asked.jsonl"), data, documents)
    return [questions.read(number) for number in range(len(questions))]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_records_of_every_kind_ask_the_same(tmp_path, kind):
    questions = Questions(write(tmp_path, kind), Data(cache_folder=str(tmp_path / "cache")))
    assert len(questions) == 5
    for number, record in enumerate(records()):
        found = questions.read(number)
        assert found.id == f"q{number}" and found.answers == record["answers"]
        assert found.choices == record["choices"] and right_choice(found) == 1
        (shown,) = [part for part in found.content if isinstance(part, Picture)]
        assert shown.data == (tmp_path / f"{number}.png").read_bytes()
        assert [part.strip() for part in found.content if isinstance(part, str)] == [record["question"]]


def test_a_packed_file_asks_what_it_holds(tmp_path):
    path, data = Path(write(tmp_path, "jsonl")), Data(cache_folder=str(tmp_path / "cache"))
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert Questions(str(packed), data).read(3) == Questions(str(path), data).read(3)


@pytest.mark.parametrize(
    "record",
    [
        {"url": "a.png", "caption": "a cat"},
        {"image_path": "a.png", "question": "What?", "url": "https://a.page", "answer": "a cat"},
    ],
    ids=str,
)
def test_an_image_may_stand_where_training_finds_that_of_a_caption(tmp_path, record):
    (tmp_path / "a.png").write_bytes(picture(20, 12).data)
    (question,) = read(tmp_path, [record])
    assert question.content[0] == Picture(picture(20, 12).data) and question.answers == ["a cat"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"question": "<image 1> is what?", "image_1": "a.png"},
            "image_1 is not read: images stand",
        ),
        ({"question": "What?", "image_id": 7}, "image_id is not read"),
        ({"question": "<image> is what?", "images": ["a.png", "a.png"]}, "1 times <image>, 2 images"),
        ({"question": ["What?"], "image": "a.png"}, "question is a list, no text"),
    ],
    ids=str,
)
def test_a_record_that_would_be_asked_without_a_part_of_it_is_one_error(tmp_path, record, told):
    with pytest.raises(ConfigError, match=f"record 0: .*{told}"):
        read(tmp_path, [record])
    if "image" not in record:
        asked = {"prompt": record["question"], **record}
        with pytest.raises(UserError, match=told):
            turns_of(asked, ImageValues(str(tmp_path), Data()))


def test_a_conversation_that_has_its_answer_asks_nothing():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match="the last of messages is the assistant's"):
        turns_of({"messages": turns}, ImageValues("/", Data()))


def test_the_perplexity_of_a_text_is_read_and_that_of_a_conversation_refused(tmp_path):
    (question,) = read(tmp_path, [{"text": "just words"}], documents=True)
    assert question.content == ["just words"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="a record of messages; read are captions, text, obelics, mmc4"):
        read(tmp_path, [{"messages": turns}], documents=True)


def test_controls_spoil_images_and_nothing_else(tmp_path):
    path, data = write(tmp_path, "tar"), Data(cache_folder=str(tmp_path / "cache"))
    plain = [Questions(path, data).read(number) for number in range(5)]
    images = [next(part for part in found.content if isinstance(part, Picture)).data for found in plain]
    for control in ("blanked", "shuffled"):
        spoilt = Questions(path, data, control=control)
        for number in range(5):
            found = spoilt.read(number)
            (shown,) = [part for part in found.content if isinstance(part, Picture)]
            texts = [part for part in found.content if isinstance(part, str)]
            assert texts == [part for part in plain[number].content if isinstance(part, str)]
            assert (found.id, found.answers) == (plain[number].id, plain[number].answers)
            if control == "shuffled":
                assert shown.data == images[(number + 2) % 5]  # half a shard away
            else:
                pixels, own = (Image.open(io.BytesIO(data)) for data in (shown.data, images[number]))
                assert pixels.size == own.size and pixels.getcolors() == [
                    (own.width * own.height, (128, 128, 128))
                ]


def test_a_sample_of_a_tar_may_ask_about_several_images(tmp_path):
    path, images = tmp_path / "asked.tar", [picture(20, 12, seed).data for seed in range(2)]
    told = {"question": "<image><image>second picture:", "answers": ["4 0 7"]}
    members = [(f"a.{number}.png", image) for number, image in enumerate(images)]
    write_tar(path, [*members, ("a.json", json.dumps(told).encode())])
    question = Questions(str(path), Data(cache_folder=str(tmp_path / "cache"))).read(0)
    assert question.content == [*map(Picture, images), "second picture:"]


def test_a_caption_is_asked_of_the_image_alone_where_the_model_knows_no_conversations(tmp_path):
    """As it was trained: a line break behind the image, as before a question, would be one it never saw."""
    path = tmp_path / "captions.tar"
    image = picture(20, 12).data
    write_tar(path, [("a.png", image), ("a.txt", b"a cat")])
    question = Questions(str(path), Data(cache_folder=str(tmp_path / "cache"))).read(0)
    assert TASKS["exact_match"].content(question, converses=False) == [Picture(image)]
    assert TASKS["caption"].content(question, converses=True)[-1] == "Describe the image."


def test_an_embedded_split_is_a_file_of_records(tmp_path, monkeypatch):
    shard = Path(write(tmp_path, "tar"))
    folder = tmp_path / "heldout"
    folder.mkdir()
    shard.rename(folder / "heldout-00000.tar")
    monkeypatch.setattr("experiments.vlm.evaluate.questions.ensure", lambda name, cache: folder)
    data = Data(cache_folder=str(tmp_path / "cache"))
    assert Questions("embedded:reads/heldout", data).read(1).answers == ["answer 1", "a cat"]
    (folder / "heldout-00001.tar").touch()
    with pytest.raises(ConfigError, match="2 files: name one of them, for example .*heldout-00000.tar"):
        Questions("embedded:reads/heldout", data)


def test_a_file_that_ends_early_is_one_error(tmp_path):
    whole = Path(write(tmp_path, "tar")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.json").write_text('[{"question": "a?", "answers": ["b"]}, {"question": "c')
    for name in ("cut.tar", "cut.json"):
        with pytest.raises(ConfigError, match=f"{name}: the shard ends"):
            Questions(str(tmp_path / name), Data(cache_folder=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ({"1": "cat", "2": "dog"}, "1", 0),
        ({"1": "cat", "2": "dog"}, 2, 1),
        ({str(number): f"{number}." for number in range(12)}, "10", 10),
        ({"b": "cat", "c": "dog"}, "b", 0),
        ({"A": "cat", "B": "dog"}, 1, 1),
        (["cat", "dog"], "B", 1),
        ([1, 2, 3], 2, 1),
    ],
    ids=str,
)
def test_the_name_that_a_record_gives_a_choice_is_the_choice(tmp_path, choices, answer, right):
    path = tmp_path / "asked.jsonl"
    write_jsonl(path, [{"question": "a?", "choices": choices, "answers": [], "answer": answer}])
    assert right_choice(Questions(str(path), Data(cache_folder=str(tmp_path / "cache"))).read(0)) == right
