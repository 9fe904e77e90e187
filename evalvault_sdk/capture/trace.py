"""
Hold together the stages of one request: `with tracer.trace(...)`.

In:   the request's beginning and end, and what is known of it: who asks, in which session, called by which service.
Out:  one trace id and one set of metadata for all stages inside. It is no stage, and records no event.
Caller's thread or task.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import Scope, Trace, as_id, here, leave, open_scope
from evalvault_sdk.capture.propagate import Remote, current_span, read_headers, run_hash
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.ids import NO_ID, new_id, new_span_id


class TraceContext(Scope):
    """
    One request: what `StageTracer.trace()` gives.

    It may be entered again, in other threads and tasks too: what is recorded there belongs to it as well.
    """

    __slots__ = ("_entries", "_started_perf_ns")

    def __init__(
        self,
        recorder: Recorder,
        *,
        trace_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorder = recorder
        self._open = False
        self._outer = self._before = None
        self._entries: set[_Entry] = set()
        remote = read_headers(traceparent, tracestate) if traceparent is not None else None
        span = current_span() if trace_id is None and remote is None else None
        if trace_id is not None:
            trace_id = as_id(trace_id)
        elif remote is not None:
            trace_id = remote.trace_id
        elif span is not None:
            trace_id = span[0]
        is_ours = remote is not None and remote.run == run_hash(recorder.run_id)
        metadata = _with_parent_span(metadata, None if is_ours else remote)
        self._trace = Trace(trace_id, metadata, new_id() if trace_id is None else NO_ID)
        self._trace.tracestate = remote.tracestate if remote else ""
        self._made_of = NO_ID
        self._stage_id = remote.stage_id if remote and is_ours else None
        # Outside of a stage there is no span; what is called from here still has to name one.
        self._span_id = remote.span_id if remote else span[1] if span else new_span_id()

    @property
    def trace_id(self) -> str:
        """The id that all stages of the request share: 32 hexadecimal digits, unless another was given."""
        return self._trace.trace_id

    @property
    def metadata(self) -> dict[str, Any]:
        """What every stage that ends from now on has among its metadata."""
        if self._trace.metadata is None:
            self._trace.metadata = {}
        return self._trace.metadata

    def __enter__(self) -> TraceContext:
        entry = _Entry(self, here(), open_scope.get())
        if not self._entries:
            self._started_perf_ns = clock.perf_counter_ns()
            self._trace.ended = False
        self._entries.add(entry)
        open_scope.set(entry)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        scope = open_scope.get()
        while scope is not None and not (isinstance(scope, _Entry) and scope in self._entries):
            scope = scope._outer
        if scope is None:  # left in another context than entered
            scope = next(iter(self._entries), None)
        if not isinstance(scope, _Entry):
            return
        leave(scope)
        scope._open = False
        scope._outer = scope._before = None
        self._entries.discard(scope)
        if not self._entries:
            self._recorder.end_trace(self._trace, (clock.perf_counter_ns() - self._started_perf_ns) / 1_000_000)

    async def __aenter__(self) -> TraceContext:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


class _Entry(Scope):
    """One entering of a trace."""

    __slots__ = ()

    def __init__(self, trace: TraceContext, outer: Scope | None, before: Scope | None) -> None:
        self._recorder, self._trace = trace._recorder, trace._trace
        self._made_of, self._stage_id, self._span_id = NO_ID, trace._stage_id, trace._span_id
        self._outer = outer
        self._before = before
        self._open = True


def _with_parent_span(metadata: Mapping[str, Any] | None, remote: Remote | None) -> dict[str, Any] | None:
    """Return the metadata, and the span that called us where it is no stage of this run: else nothing would tell."""
    try:
        own = dict(metadata) if metadata else None
    except Exception:  # noqa: BLE001 - what a user gave
        own = {"value": metadata}
    return own if remote is None else {**(own or {}), "parent_span_id": remote.span_id}
