"""
StageTracer: joins capture to delivery.

In:   the user's calls, in any thread or task.
Out:  events in the worker's queue; the truth about them, from `flush`, `shutdown` and `stats`.

Construction raises `ConfigurationError` on wrong settings. After that nothing here raises, blocks (but for
`flush` and `shutdown`, which hold their timeout, and recording if `queue_policy="block"` was chosen) or touches
the network in the caller's thread.
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import TYPE_CHECKING

from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.late import load

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in every type checker; not needed to run

    from evalvault_sdk.config import SettingArguments, Settings
    from evalvault_sdk.delivery.account import FlushReport, Stats
    from evalvault_sdk.delivery.transport.base import Transport


class StageTracer(Stages):
    """
    Records the stages of a RAG program and delivers them to EvalVault in the background.

    It is safe in all threads and tasks, and in forked children. Tracers with the same settings, but for the run,
    share one thread, connection and spool. As a context manager it shuts itself down; otherwise the end of the
    process does, within `shutdown_timeout_s`.

    `run_id` names what is analysed together, `api_url` is the server's address; with `file="events.jsonl"` or
    `db_path="eval.db"` instead, events are written there and no server is needed. Every other setting is
    documented in `Settings` and can be given here, or as an `EVALVAULT_*` variable.

    Raises `ConfigurationError` when a setting is wrong.
    """

    def __init__(
        self,
        run_id: str | None = None,
        api_url: str | None = None,
        *,
        transport: Transport | None = None,
        **settings: Unpack[SettingArguments],
    ) -> None:
        load("evalvault_sdk.assembly")  # most of the package: not for every program that imports us
        from evalvault_sdk.assembly import assembled
        from evalvault_sdk.config import Settings
        from evalvault_sdk.delivery.lifecycle import handle_sigterm

        self.settings: Settings = Settings.resolve(run_id=run_id, api_url=api_url, **settings)
        recorder, self._outbox = assembled(self.settings, transport)
        super().__init__(recorder)
        # When nobody can record any more (tracer, open stages and decorated functions all refer to the
        # recorder), the thread delivers what it has, and ends with the last tracer.
        self._finalizer = weakref.finalize(self._recorder, self._outbox.close)
        self._finalizer.atexit = False  # the worker has its own way to end with the process
        if self.settings.enabled and self.settings.handle_sigterm:
            handle_sigterm()

    @property
    def run_id(self) -> str:
        """The run that stages of this tracer belong to."""
        return self.settings.run_id

    @property
    def destination(self) -> str:
        """Where events go: the server's address, or a file."""
        return self._outbox.destination

    def flush(self, timeout: float = 10.0) -> FlushReport:
        """
        Deliver what was recorded before this call; wait at most `timeout` seconds.

        `in_time` of the result says whether all of it met its fate; the rest of it is the account of all
        events so far. Everything ever recorded has arrived when `complete` is true.
        """
        return self._outbox.flush(timeout)

    def shutdown(self, timeout: float | None = None) -> FlushReport:
        """
        Deliver what was recorded and end; after `timeout` seconds (`shutdown_timeout_s` if None) keep the rest on disk.

        The next process that delivers to the same place sends it. What is recorded later is counted as dropped
        (`closed`). May be called again, to no effect.
        """
        self._recorder.end_sources()
        self._finalizer.detach()
        return self._outbox.shutdown(timeout)

    def stats(self) -> Stats:
        """Return what became of all events recorded so far. The account balances at every instant."""
        return self._outbox.stats()

    def __enter__(self) -> StageTracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def __repr__(self) -> str:
        return f"StageTracer(run_id={self.run_id!r}, destination={self.destination!r})"
