"""A rank that hangs, fails or was started otherwise is named, before or after the others waited for it."""

import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.reference.small_run import CPU, SMALL, job_of
from torchtitan.build import build, require_one_job
from torchtitan.config.errors import ConfigError
from torchtitan.distributed import process_group
from torchtitan.train import Trainer


def wait_for_a_stuck_rank(folder: str) -> str:
    """Rank 1 stays in step 2; what rank 0 then knows."""
    given_up = Path(folder) / "given_up"
    trainer = Trainer(build(job_of({"comm.train_timeout_seconds": 2}, folder), SMALL, CPU))
    try:
        trainer.train_step()
        trainer.state.step = 1
        process_group.set_timeout(2)
        process_group.note_step(2)
        if dist.get_rank() == 1:
            while not given_up.exists():
                time.sleep(0.05)
            return ""
        process_group.note_step(3)
        trainer.sum_counts(None)
    except RuntimeError as error:
        assert "time" in str(error).lower()
        return process_group.stragglers()
    finally:
        given_up.touch()
        trainer.close()
    raise AssertionError("the collective was not given up")


def test_a_rank_that_hangs_is_named_with_its_step(pool, tmp_path):
    assert pool.run(2, wait_for_a_stuck_rank, str(tmp_path))[0] == "behind the others: rank 1 in step 2"


def who_is_blamed() -> str:
    """Two of four ranks lose the others (one inside a stage), one fails by itself, the last says nothing."""
    rank, wrapped = dist.get_rank(), RuntimeError("[Stage 1] failed to run forward")
    wrapped.__cause__ = RuntimeError("Timed out waiting 8000ms for recv operation to complete")
    errors = [wrapped, RuntimeError("Connection closed by peer [127.0.0.1]:1"), ValueError("a bad shard")]
    process_group.note_step(5)
    dist.barrier()
    return process_group.who_is_to_blame(errors[rank]) if rank < len(errors) else ""


@pytest.mark.slow
def test_ranks_that_only_waited_are_not_blamed(pool):
    told = pool.run(4, who_is_blamed)
    assert (
        told[0]
        == told[1]
        == "rank 2 failed by itself in step 5, rank 3 does not answer since it began step 5"
    )
    assert told[2] == "all ranks had begun step 5"


def start_with_another_learning_rate(folder: str) -> str:
    """Rank 1 is told another one, and another warm-up; what each rank says."""
    mine = {"optimizer.lr": 0.1, "lr_scheduler.warmup_steps": 7} if dist.get_rank() == 1 else {}
    with pytest.raises(ConfigError) as caught:
        require_one_job(job_of(mine, folder))
    return str(caught.value)


def test_ranks_with_other_options_are_told_before_they_wait(pool, tmp_path):
    first, second = pool.run(2, start_with_another_learning_rate, str(tmp_path))
    assert second.startswith("rank 1 has other options than rank 0: optimizer.lr, lr_scheduler.warmup_steps;")
    assert first.startswith("rank 0 sees ranks with other options")
