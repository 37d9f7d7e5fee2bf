"""Which GPUs and cores runs at the same time get, and which members an array has."""

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.sweep.places import gpus_of, places
from torchtitan.sweep.slurm import ranges


def test_runs_share_the_gpus_of_a_machine():
    four = ["0", "1", "2", "3"]
    given = [place["CUDA_VISIBLE_DEVICES"] for place in places(0, 0, four, cores=16)]
    assert given == four
    pairs = places(0, 2, four, cores=16)
    assert [(p["CUDA_VISIBLE_DEVICES"], p["NGPU"], p["OMP_NUM_THREADS"]) for p in pairs] == [
        ("0,1", "2", "3"),
        ("2,3", "2", "3"),
    ]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(1, 0, four, cores=16)] == ["0,1,2,3"]
    with pytest.raises(ConfigError, match=r"3 runs at once with 2 GPUs each \(NGPU\) need more than the 4"):
        places(3, 2, four, cores=16)
    with pytest.raises(ConfigError, match="5 runs at once with 1 GPUs each"):
        places(5, 0, four, cores=16)


def test_the_gpus_are_called_as_the_variable_calls_them(monkeypatch):
    monkeypatch.setattr("torchtitan.sweep.places.visible_gpus", lambda: 2)
    assert gpus_of({"CUDA_VISIBLE_DEVICES": "3,MIG-5"}) == ["3", "MIG-5"]
    assert gpus_of({}) == ["0", "1"]


def test_runs_share_the_cores_of_a_machine_without_gpus():
    assert [place["OMP_NUM_THREADS"] for place in places(4, 0, [], cores=16)] == ["3"] * 4
    assert places(0, 0, [], cores=16) == [{"NGPU": "1", "OMP_NUM_THREADS": "15"}]
    assert places(8, 2, [], cores=4)[0]["OMP_NUM_THREADS"] == "1"
    assert places(2, 1, [], cores=16, threads="5")[0]["OMP_NUM_THREADS"] == "5"


def test_indices_of_an_array():
    assert ranges([7, 0, 1, 2, 10, 9]) == "0-2,7,9-10"
