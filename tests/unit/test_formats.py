"""The table of formats: pure functions of whatever a record may hold, in every file of records."""

import base64
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from experiments.vlm.data.document import Draft, Text
from experiments.vlm.data.formats import FORMATS, RECORD_FORMATS, format_of
from experiments.vlm.data.formats.image_values import plain_value
from experiments.vlm.data.formats.record_shard import ImageFolder
from experiments.vlm.data.rejects import Rejected
from tests.samples import jpeg, write_jsonl
from tests.unit.test_record_formats import open_records

TELLING = [
    "<image>",
    "",
    " ",
    "user",
    "human",
    "gpt",
    "assistant",
    "image",
    "image_url",
    "text",
    "1.jpg",
    "http://a/1.jpg",
    "data:,x",
]
FIELDS = [
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "index",
    "image",
    "url",
    "bytes",
    "path",
    "base64",
]
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(TELLING)
    | st.text(max_size=3)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", RECORD_FORMATS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_a_record_holds_it_gives_a_draft_or_a_reason(name, data):
    columns = st.sampled_from(RECORD_FORMATS[name].columns)
    record = data.draw(st.dictionaries(columns, VALUES, max_size=4))
    for parse in (RECORD_FORMATS[name].parse, FORMATS["webdataset"].parse):
        try:
            draft = parse(record)
        except Rejected:
            continue
        assert isinstance(draft, Draft)
        for image in draft.images():
            value: Any = record
            for step in image.place:
                value = value[step]
            assert value is image.value or value["type"] in ("image", "image_url")


@settings(deadline=None, max_examples=60)
@given(VALUES)
def test_whatever_stands_for_an_image_it_is_bytes_a_string_or_rejected(value):
    try:
        assert isinstance(plain_value(value), memoryview | str)
    except Rejected as rejected:
        assert rejected.reason in ("image_missing", "image_undecodable")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_base64_of_an_image_is_told_from_a_path(kind):
    file = io.BytesIO()
    PILImage.new("RGB", (9, 7)).save(file, kind)
    text = base64.b64encode(file.getvalue()).decode()
    assert plain_value(text) == file.getvalue() and plain_value(text[:4] + ".jpg") == text[:4] + ".jpg"
    with pytest.raises(Rejected, match="base64"):
        plain_value(text[:-1] + "!")


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        ({"url": "http://a", "caption": "b"}, "captions"),
        ({"jpg": b"", "txt": "b"}, "captions"),
        ({"texts": [], "images": []}, "obelics"),
        ({"image": "1.jpg", "conversations": []}, "llava"),
        ({"images": [], "messages": []}, "messages"),
        ({"content": "a"}, "text"),
        ({"other": 1}, None),
    ],
)
def test_a_record_tells_its_kind(record, kind):
    assert format_of(record) == kind


@pytest.mark.parametrize(
    ("name", "lines"), [("x.jsonl", None), ("x.tsv", "image\tcaption\n"), ("x.tsv", "caption\timage\n")]
)
def test_captions_stand_in_record_files_too(tmp_path, name, lines):
    (tmp_path / "a.jpg").write_bytes(jpeg(20, 30))
    records = [
        {"image": "a.jpg", "caption": "Ä cat."},
        {"image": "gone.jpg", "caption": "A dog."},
        {"image": "a.jpg", "caption": " "},
    ]
    if lines is None:
        write_jsonl(tmp_path / name, records)
    else:
        columns = lines.split()
        (tmp_path / name).write_text(
            lines + "".join("\t".join(record[c] for c in columns) + "\n" for record in records)
        )
    shard = open_records(tmp_path / name, "captions")
    document, lost = shard.read(0)
    assert (len(shard), document.parts[1], document.caption, lost) == (3, Text("Ä cat."), True, [])
    assert shard.load(document.parts[0]) == jpeg(20, 30)
    for index, reason in ((1, "image_missing"), (2, "caption_missing")):
        with pytest.raises(Rejected) as error:
            shard.read(index)
        assert error.value.reason == reason


def test_a_tsv_without_a_header_is_known_by_its_addresses(tmp_path):
    (tmp_path / "x.tsv").write_bytes(
        b"A cat.\thttp://10.0.0.1/a\r\nA dog.\thttp://10.0.0.1/b\tc\ncaf\xe9\thttp://10.0.0.1/d\n"
    )
    shard = open_records(tmp_path / "x.tsv", "captions")
    reasons = []
    for index in range(len(shard)):
        with pytest.raises(Rejected) as error:
            shard.read(index)
        reasons.append(error.value.reason)
    assert reasons == ["image_address", "wrong_shape", "broken_utf8"]


def test_loading_an_image_looks_for_no_other_file(tmp_path, monkeypatch):
    entries = [
        {"image_name": f"{i}.jpg", "raw_url": "http://10.0.0.1/", "matched_text_index": 0} for i in range(3)
    ]
    (tmp_path / "x.jsonl").write_text(json.dumps({"text_list": ["Birds."], "image_info": entries}))
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(20 + i, 30))
    shard, looked_for = open_records(tmp_path / "x.jsonl", "mmc4"), []
    images = shard.read(0)[0].parts[:3]
    has = ImageFolder.has
    monkeypatch.setattr(ImageFolder, "has", lambda self, name: looked_for.append(name) or has(self, name))
    assert [shard.load(image) for image in images] == [jpeg(20 + i, 30) for i in range(3)]
    assert looked_for == ["0.jpg", "1.jpg", "2.jpg"]


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("data.formats", "aiohttp"),
        ("data.formats", "torch"),
        ("data.formats.shard", "torch"),
        ("prepare.start", "torch"),
        ("check", "aiohttp"),
        ("check", "pyarrow"),
        ("check", "torch"),
    ],
)
def test_what_looks_at_no_image_imports_nothing_heavy(module, heavy):
    code = f"import sys, experiments.vlm.{module}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
