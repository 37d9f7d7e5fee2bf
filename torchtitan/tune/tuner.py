"""Measures what a search proposes, until it has no more to propose or the time is over. Imports no torch."""

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torchtitan.config.errors import require
from torchtitan.config.job import JobConfig
from torchtitan.sweep.members import Member, names
from torchtitan.sweep.space import Assignment
from torchtitan.tools.logging import logger
from torchtitan.tune.report import Report, Row, write
from torchtitan.tune.search import Change, climb
from torchtitan.tune.trial import Trial, ended_trial, read_trial, require_this_job, short_run

OWN, AGAIN = "the_job", ",again"  # folder of the job as it is; ending of the folder of a second run

C = TypeVar("C", bound=Hashable)


class Space(Protocol[C]):
    """What can be changed of a job, and what is known of a candidate without running it."""

    @property
    def own(self) -> C:
        """The job as it is."""
        ...

    @property
    def changes(self) -> Sequence[Change[C]]:
        """What may gain most first."""
        ...

    def job_of(self, candidate: C) -> JobConfig:
        """The whole job, with the candidate's settings."""
        ...

    def settings(self, candidate: C) -> Assignment:
        """Option -> value, where it differs from the job."""
        ...

    def shown(self, candidate: C) -> dict[str, str]:
        """Column -> text, for a table."""
        ...

    def peak_gib(self, candidate: C) -> float:
        """GiB of a rank, by the planner."""
        ...

    def did_fit(self, candidate: C) -> None:
        """It ran."""
        ...

    def did_not_fit(self, candidate: C) -> None:
        """It did not fit: no more that is as large is to be proposed."""
        ...


@dataclass
class Tuner(Generic[C]):
    """Short runs of the candidates of a space, each in a folder of `report.folder`."""

    space: Space[C]
    report: Report  # gets a row for each
    gib: float  # of a rank
    records: int  # that count, of each run
    log_freq: int  # steps of a record
    start: Callable[[Member], None]  # run it until it ends, or the time is over
    left_s: Callable[[], float]  # seconds until then
    candidates: list[C] = field(default_factory=list)  # of the rows
    took: list[float] = field(default_factory=list)  # seconds of those that were measured

    def tune(self) -> bool:
        """Search. Returns whether the search came to its end; else the time was over first.

        The first candidate, the job as it is, is always run; another one only where there is as much time
        left as they took so far, and to run the best and the job once more. Raises UserError where the job
        as it is fails for another reason than memory.
        """
        came_to_its_end = self.search()
        return self.confirm() and came_to_its_end

    def search(self) -> bool:
        """Measure what is proposed. Returns whether it came to its end."""
        proposals = climb(self.space.own, self.space.changes)
        candidate = next(proposals)
        while True:
            trial = self.known(candidate)
            if trial is None:
                if not self.has_time(1 if self.unconfirmed() is None else 3):
                    return False
                trial = self.measure(candidate)
            self.keep(candidate, trial)
            if trial.state == "cut":
                return False
            try:
                candidate = proposals.send(trial.rate)
            except StopIteration:
                return True

    def has_time(self, runs: int) -> bool:
        """Whether there is time for so many runs, as long as they took so far; for the first there is."""
        return not self.took or self.left_s() >= runs * statistics.median(self.took)

    def unconfirmed(self) -> int | None:
        """Which row is best and was run once, where the job as it is, too, has a figure."""
        rows, best = self.report.rows, self.report.best
        if best is None or best is rows[0] or best.runs > 1 or not rows[0].trial.work:
            return None
        return rows.index(best)

    def confirm(self) -> bool:
        """Run the best once more, and the job: a machine is not as fast at all times, which the steps of one
        run do not show. Returns whether there was time.
        """
        while (best := self.unconfirmed()) is not None:
            for place in (0, best):
                if self.report.rows[place].runs == 1 and not self.again(place):
                    return False
        return True

    def again(self, place: int) -> bool:
        """Run the candidate of this row once more. Returns whether it was measured."""
        row = self.report.rows[place]
        member = self.member(self.candidates[place], AGAIN)
        require_this_job(member)
        if (trial := read_trial(member)) is None:
            if not self.has_time(1):
                return False
            self.start(member)
            trial = ended_trial(member)
        if trial.state == "measured":
            self.report.rows[place] = replace(row, trial=row.trial.with_another(trial), runs=2)
            write(self.report)
        return trial.state == "measured"

    def known(self, candidate: C) -> Trial | None:
        """What is known without a run: from an earlier one, or from the plan. Raises ConfigError where the
        folder is of another job.
        """
        member = self.member(candidate)
        require_this_job(member)
        if (found := read_trial(member)) is not None:
            return found
        peak = self.space.peak_gib(candidate)
        too_large = Trial("too large", f"planned: {peak:.1f} GiB of the {self.gib:.1f} that there are")
        return too_large if peak > self.gib else None

    def measure(self, candidate: C) -> Trial:
        """Run a candidate, and read what came of it."""
        member = self.member(candidate)
        self.start(member)
        return ended_trial(member)

    def member(self, candidate: C, ending: str = "") -> Member:
        """Its short run, in a folder that is named by what differs from the job."""
        settings = self.space.settings(candidate)
        name = (names([settings])[0] if settings else OWN) + ending
        job = short_run(self.space.job_of(candidate), self.records, self.log_freq)
        job.job.dump_folder = str(Path(self.report.folder) / name)
        return Member(len(self.report.rows), name, settings, job)

    def keep(self, candidate: C, trial: Trial) -> None:
        """Add a trial to the report, its files, and the log."""
        settings, rows = self.space.settings(candidate), self.report.rows
        require(bool(rows) or trial.state != "failed", f"the job as it is does not run: {trial.why}")
        if trial.state == "measured":
            self.took.append(trial.seconds)
            self.space.did_fit(candidate)
        elif trial.state == "too large":
            self.space.did_not_fit(candidate)
        row = Row(settings, self.space.shown(candidate), self.space.peak_gib(candidate), trial)
        rows.append(row)
        self.candidates.append(candidate)
        write(self.report)
        name, ratio = names([settings])[0] if settings else "the job as it is", self.report.ratio(row)
        outcome = f"{trial.state}: {trial.why}"
        if trial.rate is not None:
            outcome = f"{trial.rate:.4g} useful TFLOP/s"
        logger.info(f"{name}: {outcome}{f', {ratio:.3f} times the job' if ratio and settings else ''}")
