"""The examples that docstrings show are what the loader really gives."""

import base64
import doctest
import json

import pytest

import experiments.vlm.batch
import experiments.vlm.data.loader
from experiments.vlm.batch import IGNORE
from experiments.vlm.config import Source
from experiments.vlm.data.loader import Loader
from tests.samples import jpeg
from tests.tiny_data import Characters, make_job

SPELLINGS = {256: "bos", 257: "eos", 258: "pad", 259: "v", 260: "<", 261: ">", IGNORE: "-"}


@pytest.fixture
def job(tmp_path):
    """One OBELICS document: two images and a text."""
    images = [{"bytes": base64.b64encode(jpeg(32, width)).decode()} for width in (32, 64)]
    record = {"texts": [None, None, "cats!"], "images": [*images, None]}
    (tmp_path / "document.jsonl").write_text(json.dumps(record) + "\n")
    job = make_job(
        tmp_path, tmp_path, seq_len=16, local_batch_size=1, patches_per_row=16, max_patches_per_image=16
    )
    job.data.sources = [Source(format="obelics", path=str(tmp_path / "document.jsonl"))]
    return job


def spelled(ids: list[int]) -> list[str]:
    return [SPELLINGS.get(token) or chr(token) for token in ids]


def table(tensors: dict) -> list[str]:
    """A line for each field of the first slot, a column for each token or patch."""
    fields = {name: tensor[0].tolist() for name, tensor in tensors.items()}
    places = [f"{h},{w}" if t >= 0 else "-" for t, h, w in fields["grid_thw"]]
    cells = {
        "tokens": spelled(fields["tokens"]),
        "labels": spelled(fields["labels"]),
        **{
            name: map(str, fields[name])
            for name in ("positions", "document_ids", "visual_index", "source_ids")
        },
        "grid_thw": places,
    }
    return [f"{name:12}" + "".join(f"{cell:>4}" for cell in row) for name, row in cells.items()]


def test_the_batch_contract_shows_a_real_batch(job):
    loader = Loader(job, Characters())
    lines = table(next(loader).batches[0].tensors)
    loader.close()
    shown = [line.strip() for line in experiments.vlm.batch.__doc__.splitlines()]
    assert [line for line in lines if line not in shown] == []


def test_the_example_of_the_loader_runs(job):
    examples = doctest.DocTestFinder().find(Loader, "Loader", module=experiments.vlm.data.loader)
    example = next(one for one in examples if one.name == "Loader")
    assert example.examples
    example.globs |= {"job": job, "tokenizer": Characters()}
    seen: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=seen.append)
    assert not seen, "".join(seen)
