"""Pipeline parallel: ranks share the layers, and microbatches pass from stage to stage
(torch.distributed.pipelining).

Unusual here: a stage is the model itself with parts missing, the last stage computes the summed loss inside
its module, and the loss is scaled before backward, so that gradients of microbatches simply add up. Every
stage gets every tensor of the batch, and uses those it needs.

With FSDP, parameters stay gathered from the first microbatch to the last backward of a stage. The schedules
that split backward into input and weight gradients (zero bubble) rely on that: torchtitan/config/check.py
refuses the rest.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from torchtitan.distributed.fsdp import free_gathered
from torchtitan.distributed.mesh import Mesh, own_part
from torchtitan.distributed.stages import Split, rank_of_stage, stages_of_rank
from torchtitan.layers.cross_entropy import add_up

Tensors = dict[str, Tensor]


class Pipeline:
    """This rank's stages and the schedule that drives them; implements ForwardBackward (components/)."""

    def __init__(
        self,
        parts: list[nn.Module],
        split: Split,
        mesh: Mesh,
        schedule: str,
        microbatches: int,
        received: Tensor,
        sources: int,
        sends_back: Sequence[bool],
        whole_slots: Callable[[Tensor, Tensors], Tensor],
        tied: str | None = None,
    ):
        """`parts`: the stages of this rank, each with FSDP at its root. `received`: on the meta device, what
        a stage hands to the next for one microbatch. `sources`: of data, whose losses the last stage gives.
        `sends_back`: of each stage, whether it sends a gradient of that back. `whole_slots`: (scores, batch)
        -> scores of whole slots, where ranks hold parts of them. `tied`: name of a parameter that the first
        and the last stage both hold.
        """
        ranks = mesh.degrees.pp
        self.parts, self.mesh, self._microbatches, self._received = parts, mesh, microbatches, received
        self._whole_slots, self._tied, self._losses = whole_slots, tied, 1 + sources
        self._numbers = stages_of_rank(schedule, mesh.rank("pp"), ranks, split.stages)
        self._owners = [rank_of_stage(schedule, stage, ranks, split.stages) for stage in range(split.stages)]
        self._has_first, self._has_last = 0 in self._numbers, split.stages - 1 in self._numbers
        self._group = mesh["pp"].get_group()
        self._scale: float | Tensor = 1.0
        self._sums: list[Tensor] = []
        # With the shapes given, no extra forward and backward is run to infer them. The last stage gives its
        # summed loss. Where nothing before a stage trains, its backward ends with it.
        taken = [received.detach().requires_grad_(back) for back in sends_back]
        given = [*taken[1:], torch.empty(self._losses, device="meta")]
        stages = [
            PipelineStage(
                part,
                number,
                split.stages,
                mesh.device,
                input_args=taken[number],
                output_args=given[number],
                group=self._group,
            )
            for part, number in zip(parts, self._numbers, strict=True)
        ]
        kind = get_schedule_class(schedule)
        whole = stages[0] if issubclass(kind, PipelineScheduleSingle) else stages
        self._schedule = kind(whole, microbatches, loss_fn=self._scaled, scale_grads=False)

    def _scaled(self, loss: Tensor, labels: Tensor) -> Tensor:
        self._sums.append(loss.detach())
        return (loss[:1] * self._scale).sum()

    def __call__(self, tensors: Tensors, scale: float | Tensor, last: bool) -> Tensor:
        """Gradients are reduced at the end of every batch, not of the last alone: by the schedules."""
        self._check(tensors)
        self._scale, self._sums = scale, []
        named = dict(tensors)
        tokens = named.pop("tokens")
        target = {"target": tensors["labels"]} if self._has_last else {}
        self._schedule.step(*((tokens,) if self._has_first else ()), return_outputs=False, **named, **target)
        if last:
            self._sum_tied()
        return add_up(self._sums) if self._sums else torch.zeros(self._losses, device=self.mesh.device)

    def _check(self, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            # torch.tensor_split would deal unequal parts without a word.
            assert tensor.shape[0] % self._microbatches == 0, (
                f"{name} {list(tensor.shape)} for {self._microbatches} microbatches"
            )

    @torch.no_grad()
    def score(self, tensors: Tensors) -> Tensor:
        """(nll, correct) of each label, float32 [B, S, 2], on every stage.

        Not by the schedule, since that of ZBVZeroBubble cannot go forward alone.
        """
        self._check(tensors)
        for part in self.parts:
            part.eval()
        split = {name: tensor.chunk(self._microbatches) for name, tensor in tensors.items()}
        passed = [
            self._pass({name: chunks[i] for name, chunks in split.items()}) for i in range(self._microbatches)
        ]
        for part in self.parts:
            part.train()
            free_gathered(part)
        scores = (
            torch.cat(passed)
            if self._has_last
            else torch.empty(*tensors["labels"].shape, 2, device=self.mesh.device)
        )
        dist.broadcast(scores, group=self._group, group_src=self._owners[-1])
        return self._whole_slots(scores, tensors)

    def _pass(self, microbatch: Tensors) -> Tensor:
        """One microbatch through this rank's stages; what the last of them returns."""
        h = microbatch.pop("tokens")
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for number, part in zip(self._numbers, self.parts, strict=True):
            before, after = (self._peer(stage) for stage in (number - 1, number + 1))
            if before is not None:
                h = torch.empty(self._received.shape, dtype=self._received.dtype, device=self.mesh.device)
                dist.recv(h, before, self._group)
            h = part(h, **microbatch, per_token=True).contiguous()
            if after is not None:
                sent.append((dist.isend(h, after, self._group), h))
        for work, _ in sent:
            if work is not None:
                work.wait()
        return h

    def _peer(self, stage: int) -> int | None:
        """The global rank that holds a neighbouring stage; None: this one, or there is no such stage."""
        if not 0 <= stage < len(self._owners) or stage in self._numbers:
            return None
        return dist.get_global_rank(self._group, self._owners[stage])

    def copies(self) -> list[nn.Parameter]:
        """Parameters of this rank that another stage holds too and counts in the gradient norm."""
        return [self._tied_parameter(-1)] if self._tied is not None and self._has_last else []

    def _tied_parameter(self, part: int) -> nn.Parameter:
        assert self._tied is not None
        return self.parts[part].get_parameter(self._tied)

    @torch.no_grad()
    def _sum_tied(self) -> None:
        """Add up what the first and last stage found for the weight of both, if there is one that trains."""
        ends = [
            part
            for part, here in ((0, self._has_first), (-1, self._has_last))
            if here and self._tied is not None
        ]
        grads = [
            _local_grad(parameter) for parameter in map(self._tied_parameter, ends) if parameter.requires_grad
        ]
        if not grads:
            return
        if len(grads) == 2:
            total = grads[0] + grads[1]
        else:
            peer = dist.get_global_rank(self._group, self._owners[-1] if self._has_first else 0)
            theirs = torch.empty_like(grads[0])
            operations = [
                dist.P2POp(dist.isend, grads[0], peer, self._group),
                dist.P2POp(dist.irecv, theirs, peer, self._group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()
            total = grads[0] + theirs
        for grad in grads:
            grad.copy_(total)


def _local_grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return own_part(parameter.grad)
