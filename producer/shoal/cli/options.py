"""Options that several commands share. The sampling ones are made from SamplingParams."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from shoal.cli.invocation import remember_debug, remember_log_format
from shoal.logs import FORMAT_VARIABLE, LogFormat
from shoal.wire import SamplingParams

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MODEL_HELP = (
    "The model: a folder, a hub id, or `demo` (bundled and small, for trying things out). The "
    "worker must serve it; with the embedded Redis and no worker, one is started with it."
)


def common_options(command: Decorated) -> Decorated:
    """`--redis`, `--log-format` and `--debug`."""
    for option in (
        click.option(
            "--log-format",
            type=click.Choice(get_args(LogFormat)),
            envvar=FORMAT_VARIABLE,
            expose_value=False,
            callback=remember_log_format,
            help="Lines on stderr as text or as JSON objects. [default: text]",
        ),
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=remember_debug, hidden=True
        ),
        click.option(
            "--redis",
            "redis_url",
            metavar="URL",
            help="redis://, rediss://, unix:// or redis+sentinel:// address; then "
            "SHOAL_REDIS_URL, the file that SHOAL_REDIS_URL_FILE names, REDIS_URL, and last an "
            "embedded Redis.",
        ),
    ):
        command = option(command)
    return command


def model_option(command: Decorated) -> Decorated:
    """`--model`, or SHOAL_MODEL."""
    return click.option("--model", metavar="M", envvar="SHOAL_MODEL", help=MODEL_HELP)(command)


def sampling_options(*, without: Collection[str] = ()) -> Callable[[Decorated], Decorated]:
    """One option for each field of SamplingParams, given to the command by the field's name."""

    def decorate(command: Decorated) -> Decorated:
        for name, info in reversed(SamplingParams.model_fields.items()):
            if name not in without:
                command = _sampling_option(name, info)(command)
        return command

    return decorate


def given_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields that were given, as SamplingParams takes them."""
    given = {}
    for name, value in values.items():
        if value is None or value is False or value == ():
            continue
        is_map = get_origin(SamplingParams.model_fields[name].annotation) is dict
        given[name] = _biases(value) if is_map else list(value) if _is_many(value) else value
    return given


def _sampling_option(name: str, info: FieldInfo) -> Callable[[Decorated], Decorated]:
    flag = "--" + name.replace("_", "-")
    kind = get_origin(info.annotation) or info.annotation
    description = info.description or ""
    help_text = f"{description[:1].upper()}{description[1:]}."
    if kind is bool:
        return click.option(flag, name, is_flag=True, help=help_text)
    if kind is dict:
        return click.option(
            flag, name, multiple=True, metavar="TOKEN=BIAS", help=f"{help_text} Repeatable."
        )
    if kind is list:
        (element,) = get_args(info.annotation)
        element = (get_args(element) or (element,))[0]
        return click.option(
            flag, name, type=element, multiple=True, help=f"{help_text} Repeatable."
        )
    kinds = [one for one in get_args(info.annotation) if one is not NoneType]
    if info.default is not None:
        help_text += f" [default: {info.default:g}]"
    return click.option(flag, name, type=kinds[0] if kinds else kind, help=help_text)


def _is_many(value: object) -> bool:
    return isinstance(value, tuple)


def _biases(pairs: Iterable[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, equals, bias = pair.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            equals = ""
        if not equals:
            raise click.UsageError(
                f"--logit-bias is {pair!r}; write TOKEN=BIAS, such as 50256=-100"
            )
    return biases
