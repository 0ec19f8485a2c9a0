"""Everything Shoal raises on purpose, in one tree, each named for what a caller can do about it.

ShoalError
├── InvalidRequest (also ValueError)   change the request
│   └── PromptTooLong                  shorten the prompt or ask for fewer tokens
├── QueueFull                          wait, or add workers or memory
├── ResultTimeout (also TimeoutError)  wait longer; the job goes on
├── GenerationFailed                   read `code`; send again if `retryable`
│   └── ModelMismatch                  name the model the worker serves, or another queue
├── Cancelled                          somebody cancelled the request
├── Expired                            the deadline passed, or the result was kept no longer
├── RedisUnavailable                   check the address and that the server runs
└── ModelError                         name a model folder that can be loaded
"""

from __future__ import annotations


class ShoalError(Exception):
    """Root of all errors that Shoal raises on purpose."""


class InvalidRequest(ShoalError, ValueError):
    """The request breaks a rule of the wire format; the message names field, value and limit."""


class PromptTooLong(InvalidRequest):
    """Prompt and new tokens together do not fit the model; the message carries both numbers."""


class QueueFull(ShoalError):
    """The queue takes no more: its limit is reached, or Redis is out of memory."""


class ResultTimeout(ShoalError, TimeoutError):
    """No result came in the time allowed. The job goes on; ask again."""


class GenerationFailed(ShoalError):
    """The worker answered this request with an error.

    Attributes:
        code: a short word for programs, such as `engine_error`.
        retryable: whether the same request may succeed when sent again.
    """

    def __init__(
        self, message: str, *, code: str = "generation_failed", retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class ModelMismatch(GenerationFailed):
    """The request names a model that the worker does not serve."""


class Cancelled(ShoalError):
    """The request was cancelled before it finished."""


class Expired(ShoalError):
    """The request's deadline passed, or its result is no longer kept; the message says when."""


class RedisUnavailable(ShoalError):
    """No Redis answers at the address in use."""


class ModelError(ShoalError):
    """The model cannot be loaded or is of a kind that Shoal does not run."""
