"""Tar shards: captions and interleaved documents, and what is wrong with them."""

import base64
import json

import pytest

from experiments.vlm.config import Columns, Data, Source
from experiments.vlm.data.document import Image, Text
from experiments.vlm.data.image import decode
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import encoded, jpeg, noise, write_tar

EXTENSIONS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
    **dict.fromkeys(("jp2", "j2k", "jpx", "jpf", "jpc", "j2c"), "JPEG2000"),
}


@pytest.fixture
def shard(tmp_path):
    """Opens a tar of the given members."""

    def open_members(*members: tuple[str, bytes]):
        return open_shard(
            str(write_tar(tmp_path / "x.tar", members)),
            Source(format="cc12m"),
            Data(cache_folder=str(tmp_path)),
        )

    return open_members


def rejected(shard, index: int = 0) -> str:
    with pytest.raises(Rejected) as error:
        shard.read(index)
    return error.value.reason


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_caption_is_its_image_and_then_its_text(shard, extension):
    data = encoded(noise(40, 60), EXTENSIONS[extension])
    opened = shard((f"a/0001.{extension}", data), ("a/0001.txt", b"A cat."), ("a/0001.json", b"{}"))
    document, lost = opened.read(0)
    image, text = document.parts
    assert (document.key, document.caption, lost) == ("a/0001", True, [])
    assert (image.height, image.width, text) == (40, 60, Text("A cat."))
    assert opened.load(image) == data


def test_the_content_tells_the_format_and_not_the_name(shard):
    data = encoded(noise(40, 60), "WEBP")
    opened = shard(("0.jpg", data), ("0.txt", b"A cat."))
    image = opened.read(0)[0].parts[0]
    assert decode(opened.load(image), 40, 60).shape == (40, 60, 3)


def test_images_may_stand_in_the_json_as_their_bytes(shard):
    inside = base64.b64encode(jpeg(20, 30)).decode()
    images = [{"bytes": inside}, f"data:image/jpeg;base64,{inside}", "0.jpg", {"bytes": "?"}, 5]
    fields = {"texts": [None] * 5, "images": images}
    opened = shard(("0.json", json.dumps(fields).encode()), ("0.0.jpg", jpeg(40, 60)))
    document, lost = opened.read(0)
    assert [opened.load(image) for image in document.parts] == [jpeg(20, 30), jpeg(20, 30), jpeg(40, 60)]
    assert [(reject.reason, reject.image) for reject in lost] == [
        ("image_undecodable", 3),
        ("image_missing", 4),
    ]


def test_columns_say_which_members_and_fields_are_meant(tmp_path):
    members = [("0.left.jpg", jpeg(20, 30)), ("0.right.jpg", jpeg(40, 60)), ("0.txt", b"not this")]
    members.append(("0.json", b'{"caption": "nor this", "title": "A cat."}'))
    path = str(write_tar(tmp_path / "x.tar", members))
    source = Source(format="webdataset", columns=Columns(image="right.jpg", text="title"))
    opened = open_shard(path, source, Data(cache_folder=str(tmp_path)))
    (image, text), lost = opened.read(0)[0].parts, opened.read(0)[1]
    assert (opened.load(image), text, lost) == (jpeg(40, 60), Text("A cat."), [])


@pytest.mark.parametrize("name", ["caption", "text"])
def test_a_caption_may_stand_in_the_json(shard, name):
    opened = shard(("0.jpg", jpeg()), ("0.json", json.dumps({name: "Ein Kätzchen."}).encode()))
    assert opened.read(0)[0].parts[1] == Text("Ein Kätzchen.")


def test_where_the_text_is_blank_the_json_has_the_caption(shard):
    opened = shard(("0.jpg", jpeg()), ("0.txt", b" \n"), ("0.json", b'{"caption": "A cat."}'))
    assert opened.read(0)[0].parts[1] == Text("A cat.")


def test_samples_that_the_convention_takes_for_one_are_told(shard):
    opened = shard(
        *((f"photo.{n}.{e}", d) for n in (1, 2, 3) for e, d in (("jpg", jpeg()), ("txt", b"A cat.")))
    )
    document, lost = opened.read(0)
    assert (len(opened), document.key, len(document.parts)) == (1, "photo", 2)
    assert [(reject.reason, reject.detail.split()[0]) for reject in lost] == [
        ("image_unplaced", f"{n}.jpg") for n in (2, 3)
    ]


@pytest.mark.parametrize("other", ["mask.png", "png", "1.jpg", "depth.0.tif"])
def test_a_second_image_beside_the_one_of_the_caption_is_told(shard, other):
    document, lost = shard(("0.jpg", jpeg()), (f"0.{other}", b"?"), ("0.txt", b"A cat.")).read(0)
    assert len(document.parts) == 2
    assert [(reject.reason, reject.image) for reject in lost] == [("image_unplaced", 1)]
    assert lost[0].detail == f"{other} is one more image, besides jpg"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("0.txt", b"A cat.")], "image_missing"),
        ([("0.jpg", jpeg())], "caption_missing"),
        ([("0.jpg", jpeg()), ("0.txt", b" \n")], "caption_missing"),
        ([("0.jpg", jpeg()), ("0.json", b"{}")], "caption_missing"),
        ([("0.jpg", jpeg()), ("0.txt", b"caf\xe9")], "broken_utf8"),
        ([("0.jpg", jpeg()), ("0.json", b'{"caption": ')], "broken_json"),
        ([("0.jpg", jpeg()), ("0.json", b'{"caption": 5}')], "wrong_shape"),
        ([("0.0.jpg", jpeg()), ("0.json", b'["A cat."]')], "wrong_shape"),
        ([("0.jpg", b""), ("0.txt", b"A cat.")], "image_empty"),
        ([("0.jpg", b"<html>"), ("0.txt", b"A cat.")], "image_undecodable"),
        ([("0.json", b'{"texts": "A cat.", "images": []}')], "wrong_shape"),
        ([("0.json", b'{"texts": [], "images": []}')], "empty_document"),
        ([("0.json", b'{"texts": [" "], "images": [null]}')], "empty_document"),
        ([("0.json", b'{"texts": [null], "images": ["1.jpg"]}')], "image_missing"),
    ],
)
def test_a_bad_sample_is_rejected_for_its_reason(shard, members, reason):
    opened = shard(*members, ("9.jpg", jpeg()), ("9.txt", b"good"))
    assert rejected(opened) == reason
    assert opened.key(0) == "0"
    assert opened.read(1)[0].parts[1] == Text("good")


@pytest.mark.parametrize(
    "name", ["d/7.0.jpg", "./d/7.0.jpg", "7.0.jpg", "0.jpg", "0.JPG", "coco/2017/7.0.jpg"]
)
def test_an_interleaved_document_names_members_of_its_sample(shard, name):
    record = {"texts": ["one", None, "two", None], "images": [None, name, None, "7.1.png"]}
    opened = shard(
        ("d/7.json", json.dumps(record).encode()),
        ("d/7.0.jpg", jpeg(20, 30)),
        ("d/7.1.png", encoded(noise(10, 50), "PNG")),
    )
    document, lost = opened.read(0)
    assert (document.key, document.caption, lost) == ("d/7", False, [])
    shapes = [part.text if isinstance(part, Text) else (part.height, part.width) for part in document.parts]
    assert shapes == ["one", (20, 30), "two", (10, 50)]
    assert opened.load(document.parts[1]) == jpeg(20, 30)


def test_documents_in_tars_are_read_by_the_name_of_either_format(tmp_path):
    record = json.dumps({"texts": ["one", None], "images": [None, "7.0.jpg"]}).encode()
    path = write_tar(tmp_path / "x.tar", [("7.json", record), ("7.0.jpg", jpeg())])
    by_name = [
        open_shard(str(path), Source(format=format), Data()).read(0)
        for format in ("cc12m", "webdataset", "obelics")
    ]
    assert by_name[0] == by_name[1] == by_name[2]


def test_a_document_goes_without_its_bad_images(shard):
    record = {
        "texts": ["one", None, None, None],
        "images": [None, "missing.jpg", "7.1.jpg", "7.2.jpg", "7.2.jpg"],
    }
    opened = shard(
        ("7.json", json.dumps(record).encode()),
        ("7.1.jpg", jpeg()[:20]),
        ("7.2.jpg", jpeg(20, 30)),
        ("8.0.jpg", jpeg()),
    )
    document, lost = opened.read(0)
    assert [type(part) for part in document.parts] == [Text, Image]
    assert sorted((reject.image, reject.reason) for reject in lost) == [
        (0, "image_missing"),
        (1, "image_undecodable"),
        (3, "image_unplaced"),
    ]


def test_a_member_of_another_sample_is_not_reached(shard):
    record = {"texts": ["one", None], "images": [None, "8.0.jpg"]}
    opened = shard(("7.json", json.dumps(record).encode()), ("8.0.jpg", jpeg()), ("8.txt", b"other"))
    assert [reject.reason for reject in opened.read(0)[1]] == ["image_missing"]


def test_a_truncated_tar_gives_what_is_whole(tmp_path, shard):
    members = [(f"{n}.{e}", d) for n in range(5) for e, d in (("jpg", jpeg(seed=n)), ("txt", b"A cat."))]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(jpeg(seed=3)) + 100])
    opened = open_shard(str(tmp_path / "cut.tar"), Source(format="cc12m"), Data())
    assert [reject.reason for reject in opened.rejects] == ["shard_truncated"]
    assert [opened.read(index)[0].key for index in range(len(opened))] == ["0", "1", "2"]


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"x" * 2000])
def test_what_is_no_tar_is_unreadable(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(Rejected) as error:
        open_shard(str(tmp_path / "x.tar"), Source(format="cc12m"), Data())
    assert error.value.reason == "shard_unreadable"


def test_a_shard_that_is_cut_while_it_is_read_rejects_and_does_not_crash(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("0.jpg", jpeg()), ("0.txt", b"A cat."), ("1.jpg", jpeg()), ("1.txt", b"A dog.")]
    )
    opened = open_shard(str(path), Source(format="cc12m"), Data())
    document, _ = opened.read(1)
    with open(path, "r+b") as file:
        file.truncate(700)
    for attempt in (lambda: opened.read(1), lambda: opened.key(1), lambda: opened.load(document.parts[0])):
        with pytest.raises(Rejected):
            attempt()
    path.unlink()  # what vanishes while it is open can be read on
    assert opened.key(0) == "0"
