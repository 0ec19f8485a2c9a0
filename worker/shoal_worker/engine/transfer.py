"""Small tensors between host and device, without waiting for the device.

A copy to a GPU waits for all that was launched before unless it comes from pinned memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of nested lists of numbers, there before whatever is launched next."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """A tensor on its way to the host, as it is at this point of the device's work."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()
        else:
            self._tensor = tensor.clone()

    def has_arrived(self) -> bool:
        """Whether `get` need not wait."""
        if self._arrival is None:
            return True
        return bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def get(self) -> Tensor:
        """The tensor on the host; waits for it, and for nothing that was launched after it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._tensor
