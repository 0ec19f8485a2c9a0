"""The worker's settings: read once, from flags and SHOAL_* variables, and validated.

The descriptions here are the only ones: the command line's help and the README's table are made
from them.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from shoal.errors import InvalidRequest
from shoal.logs import LogFormat
from shoal.validation import explain
from shoal.wire import QUEUES

DType = Literal["auto", "float32", "bfloat16", "float16"]
KVDType = Literal["auto", "int8"]
Precision = Literal["highest", "high", "medium"]
LogLevel = Literal["debug", "info", "warning", "error"]


Settings = TypeVar("Settings", bound="EngineSettings")


class EngineSettings(BaseModel):
    """What the engine process needs: everything that can change a token or a shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="Folder with a transformers model (safetensors), a hub id, or `demo` (bundled, "
        "small, for trying things out)."
    )
    served_model_name: str | None = Field(
        None, description="Name in results and metrics; the model's own where it is not given."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.",
    )
    dtype: DType = Field(
        "auto",
        description="Number format of weights and cache; `auto`: bfloat16 on a GPU and "
        "on a CPU with AMX or AVX512-BF16, else float32.",
    )
    kv_dtype: KVDType = Field(
        "auto",
        description="Number format of cached keys and values: `auto`, the model's own, or `int8`, "
        "on a CPU alone: a quarter of float32's memory, and changes results.",
    )
    lanes: str | None = Field(
        None,
        description="Decode shapes as CLASS=SLOTSxPOSITIONS, such as "
        "`interactive=8x1024,bulk=64x256,bulk=64x1024`; made from the model where not given.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Longest prompt and completion together, in tokens; the model's own, "
        "4096 at most, where not given.",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of the engine; all cores where not given. The number "
        "changes the last bits of results.",
    )
    matmul_precision: Precision = Field(
        "highest",
        description="float32 matrix products: `highest` is exact float32; `high` and "
        "`medium` are faster on hardware that has them, and change results.",
    )
    cudnn_benchmark: bool = Field(
        True, description="Let cuDNN choose kernels by timing; shapes repeat, so it chooses once."
    )
    warm_up: bool = Field(True, description="Run every shape once before serving.")
    cuda_graphs: bool = Field(
        True, description="On a GPU: launch a step's kernels as one; changes no result."
    )
    kernels: bool = Field(
        True,
        description="Our own kernels for attention and for drawing tokens: Triton's on a GPU; on a "
        "CPU native code, for matrix products too, which a C++ compiler builds at the first start. "
        "Changes the last bits of results.",
    )
    compile: bool = Field(
        False,
        description="Let torch.compile fuse the decode step: faster steps, a longer start; "
        "changes the last bits of results.",
    )
    decode_steps: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Tokens of each sequence between two looks at the results; 4 on a GPU and 1 "
        "on a CPU where not given. Changes no result.",
    )
    run_ahead: bool = Field(
        True,
        description="On a GPU: launch the next steps before the last ones are read; "
        "changes no result.",
    )


class WorkerSettings(EngineSettings):
    """Everything `shoal worker` can be told."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|all)$",
        description="`auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N`, or `all`: a worker "
        "process for each GPU, on ports one after the other.",
    )

    redis: str | None = Field(
        None,
        description="redis://, rediss://, unix:// or redis+sentinel:// address; then "
        "SHOAL_REDIS_URL, the file that SHOAL_REDIS_URL_FILE names, REDIS_URL, and last an "
        "embedded Redis.",
    )
    queues: tuple[str, ...] = Field(
        QUEUES, min_length=1, description="Queues to serve, most urgent first, by commas."
    )
    name: str = Field(
        default_factory=lambda: (
            f"{socket.gethostname().partition('.')[0]}-{os.getpid()}-{os.urandom(3).hex()}"
        ),
        min_length=1,
        description="Name in RQ's registry; host, process and a random part where not given.",
    )
    max_in_flight: int | None = Field(
        None,
        ge=1,
        description="Requests in the making at once, waiting ones included; twice the slots "
        "where not given. With those that have ended in a job that has not, up to four "
        "times as many are held.",
    )
    reserve: int | None = Field(
        None,
        ge=0,
        description="Requests that the most urgent queue may add whatever the others hold; an "
        "eighth of `--max-in-flight` where not given.",
    )
    allow_callbacks: bool = Field(
        False,
        description="Run jobs that bring callbacks or webhooks of RQ along, which import names and "
        "send requests from this process; it waits for each, so keep them far shorter than the "
        "lease.",
    )
    lease_s: float = Field(
        30.0, ge=1.0, le=3600.0, description="Seconds after which a silent worker's jobs run again."
    )
    drain_timeout_s: float = Field(
        60.0,
        ge=0.0,
        description="Seconds that SIGTERM leaves for work in flight; the rest goes back "
        "to its queue.",
    )
    hang_timeout_s: float = Field(
        300.0,
        ge=1.0,
        description="Seconds of silence after which an engine with work in hand is killed and "
        "started again.",
    )
    poll_s: float = Field(
        0.03,
        ge=0.001,
        le=5.0,
        description="Seconds between looks at a queue that holds nothing for this worker; for "
        "an empty one it waits in Redis.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics, /healthz and /readyz.")
    metrics_port: int = Field(
        9470, ge=0, le=65535, description="Port of /metrics; 0 picks a free one and prints it."
    )
    export_queues: bool = Field(
        False,
        description="Serve the queues' metrics too, as `shoal exporter` does: on one worker of a "
        "Redis only, or sums over them count twice.",
    )
    burst: bool = Field(False, description="Leave when the queues are empty.")
    log_level: LogLevel = Field("info", description="Least severe log line shown.")
    log_format: LogFormat = Field(
        "text", description="Log lines as text or as JSON objects, the `ready` line included."
    )

    @field_validator("queues", mode="before")
    @classmethod
    def _split_queues(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("queues")
    @classmethod
    def _queues_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in value if value.count(name) > 1})
        if twice:
            msg = f"names {', '.join(twice)} twice"
            raise ValueError(msg)
        return value

    @property
    def engine(self) -> EngineSettings:
        """The part that the engine process is given."""
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})


def read_settings(values: dict[str, Any]) -> WorkerSettings:
    """Settings from flags; what is None was not given.

    Raises:
        InvalidRequest: a value is of the wrong kind or out of range; the message names the flag.
    """
    return _read(WorkerSettings, values)


def read_engine_settings(values: dict[str, Any]) -> EngineSettings:
    """The engine's part alone; errors as `read_settings`."""
    return _read(EngineSettings, values)


def _read(kind: type[Settings], values: dict[str, Any]) -> Settings:
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return kind(**given)
    except ValidationError as error:
        text = explain(error, kind)
        for name in given:
            text = text.replace(name, flag(name), 1) if text.startswith(name) else text
        raise InvalidRequest(text) from None


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.removesuffix("_s").replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return "SHOAL_REDIS_URL" if name == "redis" else "SHOAL_" + name.removesuffix("_s").upper()


def default_text(info: FieldInfo) -> str:
    """A default as the README's table shows it."""
    default = info.default
    if info.is_required():
        return "required"
    if info.default_factory is not None or default is None:
        return "–"
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def settings_table() -> str:
    """All settings as a Markdown table: flag, variable, default, meaning."""
    lines = ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
    for name, info in WorkerSettings.model_fields.items():
        cells = (f"`{flag(name)}`", f"`{variable(name)}`", default_text(info), info.description)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
