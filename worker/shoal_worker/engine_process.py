"""The engine's own process: loads the model, runs the serving loop, talks over a pipe.

The worker process is its parent and keeps all bookkeeping, so that nothing delays a step, and a
crash here loses nothing: the parent still holds the jobs. Run as a module with the pipe's number.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, Any

from shoal.errors import ModelError
from shoal.logs import LogFormat, configure
from shoal_worker.events import Event
from shoal_worker.garbage import settle
from shoal_worker.lanes import LaneTable, default_table, parse_table
from shoal_worker.loop import Engine as EngineOfLoop
from shoal_worker.loop import ServingLoop
from shoal_worker.messages import (
    Cancel,
    Dying,
    FromEngine,
    LoadFailed,
    Observed,
    Ready,
    Shutdown,
    Submit,
    ToEngine,
)
from shoal_worker.pipe import Inbox, Outbox
from shoal_worker.scheduler import Scheduler
from shoal_worker.settings import EngineSettings
from shoal_worker.text import TextCodec

if TYPE_CHECKING:
    from shoal_worker.engine import Engine

DEFAULT_MAX_MODEL_LEN = 4096
STOP_S = 5.0
EVENTS_EVERY_S = 0.02

log = logging.getLogger("shoal.engine")


class EngineProcess:
    """The parent's end: starts the process, sends and receives messages, sees it die.

    Args:
        module: what the process runs, with the number of its pipe, the log's level and its format
            as arguments.
    """

    def __init__(
        self,
        settings: EngineSettings,
        log_level: str,
        module: str = __name__,
        log_format: LogFormat = "text",
    ) -> None:
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), log_level, log_format],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Out of the terminal's process group: Ctrl-C asks the parent to drain, not us.
                start_new_session=True,
            )
        finally:
            theirs.close()
        self._outbox: Outbox[Any] = Outbox(self._connection)
        self._outbox.put(settings.model_dump())

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def send(self, message: ToEngine) -> None:
        """Tell the engine something, without waiting until it reads it.

        Raises:
            RecursionError: the message is nested too deeply.
        """
        self._outbox.put(message)

    def receive(self, timeout_s: float, wake: int | None = None) -> list[FromEngine]:
        """Everything it has said, after waiting for the first of it up to `timeout_s`.

        Args:
            wake: a file descriptor that ends the wait when it becomes readable.

        Raises:
            EOFError: it is gone and has said everything.
        """
        messages: list[FromEngine] = []
        wait([self._connection, *([] if wake is None else [wake])], timeout_s)
        while self._connection.poll():
            try:
                messages.append(self._connection.recv())
            except (EOFError, OSError):  # OSError: it died in the middle of a message.
                if messages:
                    return messages
                raise EOFError from None
        return messages

    def exit_text(self) -> str:
        """How it ended, in words."""
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipe, went on, and was killed"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it: kindly first, then at once."""
        self._outbox.put(Shutdown())
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._outbox.close(STOP_S)
        self._connection.close()


def serve(connection: Connection, settings: EngineSettings) -> None:
    """Load, then answer messages until told to leave or the parent is gone."""
    try:
        loop, ready = load(settings)
    except ModelError as error:
        connection.send(LoadFailed(str(error)))
        return
    settle()
    connection.send(ready)
    outbox: Outbox[FromEngine] = Outbox(connection)
    try:
        _answer(loop, Inbox(connection, at_end=Shutdown()), _News(outbox))
    except Exception as error:
        # The edge of the process. The parent finds out which request did it; what is left of the
        # model, and on a GPU of the whole device, is not to be trusted any more.
        outbox.put(Dying(f"{type(error).__name__}: {error}", _is_out_of_memory(error)))
        raise
    finally:
        outbox.close(STOP_S)


def _answer(loop: ServingLoop, inbox: Inbox[ToEngine], news: _News) -> None:
    while True:
        # Block only with nothing to do; else look for news between two steps.
        for message in inbox.take(block=loop.is_idle):
            match message:
                case Shutdown():
                    return
                case Submit():
                    loop.submit(message)
                case Cancel(job_id, index):
                    loop.cancel(job_id, index)
        news.tell(loop.step(), is_idle=loop.is_idle)


def _is_out_of_memory(error: Exception) -> bool:
    # torch has a class of its own for GPUs, found by name to keep torch out of the parent; its CPU
    # allocator raises a RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


class _News:
    """What the parent is to be told: results at once, events in groups.

    A step may take a millisecond; a message for each would cost as much as the step.
    """

    def __init__(self, outbox: Outbox[FromEngine]) -> None:
        self._outbox = outbox
        self._events: list[Event] = []
        self._told_s = time.monotonic()

    def tell(self, messages: list[FromEngine], *, is_idle: bool) -> None:
        """Send these, their events perhaps later."""
        for message in messages:
            if isinstance(message, Observed):
                self._events += message.events
            else:
                self._outbox.put(message)
        now_s = time.monotonic()
        if self._events and (is_idle or now_s - self._told_s >= EVENTS_EVERY_S):
            self._outbox.put(Observed(tuple(self._events)))
            self._events, self._told_s = [], now_s


def load(settings: EngineSettings) -> tuple[ServingLoop, Ready]:
    """A serving loop over a loaded and warmed-up model, and what it serves.

    Raises:
        ModelError: the model cannot be loaded, or the lanes do not fit it.
    """
    started_s = time.monotonic()
    engine = load_engine(settings)
    loaded, table = engine.loaded, engine.table
    name = settings.served_model_name or loaded.name
    loop = serving_loop(engine, name)
    if settings.warm_up:
        engine.warm_up()
        loop.declare_shapes()
    return loop, Ready(
        model_name=name,
        fingerprint=engine.fingerprint,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        num_slots=table.num_slots,
        lanes={lane.name: lane.slots for lane in table.lanes},
        num_positions=sum(lane.slots * lane.kv_len for lane in table.lanes),
        load_s=time.monotonic() - started_s,
    )


def load_engine(settings: EngineSettings) -> Engine:
    """The engine of these settings, not warmed up; errors as `load`'s."""
    # Imported here: the parent imports this module too, and must not load torch.
    from shoal_worker.engine import Engine, load_model
    from shoal_worker.engine.memory import total_bytes
    from shoal_worker.engine.options import EngineOptions
    from shoal_worker.engine.probe import probe
    from shoal_worker.engine.switches import apply_switches

    apply_switches(
        threads=settings.threads,
        matmul_precision=settings.matmul_precision,
        cudnn_benchmark=settings.cudnn_benchmark,
    )
    loaded = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    on_gpu = loaded.device.type == "cuda"
    cache_bytes = sum(shape.bytes_per_token for shape in probe(loaded.model))
    gpu_bytes = total_bytes(loaded.device) - loaded.model.get_memory_footprint() if on_gpu else None
    table = lane_table(settings, loaded.max_positions, cache_bytes, gpu_bytes)
    options = EngineOptions(
        cuda_graphs=settings.cuda_graphs,
        compile=settings.compile,
        kernels=settings.kernels,
        decode_steps=settings.decode_steps,
        run_ahead=settings.run_ahead,
        kv_dtype=settings.kv_dtype,
    )
    return Engine(loaded, table, options)


def serving_loop(
    engine: Engine, model_name: str, stand_in: EngineOfLoop | None = None
) -> ServingLoop:
    """A loop over an engine; `stand_in` runs its steps where they are to be watched."""
    from shoal_worker.engine.tokenizer import DirectTokenizer

    loaded = engine.loaded
    codec = TextCodec(
        DirectTokenizer(loaded.tokenizer), loaded.eos_token_ids, loaded.vocab_size, engine.table
    )
    return ServingLoop(
        stand_in or engine,
        Scheduler(engine.table),
        codec,
        model_name=model_name,
        fingerprint=engine.fingerprint,
    )


def lane_table(
    settings: EngineSettings,
    max_positions: int,
    bytes_per_token: int,
    gpu_bytes: int | None = None,
) -> LaneTable:
    """The declared table, or one made from the model; see `default_table`."""
    longest = settings.max_model_len
    if longest is not None and longest > max_positions:
        raise ModelError(f"--max-model-len is {longest}; the model takes {max_positions}")
    if settings.lanes is None:
        default_len = min(max_positions, DEFAULT_MAX_MODEL_LEN)
        return default_table(longest or default_len, bytes_per_token, gpu_bytes=gpu_bytes)
    try:
        return parse_table(settings.lanes, longest or max_positions, fine=gpu_bytes is None)
    except ValueError as error:
        raise ModelError(f"--lanes: {error}") from None


def _die_with_parent() -> None:
    """Have the kernel end us when the parent is killed: nobody else would free the GPU."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _main(arguments: list[str]) -> None:
    descriptor, log_level, log_format = arguments
    _die_with_parent()
    configure(log_level, "json" if log_format == "json" else "text")
    connection: Connection[Any, Any] = Connection(int(descriptor))
    with contextlib.suppress(EOFError, BrokenPipeError):
        serve(connection, EngineSettings(**connection.recv()))


if __name__ == "__main__":
    _main(sys.argv[1:])
