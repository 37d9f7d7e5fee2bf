"""However malformed, a record costs the same whether training reads it or a shard made of it."""

import base64
import json
from pathlib import Path

import pytest

from experiments.vlm.config import Source
from experiments.vlm.data.loader import Loader
from tests.faults.prepared import rejects, run
from tests.samples import jpeg, llava, messages
from tests.tiny_data import Characters, make_job

GOOD = jpeg(40, 60)
FILES = {
    "1.jpg": GOOD,
    "2.jpg": jpeg(64, 32),
    "cut.jpg": jpeg(90, 90)[:900],
    "none.jpg": b"",
    "words.jpg": b"no pixels",
}
BYTES = {"bytes": base64.b64encode(GOOD).decode(), "path": None}
SPELLINGS = ["1.jpg", "./1.jpg", {"path": "1.jpg"}, BYTES, f"data:image/jpeg;base64,{BYTES['bytes']}"]
BAD_IMAGES = [
    *("gone.jpg", "../1.jpg", "/etc/hostname", "a\0b", "cut.jpg", "none.jpg", "words.jpg"),
    *({"bytes": "?!"}, {"path": None}, 5, "http://10.0.0.1/1.jpg", {"url": "ftp://a/1.jpg", "path": "1.jpg"}),
]
# training tells fewer reasons apart
COARSER = {"private_address": "image_address", "bad_url": "image_address"}
NO_RECORDS = [b'{"texts": ["one"', b'{"text": "caf\xe9"}', b"[1]", b"17", b"{}", b"[" * 100_000]


def asked(*turns: tuple, **fields) -> dict:
    return {"texts": [{"user": user, "assistant": assistant} for user, assistant in turns], **fields}


def sentences(*entries: dict | str | None, **fields) -> dict:
    info = [{"matched_text_index": 1, **entry} if isinstance(entry, dict) else entry for entry in entries]
    return {"text_list": ["One.", "Two.", "Three."], "image_info": info, **fields}


ASKED, ANSWER = ("human", "<image>\nWhat?"), ("gpt", "A cat.")
PICTURE, WORDS, YES = {"type": "image"}, {"type": "text", "text": "What?"}, ("assistant", "Yes.")
RECORDS = {
    "captions": [
        *({"image": image, "caption": "A cat."} for image in SPELLINGS + BAD_IMAGES + [None]),
        *({"jpg": "1.jpg", name: "A dog.", "score": 0.5} for name in ("caption", "text", "TEXT", "txt")),
        *({"image": "1.jpg", "caption": caption} for caption in ("", " \n", None, 5, ["A cat."])),
        *(
            {"image": "1.jpg", "caption": caption}
            for caption in (["One.", "", "Two."], [], [" "], ["One.", 5])
        ),
        *({"image": "1.jpg"}, {"caption": "A cat."}, {"image": "1.jpg", "caption": "", "text": "A cat."}),
    ],
    "obelics": [
        *({"texts": ["one", None, "two"], "images": [None, image, None]} for image in SPELLINGS + BAD_IMAGES),
        # Not "cut.jpg": its header is good, so training plans a document that decoding then empties.
        *({"texts": [None], "images": [image]} for image in ["1.jpg", *BAD_IMAGES] if image != "cut.jpg"),
        {"texts": ["one", None], "images": [None, "1.jpg", "1.jpg", "2.jpg"]},
        {"texts": ["one", "two"], "images": ["1.jpg", None]},
        {"texts": ["one", None, "two", "three"], "images": [None, "1.jpg"]},
        {"texts": ["one", None, None], "images": [None, None, "2.jpg"]},
        {
            "texts": ["", None, None],
            "images": [None, "1.jpg", "cut.jpg"],
            "metadata": '[null, {"alt": "a"}, null]',
        },
        *(
            {"texts": texts, "images": images}
            for texts, images in [([], []), ([None, "  "], [None, None]), ([None], [None, "1.jpg"])]
        ),
        *(
            {"texts": ["one", "two"]},
            {"images": ["1.jpg"]},
            {"texts": "one"},
            {"texts": [1]},
            {"texts": ["one"], "images": "1.jpg"},
        ),
    ],
    "llava": [
        *(llava(ASKED, ANSWER, image=image) for image in SPELLINGS + BAD_IMAGES),
        *(
            llava(ASKED, ANSWER, image=image)
            for image in ["", None, [], ["1.jpg", "2.jpg"], ["1.jpg", "gone.jpg"]]
        ),
        llava(("human", "<image> or <image>?"), ANSWER, image=["2.jpg", "1.jpg"]),
        llava(("human", "<image> or <image>?"), ANSWER, image="1.jpg"),
        llava(("human", "What?"), ANSWER, image="1.jpg"),
        llava(("human", "Draw."), ("gpt", "<image>"), image="1.jpg", id=7),
        llava(("system", "Be brief."), ("gpt", "Hi."), image="1.jpg"),
        llava(ASKED, ANSWER, jpg="1.jpg"),
        *(
            llava(turn, ANSWER)
            for turn in [("stranger", "Hi"), ("human", 5), (["human"], "Hi"), (None, None)]
        ),
        *(
            {"conversations": turns, "image": "1.jpg"}
            for turns in ["Hi", [], ["Hi"], [{"from": "human", "value": "Hi"}]]
        ),
    ],
    "messages": [
        *(messages(("user", [{**PICTURE, "image": image}, WORDS]), YES) for image in SPELLINGS + BAD_IMAGES),
        *(
            messages(("user", [PICTURE, WORDS]), YES, images=[image])
            for image in ["2.jpg", BYTES, "gone.jpg"]
        ),
        messages(("user", [{"type": "image_url", "image_url": {"url": "1.jpg"}}, WORDS]), YES),
        messages(
            ("user", [{"type": "image", "path": "1.jpg", "text": None}, PICTURE, WORDS]),
            YES,
            images=["2.jpg"],
        ),
        messages(
            ("user", [{**PICTURE, "index": 1}, {**PICTURE, "index": 0}, WORDS]),
            YES,
            images=["2.jpg", "1.jpg"],
        ),
        messages(("user", [{**PICTURE, "image": "1.jpg"}, WORDS]), YES, images=["1.jpg"]),
        messages(("user", [PICTURE]), YES, images=["1.jpg", "2.jpg"]),
        messages(("user", "<image> What?"), YES, images=["1.jpg"]),
        messages(("user", "<image> What?"), YES, images=["1.jpg", "2.jpg"]),
        messages(("user", [PICTURE, PICTURE]), YES, images=["1.jpg"]),
        *(
            messages(("user", content), YES)
            for content in ["What?", None, 5, ["Hi"], [{"type": "video"}], [{"type": "text"}], [PICTURE]]
        ),
        *(
            messages(("stranger", "Hi"), YES),
            messages(("user", [WORDS])),
            {"messages": []},
            {"messages": {"role": "user"}},
        ),
    ],
    "finevision": [
        *(asked(("What?", "A cat."), images=[image]) for image in SPELLINGS + BAD_IMAGES + [None]),
        *(asked(("What?", "A cat."), images=images) for images in [[], None, "1.jpg", ["1.jpg", None], 5]),
        asked(("What?", "A cat."), ("Where?", "There."), images=["1.jpg", "2.jpg"], source="a", ratings=[5]),
        asked(("<image> or <image>?", "The first."), images=["2.jpg", "1.jpg"]),
        asked(("<image> What?", "A cat."), images=["1.jpg", "2.jpg"]),
        asked(("<image> or <image>?", "The first."), images=["1.jpg"]),
        asked(("", "A cat."), images=["1.jpg"]),
        asked(("", ""), image="1.jpg"),
        *(asked(turn) for turn in [(None, "A cat."), ("What?", None), (5, "A cat."), ("What?", ["A"])]),
        *({"texts": texts, "images": ["1.jpg"]} for texts in [[], None, "What?", ["What?"], [None], {}]),
    ],
    "mmc4": [
        *(sentences(entry) for entry in [{"image_name": image} for image in SPELLINGS[:2] + BAD_IMAGES[:4]]),
        *(sentences(entry) for entry in [{"raw_url": "http://10.0.0.1/1.jpg"}, {"raw_url": "ftp://a/1.jpg"}]),
        sentences({"image_name": "1.jpg", "raw_url": "http://10.0.0.1/1.jpg"}),
        sentences({"image_name": "gone.jpg", "raw_url": "http://10.0.0.1/1.jpg"}),
        sentences({"image_name": "../1.jpg", "raw_url": "http://10.0.0.1/1.jpg"}),
        sentences({"image_name": "gone.jpg", "image_base64": BYTES["bytes"]}, url="http://a"),
        *(sentences({"image_base64": data}) for data in ["?!", "", 5]),
        *(sentences({"image_name": "1.jpg", "matched_text_index": i}) for i in [0, 2, 3, -1, None, "1", 1.0]),
        sentences(
            {"image_name": "2.jpg", "matched_text_index": 2}, {"image_name": "1.jpg"}, {}, None, "1.jpg"
        ),
        *({"text_list": ["one"], "image_info": info} for info in [None, [], "1.jpg", {}, 5]),
        *(
            {"text_list": texts}
            for texts in [["one", ""], ["", "one", "", "two"], [], [" "], ["one", None], 5]
        ),
        {"image_info": [{"image_name": "1.jpg", "matched_text_index": 0}]},
    ],
    "text": [
        {"text": "Hello"},
        {"content": "Hello"},
        {"text": None, "content": "Hi"},
        {"text": 5},
        {"text": " "},
        {"other": "Hello"},
    ],
}


def write(folder: Path, format: str) -> Path:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    lines = [json.dumps(record).encode() for record in RECORDS[format]] + NO_RECORDS
    (folder / "x.jsonl").write_bytes(b"\n".join(lines))
    return folder / "x.jsonl"


def train(path: Path, format: str, dump: Path) -> tuple[dict[int, tuple], list[dict]]:
    """What is delivered of each record, its text and the sizes of its images; and the lines of rejects."""
    job = make_job(path, dump, epochs=1)
    job.data.sources = [Source(format=format, path=str(path))]
    loader, delivered = Loader(job, Characters()), {}
    for step in loader:
        for batch in step.batches:
            for sample in batch.samples:
                own = batch.tensors["document_ids"][sample.row] == sample.document
                text = Characters().decode(batch.tensors["tokens"][sample.row][own].tolist())
                delivered[number(sample.key)] = text, sample.image_sizes
    loader.close()
    file = dump / "rejects" / "0.jsonl"
    return delivered, [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def number(key: str) -> int:
    return int(key.rpartition("-")[2])


def costs(lines: list[dict]) -> set[tuple[int, bool, str]]:
    """(record, only an image of it?, why). What a conversation does not place is told twice."""
    return {
        (number(line["key"]), "image" in line, COARSER.get(line["reason"], line["reason"])) for line in lines
    }


@pytest.mark.parametrize("format", RECORDS)
def test_a_record_costs_the_same_through_training_and_through_prepare(tmp_path, format):
    path = write(tmp_path, format)
    direct, lost = train(path, format, tmp_path / "direct")
    run(path, tmp_path / "shards", format=format, dedup="off")
    prepared, lost_then = train(
        tmp_path / "shards", "text" if format == "text" else "webdataset", tmp_path / "after"
    )
    assert prepared == direct
    assert costs(rejects(tmp_path / "shards") + lost_then) == costs(lost)
    kept, refused = set(direct), {record for record, is_image, _ in costs(lost) if not is_image}
    assert kept | refused == set(range(len(RECORDS[format]) + len(NO_RECORDS))) and not kept & refused
    assert len(kept) >= len(RECORDS[format]) // 4 and len(refused) > len(NO_RECORDS)
