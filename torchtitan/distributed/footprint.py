"""What units of a model keep, need and send in forward and backward, watched on the meta device.

Storages are counted as they come and go, whatever a unit computes: what activation checkpointing drops and
computes again, what a layout gathers, and what an operator keeps for its backward are all seen. What one of
our own operators allocates inside itself is not.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

c10d = torch.ops._c10d_functional

# Bytes that a rank sends, for each that it gives to a collective of n ranks.
SENT: dict[Any, tuple[str, Callable[[int], float]]] = {
    c10d.all_gather_into_tensor.default: ("all-gather", lambda n: n - 1),
    c10d.reduce_scatter_tensor.default: ("reduce-scatter", lambda n: 1 - 1 / n),
    c10d.all_to_all_single.default: ("all-to-all", lambda n: 1 - 1 / n),
    c10d.all_reduce.default: ("all-reduce", lambda n: 2 * (1 - 1 / n)),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one unit; a unit lasts from its own call to that of the next, what lies between included."""

    # from forward to backward; negative where the unit frees more of the one before than it keeps
    kept: float = 0
    forward: float = 0  # on top of all that is kept by then, while it runs forward
    backward: float = 0  # the same while it runs backward; gradients of weights are not in it
    sent: dict[str, float] = field(default_factory=dict)  # forward and backward, by group and collective


def footprints(
    units: Mapping[str, nn.Module],
    run: Callable[[], Tensor],
    there: Sequence[Tensor],
    ranks: Mapping[str, int],
) -> dict[str, Footprint]:
    """Footprints of `units`, which `run` calls in this order, each once, on its way to a loss.

    `there`: tensors that are not counted (parameters, the batch). `ranks`: of imagined groups, by name. The
    units and parameters keep hooks, so they are of no further use.
    """
    watch = _Watch(there, ranks)
    for name, unit in units.items():
        watch.mark_calls(name, unit)
    for parameter in there:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(watch.forget_gradient)
    with watch, torch.enable_grad():
        loss = run()
        *_, last = units
        watch.mark("backward", last)
        loss.sum().backward()
        watch.mark("end", "")
    return watch.found()


class _Mark(NamedTuple):
    """The begin of a unit's forward or backward."""

    phase: str
    unit: str
    operation: int
    alive: int
    sent: dict[str, float]


class _Watch(TorchDispatchMode):
    def __init__(self, there: Sequence[Tensor], ranks: Mapping[str, int]):
        super().__init__()
        self._alive, self._after = 0, [0]  # bytes now, and after each operation
        self._storages: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in there}
        self._born: dict[int, int] = {}  # storage -> operation
        self._marks: list[_Mark] = []
        self._sent: dict[str, float] = defaultdict(float)
        self._ranks = ranks

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            # A tensor of fp8 numbers and their scales: the operators on its two parts come here next.
            return NotImplemented
        # What is written into a given tensor takes no memory; torch 2.11 fails at an `addmm` of that kind.
        given = (kwargs or {}).get("out")
        out = operator(*args, **(kwargs or {})) if given is None else given
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        if operator in SENT:
            collective, times = SENT[operator]
            self._sent[f"{args[-1]} {collective}"] += times(self._ranks[args[-1]]) * args[0].nbytes
        self._after.append(self._alive)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._alive += size
            self._born[key] = len(self._after)
            self._storages[key] = weakref.ref(storage, lambda _: self._gone(key, size))

    def _gone(self, key: int, size: int) -> None:
        self._alive -= size
        del self._storages[key], self._born[key]

    def mark(self, phase: str, unit: str) -> None:
        self._marks.append(_Mark(phase, unit, len(self._after), self._alive, self._sent.copy()))
        self._after.append(self._alive)

    def mark_calls(self, name: str, unit: nn.Module) -> None:
        """Mark the unit's calls. Its backward lasts from the gradient of its result to that of its input."""

        def enter(module: nn.Module, inputs: tuple) -> None:
            before = self._marks[-1].unit if self._marks else name
            self.mark("forward", name)
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    x.register_hook(lambda gradient: self.mark("backward", before))
                    return

        def leave(module: nn.Module, inputs: tuple, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda gradient: self.mark("backward", name))

        unit.register_forward_pre_hook(enter)
        unit.register_forward_hook(leave)

    def forget_gradient(self, parameter: Tensor) -> None:
        """Gradients of weights are counted elsewhere: count as if they had never been alive."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        for operation in range(self._born.get(storage._cdata, len(self._after)), len(self._after)):
            self._after[operation] -= storage.nbytes()
        del storage
        parameter.grad = None

    def found(self) -> dict[str, Footprint]:
        spans = list(zip(self._marks, self._marks[1:], strict=False))
        ends = {mark.unit: then.alive for mark, then in spans if mark.phase == "forward"}
        peaks: Counter[tuple[str, str]] = Counter()
        sent: dict[str, dict[str, float]] = {unit: defaultdict(float) for unit in ends}
        for mark, then in spans:
            over = max(self._after[mark.operation : then.operation]) - ends[mark.unit]
            peaks[mark.phase, mark.unit] = max(peaks[mark.phase, mark.unit], over)
            for collective, total in then.sent.items():
                sent[mark.unit][collective] += total - mark.sent[collective]
        starts = {mark.unit: mark.alive for mark, _ in spans if mark.phase == "forward"}
        # What was made before the first unit counts as the first unit's.
        starts[self._marks[0].unit] = 0
        return {
            unit: Footprint(
                ends[unit] - starts[unit], peaks["forward", unit], peaks["backward", unit], dict(sent[unit])
            )
            for unit in ends
        }


class _FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel: it keeps its input, its weight and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def as_one_kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one kernel on the meta device: nothing between arguments and result is counted."""

    def kernel(*args: Tensor) -> Tensor:
        with _disable_current_modes():
            result = function(*args)
        return torch.empty_like(result)

    return kernel


def fuse_norms(model: nn.Module) -> None:
    """RMSNorm as GPUs compute it.

    On the meta device, as on CPU, it is several operators that keep float32 copies.
    """
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(_fused_norm, module)  # type: ignore[method-assign]


def _fused_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return _FusedNorm.apply(x, norm.weight)
