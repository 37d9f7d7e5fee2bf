"""The training loop. What it trains comes from a TrainSpec (spec.py), how it is built from build.py.

In: steps of batches, from the loader. Out: trained weights, in checkpoints, and what was measured on the way.
"""

import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from torchtitan.build import Run, build, require_one_job, require_weights, resolve_options
from torchtitan.components.cuda_graph import GraphedStep, OptimizerStep, Recorder
from torchtitan.components.data_report import write_data_report
from torchtitan.components.dump_folder import begin
from torchtitan.components.epochs import Epochs
from torchtitan.components.hf_save import FOLDER as HF_FOLDER
from torchtitan.components.hf_save import save_in_hf
from torchtitan.components.loader import Step, Tensors
from torchtitan.components.metrics import SourceLosses, Values
from torchtitan.components.parameter_groups import peak_rates
from torchtitan.config.errors import CheckpointError, UserError
from torchtitan.config.job import JobConfig
from torchtitan.distributed.collectives import any_rank, from_first_rank, sum_over_hosts, sum_over_ranks
from torchtitan.distributed.grad_norm import clip, global_norm
from torchtitan.distributed.process_group import (
    close_process_group,
    note_step,
    open_process_group,
    set_timeout,
    who_is_to_blame,
    write_flight_record,
)
from torchtitan.dry_run import dry_run
from torchtitan.evaluator import Evaluator
from torchtitan.layers.cross_entropy import add_up
from torchtitan.spec import TrainSpec
from torchtitan.tools.disk import is_full
from torchtitan.tools.garbage import GarbageCollection
from torchtitan.tools.logging import logger
from torchtitan.tools.progress import Progress
from torchtitan.tools.signals import WATCHED, StopAsked, StopSignals, exit_code


class Trainer:
    """The loop over the steps of a run that has been built."""

    def __init__(self, run: Run):
        self.run, self.job, self.state = run, run.job, run.state
        self.folder = Path(run.job.job.dump_folder)
        self.evaluator = Evaluator(run)
        self.epochs = Epochs(run.counts.sources, run.state.step > 0, run.counts.passes)
        copies = {id(parameter) for parameter in run.forward_backward.copies()}
        self.source_losses = SourceLosses(run.mesh.device, run.counts)
        self.norm_parameters = [
            parameter for parameter in run.state.optimizers.parameters if id(parameter) not in copies
        ]
        self.take_step: OptimizerStep = self.optimizer_step
        if run.job.compile.cuda_graphs:
            self.take_step = GraphedStep(self.optimizer_step, Recorder())
        self.signals = StopSignals()
        self.stopped_by: signal.Signals | None = None  # where the run ended early for it
        self.failed_data: UserError | None = None  # or for this, of the data or of where they lie
        self.garbage = GarbageCollection(run.job.training.gc_freq)
        self.progress = Progress(run.job.training.steps, run.state.step, run.reporter.writes)
        self.batches = iter(run.state.loader)
        self.first_step = run.state.step + 1
        self.began = time.perf_counter() - run.state.wall_s
        self.logged_step = run.state.step
        self.data_report: dict[str, Any] | None = None  # rank 0: of all ranks, at the last checkpoint or end
        if not run.state.data:
            run.state.data = run.state.loader.state_dict()

    def train(self) -> None:
        """Train until the last step, the end of the data or a signal; then evaluate and save.

        Raises on all ranks, once it has saved, the UserError that the loader ended with.
        """
        steps = self.job.training.steps
        if self.first_step <= steps:
            logger.info(f"training from step {self.first_step} to {steps}")
        try:
            while self.state.step < steps and self.train_step():
                self.after_step()
        except StopAsked:
            pass  # `finish` says for which signal
        except CheckpointError:
            raise
        except UserError as error:
            self.failed_data = error
        self.finish()

    def train_step(self) -> bool:
        """One optimizer step.

        False, and nothing is changed, where the data has ended or somebody asked to stop.
        """
        note_step(self.state.step + 1)
        waiting = time.perf_counter()
        step = next(self.batches, None)
        data_s = time.perf_counter() - waiting
        total = self.sum_counts(step)
        if total["ended"] or total["stop"] or step is None:
            return False

        # Everyone divides by the same number: the tokens that carry loss in the whole global step.
        scale = 1 / max(1.0, total[self.run.counts.loss_weight])
        self.state.schedule.advance()
        losses, self.grad_norm = self.take_step(map(self.run.to_rank, step.once()), scale)
        self.loss = losses[0] * scale
        self.source_losses.add(losses[1:])

        self.state.step += 1
        self.state.tokens += int(total[self.run.counts.tokens])
        self.state.data = step.state
        self.run.meter.add(total, data_s)
        self.epochs.add(self.state.step, total)
        return True

    def optimizer_step(self, microbatches: Iterable[Tensors], scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Forward, backward and update.

        Returns this rank's part of the summed loss, that of each source after it, and the gradient norm; on
        the device.
        """
        last = self.run.sizes.accumulation - 1
        losses = [
            self.run.forward_backward(tensors, scale, number == last)
            for number, tensors in enumerate(microbatches)
        ]
        return add_up(losses), self.update()

    def update(self) -> Tensor:
        """Clip and step. Returns the global gradient norm before clipping."""
        optimizers = self.state.optimizers
        optimizers.drop_frozen_rows()
        norm = global_norm(self.norm_parameters, self.run.mesh)
        if self.job.training.max_norm > 0:
            clip(optimizers.parameters, norm, self.job.training.max_norm)
        optimizers.step()
        optimizers.zero_grad()
        return norm

    def sum_counts(self, step: Step | None) -> dict[str, float]:
        """The counts of this step over all ranks, and whether any rank wants to stop or has no more data."""
        own = dict.fromkeys([*self.run.counts.names, *self.epochs.names.values(), "slots", "flops"], 0.0)
        if step is not None and self.run.mesh.leads:
            for batch in step.batches:
                own["slots"] += len(batch.tensors["labels"])
                own["flops"] += self.run.flops(batch)
                for name in self.run.counts.names:
                    own[name] += batch.counts.get(name, 0)
                for source, name in self.epochs.names.items():
                    own[name] += batch.epochs.get(source, 0)
        own |= {"ended": float(step is None), "stop": float(self.signals.received is not None)}
        return sum_over_hosts(own)

    def after_step(self) -> None:
        """Do what is due every few steps; `finish` does it for the last one."""
        step = self.state.step
        if step == self.first_step:
            set_timeout(self.job.comm.train_timeout_seconds)
        if step == self.first_step or step % self.job.metrics.log_freq == 0:
            self.log()
        self.run.profiler.after_step(step)
        self.garbage.after_step(step)
        self.progress.after_step(step)
        if step < self.job.training.steps:  # the last step is evaluated and saved by `finish`
            self.pause(step)

    def pause(self, step: int) -> None:
        """Evaluate and save where due; the time it takes is not counted as training."""
        started = time.perf_counter()
        if self.job.validation.enable and step % self.job.validation.freq == 0:
            self.evaluator.validate()
        if step % self.job.validation.task_freq == 0:
            self.evaluator.run_tasks()
        if step % self.job.checkpoint.interval == 0:
            self.save()
        self.run.meter.leave_out(time.perf_counter() - started)

    def log(self) -> None:
        """Write a line and a record of what happened since the last."""
        self.logged_step = self.state.step
        # Each rank of a tensor-parallel group has the whole loss of its tokens.
        loss = sum_over_ranks(self.loss) / self.run.mesh.degrees.tp
        values: Values = {"loss": loss.item(), "grad_norm": self.grad_norm.item()}
        printed, tallies = self.run.meter.read()
        factor = self.state.schedule.factor
        tallies |= {name: peak * factor for name, peak in peak_rates(self.job.optimizer).items()}
        tallies |= self.epochs.metrics() | self.source_losses.read(tallies, self.run.mesh.degrees.tp)
        tallies |= {"tokens_seen": self.state.tokens, "wall_s": self.wall_s}
        self.run.reporter.train(self.state.step, values | printed, tallies)
        self.epochs.log()

    @property
    def wall_s(self) -> float:
        """Seconds of training, over all launches up to the checkpoints they were resumed from."""
        return time.perf_counter() - self.began

    def save(self, final: bool = False) -> None:
        """Save a checkpoint, and the report of the data with it."""
        self.state.wall_s = self.wall_s
        self.run.checkpointer.save(final)
        self.report_data()

    def report_data(self) -> None:
        """Write data_report.json. Called by all ranks."""
        self.data_report = write_data_report(
            self.folder, self.state.loader.report() if self.run.mesh.leads else None
        )

    def log_rejected(self) -> None:
        """Log which data were not used, from the last report, where this rank has one."""
        if self.data_report is not None and (line := self.state.loader.summary(self.data_report)):
            logger.info(line)

    def finish(self) -> None:
        """End the run: after the last step, at the end of the data, or when asked to stop."""
        if self.logged_step < self.state.step:
            self.log()
        early = self.state.step < self.job.training.steps
        self.stopped_by = self.received_anywhere() if early else None
        self.save(final=self.stopped_by is None and self.failed_data is None)
        self.run.checkpointer.wait()
        self.progress.close()
        self.log_rejected()
        if self.failed_data is not None:
            self.raise_stopped(self.failed_data)
        if self.stopped_by is not None:
            self.log_stopped(self.stopped_by)
        elif early:
            logger.info(f"the data ended at step {self.state.step} of {self.job.training.steps}")
        if self.job.checkpoint.last_save_in_hf and self.stopped_by is None and self.state.step:
            self.save_in_hf()
        try:
            self.evaluator.judge(stopped=self.stopped_by is not None)
        except StopAsked:
            self.stopped_by = self.received_anywhere()
            by = self.stopped_by.name if self.stopped_by else "a signal"
            logger.info(f"stopped by {by} while the last step was evaluated; {self.saved()}")

    def save_in_hf(self) -> None:
        """Write the last checkpoint, which is complete, as a Hugging Face folder too."""
        set_timeout(self.job.comm.init_timeout_seconds)  # one rank may write for longer than a step takes
        step = f"step-{self.state.step}"
        checkpoint = self.folder / self.job.checkpoint.folder / step
        save_in_hf(partial(self.run.spec.export, self.job, checkpoint), self.folder / HF_FOLDER / step)

    def received_anywhere(self) -> signal.Signals | None:
        """The signal that asks this run to stop, whichever rank received it; all of them ask."""
        return next((number for number in WATCHED if any_rank(self.signals.received is number)), None)

    def saved(self) -> str:
        """What was saved of a run that ends early, in words."""
        if not self.job.checkpoint.enable:
            return "nothing was saved, since checkpoint.enable is off"
        if self.state.step == 0:
            return "nothing was trained yet, so nothing was saved"
        return "the same command goes on from its checkpoint"

    def log_stopped(self, by: signal.Signals) -> None:
        """Log which signal ended the run and what was saved. Waits for all ranks."""
        logger.info(f"stopped by {by.name} after step {self.state.step}; {self.saved()}")
        # once a rank has ended with another code than 0, a launcher gives the others little time
        dist.barrier()

    def raise_stopped(self, by: UserError) -> NoReturn:
        """Raises the error again, with the step and what was saved. Waits for all ranks."""
        dist.barrier()
        at = f"stopped after step {self.state.step}; {self.saved()}"
        raise type(by)(f"{by}; {at}") from by

    def close(self) -> None:
        """Ends the loader's processes, the sinks and the profiler; signals are the caller's again."""
        self.signals.close()
        self.garbage.close()
        self.progress.close()
        self.run.profiler.close()
        self.run.reporter.close()
        self.state.loader.close()


def main(job: JobConfig, spec: TrainSpec) -> int:
    """Train, or only look (job.dry_run). Returns the exit code: 0 for a run that is done.

    Raises ConfigError for what only shows once something is built.
    """
    if job.job.dry_run:
        dry_run(job, spec)
        return 0
    device = open_process_group(job.comm, Path(job.job.dump_folder))
    require_one_job(job)
    resolve_options(job)
    from_first_rank(lambda: require_weights(job, spec))
    if not from_first_rank(lambda: begin(job)):
        close_process_group()
        return 0
    trainer = Trainer(build(job, spec, device))
    try:
        trainer.train()
    except UserError:
        raise  # raised on all ranks, and its message suffices
    except Exception as error:
        if dist.get_world_size() == 1 and is_full(error):
            raise  # nothing more can be written
        logger.error(failure(trainer.state.step + 1, error))
        write_flight_record(job.comm, trainer.folder)
        if dist.get_world_size() == 1:
            trainer.report_data()  # several ranks could no longer agree on one
            trainer.log_rejected()
        raise
    finally:
        trainer.close()
    close_process_group()
    return exit_code(trainer.stopped_by)


def failure(step: int, error: Exception) -> str:
    """Where this rank failed, and what is known of the others, in words."""
    failed = f"failed in step {step}"
    return (
        failed if dist.get_world_size() == 1 else f"rank {dist.get_rank()} {failed}; {who_is_to_blame(error)}"
    )
