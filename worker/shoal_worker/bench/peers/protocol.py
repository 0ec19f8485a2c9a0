"""What a peer is: an engine that was made from a setup and generates so many tokens a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Setup:
    """What an adapter is made from.

    Attributes:
        model: a folder that transformers reads.
        converted: the same model in the engine's own format, where it was made before.
        settings: of Shoal alone.
    """

    model: str
    device: str
    dtype: str
    threads: int
    converted: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Of the device: cpu or cuda."""
        return self.device.partition(":")[0]


class Peer(Protocol):
    """An engine with a model loaded.

    Attributes:
        differs: what is not as in the others, in a few words.
    """

    differs: str

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> list[int]:
        """Generate for all prompts at once: how many tokens each got."""
        ...
