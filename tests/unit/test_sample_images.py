"""Samples of several images, in all the spellings of tars: each image is in the document, or told."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from experiments.vlm.config import Data, Source
from experiments.vlm.data.document import Image, Text
from experiments.vlm.data.formats.tiff_pages import only, pages
from experiments.vlm.data.image import decode, probe
from experiments.vlm.data.rejects import Rejected
from experiments.vlm.data.sources.shards import open_shard
from tests.samples import encoded, jpeg, noise, write_tar

MARKS = [(20 + 10 * number, 40) for number in range(5)]  # sizes that tell the images apart


def read(tmp_path, *members, format="webdataset"):
    """The document of a tar's one sample, its images as sizes, and what is told."""
    path = str(write_tar(tmp_path / "x.tar", members))
    shard = open_shard(path, Source(format=format), Data(cache_folder=str(tmp_path)))
    assert len(shard) == 1
    document, lost = shard.read(0)
    for part in document.parts:
        if isinstance(part, Image):
            assert probe(shard.load(part)) == (part.height, part.width)
    parts = [
        part.text if isinstance(part, Text) else (part.height, part.width)
        for part in document.parts
        if isinstance(part, (Text, Image))
    ]
    return parts, sorted(reject.reason for reject in lost)


def picture(number: int, name: str) -> bytes:
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2], name.rpartition(".")[2])
    return encoded(noise(*MARKS[number]), kind)


@pytest.mark.parametrize(
    "names",
    [
        ["0.jpg", "1.png"],
        ["img1.jpg", "img2.jpg", "img3.jpg"],
        ["image.0.jpg", "image.1.webp"],
        ["page_00.png", "page_01.png"],
        ["8.jpg", "9.jpg", "10.jpg"],
        ["0001.jpg", "0002.tif"],
        ["IMG-1.JPG", "IMG-2.JPG"],
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_numbered_images_stand_before_their_caption_in_order(tmp_path, names, backwards):
    images = [(f"k.{name}", picture(number, name.lower())) for number, name in enumerate(names)]
    parts, told = read(tmp_path, *images[:: -1 if backwards else 1], ("k.txt", b"A cat."))
    assert (parts, told) == ([*MARKS[: len(names)], "A cat."], [])


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.from_regex(r"\A([a-z]{0,3}[._]?[0-9]{0,2}\.)?(jpg|png)\Z"), min_size=1, max_size=5, unique=True
    ),
    record=st.sampled_from(["txt", "caption", "obelics", "llava"]),
)
def test_whatever_images_are_called_each_is_in_the_document_or_told(tmp_path_factory, names, record):
    members = [(f"k.{name}", picture(number, name)) for number, name in enumerate(names)]
    texts = {
        "txt": ("k.txt", b"A cat."),
        "caption": ("k.json", b'{"caption": "A cat."}'),
        "obelics": ("k.json", json.dumps({"texts": ["a", None], "images": [None, names[0]]}).encode()),
        "llava": (
            "k.json",
            json.dumps(
                {
                    "image": [f"k.{name}" for name in names[:2]],
                    "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}],
                }
            ).encode(),
        ),
    }
    parts, told = read(tmp_path_factory.mktemp("tar"), *members, texts[record])
    assert sum(isinstance(part, tuple) for part in parts) + len(told) == len(names)
    assert set(told) <= {"image_unplaced"}


def test_text_alone_was_asked_for(tmp_path):
    assert read(tmp_path, ("k.jpg", jpeg()), ("k.txt", b"A cat."), format="text") == (["A cat."], [])


def tiff(count: int, **options) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (PILImage.fromarray(noise(*MARKS[number], seed=number)) for number in range(count))
    first.save(buffer, "TIFF", save_all=True, append_images=rest, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}]
)
def test_each_page_of_a_tiff_is_the_one_that_pillow_shows(options):
    data = tiff(4, **options)
    found = pages(lambda offset, size: data[offset : offset + size])
    assert [(page.height, page.width) for page in found] == MARKS[:4]
    whole = PILImage.open(io.BytesIO(data))
    for number, page in enumerate(found):
        whole.seek(number)
        assert np.array_equal(decode(only(data, page.tags), *MARKS[number]), np.array(whole.convert("RGB")))


def test_a_turned_page_has_the_size_that_is_shown():
    data = encoded(noise(20, 60), "TIFF", tiffinfo={274: 6})
    (page,) = pages(lambda offset, size: data[offset : offset + size])
    assert (page.height, page.width) == probe(data) == (60, 20)


@pytest.mark.parametrize("data", [b"", b"II*", b"II*\0\x08\0\0\0" + bytes(2) + b"\x08\0\0\0", jpeg()])
def test_what_is_no_tiff_is_rejected(data):
    def read_at(offset: int, size: int) -> bytes:
        if offset + size > len(data):
            raise Rejected("image_truncated")
        return data[offset : offset + size]

    with pytest.raises(Rejected):
        pages(read_at)


def mint(images: list[str | None], texts: list[str | None], metadata: list[dict] | None = None) -> bytes:
    record = {"texts": texts, "images": images, "pdf_name": "a.pdf"}
    return json.dumps(record | ({"image_metadata": metadata} if metadata is not None else {})).encode()


def entry(page: int, xref: int) -> dict:
    return {"page": page, "xref": xref, "height": 1, "width": 1, "sha256": "0"}


@pytest.mark.parametrize(
    "record, expected, told",
    [
        (mint(["page_0_image_85", None], [None, "a"], [entry(0, 85)]), [MARKS[0], "a"], 2),
        (
            mint(
                [None, "page_4_image_2", None, "page_1_image_9"],
                ["a", None, "b", None],
                [entry(1, 9), entry(2, 7), entry(4, 2)],
            ),
            ["a", MARKS[2], "b", MARKS[0]],
            1,
        ),
        (mint(["x", None, "y", "z"], [None, "a", None, None]), [MARKS[0], "a", MARKS[1], MARKS[2]], 0),
        (
            mint(["page_0_image_1", "page_0_image_1", None], [None, None, "a"], [entry(0, 1), entry(0, 1)]),
            [MARKS[0], MARKS[1], "a"],
            1,
        ),
        (mint([None], ["a"], []), ["a"], 1),
    ],
)
def test_documents_of_mint_1t_find_their_images_in_the_pages_of_a_tiff(tmp_path, record, expected, told):
    parts, lost = read(tmp_path, ("k.json", record), ("k.tiff", tiff(3)))
    assert parts == expected and lost == ["image_unplaced"] * told


def test_a_page_that_is_not_there_costs_the_image_and_not_the_document(tmp_path):
    record = mint(["page_0_image_1", "page_0_image_2", None], [None, None, "a"], [entry(0, 1), entry(0, 2)])
    assert read(tmp_path, ("k.json", record), ("k.tiff", tiff(1))) == ([MARKS[0], "a"], ["image_missing"])
    broken = tiff(2)[:200]
    assert read(tmp_path, ("k.json", record), ("k.tiff", broken))[0] == ["a"]


def test_an_image_that_is_missing_is_no_page_of_a_tiff(tmp_path):
    record = json.dumps({"texts": [None, None, "a"], "images": ["missing.jpg", "0.tif", None]}).encode()
    parts, told = read(tmp_path, ("k.json", record), ("k.0.tif", tiff(2)))
    assert parts == [MARKS[0], "a"] and told == ["image_missing", "image_unplaced"]


def test_of_a_caption_the_first_page_is_the_image_and_the_others_are_told(tmp_path):
    parts, told = read(tmp_path, ("k.tif", tiff(3)), ("k.txt", b"A cat."))
    assert parts == [MARKS[0], "A cat."] and told == ["image_unplaced"] * 2
