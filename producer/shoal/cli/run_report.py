"""Tells how a bulk run goes: on the terminal, and in Redis for other terminals and the exporter.

Owns what is told and how often. How it looks is `progress`'s; the format in Redis `run_state`'s.
"""

from __future__ import annotations

import contextlib
import time

from shoal.bulk.pace import Pace
from shoal.bulk.plan import Progress
from shoal.bulk.run import BulkRun
from shoal.bulk.run_state import SAVE_INTERVAL_S, RunState, save_commands
from shoal.cli.exits import note
from shoal.cli.progress import Display
from shoal.cli.serving import Serving
from shoal.cli.show import share
from shoal.cli.summary import limit_hint
from shoal.client import Client
from shoal.errors import ShoalError

MIN_FOR_HINT = 200  # Completions; fewer say little of the rest.


class RunReport:
    """Called once a turn with the run's progress."""

    def __init__(
        self, run: BulkRun, client: Client, queue: str, serving: Serving, display: Display
    ) -> None:
        self._run = run
        self._client = client
        self._queue = queue
        self._serving = serving
        self._display = display
        self._pace = Pace()
        self._saved_s = float("-inf")
        self._jobs_lost = 0
        self._has_hinted = False

    def __call__(self, progress: Progress) -> None:
        """Show it, and save it if that was not done for a while."""
        state = self._state("running", progress)
        self._display.show(state)
        if time.monotonic() - self._saved_s >= SAVE_INTERVAL_S:
            self._save(state)
        if progress.jobs_lost > self._jobs_lost:
            lost, self._jobs_lost = progress.jobs_lost - self._jobs_lost, progress.jobs_lost
            note(f"{lost} jobs were gone from Redis without an answer, and were sent again")
        if not self._has_hinted and progress.completions_received >= MIN_FOR_HINT:
            self._has_hinted = True
            sampling = self._run.manifest.parameters.sampling
            if hint := limit_hint(progress, sampling):
                ratio, limit = share(progress.limit_ratio), sampling["max_tokens"]
                note(
                    f"{ratio} of the completions so far were ended by max_tokens ({limit}): {hint}"
                )

    def end(self, status: str) -> None:
        """Save how it ended."""
        self._save(self._state(status, self._run.progress()))

    def _state(self, status: str, progress: Progress) -> RunState:
        return RunState(
            run_id=self._run.manifest.run_id,
            status=status,
            output=self._run.plan.output.name,
            queue=self._queue,
            rows_total=progress.rows_total,
            rows_done=progress.rows_done,
            rows_failed=progress.rows_failed,
            workers=len(self._serving.workers),
            tokens_per_s=round(self._pace.per_s(progress.elapsed_s, progress.tokens_received), 1),
            mean_tokens_per_s=round(progress.tokens_per_s, 1),
            model=self._run.manifest.model or self._run.model,
            padding_ratio=self._serving.padding_ratio,
            limit_ratio=progress.limit_ratio,
            eta_s=progress.left_s,
        )

    def _save(self, state: RunState) -> None:
        self._saved_s = time.monotonic()
        # A run does not stop for this; whether Redis answers, its own exchanges find out.
        with contextlib.suppress(ShoalError):
            self._client.execute(save_commands(state, time.time()))
