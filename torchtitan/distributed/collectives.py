"""Small sums over ranks, of host numbers and a scalar of the device, and what one rank decides for all."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.config.errors import UserError
from torchtitan.tools.signals import StopAsked, stop_asked

T = TypeVar("T")
STILL_WAITING_S = 5.0  # between two messages of a rank that waits


def sum_over_hosts(values: Mapping[str, float]) -> dict[str, float]:
    """Each value added over all ranks, which have the same keys; by gloo, so no device has to wait.

    Integers stay exact up to 2^53.
    """
    names = sorted(values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64)
    dist.all_reduce(packed)
    return dict(zip(names, packed.tolist(), strict=True))


def any_rank(holds: bool) -> bool:
    """Whether it holds on any rank; all of them ask."""
    return sum_over_hosts({"holds": float(holds)})["holds"] > 0


def agree_on_data(has_data: bool | None, error: UserError | None = None) -> bool:
    """Whether any rank has data; all of them ask. Raises on all the error that one of them brings.

    None: not known yet, since this rank waits for its storage, and will ask again before a collective times
    out. The others wait with it, however long it takes. A signal to stop on any of them raises StopAsked on
    all.
    """
    while True:
        waits = has_data is None
        own = {"data": bool(has_data), "waits": waits, "failed": error is not None, "stop": stop_asked()}
        total = sum_over_hosts({name: float(holds) for name, holds in own.items()})
        if total["failed"]:
            raise first_error(error)
        if total["waits"] and total["stop"]:
            raise StopAsked
        if waits or not total["waits"]:
            return total["data"] > 0


def wait_together(work: Callable[[], T]) -> T:
    """What `work` returns, on a rank where it may wait longer for its storage than a collective may take; all
    ranks call it, and wait with the slowest. Raises on all the UserError that it raises on one.
    """
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(work)
        while not wait([done], STILL_WAITING_S).done:
            agree_on_data(None)
    error = done.exception()
    agree_on_data(True, error if isinstance(error, UserError) else None)
    return done.result()


def first_error(error: UserError | None) -> UserError:
    """The error of the first rank that has one, on all ranks. At least one rank has one."""
    errors = from_all_ranks(None if error is None else type(error)(str(error)))
    return next(found for found in errors if found is not None)


def from_first_rank(decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; a UserError of it is raised on all of them."""
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def from_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, or of those of a group, in their order, on each of them. For small ones."""
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def sum_over_ranks(value: Tensor) -> Tensor:
    """A tensor added over all ranks of the world, on the device; a new tensor."""
    total = value.clone()
    dist.all_reduce(total)
    return total
