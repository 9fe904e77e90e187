"""
StageTracer: joins capture to delivery.

In:   the user's calls, in any thread or task.
Out:  events in the worker's queue; the truth about them, from `flush`, `shutdown` and `stats`.

Construction raises `ConfigurationError` on wrong settings. After that nothing here raises, blocks (but for
`flush` and `shutdown`, which hold their timeout, and recording if `queue_policy="block"` was chosen) or touches
the network in the caller's thread.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from evalvault_sdk.capture.context import open_stage
from evalvault_sdk.capture.encode import iso_time
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import NOWHERE, StageContext, as_object, as_reference, parent_and_trace
from evalvault_sdk.config import SettingArguments, Settings
from evalvault_sdk.delivery.account import FlushReport, Stats
from evalvault_sdk.delivery.lifecycle import handle_sigterm
from evalvault_sdk.delivery.outbox import Outbox, open_outbox
from evalvault_sdk.delivery.transport.base import Transport
from evalvault_sdk.events import StageEvent, StagePayloadRef
from evalvault_sdk.ids import new_stage_id, span_id_of

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in every type checker; not needed to run

#: A stage that took longer (30 years) gets no derived start: it would lie before the calendar's.
_LONGEST_MS = 1e12


class StageTracer:
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
        self.settings = Settings.resolve(run_id=run_id, api_url=api_url, **settings)
        self._outbox = open_outbox(self.settings, transport)
        sink = self._outbox.queue if self.settings.enabled else NOWHERE.sink
        self._recorder = Recorder(self.settings.run_id, sink)
        # When nobody can record any more (tracer, open stages and decorated functions all refer to the
        # recorder), the thread delivers what it has, and ends with the last tracer.
        self._finalizer = weakref.finalize(self._recorder, Outbox.close, self._outbox)
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

    def stage(
        self,
        stage_type: str,
        *,
        stage_name: str | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 1,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
    ) -> StageContext:
        """
        Measure a stage: use the result as `with`, `async with`, or as a decorator.

        The stage open around it becomes its parent, unless `parent_stage_id` is given; a parent that is
        neither open here nor the root of its trace wants its `trace_id` given too. An exception is
        recorded as `status="error"` with its type and message, and passes through unchanged.
        """
        return StageContext(
            self._recorder,
            stage_type,
            stage_name=stage_name,
            parent_stage_id=parent_stage_id,
            trace_id=trace_id,
            attempt=attempt,
            attributes=attributes,
            metadata=metadata,
            input_ref=input_ref,
            output_ref=output_ref,
        )

    def record_stage(
        self,
        stage_type: str,
        *,
        stage_name: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        duration_ms: float | None = None,
        started_at: datetime | str | None = None,
        finished_at: datetime | str | None = None,
        status: str = "success",
        attempt: int = 1,
        stage_id: str | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
    ) -> str:
        """
        Record a stage that was measured elsewhere, or that takes no time; return its id for its children.

        Without times it ended now, and began `duration_ms` milliseconds before. Parent and trace are found
        as for `stage`. What breaks EvalVault's rules is rejected by the server, counted and logged.
        """
        now_ns = time.time_ns()
        made_id = new_stage_id(now_ns)
        if stage_id is None:
            stage_id = made_id
        try:
            parent_id, trace = parent_and_trace(
                open_stage.get(), self._recorder.run_id, made_id, parent_stage_id, trace_id
            )
            if started_at is None and finished_at is None:
                finished_at = iso_time(now_ns)
                if isinstance(duration_ms, (int, float)) and 0 <= duration_ms < _LONGEST_MS:
                    started_at = iso_time(now_ns - round(duration_ms * 1_000_000))
            fields = {
                "run_id": self._recorder.run_id,
                "stage_id": stage_id,
                "parent_stage_id": parent_id,
                "stage_type": stage_type,
                "stage_name": stage_name,
                "status": status,
                "attempt": attempt,
                "started_at": started_at,
                "finished_at": finished_at,
                "duration_ms": duration_ms,
                "input_ref": as_reference(input_ref) if input_ref is not None else None,
                "output_ref": as_reference(output_ref) if output_ref is not None else None,
                "attributes": as_object(attributes),
                "metadata": as_object(metadata),
                "trace_id": trace,
                "span_id": span_id or span_id_of(made_id),
            }
            self._recorder.record({name: value for name, value in fields.items() if value is not None})
        except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
            self._recorder.fault("recording a stage", error)
        return stage_id

    def record_batch(self, events: Iterable[StageEvent | Mapping[str, Any]]) -> list[str | None]:
        """
        Record ready-made events: `StageEvent`s, or JSON objects of the contract.

        An object without a `run_id` gets this tracer's. Returns the id of each, in order; None stands for one
        that breaks EvalVault's rules, which is counted as dropped (`invalid`) and logged.
        """
        ids: list[str | None] = []
        try:
            if isinstance(events, (StageEvent, Mapping)):
                events = [events]  # one event, meant as a batch of one
            for event in events:
                ids.append(self._record_ready_made(event))
        except Exception as error:  # noqa: BLE001 - an iterable of the user's own
            self._recorder.fault("reading a batch", error)
        return ids

    def _record_ready_made(self, event: StageEvent | Mapping[str, Any]) -> str | None:
        try:
            if not isinstance(event, StageEvent):
                run_id = event.get("run_id")
                event = StageEvent.from_dict({**event, "run_id": self._recorder.run_id if run_id is None else run_id})
            self._recorder.record(event.to_dict())
        except Exception as error:  # noqa: BLE001 - invalid, or no event at all
            self._recorder.fault("checking a ready-made event", error, reason="invalid")
            return None
        return event.stage_id

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
