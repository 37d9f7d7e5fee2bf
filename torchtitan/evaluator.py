"""Evaluation of a run while it trains and at its end: held-out data, tasks, controls and curves."""

from pathlib import Path

from torchtitan.build import Run
from torchtitan.components.curves import draw_curves
from torchtitan.components.metrics import Values
from torchtitan.distributed.process_group import set_timeout
from torchtitan.tools.logging import logger


class Evaluator:
    """Evaluates the weights of the present step. All ranks make the same calls; each may raise StopAsked."""

    def __init__(self, run: Run):
        self.run, self.job = run, run.job

    def validate(self) -> Values:
        """Held-out figures of this step, logged."""
        values = self.run.validator.evaluate()
        self.run.reporter.validate(self.run.state.step, values)
        return values

    def run_tasks(self) -> None:
        """Run tasks and log their figures and answers; nothing where there are none."""
        if self.run.tasks is None:
            return
        comm = self.job.comm
        set_timeout(comm.init_timeout_seconds)  # one rank scores what all answered
        values, exhibits = self.run.tasks.run(
            self.run.forward_backward.parts, self.run.mesh, self.run.state.step
        )
        set_timeout(comm.train_timeout_seconds)
        self.run.reporter.tasks(self.run.state.step, values, exhibits)

    def judge(self, stopped: bool) -> None:
        """At the end: held-out figures, tasks, curves and controls; for a stopped run only the curves."""
        values = self.validate() if self.job.validation.enable and not stopped else None
        if not stopped:
            self.run_tasks()
        self.draw_curves()
        if values is not None and self.job.validation.controls:
            self.control(values)

    def control(self, values: Values) -> None:
        """The held-out split as it is, just evaluated, and spoilt in each way that the experiment knows."""
        found = {"": values}
        for name, words in self.run.spec.scoring.controls.items():
            found[f", {words}"] = spoilt = self.run.validator.evaluate(name)
            self.run.reporter.keep(f"{name}/", self.run.state.step, spoilt)
        for what, name in (("documents", "exact"), ("tokens", "right")):
            shares = (f"{words}: {of[name] or 0.0:.1f} %" for words, of in found.items())
            logger.info(f"held-out {what} {name}" + "".join(shares))

    def draw_curves(self) -> None:
        """Draws curves.png from all of the run so far, on the rank that writes metrics."""
        if self.job.metrics.save_plot and self.run.reporter.writes:
            names = tuple(self.run.counts.capacity), tuple(self.run.spec.scoring.groups)
            path = draw_curves(Path(self.job.job.dump_folder), *names)
            logger.info(f"curves: {path}")
