"""How a bulk run goes, as Redis keeps it for `shoal status` and the exporter.

Owns the keys and the format. It builds commands and reads replies, and sends nothing. A state is a
hash that lives for an hour after it was last told, so its age follows from its time to live and no
clock of another machine; a sorted set names the runs, scored by the time at which each one's goes.

    rq:shoal:bulk:runs     run ids, by Unix seconds
    rq:shoal:bulk:RUN      the fields of `RunState`, numbers in decimal, absent where unknown
    rq:shoal:bulk:RUN:jobs the ids of its jobs (`shoal.bulk.job_names`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from shoal.jobs import RUN_KEY_PREFIX, Command

STATE_TTL_S = 3_600
SAVE_INTERVAL_S = 2.0
STALE_S = 30.0  # A run that tells nothing for so long was killed, or has lost Redis.
RUNS_KEY = f"{RUN_KEY_PREFIX}:runs"
LIST_RUNS: Command = ("ZRANGE", RUNS_KEY, 0, -1)


@dataclass(frozen=True, slots=True)
class RunState:
    """One run as it was last told.

    Attributes:
        status: `running`, or how it ended: `complete`, `interrupted`, `timed out`, `too many
            failures`, `failed`.
        output: the file's name, without its folder.
        tokens_per_s, mean_tokens_per_s: completion tokens, lately and since this start.
        padding_ratio: share of what its workers computed that was padding.
        limit_ratio: share of completions that max_tokens has ended.
        eta_s: seconds left at the pace since this start.
        age_s: seconds since it was told.
    """

    run_id: str
    status: str
    output: str
    queue: str
    rows_total: int
    rows_done: int
    rows_failed: int
    workers: int
    tokens_per_s: float
    mean_tokens_per_s: float
    model: str | None = None
    padding_ratio: float | None = None
    limit_ratio: float | None = None
    eta_s: float | None = None
    age_s: float = 0.0

    @property
    def is_stale(self) -> bool:
        """Whether it says that it runs, and has not said so for long."""
        return self.status == "running" and self.age_s > STALE_S


def state_key(run_id: str) -> str:
    """The key of a run's state."""
    return f"{RUN_KEY_PREFIX}:{run_id}"


def save_commands(state: RunState, now_s: float) -> list[Command]:
    """What tells a state, to be sent in one transaction.

    Args:
        now_s: Unix seconds, only to forget the names of runs whose states are gone.
    """
    values = asdict(state)
    del values["age_s"], values["run_id"]
    known = [word for name, value in values.items() if value is not None for word in (name, value)]
    key = state_key(state.run_id)
    return [
        ("DEL", key),
        ("HSET", key, *known),
        ("EXPIRE", key, STATE_TTL_S),
        ("ZADD", RUNS_KEY, now_s + STATE_TTL_S, state.run_id),
        ("ZREMRANGEBYSCORE", RUNS_KEY, "-inf", now_s),
        ("EXPIRE", RUNS_KEY, 2 * STATE_TTL_S),
    ]


def read_commands(run_id: str) -> tuple[Command, Command]:
    """What asks for one run's state."""
    return ("HGETALL", state_key(run_id)), ("PTTL", state_key(run_id))


def read_state(run_id: str, hash_fields: Mapping[bytes, bytes], ttl_ms: int) -> RunState | None:
    """A state from the replies to `read_commands`; None if it is gone or another version's."""
    given = {name.decode(): text.decode(errors="replace") for name, text in hash_fields.items()}
    values: dict[str, Any] = {"run_id": run_id, "age_s": STATE_TTL_S - ttl_ms / 1000}
    hints = get_type_hints(RunState)
    try:
        for field in fields(RunState):
            if field.name in given:
                values[field.name] = _kind(hints[field.name])(given[field.name])
        return RunState(**values)
    except (TypeError, ValueError):
        return None


def _kind(hint: Any) -> type[Any]:
    kinds = [one for one in get_args(hint) if one is not NoneType] or [hint]
    kind: type[Any] = kinds[0]
    return kind
