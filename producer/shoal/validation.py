"""Data into a wire type, and what is wrong with them in words.

Owns the messages: each names field, value and limit, and quotes no more of a value than it shows.
"""

from __future__ import annotations

import difflib
import reprlib
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from shoal.errors import InvalidRequest
from shoal.wire import GenerationRequest, SamplingParams

MAX_EXPLAINED_RULES = 8  # A job of a thousand bad requests must not fill Redis with its reasons.

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], data: object) -> Model:
    """`data` as a `model`, or `InvalidRequest` with the broken rules in one message."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise InvalidRequest(explain(error, model)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The broken rules as 'field value: rule', joined by semicolons; the first few of many."""
    details = error.errors()
    rules = [_explain_one(detail, model) for detail in details[:MAX_EXPLAINED_RULES]]
    num_more = len(details) - len(rules)
    return "; ".join(rules) + (f"; and {num_more} more" if num_more else "")


def _explain_one(detail: Any, model: type[BaseModel]) -> str:
    location = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return _unknown_field(detail["loc"], model)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{location}: {message}" if location else message
    if detail["type"] == "missing":
        return f"{location} is missing"
    return f"{location or model.__name__} is {_shortened(detail['input'])}: {message}"


def _unknown_field(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    name = str(location[-1])[:60]
    known = _fields_at(location[:-1], model)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
    return f"unknown field {name!r}; {hint}"


def _fields_at(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    if location and location[-1] == "sampling":
        model = SamplingParams
    elif "requests" in location:
        model = GenerationRequest
    return list(model.model_fields)


class _Short(reprlib.Repr):
    """`repr` for values of any size: it reads no more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 1024 else "a huge number"


def _shortened(value: object, max_chars: int = 60) -> str:
    text = _Short().repr(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
