"""Whole steps of several ranks, collectives included, repeated without Python: as a CUDA graph would."""

import pytest

from tests.distributed.table import layout
from tests.reference.tape import replay_on_rank

LAYOUTS = [
    layout("fsdp2, accumulation of 2", 2, slots=2, global_slots=8),
    layout("fsdp2, never resharding", 2, slots=2, reshard="never"),
    layout("fsdp2, tied", 2, slots=2, model="small-qwen3-tied"),
    layout("replicate2, muon", 2, slots=2, replicate=2, optimizer="Muon"),
    layout("tp2", 2, slots=2, tp=2),
    layout("cp2", 2, slots=2, cp=2),
]


QUICK = ("fsdp2, accumulation of 2",)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow)
        for case in LAYOUTS
    ],
)
def test_replayed_steps_equal_driven_ones(pool, case, tmp_path):
    pool.run(case.ranks, replay_on_rank, str(tmp_path), case.changes)
