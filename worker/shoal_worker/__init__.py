"""Shoal's worker: claims many jobs at once, decodes them in fixed shapes, writes results back.

`Generator` is the same scheduler and engine without a queue. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal_worker.generator import Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    # The command line imports this package and must not wait for what only a generator needs.
    if name == "Generator":
        from shoal_worker.generator import Generator  # noqa: PLC0415

        return Generator
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
