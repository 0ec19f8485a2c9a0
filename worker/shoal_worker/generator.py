"""Generation in this process, without a queue: the worker's own scheduler and engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shoal.errors import InvalidRequest
from shoal.jobs import as_requests
from shoal.wire import GenerationRequest, GenerationResult, SamplingParams
from shoal_worker.engine_process import load
from shoal_worker.in_process import InProcess
from shoal_worker.settings import read_engine_settings


class Generator:
    """A model and its engine, ready to generate.

    Args:
        model: a folder, a hub id or `demo`, as `shoal worker --model`.
        device, dtype: as `shoal worker`'s.
        settings: any other setting of the engine, such as `lanes` or `threads`.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidRequest: a setting is of the wrong kind or out of range.
    """

    def __init__(
        self, model: str, device: str = "auto", dtype: str = "auto", **settings: Any
    ) -> None:
        given = {"model": model, "device": device, "dtype": dtype, **settings}
        loop, self._ready = load(read_engine_settings(given))
        self._serving = InProcess(loop)

    @property
    def model_name(self) -> str:
        """The name in results."""
        return self._ready.model_name

    @property
    def fingerprint(self) -> str:
        """The digest of all that can change a token."""
        return self._ready.fingerprint

    def generate(
        self,
        requests: Iterable[GenerationRequest | str | list[int]],
        sampling: SamplingParams | None = None,
        **sampling_fields: object,
    ) -> list[GenerationResult]:
        """All results, in the order of the requests; failed ones carry their `error`.

        Ctrl-C is heard between two steps and leaves the generator as new; a second one breaks the
        step off, and every later call says that this generator is of no more use.

        Args:
            requests: prompts, which share the sampling, or whole requests. They use the lanes of
                the bulk class, whatever their own.
            sampling: of all prompts; or its fields, one by one.

        Raises:
            InvalidRequest: a field is unknown or out of range.
            GenerationFailed: an earlier call was broken off in the middle of a step.
        """
        if isinstance(requests, str):
            raise InvalidRequest("generate takes a list of prompts; got one text: put it in a list")
        bulk = [
            request.model_copy(update={"service_class": "bulk"})
            for request in as_requests(requests, sampling, sampling_fields)
        ]
        return [
            result.model_copy(update={"prompt": request.prompt})
            for result, request in zip(self._serving.run(bulk), bulk, strict=True)
        ]
