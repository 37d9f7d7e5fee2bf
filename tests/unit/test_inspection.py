"""What people see is what the tensors hold."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments.vlm.data.image import ImagePlan, decode, write_patches
from experiments.vlm.data.loader import Loader
from experiments.vlm.view.inspection import inspect
from experiments.vlm.view.page import make_page
from experiments.vlm.view.slot_view import Kind, read_slot, unpatchify
from tests.samples import noise
from tests.tiny_data import Characters, make_job, write_all


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_go_back_to_the_image(merge):
    plan = ImagePlan(16, merge, 4, 1024)
    image = noise(64, 96)
    patches, grid = np.zeros((24, 768), np.uint8), np.zeros((24, 3), np.int32)
    write_patches(image, plan, patches, grid)
    np.testing.assert_array_equal(unpatchify(patches, grid, 16), image)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_slot_is_read_back(data, tmp_path, rows):
    job = make_job(data, tmp_path, patch_rows=rows, patches_per_row=256 // rows)
    loader = Loader(job, Characters())
    step = next(loader)
    for row in range(2):
        slot = read_slot(step.batches[0], row, 1, row, loader.shape, 2, Characters())
        sizes = [size for sample in slot.samples for size in sample.image_sizes]
        by_token = sorted(slot.images, key=lambda image: image.tokens)
        assert [loader.setup.plan.grid(*size) for size in sizes] == [(image.h, image.w) for image in by_token]
        for image in slot.images:
            start, end = image.tokens
            assert (slot.kinds[start:end] == Kind.IMAGE).all() and (
                slot.document_ids[start:end] == image.document
            ).all()
            assert slot.visual_index[start] == image.visual and end - start == image.h * image.w // 4
            assert slot.kinds[start - 1] == slot.kinds[end] == Kind.BOUNDARY
        targets = np.flatnonzero(slot.kinds == Kind.TARGET)
        assert set(targets - 1) == set(np.flatnonzero(step.batches[0].tensors["labels"][row].numpy() >= 0))
        assert (slot.kinds[slot.document_ids < 0] == Kind.PADDING).all()
        assert slot.patch_occupancy == pytest.approx(sum(image.h * image.w for image in slot.images) / 256)
    loader.close()


def test_an_image_reads_back_as_it_was_decoded(tmp_path):
    job = make_job(write_all(tmp_path / "data"), tmp_path / "out")
    job.data.sources = job.data.sources[:1]
    loader = Loader(job, Characters())
    step = next(loader)
    slot = read_slot(step.batches[0], 0, 1, 0, loader.shape, 2, Characters())
    shard = loader.setup.open_shard(0, slot.samples[0].shard)
    record = [shard.key(index) for index in range(len(shard))].index(slot.samples[0].key)
    image = next(part for part in shard.read(record)[0].parts if hasattr(part, "locator"))
    first = min(slot.images, key=lambda view: view.tokens)
    np.testing.assert_array_equal(first.pixels, decode(shard.load(image), first.h * 16, first.w * 16))
    loader.close()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_self_contained_and_shows_what_is_written(data, tmp_path):
    job = make_job(data, tmp_path / "out")
    seen = inspect(job, Characters(), steps=2, shown=3, out=str(tmp_path / "report.html"), keys="")
    content = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', content) and "http" not in content
    page = Page()
    page.feed(content)
    assert sum(tag == "canvas" for tag, _ in page.tags) == 3
    loader = Loader(job, Characters())
    sample = next(loader).batches[0].samples[0]
    assert sample.key in page.text and str(seen) in page.text
    loader.close()


def test_a_data_set_cannot_write_into_the_page(data, tmp_path):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "t.jsonl").write_text(
        json.dumps({"text": "</script><img src=x onerror=alert(1)><b>"}) + "\n"
    )
    job = make_job(data, tmp_path / "out")
    job.data.sources = job.data.sources[2:]
    job.data.sources[0].path = str(tmp_path / "evil")
    loader = Loader(job, Characters())
    slot = read_slot(next(loader).batches[0], 0, 1, 0, loader.shape, 2, Characters())
    page = Page()
    page.feed(make_page([slot], loader.shape, 2, Characters(), "title", "facts"))
    assert not any("onerror" in attributes for _, attributes in page.tags) and not any(
        tag == "b" and not a for tag, a in page.tags
    )
    loader.close()


def test_the_picture_shows_the_images_and_words_of_each_slot(data, tmp_path, figures):
    job = make_job(data, tmp_path / "out")
    inspect(job, Characters(), steps=1, shown=2, out=str(tmp_path / "report.png"), keys="")
    assert (tmp_path / "report.png").is_file()
    loader = Loader(job, Characters())
    batch = next(loader).batches[0]
    slots = [read_slot(batch, row, 1, row, loader.shape, 2, Characters()) for row in range(2)]
    loader.close()
    *parts, _ = figures[0].subfigs
    for part, slot in zip(parts, slots, strict=True):
        assert part.get_suptitle().startswith(f"step 1, slot {slot.slot}: ")
        tokens, strips, *images, words = part.axes
        assert len(images) == min(12, len(slot.images)) > 0
        for axes, image in zip(images, slot.images, strict=False):
            assert np.array_equal(axes.images[0].get_array(), image.pixels)
        text = Characters().decode(slot.tokens[slot.kinds == Kind.TARGET][:20].tolist())
        assert " ".join(text.split())[:10] in words.texts[0].get_text()
        cells = tokens.images[0].get_array().reshape(-1, 3)[: len(slot.tokens)]
        # Kinds and images are told apart by their colours alone.
        shades = [
            np.unique(cells[slot.kinds == kind], axis=0)
            for kind in Kind
            if kind != Kind.IMAGE and (slot.kinds == kind).any()
        ]
        shades += [np.unique(cells[slice(*image.tokens)], axis=0) for image in slot.images]
        assert all(len(shade) == 1 for shade in shades)
        assert len({tuple(shade[0]) for shade in shades}) == len(shades)
        strip = strips.images[0].get_array()
        first = next(image for image in slot.images if image.row == image.first == 0)
        assert strip.shape[1] == 4 * min(256, loader.shape.patches_per_row)
        assert np.array_equal(strip[0, 0], first.pixels[:16, :16].mean((0, 1)).astype(int)), (
            "a patch is its mean colour"
        )


def test_keys_hold_every_sample_and_a_hash_of_every_slot(data, tmp_path):
    job = make_job(data, tmp_path / "out", epochs=1, global_batch_size=4)
    inspect(job, Characters(), steps=1000, shown=0, out="", keys=str(tmp_path / "a.jsonl"))
    job.training.local_batch_size = 4
    inspect(job, Characters(), steps=1000, shown=0, out="", keys=str(tmp_path / "b.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    samples = [line for line in lines if "key" in line]
    assert (
        len({(line["shard"], line["key"]) for line in samples})
        == len([line for line in samples if line["offset"] == 0])
        == 102
    )
    slots = [line for line in lines if "hash" in line]
    assert {line["slot"] for line in slots} == {0, 1, 2, 3} and len(slots) == 4 * max(
        line["step"] for line in lines
    )


def test_what_was_rejected_is_written_where_it_is_asked_for(data, tmp_path):
    (tmp_path / "bad").mkdir()
    lines = [json.dumps({"text": text}) for text in ("good", "", "good too")]
    (tmp_path / "bad" / "t.jsonl").write_text("\n".join(lines) + "\n")
    job = make_job(data, tmp_path / "out", epochs=1)
    job.data.sources = job.data.sources[2:]
    job.data.sources[0].path = str(tmp_path / "bad")
    inspect(job, Characters(), steps=9, shown=0, out="", keys=str(tmp_path / "keys.jsonl"))
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["sources"]["texts"]
    assert (report["counts"]["samples"], report["rejected"]["samples"]["empty_document"]["count"]) == (2, 1)
    assert [
        json.loads(line)["key"]
        for line in (tmp_path / "out" / "rejects" / "0.jsonl").read_text().splitlines()
    ] == ["1"]
    job.job.dump_folder = ""
    before = set(tmp_path.rglob("*"))
    inspect(job, Characters(), steps=9, shown=0, out="", keys=str(tmp_path / "keys.jsonl"))
    assert set(tmp_path.rglob("*")) == before
