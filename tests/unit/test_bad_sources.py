"""A source of which nothing is good, or which goes away, ends the run with the commonest reason."""

import json
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.vlm.config import Columns, Source
from experiments.vlm.data.loader import Loader
from tests.bad_samples import caption, kinds_of_bad, mixed_job, read_all, wholly_bad
from tests.samples import jpeg, write_tar
from tests.tiny_data import Characters, make_job, write_all
from torchtitan.config.errors import ConfigError, DataError, StorageError


def tokens_of(loader: Loader, steps: int) -> list[np.ndarray]:
    return [next(loader).batches[0].tensors["tokens"].numpy().copy() for _ in range(steps)]


def test_a_source_that_vanished_ends_the_run_and_goes_on_once_it_is_back(tmp_path):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out")
    job.data.sources[0].path = str(folder / "captions" / "captions-{0..2}.tar")
    loader = Loader(job, Characters())
    next(loader)
    state, expected = loader.state_dict(), tokens_of(loader, 8)
    loader.close()
    (folder / "captions").rename(folder / "away")
    with pytest.raises(ConfigError, match=r"captions-\{0..2\}.tar: none of these 3 shards is there"):
        Loader(job, Characters())
    (folder / "away").rename(folder / "captions")
    loader = Loader(job, Characters())
    loader.load_state_dict(state)
    assert all(map(np.array_equal, tokens_of(loader, 8), expected))
    loader.close()


@pytest.mark.parametrize("workers, epochs", [(0, 0), (0, 1), (1, 0)])
def test_shards_that_are_deleted_while_they_are_read_end_the_run(tmp_path, workers, epochs):
    job = make_job(write_all(tmp_path / "data"), tmp_path / "out", num_workers=workers, epochs=epochs)
    states: list = []
    loader = Loader(job, Characters())
    (tmp_path / "data" / "captions" / "note").write_text("The folder is there, its shards are not.")
    for shard in (tmp_path / "data" / "captions").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"source captions: none of its 3 shards can be read"):
        for state in (next(loader).state() for _ in range(200)):
            states.append(state)
    loader.close()
    assert all(b'"exhausted"' not in zlib.decompress(entry) for state in states for entry in state.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_is_away_too_long_stops_the_run_where_it_was(tmp_path, workers):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out", num_workers=workers, storage_timeout_s=0.0)
    loader = Loader(job, Characters())
    expected = tokens_of(loader, 8)
    loader.close()
    loader = Loader(job, Characters())
    (folder / "captions").rename(folder / "away")
    with pytest.raises(StorageError) as error:
        next(loader)
    assert "captions-" in str(error.value) and "unmounted, or moved away?" in str(error.value)
    assert "\n" not in str(error.value)
    loader.close()
    (folder / "away").rename(folder / "captions")
    assert not loader.state_dict()
    assert all(map(np.array_equal, tokens_of(loader, 8), expected))
    loader.close()


@pytest.mark.parametrize("kind", kinds_of_bad())
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_source_without_one_good_sample_is_an_error_beside_good_ones(tmp_path, kind, epochs):
    folder = write_all(tmp_path / "data")
    (folder / "rotten").mkdir()
    members = [member for number in range(20) for member in wholly_bad(kind)(f"{number:02d}")]
    write_tar(folder / "rotten" / "a.tar", members)
    job = make_job(folder, tmp_path / "out", epochs=epochs)
    job.data.sources[1] = Source(name="rotten", format="cc12m", path=str(folder / "rotten"))
    reason = kinds_of_bad()[kind][0]
    with pytest.raises(DataError) as error:
        Loader(job, Characters())
    message = str(error.value)
    assert message.startswith(
        f"source rotten: none of the 20 samples that were tried is good ({reason} 20); for example shard "
        f"{folder}"
    )
    assert "a.tar, sample " in message and "\n" not in message


def test_a_held_out_source_without_a_good_sample_is_told_before_training(tmp_path):
    folder = write_all(tmp_path / "data")
    (tmp_path / "rotten").mkdir()
    write_tar(tmp_path / "rotten" / "a.tar", wholly_bad("no image")("1"))
    job = make_job(folder, tmp_path / "out")
    job.validation.sources = [Source(name="held out", format="cc12m", path=str(tmp_path / "rotten"))]
    Loader(job, Characters())
    job.validation.enable = True
    with pytest.raises(DataError, match="source held out: none of the 1 samples"):
        Loader(job, Characters())


def test_a_source_of_documents_that_are_all_too_long_is_an_error(tmp_path):
    job = make_job(
        write_all(tmp_path / "data"),
        tmp_path / "out",
        long_documents="drop",
        seq_len=64,
        max_patches_per_image=16,
    )
    (tmp_path / "data" / "texts" / "texts.jsonl").write_text(json.dumps({"text": "word " * 100}) + "\n")
    with pytest.raises(
        DataError, match=r"source texts: none of the 1 samples that were tried is good \(too_long 1\)"
    ):
        Loader(job, Characters())


def test_one_good_sample_among_many_is_enough(tmp_path):
    (tmp_path / "mixed").mkdir()
    members = [
        member
        for n in range(300)
        for member in (caption(jpeg()) if n == 211 else wholly_bad("zero bytes"))(f"{n:03d}")
    ]
    write_tar(tmp_path / "mixed" / "a.tar", members)
    job = mixed_job(tmp_path / "mixed", tmp_path / "out")
    seen, report, _ = read_all(job)
    assert (
        seen == Counter(["211"]) and report["captions"]["rejected"]["samples"]["image_empty"]["count"] == 299
    )


def test_a_source_of_which_nearly_all_shards_are_missing_stays_in_the_mixture(tmp_path):
    folder = write_all(tmp_path / "data")
    job = make_job(folder, tmp_path / "out")
    job.data.sources[0].path = str(folder / "captions" / "captions-{0..400}.tar")
    loader = Loader(job, Characters())
    given = [sum(batch.counts["samples/captions"] for batch in next(loader).batches) for _ in range(60)]
    loader.close()
    assert sum(given[-10:]) > 0


def test_slots_without_a_share_of_an_unshuffled_source_go_on_without_it(tmp_path):
    folder = write_all(tmp_path / "data")
    (folder / "few").mkdir()
    members = [
        member
        for n in range(4)
        for member in (wholly_bad("zero bytes") if n == 2 else caption(jpeg()))(f"few {n}")
    ]
    write_tar(folder / "few" / "a.tar", members)
    job = make_job(folder, tmp_path / "out", global_batch_size=8)
    job.data.sources[0] = Source(name="few", format="cc12m", path=str(folder / "few"), shuffle=False)
    loader = Loader(job, Characters())
    few = {
        sample.key
        for _ in range(10)
        for batch in next(loader).batches
        for sample in batch.samples
        if sample.source == "few"
    }
    loader.close()
    assert few == {"few 0", "few 1", "few 3"}


def test_slots_that_can_get_no_sample_ever_are_an_error(tmp_path):
    (tmp_path / "few").mkdir()
    write_tar(tmp_path / "few" / "a.tar", caption(jpeg())("0"))
    job = mixed_job(tmp_path / "few", tmp_path / "out", global_batch_size=4)
    job.data.epochs, job.data.sources[0].shuffle = 0, False
    with pytest.raises(DataError, match="slots 2 to 3 get no good sample of captions, ever"):
        next(Loader(job, Characters(), rank=1, ranks=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rotten_source_stops_the_run_when_asked_to(tmp_path, workers):
    (tmp_path / "rotten").mkdir()
    members = [
        member for n in range(1500) for member in caption(b"no image" if n % 3 else jpeg())(f"{n:04d}")
    ]
    write_tar(tmp_path / "rotten" / "a.tar", members)
    job = mixed_job(tmp_path / "rotten", tmp_path / "out", max_bad_fraction=0.7, num_workers=workers)
    if workers == 0:
        assert sum(1 for _ in Loader(job, Characters())) > 10
    job.data.max_bad_fraction = 0.5
    with pytest.raises(
        DataError,
        match=r"captions: \d+ of \d+ samples are bad \(6\d.\d%\), more than data.max_bad_fraction = 0.5",
    ):
        for _ in Loader(job, Characters()):
            pass


def jsonl(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


LLAVA = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
MESSAGES = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}


@pytest.mark.parametrize(
    "format, name, content, hint",
    [
        (
            "captions",
            "a.jsonl",
            jsonl(*[LLAVA] * 5),
            "its records are of format llava, not captions: set format = 'l",
        ),
        ("llava", "a.jsonl", jsonl(*[MESSAGES] * 5), "its records are of format messages, not llava"),
        ("llava", "a.jsonl", jsonl({"text": "a book"}), "its records are of format text, not llava"),
        (
            "obelics",
            "a.tsv",
            b"url\tcaption\nhttp://a.b/c\tA cat.\n",
            "its records are of format captions, not",
        ),
        ("captions", "a.jsonl", jsonl({"bild": "a.jpg", "titel": "Katze"}), "fields are bild, titel"),
        ("captions", "a.jsonl", jsonl({"image": "a.jpg", "caption": ""}), "correct it, or take it out"),
        ("captions", "a.jsonl", jsonl({"bild": "a.jpg", "titel": 5}), "columns = {image = ..., text = ...}"),
        (
            "captions",
            "a.jsonl",
            jsonl({"bild": "a.jpg", "id": "7", "description": "Katze"}),
            'set format = \'captions\' and columns = {image = "bild", text = "description"}',
        ),
        (
            "captions",
            "a.jsonl",
            jsonl({"image": "a.jpg", "question": "What is it?", "answer": "A cat."}),
            "columns = {image = ..., text = ...}",
        ),
        (
            "captions",
            "a.jsonl",
            jsonl({"images": ["a.jpg"], "caption": "A cat."}),
            "columns = {image = ..., text = ...}",
        ),
        (
            "llava",
            "a.jsonl",
            jsonl({"img": "a.jpg", "text": "A cat."}),
            'set format = \'captions\' and columns = {image = "img", text = "text"}',
        ),
        ("text", "a.jsonl", jsonl({"file_name": "a.jpg", "caption": "A cat."}), "set format = 'captions'"),
        ("captions", "a.CSV", b"image,caption\na.jpg,A cat.\n", "CSV is not read"),
        (
            "llava",
            "a.jsonl",
            jsonl({"image": "a.jpg", "conversations": MESSAGES["messages"]}),
            "set format = 'messages' and columns = {text = \"conversations\"}",
        ),
        (
            "messages",
            "a.jsonl",
            jsonl({"photos": ["a.jpg"], "dialog": LLAVA["conversations"]}),
            'set format = \'llava\' and columns = {image = "photos", text = "dialog"}',
        ),
        (
            "obelics",
            "a.jsonl",
            jsonl({"text_list": ["a"], "image_info": []}),
            "its records are of format mmc4, not obelics: set format = 'mmc4'",
        ),
    ],
)
def test_a_source_of_another_format_is_told_which_would_fit(tmp_path, format, name, content, hint):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    job = make_job(folder, tmp_path / "out")
    job.data.sources = [Source(format=format, path=str(folder / name))]
    with pytest.raises(DataError) as error:
        Loader(job, Characters())
    message = str(error.value)
    assert "that were tried is good" in message and hint in message and "\n" not in message


@pytest.mark.parametrize("format", ["webdataset", "cc12m", "llava"])
def test_a_tar_whose_images_and_texts_share_no_key_is_told_so(tmp_path, format):
    members = [(f"00{n}_{k}.png", jpeg(8, 8)) for n in range(5) for k in range(2)]
    members += [(f"00{n}.txt", b"a cat") for n in range(5)]
    write_tar(tmp_path / "a.tar", sorted(members))
    job = make_job(tmp_path, tmp_path / "out")
    job.data.sources = [Source(format=format, path=str(tmp_path / "a.tar"))]
    with pytest.raises(DataError, match="00\\d_0.png is one by itself.*call the images of KEY.txt KEY.0.png"):
        Loader(job, Characters())


def test_parquet_of_another_format_is_told_though_its_columns_are_not_read(tmp_path):
    pq.write_table(pa.table({"conversations": [LLAVA["conversations"]] * 3}), tmp_path / "a.parquet")
    job = make_job(tmp_path, tmp_path / "out")
    job.data.sources = [Source(format="captions", path=str(tmp_path / "a.parquet"))]
    with pytest.raises(DataError, match="of format llava, not captions"):
        Loader(job, Characters())


def test_a_tar_of_texts_is_told_to_be_no_captions(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{number}.txt", b"a book") for number in range(4)])
    job = make_job(tmp_path, tmp_path / "out")
    job.data.sources = [Source(format="cc12m", path=str(tmp_path / "a.tar"))]
    with pytest.raises(DataError, match=r"image_missing 4.*of format text, not cc12m"):
        Loader(job, Characters())


@pytest.mark.parametrize("format", ["webdataset", "captions"])
def test_columns_that_fit_are_not_blamed_for_images_that_are_no_images(tmp_path, format):
    said = json.dumps({"said": "a cat"}).encode()
    members = [
        (f"{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", b"no image"), ("json", said))
    ]
    write_tar(tmp_path / "a.tar", members)
    job = make_job(tmp_path, tmp_path / "out")
    job.data.sources = [Source(format=format, path=str(tmp_path / "a.tar"), columns=Columns(text="said"))]
    with pytest.raises(DataError, match=r"image_undecodable 4.*correct it, or take it out"):
        Loader(job, Characters())
