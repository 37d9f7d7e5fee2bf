"""Records name the images that lie next to them in the shard."""

import json

import pytest

from experiments.vlm.data.document import Document, Image
from experiments.vlm.data.formats import RECORD_FORMATS
from experiments.vlm.prepare.images import FinishedImage
from experiments.vlm.prepare.records import MEMBERS


@pytest.mark.parametrize(
    ("item", "place"),
    [
        ({"type": "image", "image": "1.jpg"}, "content"),
        ({"type": "image", "path": "1.jpg", "text": None}, "content"),
        ({"type": "image", "url": "http://a/1"}, "content"),
        ({"type": "image_url", "image_url": {"url": "http://a/1"}}, "content"),
        ({"type": "image", "image": {"bytes": "QUJD", "path": "1.jpg"}}, "content"),
        ({"type": "image"}, "images"),
        ({"type": "image", "index": 1}, "images"),
    ],
)
def test_whatever_a_message_calls_its_image_the_shard_names_it(item, place):
    turns = [
        {"role": "user", "content": [item, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Noise."},
    ]
    record = {"id": 7, "messages": turns, "images": ["1.jpg", b"2"]}
    finished = FinishedImage(b"ABC", "png", 1, 1, "")
    (value,) = RECORD_FORMATS["messages"].parse(record).images()
    members = MEMBERS["messages"](record, Document("7", [Image((value, finished), 1, 1)]), "7")
    assert members["7.0.png"] == b"ABC"
    told = json.loads(members["7.json"])
    named, rest = told["messages"][0]["content"]
    assert (told["id"], rest, told["messages"][1]) == (7, turns[0]["content"][1], turns[1])
    if place == "content":
        assert {name: named[name] for name in named if name != "text"} == {
            "type": "image",
            "image": "7.0.png",
        }
    else:
        assert named == item and told["images"][item.get("index", 0)] == "7.0.png"
