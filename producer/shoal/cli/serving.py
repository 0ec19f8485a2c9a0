"""Whether a queue has a worker, and the workers that a command starts for itself.

Owns that decision and the watch over it while the command waits: a worker that somebody else's
command started ends with that command, and then this one needs its own.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.cli.exits import note
from shoal.cli.padding import PaddingCount
from shoal.cli.show import error_console
from shoal.client import Client
from shoal.errors import InvalidRequest, ShoalError
from shoal.local_worker import LocalWorker
from shoal.redis_url import redis_errors
from shoal.status import WorkerState, live_workers
from shoal.wire import QUEUES

WATCH_INTERVAL_S = 2.0
TURN_S = 0.2  # Well over the time between a last commit and what the worker says after it.

RUN = "this run is"
ADVICE = "--mixed lets any worker go on, and --overwrite starts anew"
NO_MODEL = (
    "there is no model to start a worker with: name a folder or hub id with --model (or "
    "SHOAL_MODEL), or try --model demo, the small one that comes with Shoal"
)


@contextlib.contextmanager
def connected(redis_url: str | None) -> Iterator[Client]:
    """A client; says so if it is one of the embedded Redis."""
    with Client(redis_url) as client:
        if client.is_embedded:
            note("using the embedded Redis of this user")
        yield client


class Serving:
    """A queue's workers, for as long as a command needs them. A context manager.

    Args:
        model: for workers started here; None: none can be.
        num_local: workers to start whatever there is; None: one, if the Redis is the embedded one
            and nobody serves the queue.
        log_folder: for the logs of workers started here; a temporary one where not given.
        may_start: False only tells whether somebody serves.

    Attributes:
        workers: those that serve the queue, as of the last look.
        padding: what they computed since then that was padding.
    """

    def __init__(
        self,
        client: Client,
        queue: str,
        model: str | None,
        *,
        num_local: int | None = None,
        log_folder: Path | None = None,
        may_start: bool = True,
    ) -> None:
        self.workers: list[WorkerState] = []
        self.padding = PaddingCount()
        self._client = client
        self._queue = queue
        self._model = model
        self._num_local = num_local
        self._log_folder = log_folder
        self._may_start = may_start and (client.is_embedded or num_local is not None)
        self._local: list[LocalWorker] = []
        self._resources = ExitStack()
        self._watched_s = 0.0
        self._has_told = False
        self._has_told_kind = False

    def __enter__(self) -> Self:
        try:
            if self._num_local is not None:
                self._start(self._num_local)
            self._look()
        except BaseException:
            self._resources.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    @property
    def has_local(self) -> bool:
        """Whether workers run that end with this command."""
        return bool(self._local)

    def requested_model(self) -> str | None:
        """The model to ask for in requests: by the name that a worker serves it under.

        None where the worker was started with it, since its name there is the worker's to choose.

        Raises:
            InvalidRequest: the queue is served, and by nobody with this model.
        """
        if self._model is None or self._local:
            return None
        folder = Path(self._model)
        name = folder.resolve().name if folder.is_dir() else self._model
        served = {worker.model for worker in self.workers}
        if not served or served & {None, name, self._model}:
            return self._model if self._model in served else name
        names = ", ".join(sorted(map(str, served)))
        raise InvalidRequest(
            f"{self._queue} is served with {names}, not with {self._model}: leave --model out, or "
            "use another --queue"
        )

    @property
    def num_slots(self) -> int:
        """Sequences that the queue's workers decode at once, as far as they tell."""
        return sum(worker.slots or 0 for worker in self.workers)

    @property
    def padding_ratio(self) -> float | None:
        """The share of padding in what the workers computed meanwhile; None if none tells."""
        return self.padding.ratio

    def watch(self) -> None:
        """Look again, every few seconds at the most.

        Raises:
            ShoalError: a worker started here has ended, or none can be started.
        """
        if time.monotonic() - self._watched_s >= WATCH_INTERVAL_S:
            self._look()

    def require_kind(self, fingerprint: str | None, what: str = RUN, advice: str = ADVICE) -> None:
        """Say, once, if the queue is served, and by no worker of the kind that work is bound to.

        Raises:
            ShoalError: nor will it be, since the workers of this Redis are the command's own.
        """
        kinds = {worker.fingerprint for worker in self.workers}
        # One that tells no fingerprint may be of any kind.
        if fingerprint is None or not kinds or kinds & {None, fingerprint}:
            return
        text = (
            f"{what} bound to workers of fingerprint {fingerprint}, and no living worker of "
            f"{self._queue} has it (there: {', '.join(sorted(map(str, kinds)))})"
        )
        if self._local and self._client.is_embedded:
            raise ShoalError(f"{text}; {advice}")
        if not self._has_told_kind:
            self._has_told_kind = True
            note(f"{text}; waiting for one: {advice}")

    def look_last(self) -> None:
        """Look once more when the work is done; a worker tells its figures when it turns idle."""
        time.sleep(TURN_S)
        with contextlib.suppress(ShoalError), redis_errors(self._client.redis_url):
            self._see(live_workers(self._client.redis, self._queue))

    def _see(self, workers: list[WorkerState]) -> None:
        self.workers = workers
        self.padding.look(workers)

    def _look(self) -> None:
        for worker in self._local:
            worker.check()
        with redis_errors(self._client.redis_url):
            self._see(live_workers(self._client.redis, self._queue))
        if not self.workers and not self._local:
            if self._may_start:
                self._start(1)
            else:
                self._tell_once()
        self._watched_s = time.monotonic()

    def _start(self, number: int) -> None:
        if self._model is None:
            raise InvalidRequest(NO_MODEL)
        note(f"starting {_count(number)} for model {self._model}")
        folder = self._log_folder or Path(
            self._resources.enter_context(tempfile.TemporaryDirectory(prefix="shoal-"))
        )
        queues = _queues_with(self._queue)
        workers = [
            LocalWorker(self._model, self._client.redis_url, queues, folder, f"worker-{i}")
            for i in range(number)
        ]
        # All load their model at the same time, and all end at the same time.
        for worker in workers:
            worker.start()
            self._local.append(worker)
            self._resources.callback(worker.stop)
        for worker in workers:
            self._resources.callback(worker.tell_to_stop)
        with error_console().status("loading the model"):
            for worker in workers:
                worker.wait_ready()
        with redis_errors(self._client.redis_url):
            self._see(live_workers(self._client.redis, self._queue))

    def _tell_once(self) -> None:
        if not self._has_told:
            self._has_told = True
            note(f"no worker serves {self._queue} yet; waiting for one (`shoal worker --model M`)")


def _queues_with(queue: str) -> Sequence[str]:
    return QUEUES if queue in QUEUES else (*QUEUES, queue)


def _count(number: int) -> str:
    return "a worker" if number == 1 else f"{number} workers"
