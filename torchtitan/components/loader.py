"""What the trainer asks of a loader and of what it delivers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

Tensors = dict[str, Tensor]
# small pieces of a loader's position, each under a name that no other rank's piece bears
State = Mapping[str, bytes]


# (whether this rank has data, its error) -> whether any rank has. Raises an error of any rank on all of them.
# None in place of the first: this rank waits for its storage and asks again soon; the others wait with it. A
# single rank has no `agree`.
Agree = Callable[..., bool]


class Batch(Protocol):
    """One microbatch: host tensors of fixed shapes, and host numbers that describe them.

    Of `tensors` the trainer itself reads, [B, S] each, `labels`, negative where there is none, and of each
    token `document_ids` and `source_ids` (which source of the split), negative on padding.

    `epochs`: name of a source -> this batch's share in how often it was delivered so far; over all batches of
    a step they add up.
    """

    tensors: Tensors
    counts: dict[str, int]
    samples: list[Any]
    epochs: dict[str, float]


class Step(Protocol):
    """The microbatches of one optimizer step, and the loader's position right after them."""

    @property
    def batches(self) -> Sequence[Batch]:
        """A microbatch for each forward, in order, as many on every rank. They hold until the next step."""
        ...

    def once(self) -> Iterator[Batch]:
        """The same, where each holds until the next one is asked for: its memory is used again."""
        ...

    @property
    def state(self) -> State | Callable[[], State]:
        """The position right after this step, or a function that makes it where it is saved."""
        ...


class Loader(Protocol):
    """Steps of data-parallel rank `rank` of `ranks`.

    `split` is train or validation; `control`, one of Scoring.controls, spoils the latter. `group`: the ranks
    that hold the same slots as this one, if others do (distributed/slot_group.py); one of them may read for
    all. Only that one knows the state and the report; the others leave them empty.

    It ends on every rank at the same step: `agree`, asked by all once a step, says whether any of them still
    has data. A UserError of one rank goes through it too, and so is raised by `next` on all of them alike.
    """

    def __iter__(self) -> Iterator[Step]: ...

    def __next__(self) -> Step: ...

    def state_dict(self) -> State:
        """The position after the last step that was given."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from a position that has all `slot_keys`. Raises ConfigError where data changed."""
        ...

    def slot_keys(self) -> list[str]:
        """Names of the pieces of state that this rank needs."""
        ...

    def report(self) -> dict:
        """What this rank delivered and rejected so far, in values that JSON can hold."""
        ...

    def summary(self, report: Mapping[str, Any]) -> str:
        """What a report, merged or not, says was not used, in a line for people; empty where all was."""
        ...

    def close(self) -> None:
        """Ends processes and threads of the loader, and closes its files."""


def to_device(tensors: Tensors, device) -> Tensors:
    """Copy to the device without waiting, on the stream that uses them; on a GPU from pinned memory."""
    if device.type == "cpu":
        return tensors
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
