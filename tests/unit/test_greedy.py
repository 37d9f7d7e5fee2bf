"""Answers written greedily are exact on the very samples where teacher forcing says so."""

import pytest
from PIL import Image

from benchmarks.greedy import Forced, compare, generated, teacher_forced
from experiments.__main__ import main as train
from experiments.commands import main
from experiments.notebook import load_job
from tests.samples import encoded, write_tar
from torchtitan.config.errors import UserError

COLOURS = ["red", "lime", "blue", "black", "white"]
SHOWN = [*COLOURS, "red", "lime"]  # the last two pictures are those of the first, with other words
WORDS = ["one", "two", "three four", "five", "six", "seven", "eight nine"]
SMALL = [
    "--training.steps", "40", "--training.seq_len", "64", "--training.local_batch_size", "1",
    "--training.mixed_precision_param", "float32", "--data.patches_per_row", "32",
    "--data.max_patches_per_image", "4", "--optimizer.name", "AdamW", "--optimizer.lr", "3e-3",
    "--lr_scheduler.warmup_steps", "5", "--metrics.no_enable_tensorboard", "--metrics.no_save_plot",
    "--validation.no_controls", "--checkpoint.enable",
]  # fmt: skip


@pytest.mark.slow
def test_what_is_written_is_exact_where_teacher_forcing_is(tmp_path):
    members = []
    for number, (colour, words) in enumerate(zip(SHOWN, WORDS, strict=True)):
        picture = encoded(Image.new("RGB", (32, 32), colour), "PNG")
        members += [(f"k{number}.png", picture), (f"k{number}.txt", words.encode())]
    shard, run = tmp_path / "shard.tar", tmp_path / "run"
    write_tar(shard, members)
    sources = [f"--{part}.sources.0.path={shard}" for part in ("data", "validation")]
    job = ["--job.config_file", "vlm_sees", "--job.dump_folder", str(run), *SMALL, *sources]
    assert train([*job, "--data.num_workers", "0", "--data.cache_folder", str(tmp_path)]) == 0
    task = ["--task", f"exact_match={shard}", "--out", str(tmp_path / "out")]
    assert main(["evaluate", "--job.dump_folder", str(run), *task]) == 0
    forced, written = teacher_forced(load_job(str(run))), generated(tmp_path / "out" / "exact_match.jsonl")
    assert forced.keys() == written.keys() == {f"k{number}" for number in range(len(WORDS))}
    counts = compare(forced, written)
    assert counts["different"] == counts["different by a tie"] == 0
    # At most one of two pictures that are alike is described as it should be: there are some of both kinds.
    assert 0 < sum(written.values()) <= len(COLOURS)


def test_ties_are_counted_apart_and_other_samples_refused():
    forced = {
        "a": Forced(True, 2.0),
        "b": Forced(True, 1e-5),
        "c": Forced(False, 1.0),
        "d": Forced(False, 1.0),
    }
    counts = compare(forced, {"a": True, "b": False, "c": True, "d": False})
    assert list(counts.values()) == [4, 2, 2, 1, 1]
    with pytest.raises(UserError, match="of other samples"):
        compare(forced, {"a": True})
