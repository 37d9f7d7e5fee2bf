"""Which combinations a sweep runs, and how their folders are called."""

import functools
import math

import pytest

from experiments.__main__ import CONFIG_CLASSES
from torchtitan.config.errors import ConfigError
from torchtitan.config.parse import option_types, parse
from torchtitan.sweep.members import check_members, members, names, options
from torchtitan.sweep.options import Options, settings_of, space_of
from torchtitan.sweep.space import combinations

BASE = ["--job.config_file", "vlm_debug"]


@functools.cache
def base():
    return parse(BASE, CONFIG_CLASSES)


def swept(table: dict | None = None, **given) -> list[dict]:
    job = base()
    return combinations(space_of(table or {}, Options(**given)), option_types(type(job), job), job.debug.seed)


def wrong(table: dict | None = None, **given) -> str:
    with pytest.raises(ConfigError) as error:
        swept(table, **given)
    return str(error.value)


def test_a_grid_is_each_with_each_and_seeds_come_last():
    found = swept(sweep=["optimizer.lr=1e-4,0.001", "optimizer.name=AdamW,Muon"], seeds=2)
    assert [tuple(settings.values()) for settings in found] == [
        (lr, name, seed) for lr in (1e-4, 1e-3) for name in ("AdamW", "Muon") for seed in (0, 1)
    ]
    assert list(found[0]) == ["optimizer.lr", "optimizer.name", "debug.seed"]


def test_a_table_may_nest_its_sections_or_write_keys_whole():
    nested = {"grid": {"optimizer": {"lr": [1e-4, 1]}, "data": {"sources": {"1": {"weight": [2]}}}}}
    whole = {"grid": {"optimizer.lr": [1e-4, 1.0], "data.sources.1.weight": [2.0]}}
    assert swept(nested) == swept(whole)
    assert swept(whole)[1] == {"optimizer.lr": 1.0, "data.sources.1.weight": 2.0}


def test_zipped_lists_go_together_and_cross_with_the_rest():
    table = {"zip": [{"training": {"seq_len": [512, 1024]}, "data": {"patches_per_row": [976, 1952]}}]}
    assert swept(table, seeds=2) == swept(
        zip=["training.seq_len=512,1024 data.patches_per_row=976,1952"], seeds=2
    )
    spaced = swept(zip=['training.freeze=["encoder", "projector"],[] optimizer.lr=1,2'])
    assert spaced[0] == {"training.freeze": ["encoder", "projector"], "optimizer.lr": 1.0}
    pairs = [(s["training.seq_len"], s["data.patches_per_row"]) for s in swept(table, seeds=2)]
    assert pairs == [(512, 976), (512, 976), (1024, 1952), (1024, 1952)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("training.freeze=[],['encoder'],['encoder','norm']", [[], ["encoder"], ["encoder", "norm"]]),
        ("checkpoint.enable=true,false", [True, False]),
        ("activation_checkpoint.selective_ac_option=op,2", ["op", "2"]),
        ("lr_scheduler.decay_ratio=0.5,1", [0.5, 1.0]),
        ("lr_scheduler.decay_ratio=.5,1", [0.5, 1.0]),
        ("training.dataset_path=a b.tar,c", ["a b.tar", "c"]),
    ],
)
def test_values_of_the_command_line_have_the_type_of_their_option(text, values):
    assert [value for settings in swept(sweep=[text]) for value in settings.values()] == values


def test_the_command_line_wins_over_the_file():
    assert swept({"grid": {"optimizer.lr": [1, 2]}}, sweep=["optimizer.lr=3"]) == [{"optimizer.lr": 3.0}]
    table = {"zip": [{"training.seq_len": [64, 128], "data.patches_per_row": [100, 200]}]}
    asked = "training.seq_len=256 data.patches_per_row=300"
    assert swept(table, zip=[asked]) == [{"training.seq_len": 256, "data.patches_per_row": 300}]


def test_draws_lie_in_their_ranges_on_their_scale_and_more_keep_the_first():
    ranges = ["optimizer.lr=1e-5:1e-1:log", "optimizer.weight_decay=0:0.5", "lr_scheduler.warmup_steps=3:9"]
    many = swept(random=[*ranges, "optimizer.name=AdamW,Muon"], draws=400)
    assert many[:5] == swept(random=[*ranges, "optimizer.name=AdamW,Muon"], draws=5)
    assert many[:5] != swept(random=[*ranges, "optimizer.name=AdamW,Muon"], draws=5, draw_seed=1)
    rates = sorted(settings["optimizer.lr"] for settings in many)
    decays = sorted(settings["optimizer.weight_decay"] for settings in many)
    assert 1e-5 <= rates[0] < rates[-1] <= 1e-1 and 0 <= decays[0] < decays[-1] <= 0.5
    # Half of either lies below the middle of its scale; six deviations of 400 draws are 60.
    assert abs(sum(rate < 1e-3 for rate in rates) - 200) < 60
    assert abs(sum(decay < 0.25 for decay in decays) - 200) < 60
    assert {settings["lr_scheduler.warmup_steps"] for settings in many} == set(range(3, 10))
    assert {settings["optimizer.name"] for settings in many} == {"AdamW", "Muon"}


def test_draws_differ_and_a_table_says_the_same_as_the_command_line():
    table = {"random": {"lr_scheduler": {"warmup_steps": {"min": 1, "max": 4, "scale": "log"}}}}
    found = swept(table, draws=4)
    assert found == swept(random=["lr_scheduler.warmup_steps=1:4:log"], draws=4)
    assert sorted(settings["lr_scheduler.warmup_steps"] for settings in found) == [1, 2, 3, 4]
    assert "gave 4 different combinations" in wrong(table, draws=5)


@pytest.mark.parametrize(
    ("table", "given", "told"),
    [
        ({}, {}, "nothing to sweep: give --sweep"),
        ({}, {"sweep": ["optimizer.lr"]}, "--sweep optimizer.lr: expected KEY=VALUES"),
        ({}, {"sweep": ["training.lr=1"]}, "training.lr: no such option; did you mean --optimizer.lr?"),
        ({}, {"sweep": ["optimizer.lr=1e-3,x"]}, "sweep: optimizer.lr = 'x': expected a number"),
        ({}, {"sweep": ["optimizer.lr=1e-3,0.001"]}, "optimizer.lr = 0.001: is there twice"),
        ({}, {"sweep": ["optimizer.lr=1", "optimizer.lr=2"]}, "--sweep optimizer.lr: is given twice"),
        ({}, {"sweep": ["job.dump_folder=a,b"]}, "job.dump_folder: each run has its own"),
        ({}, {"sweep": ["debug.seed=1,2"], "seeds": 2}, "debug.seed is swept in two places"),
        ({"grid": {"optimizer.lr": 1}}, {}, "optimizer.lr = 1: expected a list of values"),
        ({"grid": {"optimizer.lr": []}}, {}, "optimizer.lr: there are no values"),
        ({"grid": 1}, {}, "sweep.grid = 1: expected a table"),
        (
            {"zip": {"optimizer.lr": [1, 2], "training.steps": [1]}},
            {},
            "not 2 of optimizer.lr, 1 of training",
        ),
        ({"random": {"optimizer.lr": {"min": 0, "max": 1, "scale": "log"}}}, {"draws": 2}, "must be > 0"),
        ({"random": {"optimizer.lr": {"min": 2, "max": 1}}}, {"draws": 2}, "min (2) must be below max (1)"),
        (
            {"random": {"optimizer.lr": {"min": 1}}},
            {"draws": 2},
            "optimizer.lr.max = None: expected a number",
        ),
        ({"random": {"optimizer.name": {"min": 1, "max": 2}}}, {"draws": 2}, "takes no number"),
        ({"random": {"optimizer.lr": {"min": 1, "max": 2}}}, {}, "how many are drawn?"),
        ({}, {"sweep": ["optimizer.lr=1"], "draws": 2}, "nothing to draw from"),
        ({}, {"random": ["optimizer.lr=1e-3:x"], "draws": 2}, "expected LEAST:MOST"),
        ({}, {"sweep": ["optimizer.lr=1"], "seeds": -1}, "--seeds = -1: must be >= 0"),
        (
            {},
            {"sweep": ["optimizer.lr=1"], "slurm": True, "index": 1},
            "--slurm and --index: give one of them",
        ),
    ],
)
def test_what_cannot_be_swept_is_one_line(table, given, told):
    line = wrong(table, **given)
    assert told in line and "\n" not in line


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"sede": 3, "grid": {}}, "sweep.sede is not a known option; did you mean seeds?"),
        ({"optimizer": {"lr": [1]}}, r"values of options stand in \[sweep.grid\]"),
        ({"seeds": [0, 1]}, r"sweep.seeds = \[0, 1\]: expected a whole number"),
        (3, "sweep = 3: expected a table"),
    ],
)
def test_what_does_not_belong_into_the_table_is_told(table, told):
    with pytest.raises(ConfigError, match=told):
        settings_of(table)


def test_names_say_what_differs_as_shortly_as_they_can():
    found = names(
        [
            {"optimizer.lr": 1e-4, "optimizer.name": "Muon", "training.steps": 5, "validation.steps": 2},
            {"optimizer.lr": 2e-4, "optimizer.name": "Muon", "training.steps": 5, "validation.steps": 2},
        ]
    )
    assert found[0] == "lr=0.0001,optimizer.name=Muon,training.steps=5,validation.steps=2"
    assert names([{"data.sources.0.weight": 2.0, "data.sources.1.weight": -1}]) == [
        "sources.0.weight=2.0,sources.1.weight=-1"
    ]


def test_names_are_folders_of_their_own_whatever_the_values():
    paths = [f"/data/{'x' * 300}/{n}.tar" for n in range(3)] + ["/data/a b", "/data/a/b", "..", "..."]
    found = names([{"training.dataset_path": path, "training.freeze": ["a", "b"]} for path in paths])
    assert len(set(found)) == len(paths)
    assert all(len(name) < 200 and not {"/", " "} & set(name) for name in found)


def test_a_name_does_not_depend_on_the_other_values():
    few, many = (
        ({"optimizer.lr": 1e-4}, {"optimizer.lr": 3e-4}),
        ({"optimizer.lr": n} for n in (3e-4, 1, 1e-4)),
    )
    assert set(names(list(few))) <= set(names(list(many)))


def test_a_member_is_the_job_that_its_options_make_on_a_command_line(tmp_path):
    settings = {
        "optimizer.lr": 0.5,
        "metrics.enable_tensorboard": False,
        "training.freeze": ["encoder", "norm"],
    }
    assert options(settings) == [
        "--optimizer.lr=0.5",
        "--metrics.no_enable_tensorboard",
        "--training.freeze",
        "encoder",
        "norm",
    ]
    (member,) = members([settings], tmp_path, lambda more: parse([*BASE, *more], CONFIG_CLASSES))
    assert (member.job.optimizer.lr, member.job.training.freeze) == (0.5, ["encoder", "norm"])
    assert not member.job.metrics.enable_tensorboard and member.job.training.seq_len == 512
    assert member.folder == tmp_path / member.name


def test_every_combination_is_checked_and_the_error_says_how_many_are_wrong(tmp_path):
    def check(job):
        if job.optimizer.lr > 1:
            raise ConfigError(f"optimizer.lr = {job.optimizer.lr}: too much")

    found = members(
        [{"optimizer.lr": lr} for lr in (0.5, 2.0, 3.0)],
        tmp_path,
        lambda more: parse([*BASE, *more], CONFIG_CLASSES),
    )
    with pytest.raises(ConfigError) as error:
        check_members(found, check)
    assert str(error.value) == (
        "2 of 3 combinations cannot run; the first is run 1 (lr=2.0): optimizer.lr = 2.0: too much"
    )
    check_members(found[:1], check)
    assert math.isclose(found[0].job.optimizer.lr, 0.5)
