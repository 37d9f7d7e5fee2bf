"""The vision-language experiment. `SPEC` is what the trainer gets; it imports torch, so it is looked up only when asked for."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "SPEC":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from experiments.vlm.spec import SPEC

    return SPEC
