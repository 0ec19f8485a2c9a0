"""The wire format, version 1: what a producer sends, what a worker answers, and their names.

Owns the field names, defaults and limits of a request and of a result. Everything that enters
through it is validated here, once, by pydantic. It knows neither Redis nor RQ nor a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

WIRE_VERSION = 1
FUNCTION_NAME = "shoal.generate"
QUEUE_HIGH = "shoal-high"
QUEUE_DEFAULT = "shoal-default"
QUEUE_BULK = "shoal-bulk"
QUEUES = (QUEUE_HIGH, QUEUE_DEFAULT, QUEUE_BULK)

MAX_PROMPT_BYTES = 1_048_576
MAX_NEW_TOKENS = 131_072
MAX_REQUESTS_PER_JOB = 1_024
MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_MESSAGES = 1_024
MAX_METADATA_BYTES = 16_384
MAX_METADATA_LEVELS = 32

ServiceClass = Literal["interactive", "bulk"]
FinishReason = Literal["stop", "length", "abort", "deadline"]
OnLong = Literal["error", "truncate-left"]

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _kind_of_prompt(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "token_ids" if isinstance(value, list) else None


# Told apart before validation, so that an error speaks of the kind that was given.
Prompt = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TokenId], Tag("token_ids")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string or a list of token ids",
    ),
]


class _Wire(BaseModel):
    """Strict types, no unknown fields, no NaN; frozen, because a request is a value."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False
    )


class SamplingParams(_Wire):
    """How one request's tokens are chosen. Names and meanings follow vLLM's."""

    max_tokens: int = Field(16, ge=1, le=MAX_NEW_TOKENS, description="new tokens at the most")
    min_tokens: int = Field(0, ge=0, le=MAX_NEW_TOKENS, description="new tokens before any stop")
    temperature: float = Field(1.0, ge=0.0, le=100.0, description="0 takes the likeliest token")
    top_k: int = Field(0, ge=-1, le=MAX_TOKEN_ID, description="likeliest tokens kept; 0 or -1: all")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="probability mass kept, likeliest first")
    min_p: float = Field(0.0, ge=0.0, le=1.0, description="least share of the likeliest's chance")
    repetition_penalty: float = Field(
        1.0, gt=0.0, le=100.0, description="over 1 makes tokens of prompt and completion rarer"
    )
    presence_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="taken off a token's logit once it was generated"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2.0, le=2.0, description="taken off a token's logit each time it was generated"
    )
    stop: list[StopString] = Field(
        default_factory=list, max_length=MAX_STOP_STRINGS, description="strings that end the text"
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=MAX_REQUESTS_PER_JOB, description="tokens that end it"
    )
    ignore_eos: bool = Field(default=False, description="go on past the model's end token")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="same seed, prompt and worker kind: same text"
    )
    n: int = Field(1, ge=1, le=MAX_SAMPLES, description="completions of each prompt")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="log-probabilities of this many likeliest tokens"
    )
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict, max_length=MAX_REQUESTS_PER_JOB, description="added to logits"
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="keep the stop string at the end of the text"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _json_keys(cls, value: object) -> object:
        # JSON has no integer keys.
        if not isinstance(value, Mapping):
            return value
        return {
            int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key: bias
            for key, bias in value.items()
        }

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.min_tokens > self.max_tokens:
            msg = f"min_tokens is {self.min_tokens}; max_tokens allows {self.max_tokens}"
            raise ValueError(msg)
        return self


class ChatMessage(_Wire):
    """One turn of a conversation, as chat templates take it."""

    role: str = Field(min_length=1, max_length=64)
    content: str
    name: str | None = Field(None, min_length=1, max_length=256)


class GenerationRequest(_Wire):
    """One prompt and how to continue it.

    Attributes:
        prompt: text, or token ids of the worker's tokenizer; empty where there are messages.
        messages: a conversation in its place, which the worker's tokenizer turns into a prompt by
            its chat template; refused where it has none.
        on_long: what becomes of a prompt that does not fit: refused, or cut at its start.
        count_only: tokenise, check and count, and generate nothing: completions are empty.
        id: comes back in the result; a job's own id where it is not given.
        service_class: chooses the worker's lanes: `interactive` for latency, `bulk` for throughput.
        model: the model this request is for; None takes whatever the worker serves.
        deadline: seconds after submission; past it the request ends with what it has.
        metadata: the caller's own, carried along and never read.
    """

    prompt: Prompt = ""
    messages: list[ChatMessage] = Field(default_factory=list, max_length=MAX_MESSAGES)
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    id: str | None = Field(None, min_length=1, max_length=256)
    service_class: ServiceClass = "interactive"
    model: str | None = Field(None, min_length=1, max_length=1024)
    deadline: float | None = Field(None, gt=0.0)
    on_long: OnLong = "error"
    count_only: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("prompt")
    @classmethod
    def _prompt_within_limits(cls, value: str | list[int]) -> str | list[int]:
        if not value:
            raise ValueError("the prompt is empty; give at least one character or token")
        num_bytes = _num_bytes("prompt is", value) if isinstance(value, str) else 4 * len(value)
        if num_bytes > MAX_PROMPT_BYTES:
            msg = f"the prompt is {num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}"
            raise ValueError(msg)
        return value

    @field_validator("messages")
    @classmethod
    def _messages_within_limits(cls, value: list[ChatMessage]) -> list[ChatMessage]:
        num_bytes = sum(_num_bytes("messages are", one.content) for one in value)
        if num_bytes > MAX_PROMPT_BYTES:
            msg = f"the messages are {num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}"
            raise ValueError(msg)
        return value

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> Self:
        if not self.prompt and not self.messages:
            raise ValueError("prompt is missing")
        if self.prompt and self.messages:
            raise ValueError("there are both prompt and messages; give one of them")
        return self

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not nests_within(value, MAX_METADATA_LEVELS):
            msg = f"metadata nests deeper than {MAX_METADATA_LEVELS} levels"
            raise ValueError(msg)
        try:
            num_bytes = len(json.dumps(value, allow_nan=False).encode())
        except (TypeError, ValueError) as error:
            msg = f"metadata must be JSON: {error}"
            raise ValueError(msg) from None
        if num_bytes > MAX_METADATA_BYTES:
            msg = f"metadata is {num_bytes} bytes as JSON; the limit is {MAX_METADATA_BYTES}"
            raise ValueError(msg)
        return value


def _num_bytes(subject: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        msg = f"the {subject} not valid Unicode text: {error.reason}"
        raise ValueError(msg) from None


def nests_within(value: object, num_levels: int) -> bool:
    """Whether objects and lists lie in each other at most so many levels deep."""
    if not isinstance(value, dict | list | tuple):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return num_levels > 0 and all(nests_within(part, num_levels - 1) for part in inner)


class GenerationJob(_Wire):
    """The one argument of an RQ job: 1..N requests that are committed together."""

    v: Literal[1] = 1
    requests: list[GenerationRequest] = Field(min_length=1, max_length=MAX_REQUESTS_PER_JOB)


class Logprobs(_Wire):
    """Log-probabilities of one completion, a list entry a token, as OpenAI's completions give them.

    Natural logarithms of the model's own distribution, before penalties, temperature and top-k.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class Completion(_Wire):
    """One completion. `token_ids` holds what was generated, an end token included."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: Logprobs | None = None


class Usage(_Wire):
    """Tokens read and made, as OpenAI counts them: the prompt once, all completions."""

    prompt_tokens: int
    completion_tokens: int


class Timing(_Wire):
    """Seconds from submission to the first prefill, through it, and from first token to last."""

    queue_s: float
    prefill_s: float
    decode_s: float


class ResultError(_Wire):
    """Why a request has no completion."""

    code: str
    message: str
    retryable: bool = False


class GenerationResult(_Wire):
    """What became of one request: completions or an error, never neither.

    Attributes:
        truncated_tokens: how many tokens the prompt lost at its start, as the request allowed.
    """

    id: str
    completions: list[Completion] = Field(default_factory=list)
    usage: Usage = Field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    model: str = ""
    fingerprint: str = ""
    timing: Timing = Field(default_factory=lambda: Timing(queue_s=0.0, prefill_s=0.0, decode_s=0.0))
    error: ResultError | None = None
    prompt: str | list[int] | None = Field(None, exclude_if=lambda value: value is None)
    truncated_tokens: int = Field(0, exclude_if=lambda value: value == 0)

    @model_validator(mode="after")
    def _never_neither(self) -> Self:
        if not self.completions and self.error is None:
            raise ValueError("a result has completions or an error; this one has neither")
        return self

    @property
    def text(self) -> str:
        """The first completion's text; empty where there is none."""
        return self.completions[0].text if self.completions else ""


class JobResult(_Wire):
    """The return value of an RQ job: one result for each request, in the job's order."""

    v: Literal[1] = 1
    results: list[GenerationResult]
