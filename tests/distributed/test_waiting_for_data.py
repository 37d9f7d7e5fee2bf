"""Ranks wait for one whose storage is away, and stop with it where it stays away."""

import dataclasses
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.reference.small_run import CPU, SMALL, DrawnLoader, job_of
from torchtitan.build import build
from torchtitan.config.errors import StorageError
from torchtitan.distributed import collectives
from torchtitan.distributed.collectives import agree_on_data
from torchtitan.tools.signals import StopAsked, StopSignals
from torchtitan.train import Trainer


def answers_of_two() -> tuple[list, int]:
    """Rank 1 waits three times before it has data, then neither has any; and how often rank 0 was asked."""
    sums, true_sum = [], collectives.sum_over_hosts
    collectives.sum_over_hosts = lambda values: sums.append(values) or true_sum(values)  # type: ignore
    waits = [agree_on_data(None) for _ in range(3)] if dist.get_rank() == 1 else []
    return [*waits, agree_on_data(dist.get_rank() == 1), agree_on_data(False)], len(sums)


def error_of_two() -> str:
    """Rank 1 gives up while rank 0 waits."""
    error = StorageError("a.tar: away") if dist.get_rank() == 1 else None
    try:
        agree_on_data(None if error is None else True, error)
    except StorageError as raised:
        return str(raised)
    return ""


def test_those_who_have_data_wait_with_those_who_do_not_know_yet(pool):
    (first, asked), (second, _) = pool.run(2, answers_of_two)
    assert first == [True, False] and asked == 5
    assert second[-2:] == [True, False]


def test_an_error_of_one_rank_is_raised_on_all(pool):
    assert pool.run(2, error_of_two) == ["a.tar: away"] * 2


def stops_of_two() -> list[str]:
    """Rank 1 waits for data, rank 0 was asked to stop; then the same where nobody waits."""
    signals, said = StopSignals(), []
    if dist.get_rank() == 0:
        signals.received = signal.SIGTERM
    for answer in (True if dist.get_rank() == 0 else None, True):
        try:
            said.append(str(agree_on_data(answer)))
        except StopAsked:
            said.append("stop")
    signals.close()
    return said


def test_a_signal_to_one_rank_ends_the_wait_of_all(pool):
    assert pool.run(2, stops_of_two) == [["stop", "True"]] * 2


def results_of_two(slow_rank: int, fails: bool) -> tuple[str, int]:
    """What each rank's work gives, where one works until the other has waited for it three times."""
    waited, true_agree = [], collectives.agree_on_data
    collectives.STILL_WAITING_S = 0.01
    collectives.agree_on_data = lambda *answer: waited.append(answer[0]) or true_agree(*answer)  # type: ignore
    rank = dist.get_rank()

    def work() -> str:
        while rank == slow_rank and waited.count(None) < 3:
            time.sleep(0.01)
        if rank == slow_rank and fails:
            raise StorageError("a.tar: away")
        return f"rank {rank}"

    try:
        return collectives.wait_together(work), waited.count(None)
    except StorageError as error:
        return str(error), waited.count(None)


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_with_the_slowest_and_fail_with_it(pool, slow, fails):
    results = pool.run(2, results_of_two, slow, fails)
    assert [result for result, _ in results] == (["a.tar: away"] * 2 if fails else ["rank 0", "rank 1"])
    assert results[slow][1] >= 3


class AwayLoader(DrawnLoader):
    """Rank 1 has no third step."""

    def __init__(self, *arguments, agree, **options):
        super().__init__(*arguments, **options)
        self.agree = agree

    def __next__(self):
        error = StorageError("a.tar: away") if self.given == 2 and dist.get_rank() == 1 else None
        self.agree(True, error)
        return super().__next__()


def stop_of_two(folder: str) -> str:
    spec = dataclasses.replace(SMALL, build_loader=AwayLoader)
    options = {"checkpoint.enable": True, "checkpoint.interval": 100, "training.steps": 5}
    trainer = Trainer(build(job_of(options, folder), spec, CPU))
    try:
        trainer.train()
    except StorageError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def test_a_rank_whose_storage_stays_away_stops_all_with_what_was_trained(pool, tmp_path):
    line = "a.tar: away; stopped after step 2; the same command goes on from its checkpoint"
    assert pool.run(2, stop_of_two, str(tmp_path)) == [line] * 2
    assert [path.name for path in (Path(tmp_path) / "checkpoint").iterdir()] == ["step-2"]
