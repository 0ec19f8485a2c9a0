"""The error tree: as its docstring draws it, and whole on the far side of a process."""

from __future__ import annotations

import pickle
import re
import textwrap

import pytest

import shoal
from shoal import errors
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

ALL = (
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


def drawn_tree() -> dict[str, str]:
    """Each error of the module's docstring with the one that it hangs from."""
    stems: list[str] = []
    parents = {}
    drawing = re.compile(r"^([│ ├└─]*)([A-Z]\w+)", re.MULTILINE)
    _summary, _, tree = (errors.__doc__ or "").partition("\n\n")
    for indent, name in drawing.findall(textwrap.dedent(tree)):
        depth = len(indent) // 4
        parents[name] = stems[depth - 1] if depth else ""
        stems[depth:] = [name]
    return parents


def test_the_tree_is_the_one_its_docstring_draws() -> None:
    real = {one.__name__: one.__bases__[0].__name__ for one in ALL}

    assert drawn_tree() == real | {"ShoalError": ""}


def test_every_error_is_drawn_and_public() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}

    assert defined == {one.__name__ for one in ALL}
    assert defined <= set(shoal.__all__)


def test_errors_that_python_has_a_word_for_are_caught_by_that_word_too() -> None:
    assert issubclass(InvalidRequest, ValueError)
    assert issubclass(PromptTooLong, ValueError)
    assert issubclass(ResultTimeout, TimeoutError)


@pytest.mark.parametrize("kind", [GenerationFailed, ModelMismatch])
def test_a_failure_keeps_its_code_across_processes(kind: type[GenerationFailed]) -> None:
    error = kind("it failed", code="engine_error", retryable=True)

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert (str(copy), copy.code, copy.retryable) == ("it failed", "engine_error", True)


def test_a_failure_without_a_code_is_not_to_be_sent_again() -> None:
    error = GenerationFailed("it failed")

    assert (error.code, error.retryable) == ("generation_failed", False)
