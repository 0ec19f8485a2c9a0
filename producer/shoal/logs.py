"""Log lines: words for people, or a JSON object a line for what collects logs.

Owns the form of a line and where it goes (stderr). What is said, and how severe it is, is the
business of whoever says it; prompts and completions are never part of it.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

LogFormat = Literal["text", "json"]
FORMAT_VARIABLE = "SHOAL_LOG_FORMAT"
TEXT = "%(asctime)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, process, message, error."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        moment = datetime.fromtimestamp(record.created, UTC)
        fields = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(fields, ensure_ascii=False)


def configure(level: str, log_format: LogFormat) -> None:
    """Send this process's log to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    if log_format == "json":
        # What Python itself would print as bare lines.
        logging.captureWarnings(capture=True)
        sys.excepthook = _log_exception


def json_line(level: str, message: str, logger: str = "shoal.cli") -> str:
    """A line in the same form for what is said without a logger."""
    number = logging.getLevelNamesMapping()[level.upper()]
    record = logging.LogRecord(logger, number, "", 0, message, None, None)
    return JsonFormatter().format(record)


def _log_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger("shoal").critical("the process ends", exc_info=(kind, error, trace))
