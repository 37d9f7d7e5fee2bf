"""LLaVA records and Hugging Face messages: who says what, where images stand, and what is wrong."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.config import Data, Source, VLMJobConfig
from experiments.vlm.data.document import BOS, Image, Special, Text
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.setup import make_deal
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import jpeg, llava, messages, write_tar
from tests.tiny_data import Characters
from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import parse


@pytest.fixture
def read(tmp_path):
    """Reads one record of a format from a JSON-lines file that has images 1.jpg and 2.jpg next to it."""
    for number in (1, 2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(10 * number, 30))

    def read_record(record, format):
        (tmp_path / "x.jsonl").write_text(json.dumps(record))
        return open_shard(
            str(tmp_path / "x.jsonl"), Source(format=format), Data(cache_folder=str(tmp_path / "cache"))
        ).read(0)

    return read_record


def spoken(parts) -> str:
    """ChatML as one line: images by their height, what carries loss in brackets."""
    assert parts[0] == Special(BOS)
    pieces = []
    for part in parts[1:]:
        if isinstance(part, Image):
            pieces.append(f"<{part.height}>")
        else:
            text = part.spelling if isinstance(part, Special) else part.text
            pieces.append(f"[{text}]" if part.loss else text)
    return (
        "".join(pieces)
        .replace("<|im_start|>", "")
        .replace("[<|im_end|>]", "!")
        .replace("<|im_end|>", "")
        .replace("\n", " ")
        .strip()
    )


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            llava(("human", "<image>\nWhat?"), ("gpt", "A cat."), image="1.jpg"),
            "user <10> What? assistant [A cat.]!",
        ),
        (
            llava(("human", "What? <image>"), ("gpt", "A cat."), image=["1.jpg"]),
            "user What? <10> assistant [A cat.]!",
        ),
        (
            llava(
                ("human", "<image> or <image>?"),
                ("gpt", "Yes."),
                ("human", "a"),
                ("gpt", "b"),
                image=["2.jpg", "1.jpg"],
            ),
            "user <20> or <10>? assistant [Yes.]! user a assistant [b]!",
        ),
        (
            llava(("system", "Be brief."), ("human", "Hi"), ("gpt", "Yes?")),
            "system Be brief. user Hi assistant [Yes?]!",
        ),
        # no image: text
        (
            llava(("human", "What is <image>?"), ("gpt", "A tag.")),
            "user What is <image>? assistant [A tag.]!",
        ),
        (
            llava(("human", "<image>"), ("gpt", "See <image>."), image="1.jpg"),
            "user <10> assistant [See <image>.]!",
        ),
        (llava(("human", "Draw."), ("gpt", "<image>"), image="1.jpg"), "user Draw. assistant <10>!"),
        # no marker
        (llava(("human", "What?"), ("gpt", "A cat."), image="1.jpg"), "user <10> What? assistant [A cat.]!"),
    ],
)
def test_llava(read, record, expected):
    document, lost = read(record, "llava")
    assert spoken(document.parts) == expected
    assert document.caption == any(isinstance(part, Image) for part in document.parts)
    assert not lost


def test_of_more_images_than_markers_the_rest_is_told(read):
    document, lost = read(
        llava(("human", "<image> What?"), ("gpt", "A cat."), image=["1.jpg", "2.jpg"]), "llava"
    )
    assert spoken(document.parts) == "user <10> What? assistant [A cat.]!"
    assert [(reject.reason, reject.image) for reject in lost] == [("image_unplaced", 1)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "1.jpg"}, "wrong_shape"),
        ({"conversations": "Hi"}, "wrong_shape"),
        ({"conversations": []}, "empty_document"),
        ({"conversations": ["Hi"]}, "wrong_shape"),
        (llava(("stranger", "Hi"), ("gpt", "Yes?")), "wrong_shape"),
        (llava(("human", 5), ("gpt", "Yes?")), "wrong_shape"),
        (llava(("human", "Hi")), "no_answer"),
        (llava(("human", "<image> <image>"), ("gpt", "Yes?"), image="1.jpg"), "image_missing"),
        (llava(("human", "<image>"), ("gpt", "Yes?"), image="3.jpg"), "image_missing"),
        (llava(("human", "<image>"), ("gpt", "Yes?"), image="../1.jpg"), "image_outside"),
        (llava(("gpt", "A cat."), image="1.jpg"), "image_unplaced"),
    ],
)
def test_bad_llava_records(read, record, reason):
    with pytest.raises(Rejected) as error:
        read(record, "llava")
    assert error.value.reason == reason


def text(said):
    return {"type": "text", "text": said}


PICTURE = {"type": "image"}
YES = ("assistant", [text("Yes.")])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (messages(("user", "Hi"), ("assistant", "Yes?")), "user Hi assistant [Yes?]!"),
        (
            messages(("user", [PICTURE, text("What?")]), YES, images=["2.jpg"]),
            "user <20>What? assistant [Yes.]!",
        ),
        (
            messages(("user", [PICTURE, text(" or "), PICTURE]), YES, images=["2.jpg", "1.jpg"]),
            "user <20> or <10> assistant [Yes.]!",
        ),
        (
            messages(("user", [PICTURE]), YES, ("user", [PICTURE]), YES, images=["1.jpg", "2.jpg"]),
            "user <10> assistant [Yes.]! user <20> assistant [Yes.]!",
        ),
        (
            messages(
                ("user", [{**PICTURE, "index": 1}, {**PICTURE, "index": 0}]), YES, images=["1.jpg", "2.jpg"]
            ),
            "user <20><10> assistant [Yes.]!",
        ),
        (
            messages(("user", [{**PICTURE, "text": None, "image": "1.jpg"}]), YES),
            "user <10> assistant [Yes.]!",
        ),
        (messages(("user", [{**PICTURE, "path": "1.jpg", "url": None}]), YES), "user <10> assistant [Yes.]!"),
        (
            messages(("user", [{"type": "image_url", "image_url": {"url": "1.jpg"}}]), YES),
            "user <10> assistant [Yes.]!",
        ),
        (
            messages(("user", "<image>What?"), ("assistant", "Yes."), images=["1.jpg"]),
            "user <10>What? assistant [Yes.]!",
        ),
        (
            messages(("system", "Brief."), ("user", [text("Hi")]), YES),
            "system Brief. user Hi assistant [Yes.]!",
        ),
        (messages(("user", [text("What is <image>?")]), YES), "user What is <image>? assistant [Yes.]!"),
    ],
)
def test_messages(read, record, expected):
    document, lost = read(record, "messages")
    assert spoken(document.parts) == expected
    assert not lost


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "wrong_shape"),
        ({"messages": {"role": "user"}}, "wrong_shape"),
        ({"messages": []}, "empty_document"),
        (messages(("stranger", "Hi"), YES), "wrong_shape"),
        (messages(("user", None), YES), "wrong_shape"),
        (messages(("user", ["Hi"]), YES), "wrong_shape"),
        (messages(("user", [{"type": "video"}]), YES), "wrong_shape"),
        (messages(("user", [{"type": "text"}]), YES), "wrong_shape"),
        (messages(("user", [PICTURE]), YES), "image_missing"),
        (messages(("user", [PICTURE, PICTURE]), YES, images=["1.jpg"]), "image_missing"),
        (messages(("user", [text("Hi")])), "no_answer"),
    ],
)
def test_bad_messages(read, record, reason):
    with pytest.raises(Rejected) as error:
        read(record, "messages")
    assert error.value.reason == reason


def test_an_image_that_no_message_shows_is_told(read):
    _, lost = read(messages(("user", [PICTURE]), YES, images=["1.jpg", "2.jpg"]), "messages")
    assert [(reject.reason, reject.image) for reject in lost] == [("image_unplaced", 1)]


def test_messages_of_parquet_with_the_images_inside(tmp_path):
    record = messages(
        ("user", [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]),
        YES,
        images=[{"bytes": jpeg(20, 30), "path": None}],
    )
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "x.parquet")
    shard = open_shard(str(tmp_path / "x.parquet"), Source(format="messages"), Data())
    document, _ = shard.read(0)
    assert spoken(document.parts) == "user <20>What? assistant [Yes.]!"
    assert [shard.load(part) for part in document.parts if isinstance(part, Image)] == [jpeg(20, 30)]


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("llava", llava(("human", "<image>What?"), ("gpt", "Yes."), image="7.0.jpg")),
        ("messages", messages(("user", [{**PICTURE, "image": "7.0.jpg"}, text("What?")]), YES)),
        ("messages", messages(("user", [PICTURE, text("What?")]), YES, images=["7.0.jpg"])),
        (
            "messages",
            messages(("user", [{**PICTURE, "image": "7.0.jpg"}, text("What?")]), YES, images=["7.0.jpg"]),
        ),
        (
            "messages",
            messages(("user", [{"type": "image_url", "image_url": {"url": "7.0.jpg"}}, text("What?")]), YES),
        ),
        # Without a name: those of the sample.
        ("llava", llava(("human", "<image>What?"), ("gpt", "Yes."))),
        ("messages", messages(("user", [PICTURE, text("What?")]), YES)),
    ],
)
def test_conversations_in_tars_name_members_of_their_sample(tmp_path, format, record):
    members = [
        ("7.json", json.dumps(record).encode()),
        ("7.0.jpg", jpeg(20, 30)),
        ("8.json", b"[]"),
        ("9.0.jpg", jpeg()),
    ]
    path = str(write_tar(tmp_path / "x.tar", members))
    for name in ("webdataset", format):
        shard = open_shard(path, Source(format=name), Data())
        document, lost = shard.read(0)
        assert (spoken(document.parts), lost) == ("user <20>What? assistant [Yes.]!", [])
        assert [shard.load(part) for part in document.parts if isinstance(part, Image)] == [jpeg(20, 30)]
    for bad in (1, 2):
        with pytest.raises(Rejected, match="not what its format says"):
            shard.read(bad)


def test_a_list_of_conversations_and_the_sources_own_template(tmp_path):
    records = [llava(("human", "Hi"), ("gpt", "Yes?")), llava(("human", "Hö"), ("gpt", "No."))]
    (tmp_path / "x.json").write_text(json.dumps(records, ensure_ascii=False, indent=2))
    shard = open_shard(str(tmp_path / "x.json"), Source(format="llava", chat_template="llama3"), Data())
    assert len(shard) == 2
    parts = shard.read(1)[0].parts
    assert Text("\n\nHö", False) in parts and parts[-2:] == [Text("No."), Special("<|eot_id|>", True)]


def test_a_template_that_is_not_there_is_the_users_mistake_and_not_the_datas(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(llava(("human", "Hi"), ("gpt", "Yes?"))))
    with pytest.raises(ConfigError, match="missing.jinja"):
        open_shard(
            str(tmp_path / "x.jsonl"),
            Source(format="llava", chat_template=str(tmp_path / "missing.jinja")),
            Data(),
        )


def test_a_template_that_cannot_be_used_is_told_before_any_shard_is_opened(tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for %}")
    source = Source(format="llava", path="nothing", chat_template=str(tmp_path / "broken.jinja"))
    with pytest.raises(ConfigError, match="broken.jinja"):
        make_deal(source, VLMJobConfig(), 1, held_out=False)


@pytest.mark.parametrize("asked", ["in the file", "on the command line"])
def test_a_dataset_on_the_command_line_is_rendered_with_the_template_that_was_asked_for(tmp_path, asked):
    (tmp_path / "x.jsonl").write_text(json.dumps(llava(("human", "What?"), ("gpt", "A cat."))))
    (tmp_path / "job.toml").write_text(
        "[[data.sources]]\n" + ("chat_template = 'llama3'" if asked == "in the file" else "")
    )
    options = {
        "job.config_file": "job.toml",
        "training.dataset": "llava",
        "training.dataset_path": "x.jsonl",
        "job.dump_folder": "out",
    }
    argv = [
        word
        for option, name in options.items()
        for word in (f"--{option}", name if name == "llava" else str(tmp_path / name))
    ]
    argv += [] if asked == "in the file" else ["--data.sources.0.chat_template", "llama3"]
    loader = Loader(
        parse(
            [*argv, "--training.seq_len", "256", "--training.local_batch_size", "1"], {"vlm": VLMJobConfig}
        ),
        Characters(),
    )
    text = Characters().decode(next(loader).batches[0].tensors["tokens"][0].tolist())
    loader.close()
    assert "<|start_header_id|>assistant<|end_header_id|>" in text and "<|im_start|>" not in text


def test_whole_conversations_are_not_told_as_truncated_though_they_end_without_eos(tmp_path):
    turns = [("human", "What?"), ("gpt", "A cat.")]
    lines = [json.dumps(llava(*turns)), json.dumps(llava(*turns, ("human", "word " * 100), ("gpt", "No.")))]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    job = VLMJobConfig()
    job.data.sources = [Source(format="llava", path=str(tmp_path / "x.jsonl"))]
    job.data.long_documents, job.data.epochs, job.training.seq_len = "truncate", 1, 256
    job.data.cache_folder = str(tmp_path / "cache")
    loader = Loader(job, Characters(bos_id=None))
    # A step's memory is used again by the next.
    tensors = [{name: tensor.clone() for name, tensor in step.batches[0].tensors.items()} for step in loader]
    counts = loader.report()["sources"]["llava"]["counts"]
    loader.close()
    assert (counts["read"], counts["truncated"]) == (2, 1)
    spelled = {
        Characters().decode(tokens[ids == document].tolist())
        for batch in tensors
        for tokens, ids in zip(batch["tokens"].numpy(), batch["document_ids"].numpy(), strict=True)
        for document in set(ids.tolist()) - {-1}
    }
    short = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert short in spelled and len(spelled) == 2
