"""Three records of each public data set, in its own columns and types, train as they are published."""

import base64
import http.server
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.config import Columns, Source
from experiments.vlm.data.formats import FORMATS, RECORD_FORMATS
from experiments.vlm.data.loader import Loader
from tests.samples import encoded, jpeg, noise, write_jsonl, write_tar
from tests.tiny_data import Characters, make_job
from torchtitan.config.errors import DataError

BIRDS = ["A heron.", "Two coots on the lake.", "A kingfisher, which dives."]
TEXT, WHOLE = pa.string(), pa.int64()
IMAGE = pa.struct([("bytes", pa.binary()), ("path", TEXT)])


def picture(number: int) -> dict:
    return {"bytes": jpeg(32, 32 * (number + 1), seed=number), "path": f"{number}.jpg"}


def parquet(path: Path, columns: dict[str, pa.DataType], records: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(records, pa.schema(list(columns.items()))), path / "train.parquet")


def turns(bird: str, **more) -> list[dict]:
    return [
        {"user": "What is it?", "assistant": bird, **more},
        {"user": "Sure?", "assistant": "Yes.", **more},
    ]


def finevision(path: Path, url: str) -> None:
    ratings = {f"{kind}_ratings": pa.list_(WHOLE) for kind in ("relevance", "image_correspondence")}
    said = pa.list_(pa.struct([("user", TEXT), ("assistant", TEXT)]))
    records = [{"texts": turns(bird), "source": "birds", "relevance_ratings": [5, 4]} for bird in BIRDS]
    for number, images in enumerate([[picture(0)], [picture(1), picture(2)], None]):
        records[number]["images"] = images
    parquet(path, {"images": pa.list_(IMAGE), "texts": said, "source": TEXT, **ratings}, records)


def the_cauldron(path: Path, url: str) -> None:
    said = pa.list_(pa.struct([("user", TEXT), ("assistant", TEXT), ("source", TEXT)]))
    records = [
        {"images": [picture(n)], "texts": turns(bird, source="AI2D")[: n + 1]} for n, bird in enumerate(BIRDS)
    ]
    parquet(path, {"images": pa.list_(IMAGE), "texts": said}, records)


def llava_onevision(path: Path, url: str) -> None:
    said = pa.list_(pa.struct([("from", TEXT), ("value", TEXT)]))
    records = [
        {
            "id": f"{n:06d}",
            "image": picture(n) if n else None,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?" if n else "Name one."},
                {"from": "gpt", "value": bird},
            ],
            "data_source": "birds",
        }
        for n, bird in enumerate(BIRDS)
    ]
    parquet(path, {"id": TEXT, "image": IMAGE, "conversations": said, "data_source": TEXT}, records)


def llava_instruct(path: Path, url: str) -> None:
    (path / "coco").mkdir()
    records = []
    for n, bird in enumerate(BIRDS):
        (path / "coco" / f"{n}.jpg").write_bytes(picture(n)["bytes"])
        said = [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": bird},
        ]
        records.append({"id": f"{n:012d}", "image": f"coco/{n}.jpg", "conversations": said})
    (path / "train.json").write_text(json.dumps(records, indent=2))


def cc12m(path: Path, url: str) -> None:
    members = []
    for n, bird in enumerate(BIRDS):
        note = {
            "caption": bird,
            "url": "https://a.b/1.jpg",
            "key": f"{n:09d}",
            "status": "success",
            "width": 32,
        }
        members += [
            (f"{n:09d}.jpg", picture(n)["bytes"]),
            (f"{n:09d}.json", json.dumps(note).encode()),
            (f"{n:09d}.txt", bird.encode()),
        ]
    write_tar(path / "cc12m-train-0000.tar", members)


def avif_and_jpeg_2000(path: Path, url: str) -> None:
    members = []
    for n, (bird, kind, name) in enumerate(
        zip(BIRDS, ("AVIF", "JPEG2000", "JPEG2000"), ("avif", "jp2", "j2k"), strict=True)
    ):
        members += [(f"{n}.{name}", encoded(noise(32, 40), kind)), (f"{n}.txt", bird.encode())]
    write_tar(path / "birds.tar", members)


def laion(path: Path, url: str) -> None:
    records = [{"SAMPLE_ID": n, "URL": f"{url}/{n}.jpg", "TEXT": bird} for n, bird in enumerate(BIRDS)]
    parquet(path, {"SAMPLE_ID": WHOLE, "URL": TEXT, "TEXT": TEXT}, records)


def coco_captions(path: Path, url: str) -> None:
    records = [
        {"image": picture(n), "caption": [bird, "A bird."], "split": "train", "img_id": str(n)}
        for n, bird in enumerate(BIRDS)
    ]
    parquet(path, {"image": IMAGE, "caption": pa.list_(TEXT), "split": TEXT, "img_id": TEXT}, records)


def docci(path: Path, url: str) -> None:
    records = [
        {"photo": picture(n), "example_id": f"{n}", "description": bird} for n, bird in enumerate(BIRDS)
    ]
    parquet(path, {"photo": IMAGE, "example_id": TEXT, "description": TEXT}, records)


def obelics(path: Path, url: str) -> None:
    lists = pa.list_(TEXT)
    records = [
        {
            "images": [None, f"{url}/{n}.jpg", None],
            "texts": ["Seen today:", None, bird],
            "metadata": json.dumps([None, {"src": "a", "format": "jpg"}, None]),
            "general_metadata": json.dumps({"url": "https://a.b"}),
        }
        for n, bird in enumerate(BIRDS)
    ]
    parquet(path, {"images": lists, "metadata": TEXT, "general_metadata": TEXT, "texts": lists}, records)


def mmc4_record(bird: str, **image) -> dict:
    entry = {"face_detections": None, "matched_sim": 0.27, "matched_text_index": 1, **image}
    return {
        "image_info": [entry],
        "similarity_matrix": [[0.24, 0.27]],
        "text_list": ["Seen today:", bird],
        "url": "http://a.b/birds.html",
        "could_have_url_duplicate": 0,
    }


def mmc4_by_address(path: Path, url: str) -> None:
    write_jsonl(
        path / "train.jsonl",
        [mmc4_record(bird, image_name=f"b{n}.jpg", raw_url=f"{url}/{n}.jpg") for n, bird in enumerate(BIRDS)],
    )


def mmc4_beside(path: Path, url: str) -> None:
    for n in range(3):
        (path / f"b{n}.jpg").write_bytes(picture(n)["bytes"])
    write_jsonl(
        path / "train.jsonl",
        [
            mmc4_record(bird, image_name=f"b{n}.jpg", raw_url=f"{url}/gone.jpg")
            for n, bird in enumerate(BIRDS)
        ],
    )


def mmc4_in_tars(path: Path, url: str) -> None:
    members = []
    for n, bird in enumerate(BIRDS):
        inside = base64.b64encode(picture(n)["bytes"]).decode()
        image = {"image_base64": inside} if n else {"image_name": "b0.jpg", "raw_url": f"{url}/gone.jpg"}
        members += [(f"{n}.json", json.dumps(mmc4_record(bird, **image)).encode())]
        members += [] if n else [("0.b0.jpg", picture(0)["bytes"])]
    write_tar(path / "mmc4-00000.tar", members)


DATA_SETS = {
    finevision: ("finevision", 3),  # format, images
    the_cauldron: ("the_cauldron", 3),
    llava_onevision: ("llava", 2),
    llava_instruct: ("llava", 3),
    cc12m: ("cc12m", 3),
    avif_and_jpeg_2000: ("webdataset", 3),
    laion: ("captions", 3),
    coco_captions: ("captions", 3),
    docci: ("captions", 3),
    obelics: ("obelics", 3),
    mmc4_by_address: ("mmc4", 3),
    mmc4_beside: ("mmc4", 3),
    mmc4_in_tars: ("webdataset", 3),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where 0.jpg, 1.jpg and 2.jpg are served."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(picture(number)["bytes"])

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def job_of(path: Path, dump: Path, source: Source):
    job = make_job(path, dump, epochs=1, allow_private_urls=True, url_timeout_s=60.0)
    source.path = str(path)
    job.data.sources = [source]
    return job


@pytest.mark.parametrize("write", DATA_SETS, ids=lambda write: write.__name__)
def test_a_public_data_set_trains_as_it_is_published(tmp_path, address, write):
    format, images = DATA_SETS[write]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", address)
    columns = Columns("photo", "description") if write is docci else Columns()
    job = job_of(tmp_path / "data", tmp_path / "out", Source(format=format, columns=columns))
    loader, text, counts = Loader(job, Characters()), "", []
    for step in loader:
        for batch in step.batches:
            text += Characters().decode(batch.tensors["tokens"].flatten().tolist())
            counts.append((len(batch.samples), batch.counts["images"]))
    report = loader.report()["sources"]
    loader.close()
    assert all(bird in text for bird in BIRDS) and tuple(map(sum, zip(*counts, strict=True))) == (3, images)
    assert not any(source.get("rejected") for source in report.values())


@pytest.mark.parametrize(
    "write",
    [write for write, (name, _) in DATA_SETS.items() if name in RECORD_FORMATS | {"the_cauldron": 0}],
    ids=lambda write: write.__name__,
)
def test_under_another_format_the_error_names_the_one_that_fits(tmp_path, write):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "http://127.0.0.1:9")
    right, fitting = FORMATS[DATA_SETS[write][0]], set()
    for wrong, format in RECORD_FORMATS.items():
        if format is not right or write is docci:
            with pytest.raises(DataError) as error:
                Loader(job_of(tmp_path / "data", tmp_path / "out", Source(format=wrong)), Characters())
            fitting.add(str(error.value).rpartition(": set ")[2].partition(", or take")[0])
    assert len(fitting) == 1
    named = fitting.pop()
    if write is docci:
        assert named == 'format = \'captions\' and columns = {image = "photo", text = "description"}'
    else:
        assert FORMATS[named.removeprefix("format = ").strip("'")] is right
