"""How the engine runs what it runs: what a user may switch off, and what each device can do."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from shoal.errors import ModelError
from shoal_worker.engine import native

CUDA_DECODE_STEPS = 4
KVDType = Literal["auto", "int8"]

log = logging.getLogger("shoal.engine")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Ways of running a step. None leaves the choice to what was measured on that kind of device.

    Attributes:
        cuda_graphs: record each shape's kernels once and launch them as one.
        compile: let torch.compile fuse the decode step.
        kernels: our own kernels for decode attention and for drawing tokens; on a CPU they are
            native code, which also does matrix products.
        decode_steps: decode steps launched together.
        run_ahead: launch the next steps before the last ones are read.
        kv_dtype: how the cache keeps keys and values: as the model computes them (auto), or in
            int8, on a CPU alone.
    """

    cuda_graphs: bool | None = None
    compile: bool | None = None
    kernels: bool | None = None
    decode_steps: int | None = None
    run_ahead: bool | None = None
    kv_dtype: KVDType = "auto"

    def on(self, device: torch.device) -> Choices:
        """What is done on this device.

        Raises:
            ModelError: it cannot do what is asked.
        """
        on_gpu = device.type == "cuda"
        if on_gpu and self.kv_dtype == "int8":
            raise ModelError("--kv-dtype int8 runs on a CPU alone; leave it out for a GPU")
        has_kernels = self.kernels is not False and _has_kernels(on_gpu=on_gpu)
        steps = CUDA_DECODE_STEPS if on_gpu else 1
        return Choices(
            cuda_graphs=on_gpu and self.cuda_graphs is not False,
            compile=bool(self.compile),
            kernels=has_kernels,
            decode_steps=steps if self.decode_steps is None else self.decode_steps,
            run_ahead=on_gpu and self.run_ahead is not False,
            kv_dtype=self.kv_dtype,
            native=native.library_path().stem if has_kernels and not on_gpu else "",
        )


def _has_kernels(*, on_gpu: bool) -> bool:
    if on_gpu:
        return importlib.util.find_spec("triton") is not None
    try:
        native.library()
    except native.NativeUnavailable as error:
        log.warning("running without native code, which is slower: %s", error)
        return False
    return True


@dataclass(frozen=True, slots=True)
class Choices:
    """`EngineOptions` as they are on one device.

    Attributes:
        native: names the CPU's native code by its source, compiler and processor.
    """

    cuda_graphs: bool
    compile: bool
    kernels: bool
    decode_steps: int
    run_ahead: bool
    kv_dtype: KVDType = "auto"
    native: str = ""

    def deciding(self) -> dict[str, str]:
        """Those that can change a token's bits, for the fingerprint."""
        kernels = self.native or str(self.kernels)
        return {"compile": str(self.compile), "kernels": kernels, "kv_dtype": self.kv_dtype}
