"""Which fields of a record are its prompt and its id, and which are kept: a user's choice.

Also the types that kept columns have: one for a whole run, so that every file of it has one schema.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import InvalidRequest

Kind = Literal["string", "int64", "double", "bool"]

COLUMNS = (
    "index",
    "sample",
    "id",
    "prompt",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "seed",
    "model",
    "fingerprint",
    "metadata",
)
TOKEN_IDS = "token_ids"  # noqa: S105
MAX_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Fields:
    """What a record's fields mean.

    Attributes:
        prompt: the field that is the prompt; None: `prompt`.
        template: a text with `{field}` in it, in place of one field.
        id: the field that is the id; None: `id`, where there is one.
        keep: fields that each row of the output repeats.
    """

    prompt: str | None = None
    template: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()

    @property
    def are_default(self) -> bool:
        """Whether a record is what the wire calls a request, sampling fields included."""
        return self.prompt is None and self.template is None

    @property
    def are_given(self) -> bool:
        """Whether anything at all is chosen."""
        return self != Fields()

    def check(self) -> None:
        """Raises InvalidRequest if the choice cannot be followed, whatever the input."""
        if self.prompt is not None and self.template is not None:
            raise InvalidRequest("give --template or --prompt-column, not both")
        if self.template is not None and not template_names(self.template):
            raise InvalidRequest(
                f"--template is {self.template!r}; name a field in it, such as 'Q: {{question}}'"
            )
        taken = [name for name in self.keep if name in {*COLUMNS, TOKEN_IDS}]
        if taken:
            raise InvalidRequest(f"--keep-columns {taken[0]}: every row has a column of that name")
        if len(set(self.keep)) < len(self.keep):
            raise InvalidRequest(f"--keep-columns names a column twice: {','.join(self.keep)}")

    def names(self) -> tuple[str, ...]:
        """The fields that are read beside an id by default, each once."""
        prompts = (
            (self.prompt or "prompt",) if self.template is None else template_names(self.template)
        )
        return tuple(dict.fromkeys((*prompts, *((self.id,) if self.id else ()), *self.keep)))

    def prompt_of(self, record: Mapping[str, Any]) -> Any:
        """The prompt of a record, not yet checked; None where its field is missing or null.

        Raises:
            InvalidRequest: the template has no value for one of its fields.
        """
        if self.template is None:
            return record.get(self.prompt or "prompt")
        values = {}
        for name in template_names(self.template):
            if (value := record.get(name)) is None:
                raise InvalidRequest(f"the template's field {name!r} is missing or null")
            values[name] = _as_text(value)
        return self.template.format_map(values)


def template_names(template: str) -> tuple[str, ...]:
    """The fields that a template names, each once.

    Raises:
        InvalidRequest: it is malformed, or asks for more than plain fields.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidRequest(
            f"--template is {template!r}: {error}; write {{{{ and }}}} for braces"
        ) from None
    names = []
    for _text, name, spec, conversion in parts:
        if name is None:
            continue
        # Fields are named as they are in the data; attributes and indexes of values are no fields.
        if not name or set(name) & set(".[]!:") or spec or conversion:
            raise InvalidRequest(
                f"--template is {template!r}; {{{name}}} is no plain field: write {{question}}, "
                "and {{ and }} for braces"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def kinds_of(records: Iterable[Mapping[str, Any]], names: tuple[str, ...]) -> dict[str, Kind]:
    """The narrowest type that holds all values of each field; a string where there are none."""
    kinds: dict[str, Kind | None] = dict.fromkeys(names)
    for record in records:
        for name in names:
            value = record.get(name)
            if value is not None and kinds[name] != "string":
                kinds[name] = _wider(kinds[name], _kind(value))
    return {name: kind or "string" for name, kind in kinds.items()}


def kept_value(value: Any, kind: Kind) -> str | int | float | bool | None:
    """A value as its column's type has it; what is no text is JSON in a column of strings."""
    match kind:
        case _ if value is None:
            return None
        case "string":
            return _as_text(value)
        case "double":
            return float(value) if math.isfinite(value) else None  # JSON has no other numbers.
        case "int64":
            return int(value)
        case "bool":
            return bool(value)


def _kind(value: Any) -> Kind:
    match value:
        case bool():
            return "bool"
        case int() if -MAX_INT64 <= value <= MAX_INT64:
            return "int64"
        case float():
            return "double"
        case _:
            return "string"


def _wider(one: Kind | None, other: Kind) -> Kind:
    if one in {None, other}:
        return other
    return "double" if {one, other} == {"int64", "double"} else "string"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
