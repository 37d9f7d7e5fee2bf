"""A row of the batch holds exactly what its samples say: against plain references, from the delivered tensors
back to the files.
"""

import json
from collections import defaultdict

import numpy as np
import pytest

from experiments.vlm.data.image import decode
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.setup import make_setup
from tests.reference import packed_rows
from tests.reference.images import patchify
from tests.samples import jpeg, write_tar
from tests.tiny_data import Characters, make_job, write_all

TOKENIZER = Characters()
NEVER = {
    TOKENIZER.image_id,
    TOKENIZER.begin_image_id,
    TOKENIZER.end_image_id,
    TOKENIZER.bos_id,
    TOKENIZER.pad_id,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


def batches(job, count: int = 10, **options):
    """(tensors as NumPy arrays, counts, samples) of the first steps; options as of Loader."""
    loader = Loader(job, TOKENIZER, **options)
    for _, step in zip(range(count), loader, strict=False):
        for batch in step.batches:
            yield (
                {name: tensor.numpy().copy() for name, tensor in batch.tensors.items()},
                batch.counts,
                batch.samples,
            )
    loader.close()


def documents_of(tensors, row: int) -> dict[int, np.ndarray]:
    """document number -> its places in the row."""
    ids = tensors["document_ids"][row]
    return {number: np.flatnonzero(ids == number) for number in sorted(set(ids[ids >= 0]))}


@pytest.mark.parametrize("rows", [1, 4])
def test_labels_positions_and_padding_are_the_reference(data, tmp_path, rows):
    job = make_job(data, tmp_path, patch_rows=rows, patches_per_row=256 // rows)
    for tensors, counts, _ in batches(job):
        for row in range(len(tensors["tokens"])):
            tokens, ids = tensors["tokens"][row].tolist(), tensors["document_ids"][row].tolist()
            assert tensors["labels"][row].tolist() == packed_rows.labels(tokens, ids, NEVER)
            assert tensors["positions"][row].tolist() == packed_rows.positions(ids)
            assert all(
                token == TOKENIZER.pad_id for token, document in zip(tokens, ids, strict=True) if document < 0
            )
        empty = (tensors["grid_thw"] < 0).all(-1)
        assert (tensors["pixel_values"][empty] == 0).all()
        assert (~empty).sum() == counts["patches"] == ((tensors["grid_thw"] >= 0).all(-1)).sum()
        assert (tensors["document_ids"] >= 0).sum() == counts["tokens"]
        assert (tensors["labels"] >= 0).sum() == counts["loss_tokens"]


def test_every_token_knows_its_source(data, tmp_path):
    names = ["captions", "documents", "texts"]
    for tensors, counts, samples in batches(make_job(data, tmp_path)):
        expected = np.full_like(tensors["document_ids"], -1)
        for sample in samples:
            here = tensors["document_ids"][sample.row] == sample.document
            expected[sample.row][here] = names.index(sample.source)
        assert (tensors["source_ids"] == expected).all()
        for number, name in enumerate(names):
            labels = tensors["labels"][expected == number]
            assert (counts[f"tokens/{name}"], counts[f"loss_tokens/{name}"]) == (
                len(labels),
                (labels >= 0).sum(),
            )


@pytest.mark.parametrize(("rows", "flavor", "extra"), [(1, "", 0), (4, "", 0), (2, "dinov3-S-qwen3-0.6B", 5)])
def test_every_document_comes_with_its_own_text_and_images(data, tmp_path, rows, flavor, extra):
    """From the tensors back: the text is the file's, and the patches that the placeholders point at are the
    decoded images. Behind those are cells for class token and registers, in whole groups of those that merge.
    """
    job = make_job(data, tmp_path, patch_rows=rows, patches_per_row=256 // rows, epochs=1)
    job.model.flavor = flavor
    setup = make_setup(job, TOKENIZER, "train", 2)
    found = defaultdict(lambda: ([], []))  # (source, shard, key) -> tokens, images
    for tensors, _, samples in batches(job, count=200):
        for sample in samples:
            places = documents_of(tensors, sample.row)[sample.document]
            assert (np.diff(places) == 1).all()
            tokens, images = found[sample.source, sample.shard, sample.key]
            tokens += tensors["tokens"][sample.row][places].tolist()
            pixels = tensors["pixel_values"].reshape(2, -1, 768)[sample.row]
            grid = tensors["grid_thw"].reshape(2, -1, 3)[sample.row]
            visual = tensors["visual_index"][sample.row][places]
            assert ((visual >= 0) == (tensors["tokens"][sample.row][places] == TOKENIZER.image_id)).all()
            patches = (visual[visual >= 0, None] * 4 + np.arange(4)).flatten()
            starts = np.flatnonzero((grid[patches][:, 1:] == 0).all(-1))
            images += [(pixels[p], grid[p]) for p in np.split(patches, starts[1:]) if len(p)]
            for last in (p[-1] for p in np.split(patches, starts[1:]) if len(p)):
                cells = slice(last + 1, last + 1 + -(-extra // 4) * 4)
                behind = [[0, -2, -2]] * extra + [[-1, -1, -1]] * (-extra % 4)
                assert grid[cells].tolist() == behind and not pixels[cells].any()
    assert len(found) == 102
    for (source, shard, key), (tokens, images) in found.items():
        number = [deal.name for deal in setup.deals].index(source)
        opened = setup.open_shard(number, shard)
        record = [opened.key(index) for index in range(len(opened))].index(key)
        document, _ = opened.read(record)
        text = "".join(part.text for part in document.parts if hasattr(part, "text"))
        assert (
            TOKENIZER.decode(tokens) == text
            and tokens[0] == TOKENIZER.bos_id
            and tokens[-1] == TOKENIZER.eos_id
        )
        expected = [part for part in document.parts if hasattr(part, "locator")]
        assert len(expected) == len(images)
        for image, (pixels, grid) in zip(expected, images, strict=True):
            h, w = setup.plan.grid(image.height, image.width)
            patches, coordinates = patchify(decode(opened.load(image), h * 16, w * 16), 16, 2)
            np.testing.assert_array_equal(pixels, patches)
            np.testing.assert_array_equal(grid, coordinates)


def test_what_a_buffer_held_before_is_gone(data, tmp_path):
    """Buffers are used in turn: the same step in fresh memory is the same."""
    job = make_job(data, tmp_path)
    loader = Loader(job, TOKENIZER)
    for _ in range(5):
        state = next(loader).state()
    later = next(loader).batches[0]
    fresh = Loader(job, TOKENIZER)
    fresh.load_state_dict(state)
    for name, tensor in next(fresh).batches[0].tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), later.tensors[name].numpy())
    loader.close()
    fresh.close()


@pytest.fixture
def one_bad_image(tmp_path):
    """Captions and documents in which one image has a good header and bad pixels."""
    good, bad = jpeg(64, 64), jpeg(64, 64)[:700]
    (tmp_path / "captions").mkdir()
    names = [f"{record:03d}" for record in range(6)]
    members = [
        m
        for name in names
        for m in ((f"{name}.jpg", bad if name == "002" else good), (f"{name}.txt", b"word " * 3))
    ]
    write_tar(tmp_path / "captions" / "a.tar", members)
    (tmp_path / "documents").mkdir()
    names = [f"{record:03d}" for record in range(6)]
    lines = [
        {
            "texts": ["before", None, "between", None, "after"],
            "images": [None, "KEY.0.jpg", None, "KEY.1.jpg", None],
        }
        for _ in names
    ]
    members = []
    for name, line in zip(names, lines, strict=True):
        members += [(f"{name}.json", json.dumps(line).replace("KEY", name).encode())]
        members += [(f"{name}.0.jpg", bad if name == "003" else good), (f"{name}.1.jpg", good)]
    write_tar(tmp_path / "documents" / "b.tar", members)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "t.jsonl").write_text('{"text": "a text"}\n')
    job = make_job(tmp_path, tmp_path / "out", epochs=1)
    job.data.sources[1].format = "webdataset"
    return job


@pytest.mark.parametrize("threads", [1, 3])
def test_an_image_that_fails_at_decoding_leaves_padding(one_bad_image, threads):
    one_bad_image.data.decode_threads = threads
    seen, rows = {}, []
    for tensors, _, samples in batches(one_bad_image, 50):
        for sample in samples:
            places = documents_of(tensors, sample.row)[sample.document]
            assert (np.diff(places) == 1).all(), "a document stays in one piece"
            seen[sample.source, sample.key] = (
                sample,
                tensors["tokens"][sample.row][places],
                tensors["visual_index"][sample.row][places],
            )
        rows += [
            packed_rows.labels(tensors["tokens"][row].tolist(), tensors["document_ids"][row].tolist(), NEVER)
            == tensors["labels"][row].tolist()
            for row in range(len(tensors["tokens"]))
        ]
    assert all(rows)
    assert ("captions", "002") not in seen and len(seen) == 5 + 6 + 1
    sample, tokens, visual = seen["documents", "003"]
    assert TOKENIZER.decode(tokens.tolist()) == "beforebetweenafter" and len(sample.image_sizes) == 1
    assert (visual >= 0).sum() == 4
    assert len(seen["documents", "004"][0].image_sizes) == 2


def test_failed_images_are_told_once(one_bad_image):
    loader = Loader(one_bad_image, TOKENIZER)
    counts = [step.batches[0].counts for step in loader]
    assert sum(count.get("rejected/image_truncated", 0) for count in counts) == 2
    report = loader.report()["sources"]
    assert report["captions"]["rejected"]["samples"]["image_truncated"]["count"] == 1
    assert report["documents"]["rejected"]["images"]["image_truncated"]["examples"][0]["key"] == "003"
    assert report["captions"]["counts"]["samples"] == 5 and report["documents"]["counts"]["images"] == 11
    loader.close()


def test_blanked_images_are_grey_and_of_the_same_size(data, tmp_path):
    job = make_job(data, tmp_path)
    job.validation.sources = job.data.sources
    plain = list(batches(job, 6, split="validation"))
    blanked = list(batches(job, 6, split="validation", control="blanked"))
    for (tensors, counts, samples), (grey, same, others) in zip(plain, blanked, strict=True):
        for name in tensors:
            if name != "pixel_values":
                np.testing.assert_array_equal(tensors[name], grey[name])
        assert set(np.unique(grey["pixel_values"][(grey["grid_thw"] >= 0).all(-1)])) == {128}
        assert counts == same and samples == others


def test_shuffled_samples_keep_their_text_and_get_the_images_of_others(data, tmp_path):
    job = make_job(data, tmp_path)
    job.validation.sources = job.data.sources

    def collect(control):
        found = {}
        for tensors, _, samples in batches(job, 200, split="validation", control=control):
            for sample in samples:
                tokens = tensors["tokens"][sample.row][documents_of(tensors, sample.row)[sample.document]]
                text, sizes = found.get((sample.source, sample.shard, sample.key), ("", []))
                found[sample.source, sample.shard, sample.key] = (
                    text + TOKENIZER.decode(tokens.tolist()),
                    sizes + sample.image_sizes,
                )
        return found

    plain, shuffled = collect(None), collect("shuffled")
    assert {name: text for name, (text, _) in plain.items()} == {
        name: text for name, (text, _) in shuffled.items()
    }
    captions = [name for name in plain if name[0] == "captions"]
    for name in captions:
        shards_sizes = [plain[other][1][0] for other in captions if other[1] == name[1] and other != name]
        assert shuffled[name][1][0] in shards_sizes
    assert sum(plain[name][1] == shuffled[name][1] for name in captions) < 3
    for name in plain:
        assert len(plain[name][1]) == len(shuffled[name][1])
