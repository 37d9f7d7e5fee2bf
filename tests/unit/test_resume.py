"""When a changed configuration makes an exact resume impossible, it is said by name, and a flag goes on
anyway.
"""

from dataclasses import fields

import pytest

from experiments.vlm.config import Data, Source
from experiments.vlm.data.loader import Loader
from experiments.vlm.data.resume import differences
from experiments.vlm.data.setup import FREE_OF_DATA, FREE_OF_SOURCE, make_setup, order_facts
from tests.tiny_data import Characters, make_job, write_all
from torchtitan.components.saved_config import Change
from torchtitan.config.errors import ConfigError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    loader = Loader(make_job(data, tmp_path_factory.mktemp("first")), Characters())
    next(loader)
    loader.close()
    return loader.state_dict()


def resume(job, saved) -> Loader:
    loader = Loader(job, Characters())
    loader.load_state_dict(saved)
    return loader


@pytest.mark.parametrize(
    "options, named",
    [
        ({"seq_len": 512}, "training.seq_len was 256 and is 512"),
        ({"patches_per_row": 512}, "data.patches_per_row was 256 and is 512"),
        ({"packing_buffer_size": 32}, "data.packing_buffer_size was 16 and is 32"),
        ({"long_documents": "drop"}, "data.long_documents was split and is drop"),
        ({"global_batch_size": 4}, "training.global_batch_size was 2 and is 4"),
    ],
)
def test_a_change_is_named(data, saved, tmp_path, options, named):
    with pytest.raises(ConfigError, match=f"{named}.*data.resume_changed_data"):
        resume(make_job(data, tmp_path, **options), saved)


def test_a_changed_source_is_named(data, saved, tmp_path):
    job = make_job(data, tmp_path)
    job.data.sources[0].weight = 3.0
    job.data.sources[1].columns.text = "texts"
    job.data.sources[2].name = "prose"
    with pytest.raises(
        ConfigError,
        match=r"data.sources\[captions\].weight was 2.0 and is 3.0"
        r".*sources\[documents\].columns.text was not set and is texts"
        r".*sources\[prose\].format was not set and is text",
    ):
        resume(job, saved)


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_source_that_came_or_went_is_named(data, saved, tmp_path, change):
    job = make_job(data, tmp_path)
    if change == "one more":
        job.data.sources.append(Source(name="more", format="text", path=str(data / "texts")))
    else:
        del job.data.sources[2]
    named = "more" if change == "one more" else "texts"
    with pytest.raises(ConfigError, match=rf"data.sources\[{named}\].weight was .* and is "):
        resume(job, saved)


def test_sources_in_another_order_are_not_taken_for_each_other(data, saved, tmp_path):
    job = make_job(data, tmp_path)
    job.data.sources.reverse()
    with pytest.raises(ConfigError, match="sources were captions, documents, texts and are texts, documents"):
        resume(job, saved)


def test_a_shard_more_is_a_change_and_another_folder_is_not(data, saved, tmp_path):
    moved = write_all(tmp_path / "moved")
    resume(make_job(moved, tmp_path), saved).close()
    (moved / "texts" / "more.jsonl").write_text('{"text": "more"}\n')
    with pytest.raises(ConfigError, match=r"data.sources\[texts\].path was 1 shards, \w+ and is 2 shards"):
        resume(make_job(moved, tmp_path), saved)


def test_the_flag_starts_the_data_anew(data, saved, tmp_path):
    job = make_job(data, tmp_path, packing_buffer_size=32, resume_changed_data=True)
    loader, fresh = resume(job, saved), Loader(make_job(data, tmp_path, packing_buffer_size=32), Characters())
    assert next(loader).batches[0].samples == next(fresh).batches[0].samples
    loader.close()
    fresh.close()


@pytest.mark.parametrize(
    "options", [{"num_workers": 3}, {"prefetch": 5}, {"decode_threads": 2}, {"max_bad_fraction": 0.5}]
)
def test_what_does_not_change_the_order_may_change(data, saved, tmp_path, options):
    resume(make_job(data, tmp_path, **options), saved).close()


COUNTING = {
    Data: "weight_by epochs patches_per_row patch_rows max_patches_per_image min_patches_per_image "
    "max_pixels_per_image min_pixels_per_image max_tokens_per_image min_tokens_per_image "
    "patch_size spatial_merge_size resize max_tiles_per_image packing_buffer_size long_documents",
    Source: "format weight shuffle shuffle_buffer repeat chat_template",
}


@pytest.mark.parametrize("section, free", [(Data, FREE_OF_DATA), (Source, FREE_OF_SOURCE)])
def test_every_option_either_counts_for_the_order_or_is_free(section, free):
    """A new option counts, unless it is listed as free; put it here in the first case."""
    names = {field.name for field in fields(section)}
    assert names - set(free) == set(COUNTING[section].split())
    assert set(free) <= names, "what is free is an option"


def test_what_counts_is_among_the_facts_and_what_is_free_is_not(data, tmp_path):
    job = make_job(data, tmp_path)
    facts = order_facts(make_setup(job, Characters(), "train", 2))
    assert {name for name in facts if name.startswith("data.") and "[" not in name} == {
        f"data.{name}" for name in COUNTING[Data].split()
    }
    of_captions = {name.rpartition(".")[2] for name in facts if name.startswith("data.sources[captions].")}
    assert of_captions == {*COUNTING[Source].split(), "path"}, "of the path the names of the shards"


def test_another_tokenizer_is_a_change(data, saved, tmp_path):
    loader = Loader(make_job(data, tmp_path), Characters(bos_id=300))
    with pytest.raises(ConfigError, match="model.tokenizer_path"):
        loader.load_state_dict(saved)


def test_a_missing_slot_is_told(data, saved, tmp_path):
    with pytest.raises(ConfigError, match="no state of slot 1"):
        resume(make_job(data, tmp_path), {"slot_000000": saved["slot_000000"]})


def test_an_option_that_is_unset_is_none_that_came():
    assert differences({"a": 1}, {"a": 1, "b": None}) == differences({"b": None}, {}) == []
    assert differences({}, {"b": 2}) == ["b was not set and is 2"]


def test_an_empty_option_is_told_as_one_that_is_not_set():
    assert str(Change("model.flavor", "", "a")) == "model.flavor was not set and is a"
    assert str(Change("model.flavor", "a", None)) == "model.flavor was a and is not set"


def test_differences_name_what_came_and_went():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == [
        "b was 2 and is not set",
        "c was not set and is 3",
    ]
