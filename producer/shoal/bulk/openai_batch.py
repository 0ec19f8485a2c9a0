"""OpenAI's batch lines as rows: `/v1/completions` and `/v1/chat/completions`.

Owns which fields of a body mean what. A value that would change nothing is accepted, any other that
is not ours to follow is refused by name. How they are answered is in `openai_answers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.bulk.records import (
    as_source,
    checked_prompt,
    earlier_place,
    is_error_line,
    json_record,
    record_within,
)
from shoal.bulk.rows import InputRow, Place, Row, RowDefaults, failed_row
from shoal.bulk.seeds import row_seed
from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import GenerationRequest, SamplingParams

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MAX_PROMPTS = 2_048  # As OpenAI has it for a line.

ANY = object()
# Values that change nothing, by field; null is none of them only because it is never looked at.
_NO_OPS: dict[str, tuple[object, ...]] = {
    "echo": (False,),
    "stream": (False,),
    "suffix": ("",),
    "user": (ANY,),
    "store": (ANY,),
    "metadata": (ANY,),
    "service_tier": (ANY,),
    "safety_identifier": (ANY,),
    "prompt_cache_key": (ANY,),
    "prompt_cache_retention": (ANY,),
    "best_of": (1,),
    "stream_options": (),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
_OF_COMPLETIONS = frozenset({"echo", "suffix", "best_of"})
_OF_BOTH = frozenset({"stream", "stream_options", "user"})
_LINE_FIELDS = frozenset({"custom_id", "method", "url", "body"})


def is_batch_record(record: Mapping[str, Any]) -> bool:
    """Whether a record is a batch line rather than a request of our own form."""
    return "custom_id" in record and "body" in record


def rows_from_line(text: str, place: Place, defaults: RowDefaults) -> list[Row]:
    """A batch line as rows, one a prompt; a line of an error file stands for the line it holds."""
    row_id = str(place.index)
    try:
        record = json_record(text)
    except InvalidRequest as error:
        return [failed_row(place, row_id, text, error)]
    if is_error_line(record):
        place, row_id = earlier_place(record, place)
        source = record_within(record)
        if isinstance(source, InvalidRequest):
            return [failed_row(place, row_id, as_source(record["input"]), source)]
        record = source
    custom_id = record.get("custom_id")
    row_id = custom_id if isinstance(custom_id, str) and custom_id else row_id
    try:
        return list(_rows(record, row_id, place, defaults))
    except InvalidRequest as error:
        return [failed_row(place, row_id, record, error)]


def _rows(
    record: Mapping[str, Any], row_id: str, place: Place, defaults: RowDefaults
) -> Sequence[Row]:
    body = _checked_body(record)
    fields = {name: value for name, value in body.items() if value is not None}
    model = fields.pop("model", None)
    if record["url"] == CHAT:
        prompts: list[dict[str, Any]] = [{"messages": _messages(fields.pop("messages", None))}]
        sampling = _chat_sampling(fields)
    else:
        prompt = checked_prompt(fields.pop("prompt", None), "prompt", defaults)
        prompts = [{"prompt": one} for one in _prompts(prompt)]
        sampling = _completions_sampling(fields)
    return [
        InputRow(
            replace(place, part=part, num_parts=len(prompts)),
            row_id,
            _request(prompt, sampling, model, row_id, replace(place, part=part), defaults),
            record,
            {},
        )
        for part, prompt in enumerate(prompts)
    ]


def _checked_body(record: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(record.keys() - _LINE_FIELDS)
    if unknown:
        names = ", ".join(sorted(_LINE_FIELDS))
        raise InvalidRequest(
            f"unknown field {unknown[0]!r} in a batch line; the fields are {names}"
        )
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequest(f"custom_id is {json.dumps(custom_id)}; give a text")
    if record.get("method") != "POST":
        raise InvalidRequest(f"method is {json.dumps(record.get('method'))}; it is POST")
    if record.get("url") not in {COMPLETIONS, CHAT}:
        raise InvalidRequest(
            f"url is {json.dumps(record.get('url'))}; the ones served are {COMPLETIONS} and {CHAT}"
        )
    body = record.get("body")
    if not isinstance(body, dict):
        raise InvalidRequest(f"body is a {type(body).__name__}; give an object")
    return body


def _request(
    prompt: Mapping[str, Any],
    sampling: Mapping[str, Any],
    model: Any,
    row_id: str,
    place: Place,
    defaults: RowDefaults,
) -> GenerationRequest:
    values = {**defaults.sampling, **sampling}
    if values.get("seed") is None:
        values["seed"] = row_seed(defaults.seed, place.index)
        if place.part:
            values["seed"] = row_seed(values["seed"], place.part)
    return parse(
        GenerationRequest,
        {
            **prompt,
            # A custom_id of any length is answered; over the wire goes no more than it takes.
            "id": row_id[:256],
            "sampling": parse(SamplingParams, values),
            "model": None if defaults.ignore_model else model,
            "service_class": "bulk",
            "on_long": defaults.on_long,
        },
    )


def _prompts(prompt: str | list[Any]) -> list[str | list[Any]]:
    """The prompts of a body: one text or one list of token ids, or a list of either."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"there are {len(prompt)} prompts; the limit is {MAX_PROMPTS} a line")
    wrong = next((one for one in prompt if not isinstance(one, str | list)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"prompt holds a {type(wrong).__name__} among texts or lists of token ids"
        )
    return prompt


def _completions_sampling(fields: dict[str, Any]) -> dict[str, Any]:
    if fields.get("best_of") == fields.get("n"):
        fields.pop("best_of", None)
    return _without_no_ops(fields, _OF_COMPLETIONS | _OF_BOTH)


def _chat_sampling(fields: dict[str, Any]) -> dict[str, Any]:
    """A chat body's sampling fields under the names that completions have for them."""
    if "max_completion_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    wants_logprobs, num_top = fields.pop("logprobs", False), fields.pop("top_logprobs", 0)
    if not isinstance(wants_logprobs, bool):
        raise InvalidRequest(f"logprobs is {json.dumps(wants_logprobs)}; in a chat it is a boolean")
    if num_top and not wants_logprobs:
        raise InvalidRequest(f"top_logprobs is {json.dumps(num_top)} without logprobs: true")
    if wants_logprobs:
        fields["logprobs"] = num_top
    return _without_no_ops(fields, frozenset(_NO_OPS) - _OF_COMPLETIONS)


def _without_no_ops(fields: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    for name in known & fields.keys():
        value, allowed = fields.pop(name), _NO_OPS[name]
        # `is`-like on purpose: True is 1 to Python, and best_of: true is a mistake.
        if ANY not in allowed and not any(
            type(value) is type(one) and value == one for one in allowed
        ):
            shown = json.dumps(value)[:60]
            accepted = " or ".join(json.dumps(one) for one in allowed) or "null"
            raise InvalidRequest(f"{name} is {shown}; only {accepted} is accepted")
    return fields


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages is missing or no list")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"messages.{index} is a {type(message).__name__}; give an object")
    given = {name: value for name, value in message.items() if value is not None}
    content = given.get("content")
    if isinstance(content, list):
        given["content"] = "".join(_part(index, part) for part in content)
    return given  # Its role, its name and whatever else there is are checked by the wire.


def _part(index: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequest(f"messages.{index} holds a part of type {kind!r}; only text is served")
