"""Shoal: prompts go into Redis, workers decode them in batches, completions come out.

This package is the producer: wire format, clients, bulk runs and the command line. It loads no
torch. The worker is `shoal_worker`, in the extra `[worker]`.
"""

from shoal.aio import AsyncClient, AsyncJob
from shoal.client import Client, Job
from shoal.errors import (
    Cancelled,
    Expired,
    GenerationFailed,
    InvalidRequest,
    ModelError,
    ModelMismatch,
    PromptTooLong,
    QueueFull,
    RedisUnavailable,
    ResultTimeout,
    ShoalError,
)
from shoal.wire import (
    Completion,
    GenerationJob,
    GenerationRequest,
    GenerationResult,
    SamplingParams,
    Usage,
)

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Cancelled",
    "Client",
    "Completion",
    "Expired",
    "GenerationFailed",
    "GenerationJob",
    "GenerationRequest",
    "GenerationResult",
    "InvalidRequest",
    "Job",
    "ModelError",
    "ModelMismatch",
    "PromptTooLong",
    "QueueFull",
    "RedisUnavailable",
    "ResultTimeout",
    "SamplingParams",
    "ShoalError",
    "Usage",
]
