"""The whole optimizer step as one CUDA graph: a GPU that is faster than Python is no longer kept waiting for
kernels to be launched.

It is possible because nothing changes from step to step but numbers: shapes are fixed, and the host never
asks the device. The first steps run as they are, so that kernels are compiled and optimizer states made; the
next is captured and from then on replayed. What is copied in: the microbatches, the scale of the loss, and
the learning rates, which are tensors for this (optimizer.py).
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchtitan.components.loader import Tensors

Result = tuple[Tensor, Tensor]  # losses (of all and by source) and gradient norm
OptimizerStep = Callable[[Iterable[Tensors], float | Tensor], Result]
Run = Callable[[], Result]
EAGER_STEPS = 3


class GraphedStep:
    """`step`, replayed. Its results are the same two tensors each time, and hold until the next call."""

    def __init__(self, step: OptimizerStep, recorder: "Recorder"):
        self.step, self.recorder = step, recorder
        self.inputs: list[Tensors] = []
        self.scale = torch.empty(())
        self.calls = 0
        self.replay: Run | None = None

    def __call__(self, microbatches: Iterable[Tensors], scale: float | Tensor) -> Result:
        self._copy_in(microbatches, scale)
        self.calls += 1
        if self.calls <= EAGER_STEPS:
            return self.recorder.run(self._on_inputs)
        if self.replay is None:
            self.replay = self.recorder.record(self._on_inputs)
        return self.replay()

    def _on_inputs(self) -> Result:
        return self.step(self.inputs, self.scale)

    def _copy_in(self, microbatches: Iterable[Tensors], scale: float | Tensor) -> None:
        """Copy microbatches one after the other, since each holds only until the next is asked for."""
        number = -1
        for number, tensors in enumerate(microbatches):
            if self.calls == 0:
                self.inputs.append({name: torch.empty_like(tensor) for name, tensor in tensors.items()})
                self.scale = torch.empty((), device=next(iter(tensors.values())).device)
            for name, tensor in tensors.items():
                self.inputs[number][name].copy_(tensor)
        assert number + 1 == len(self.inputs), "each step has as many microbatches as the first"
        self.scale.fill_(scale)


class Recorder:
    """Runs and captures on a stream of its own: autograd remembers where a gradient was first made."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def run(self, work: Run) -> Result:
        """The result of `work`, run on this stream after what the current stream was given so far."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Run) -> Run:
        """Capture `work`, without running it. Returns what replays it.

        Gradients and activations get addresses in the graph's own memory, for good.
        """
        graph = torch.cuda.CUDAGraph()
        # Threads that pin memory or ask whether a collective is done must not spoil it: only this thread's
        # calls count.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
