"""What `tune` measures, in which order, and what it leaves out.

Nothing is trained: see test_tune_command.py.
"""

import itertools
import json
import math
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from experiments.vlm.config import VLMJobConfig
from experiments.vlm.costs import tuning
from experiments.vlm.costs.estimate import estimate
from experiments.vlm.costs.tuning import Planner, Space, promising
from tests.reference.small_run import VOCAB, job_of
from torchtitan.components.run_record import RunRecord
from torchtitan.config.errors import ConfigError
from torchtitan.config.job import JobConfig, Training
from torchtitan.config.layout import Degrees, resolve_batch
from torchtitan.sweep.members import Member
from torchtitan.sweep.run import Sweeper
from torchtitan.sweep.status import begin, status_of, write_record
from torchtitan.tools.hardware import GIB
from torchtitan.tune.report import Report, Row, require_same_machine, verdict
from torchtitan.tune.search import climb
from torchtitan.tune.trial import Trial, measured
from torchtitan.tune.tuner import Tuner

# --- the search, on tables of numbers

SHAPE = (4, 3, 5)


def axis(number: int, alone: bool):
    """The others on this axis of a point, up and then down; or each as a direction of its own."""

    def moved(point, value):
        return (*point[:number], value, *point[number + 1 :])

    def change(point):
        here, size = point[number], SHAPE[number]
        if alone:
            return [[moved(point, value)] for value in range(size)]
        return [
            (moved(point, value) for value in range(here + 1, size)),
            (moved(point, value) for value in range(here - 1, -1, -1)),
        ]

    return change


CHANGES = [axis(0, False), axis(1, True), axis(2, False)]


def search(table: dict, start: tuple) -> list[tuple]:
    """What is measured, in order."""
    proposals, asked = climb(start, CHANGES), []
    point = next(proposals)
    while True:
        asked.append(point)
        try:
            point = proposals.send(table.get(point))
        except StopIteration:
            return asked


def tables():
    """One peak on each axis, each axis by itself; and a draw for more."""
    for seed in range(40):
        draw = random.Random(seed)
        peaks = [draw.randrange(size) for size in SHAPE]
        steep = [draw.uniform(0.5, 0.95) for _ in SHAPE]
        points = itertools.product(*map(range, SHAPE))
        yield (
            draw,
            {p: math.prod(s ** abs(x - y) for s, x, y in zip(steep, p, peaks, strict=True)) for p in points},
        )


def test_the_search_finds_the_best_of_all_and_measures_few():
    for draw, table in tables():
        asked = search(table, draw.choice(list(table)))
        assert max(asked, key=table.__getitem__) == max(table, key=table.__getitem__)
        assert len(asked) == len(set(asked)) < len(table) / 2


def test_where_much_does_not_run_no_single_change_of_what_is_found_is_better():
    for draw, table in tables():
        limit = draw.randrange(2, 8)
        table = {point: value for point, value in table.items() if sum(point) <= limit}
        asked = search(table, draw.choice(list(table)))
        best = max((point for point in asked if point in table), key=table.__getitem__)
        near = [p for p in table if sum(a != b for a, b in zip(p, best, strict=True)) == 1]
        assert all(table[point] <= table[best] for point in near)


def test_a_start_that_does_not_run_is_left_for_what_does():
    table = {p: float(sum(p)) for p in itertools.product(*map(range, SHAPE)) if sum(p) < 5}
    asked = search(table, (3, 0, 4))
    assert max(table.get(point, -1.0) for point in asked) == 4.0


# --- the space, by the planner


def small(**changes) -> VLMJobConfig:
    sizes = {"training.seq_len": 256, "data.patches_per_row": 256, "training.loss_chunk_tokens": 1024}
    return job_of({**sizes, "training.local_batch_size": 4, **changes}, "")


def space_of(job: VLMJobConfig, gib: float, lengths=(512, 128)) -> Space:
    planner = Planner(job, 1, VOCAB, True, gib)
    planner.of_job()
    return Space(planner, lengths, on_gpu=False)


@pytest.fixture(autouse=True)
def drawn_data(monkeypatch, request):
    """Jobs of small_run have no data to be checked."""
    if "no_data" in request.fixturenames:
        monkeypatch.setattr(tuning, "check_vlm", lambda job, world_size: resolve_batch(job, world_size))


@pytest.fixture
def no_data():
    """See above."""


def around(space: Space, candidate) -> list:
    return [c for change in space.changes for direction in change(candidate) for c in direction]


def peak(job: VLMJobConfig) -> float:
    """By a planner of its own."""
    return estimate(job, Degrees(1, 1, 1, 1, 1), VOCAB).memory.total / GIB


def test_no_change_alters_what_is_learnt(no_data):
    space = space_of(small(), 10.0)
    found = around(space, space.own)
    jobs = [space.job_of(candidate) for candidate in found]
    assert {each.training.local_batch_size for each in jobs} == {1, 2, 4, 8}
    assert {each.data.patches_per_row for each in jobs} == {128, 256, 512}
    assert {each.training.loss_chunk_tokens for each in jobs} == {256, 512, 1024}
    assert {resolve_batch(each, 1).global_ for each in jobs} == {8}
    free = {"training.local_batch_size", "training.loss_chunk_tokens", "data.patches_per_row"}
    assert {key for candidate in found for key in space.settings(candidate)} == free


def test_a_step_of_one_forward_keeps_its_slots_in_more_forwards(no_data):
    space = space_of(small(**{"training.global_batch_size": -1}), 10.0)
    moved = [c for direction in space.slots(space.own) for c in direction]
    assert [space.settings(c) for c in moved] == [
        {"training.local_batch_size": slots, "training.global_batch_size": 4} for slots in (2, 1)
    ]
    (back,) = (c for direction in space.slots(moved[0]) for c in direction if space.settings(c) == {})
    assert back == space.own


def test_what_is_proposed_fits_with_the_least_recomputation_and_what_failed_lowers_the_limit(no_data):
    step = {"training.global_batch_size": 4}
    full = {"activation_checkpoint.mode": "full", "activation_checkpoint.encoder_mode": "full"}
    job = small(**step, **full)
    limit = (peak(job) + peak(small(**step))) / 2
    space = space_of(job, limit)
    least = next(iter(next(iter(space.recomputation(space.own)))))
    asked = small(**step, **{"activation_checkpoint.memory_budget_gib": limit})
    chosen = estimate(asked, Degrees(1, 1, 1, 1, 1), VOCAB).job.activation_checkpoint
    assert space.job_of(least).activation_checkpoint == chosen
    assert space.settings(least)["activation_checkpoint.mode"] == "none"
    changes = (space.recomputation, space.slots)
    found = [least, *(c for change in changes for direction in change(least) for c in direction)]
    assert all(peak(space.job_of(candidate)) <= limit for candidate in found)
    assert {space.job_of(candidate).training.local_batch_size for candidate in found} == {1, 2, 4}
    space.did_not_fit(least)
    (more,) = (c for c in itertools.islice(next(iter(space.recomputation(least))), 1))
    assert peak(space.job_of(more)) < 0.91 * peak(space.job_of(least))


def test_what_is_too_large_with_all_of_it_recomputed_is_left_out(no_data):
    space = space_of(small(), 0.001)
    assert [list(direction) for direction in space.recomputation(space.own)] == [[]]
    assert min(space.planner.left_out.values()) > 0.001


def test_lengths_that_are_tried_cost_less_and_differ():
    costs = {1000: 9.0, 1040: 9.01, 800: 9.5, 2000: 9.2, 1200: 10.0, 1500: 9.99}
    assert promising(costs, 1200, 2, on_gpu=False) == [1000, 2000, 800]
    assert promising(costs, 1200, 2, on_gpu=True) == [1000, 2000, 800, 1024]
    assert promising(costs, 1000, 2, on_gpu=False) == []
    assert promising({900: 2.0, 800: 1.0}, 1000, 2, on_gpu=False) == [800, 900]
    assert promising({1152: 1.0}, 1152, 3, on_gpu=True) == []


# --- trials, with a clock and runs of the test's own


def trial(rate: float, spread: float = 0.01, seconds: float = 10.0) -> Trial:
    work = tuple(rate * (1 + spread * place) for place in (-2, -1, 0, 1, 2))
    return Trial("measured", "", work, {"tps": 1.0, "step_s": 0.1, "memory": 1.0, "data_wait": 1.0}, seconds)


def record(*steps: int, **figures) -> RunRecord:
    history = [
        {"step": step, "tflops": float(step), "memory": 1.0, "step_s": 2.0, **figures} for step in steps
    ]
    return RunRecord(Path(), {}, history)


def test_records_that_hold_a_step_of_the_warm_up_do_not_count():
    assert measured(record(*range(1, 8)), 1.0).work == (4.0, 5.0, 6.0, 7.0)
    assert measured(record(1, 4, 8, 12, 16), 1.0).work == (8.0, 12.0, 16.0)
    assert measured(record(1, 2, 4, 6, 8, 10), 1.0).work == (6.0, 8.0, 10.0)
    few = measured(record(1, 2, 3, 4), 1.0)
    assert few.state == "failed" and "it ended at step 4, after 1 records that count" in few.why


def test_a_gain_that_is_less_than_steps_differ_is_no_gain(tmp_path):
    def report(*trials: Trial) -> Report:
        rows = [Row({"a.b": n} if n else {}, {"B": str(n)}, 1.0, each) for n, each in enumerate(trials)]
        return Report(tmp_path, "a machine", ["tokens"], rows)

    noisy, clear = report(trial(100, 0.05), trial(104, 0.05)), report(trial(100), trial(104))
    assert noisy.best is noisy.rows[0] and clear.best is clear.rows[1]
    assert "keep the job as it is: of 2 candidates none is faster by more than steps differ" in verdict(noisy)
    assert "(its own steps differ by 10.0 %); number 1 came nearest" in verdict(noisy)
    assert "number 1 of 2 candidates is best" in verdict(clear) and "1.04 times" in verdict(clear)
    nothing = report(Trial("too large"), trial(3))
    assert nothing.best is nothing.rows[1] and "which does not run itself" in verdict(nothing)


class Doubling:
    """Slots of 1, 2, 4 and so on, each faster than those before."""

    own = 1
    changes = (lambda now: [[now << n for n in range(1, 9)]],)

    def __init__(self):
        self.too_large: list[int] = []

    def job_of(self, slots: int) -> JobConfig:
        return JobConfig(training=Training(local_batch_size=slots))

    def settings(self, slots: int) -> dict:
        return {"training.local_batch_size": slots} if slots > 1 else {}

    def shown(self, slots: int) -> dict[str, str]:
        return {"B": str(slots)}

    def peak_gib(self, slots: int) -> float:
        return float(slots)

    def did_fit(self, slots: int) -> None:
        assert slots not in self.too_large

    def did_not_fit(self, slots: int) -> None:
        self.too_large.append(slots)


class Trainer:
    """Takes ten seconds a run, on the clock that it turns itself."""

    def __init__(self, until_s: float, **speeds: float):
        self.left_s, self.started = until_s, []
        self.speeds = {int(run[1:]): speed for run, speed in speeds.items()}  # of the machine, by run

    def __call__(self, member: Member) -> None:
        slots = member.job.training.local_batch_size
        self.started.append(slots)
        begin(member)
        work = slots * self.speeds.get(len(self.started), 1.0)
        lines = [{"step": n, "tflops": work, "memory": 1.0, "step_s": 1.0, "tps": 1.0} for n in range(1, 12)]
        (member.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        self.left_s -= 10
        write_record(member.folder, 0 if self.left_s >= 0 else 143, 10.0)


def tuned(out: Path, trainer: Trainer, gib: float = 99.0) -> tuple[Tuner, bool]:
    tuner = Tuner(Doubling(), Report(out, "a machine", []), gib, 8, 1, trainer, lambda: trainer.left_s)
    return tuner, tuner.tune()


def test_nothing_is_started_that_would_not_end_in_time_and_a_longer_time_goes_on(tmp_path):
    first = Trainer(55)
    tuner, came_to_its_end = tuned(tmp_path, first)
    assert (first.started, came_to_its_end) == ([1, 2, 4, 1, 4], False)
    second = Trainer(55)
    tuner, _ = tuned(tmp_path, second)
    assert second.started == [8, 16, 32, 32]  # the job was run twice before
    assert [row.trial.rate for row in tuner.report.rows] == [1, 2, 4, 8, 16, 32]
    assert tuner.report.best is tuner.report.rows[-1]


def test_a_machine_that_was_slow_for_the_job_alone_makes_no_candidate_best(tmp_path):
    trainer = Trainer(1000, _1=0.1, _2=0.05)
    tuner, _ = tuned(tmp_path, trainer, gib=2.0)
    assert trainer.started == [1, 2]  # both as slow: nothing to confirm
    trainer = Trainer(1000, _1=0.1, _2=0.5, _4=0.06)
    tuner, came_to_its_end = tuned(tmp_path / "b", trainer, gib=2.0)
    assert trainer.started == [1, 2, 1, 2] and came_to_its_end
    own, other = tuner.report.rows[:2]
    assert other.trial.rate > own.trial.rate and (own.runs, other.runs) == (2, 2)
    assert tuner.report.best is own


def test_a_run_that_is_cut_by_the_end_of_the_time_gives_no_figure_and_is_run_again(tmp_path):
    trainer = Trainer(5)
    tuner, came_to_its_end = tuned(tmp_path, trainer)
    assert trainer.started == [1] and not came_to_its_end
    assert [row.trial.state for row in tuner.report.rows] == ["cut"] and tuner.report.best is None
    again = Trainer(25)
    tuned(tmp_path, again)
    assert again.started == [1, 2]


def test_what_needs_more_than_there_is_by_the_plan_is_not_started(tmp_path):
    trainer = Trainer(1000)
    tuner, _ = tuned(tmp_path, trainer, gib=20.0)
    assert trainer.started == [1, 2, 4, 8, 16, 1, 16] and min(tuner.space.too_large) == 32


def test_the_figures_of_another_machine_or_job_are_refused(tmp_path):
    tuned(tmp_path, Trainer(15))
    with pytest.raises(ConfigError, match="measured on a machine, and this is another; give another --out"):
        require_same_machine(Report(tmp_path, "another", []))
    tuner = Tuner(Doubling(), Report(tmp_path, "a machine", []), 99.0, 9, 1, Trainer(15), lambda: 1.0)
    with pytest.raises(ConfigError, match="the_job is of another job: training.steps was 11 and is 12; give"):
        tuner.tune()


def test_a_run_is_stopped_when_the_time_is_over(tmp_path):
    """By the signal that lets a trainer end its step."""
    job = VLMJobConfig()
    job.job.dump_folder = str(tmp_path / "a")
    (tmp_path / "wait").touch()
    member = Member(0, "a", {}, job)
    stand_in = str(Path(__file__).parents[1] / "stand_in_trainer.py")
    places = [{"NGPU": "1", "OMP_NUM_THREADS": "1"}]
    sweeper = Sweeper(
        [member], places, lambda job: [sys.executable, stand_in, str(job)], "a", time.monotonic()
    )
    assert sweeper.run() == signal.SIGTERM
    assert status_of(member).state in ("new", "cut")
