"""Rows of batch lines answered in OpenAI's response lines, and read back from them.

A line is the same whenever and wherever it is made: `created` is 0, ids follow from the row. What
flat rows tell and OpenAI's do not stands in further fields of a choice, which its types allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from shoal.bulk.flat import FlatRow, canonical_line, flat_row
from shoal.bulk.openai_batch import CHAT
from shoal.bulk.rows import InputRow
from shoal.wire import Completion, GenerationResult, Logprobs

Answered = tuple[InputRow, GenerationResult]
_OPENAI_REASONS = {"stop": "stop", "length": "length"}


def response_line(answered: Sequence[Answered], *, with_token_ids: bool) -> bytes:
    """The response to one batch line, all its prompts together."""
    row, result = answered[0]
    is_chat = row.source.get("url") == CHAT
    choices = [
        _choice(row, result, completion, is_chat=is_chat, with_token_ids=with_token_ids)
        for row, result in answered
        for completion in result.completions
    ]
    prompt_tokens = sum(result.usage.prompt_tokens for _row, result in answered)
    completion_tokens = sum(result.usage.completion_tokens for _row, result in answered)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row.place.index}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": result.model,
        "system_fingerprint": result.fingerprint,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
    return canonical_line(
        {
            "id": response_id(row),
            "custom_id": row.id,
            "response": {"status_code": 200, "request_id": response_id(row), "body": body},
            "error": None,
        }
    )


def response_id(row: InputRow) -> str:
    """The id of a row's response line."""
    return f"batch_req_{row.place.index}"


def flat_from_response(rows: Sequence[InputRow], record: dict[str, Any]) -> list[FlatRow]:
    """The flat rows that a response line stands for.

    Raises:
        KeyError, TypeError, ValueError: it is no line of ours.
    """
    body = record["response"]["body"]
    parts = chain.from_iterable([row] * row.request.sampling.n for row in rows)
    return [_flat(row, choice, body) for row, choice in zip(parts, body["choices"], strict=True)]


def _flat(row: InputRow, choice: dict[str, Any], body: dict[str, Any]) -> FlatRow:
    n, usage = row.request.sampling.n, choice["usage"]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    completion = Completion(
        index=choice["index"] - row.place.part * n,
        text=text,
        token_ids=choice.get("token_ids", []),
        finish_reason=choice.get("shoal_finish_reason", choice["finish_reason"]),
    )
    flat = flat_row(
        row,
        completion,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        model=body["model"],
        fingerprint=body["system_fingerprint"],
    )
    if "token_ids" in choice:
        flat["token_ids"] = completion.token_ids
    return flat


def _choice(
    row: InputRow,
    result: GenerationResult,
    completion: Completion,
    *,
    is_chat: bool,
    with_token_ids: bool,
) -> dict[str, Any]:
    reason = completion.finish_reason
    choice: dict[str, Any] = {
        "index": row.place.part * row.request.sampling.n + completion.index,
        **_content(completion, is_chat=is_chat),
        "finish_reason": _OPENAI_REASONS.get(reason, "length"),
        "usage": {
            "prompt_tokens": result.usage.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
        },
    }
    if reason not in _OPENAI_REASONS:
        choice["shoal_finish_reason"] = reason
    if with_token_ids:
        choice["token_ids"] = completion.token_ids
    return choice


def _content(completion: Completion, *, is_chat: bool) -> dict[str, Any]:
    logprobs = completion.logprobs
    if is_chat:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"message": message, "logprobs": _chat_logprobs(logprobs) if logprobs else None}
    return {
        "text": completion.text,
        "logprobs": {**logprobs.model_dump(), "text_offset": _offsets(logprobs.tokens)}
        if logprobs
        else None,
    }


def _offsets(tokens: Sequence[str]) -> list[int]:
    """Where in the completion each token's text begins."""
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return offsets


def _chat_logprobs(logprobs: Logprobs) -> dict[str, Any]:
    entries = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    return {
        "content": [
            {
                **_chat_token(token, logprob),
                "top_logprobs": [_chat_token(*one) for one in top.items()],
            }
            for token, logprob, top in entries
        ],
        "refusal": None,
    }


def _chat_token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode(errors="replace"))}
