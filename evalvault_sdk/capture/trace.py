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

from evalvault_sdk.capture import clock
from evalvault_sdk.capture.context import Scope, Trace, leave, open_scope
from evalvault_sdk.capture.propagate import Remote, current_span, read_headers
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.ids import new_stage_id, trace_id_of


class TraceContext(Scope):
    """One request: what `StageTracer.trace()` gives. Entered once."""

    __slots__ = ("_started_perf_ns",)

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
        self._outer = None
        remote = read_headers(traceparent, tracestate) if traceparent is not None else None
        if trace_id is None:
            trace_id = remote.trace_id if remote else _new_trace_id()
        self._trace = Trace(trace_id, _with_parent_span(metadata, remote, recorder.run_id))
        self._trace.tracestate = remote.tracestate if remote else ""
        self.stage_id = remote.stage_id if remote and remote.run_id == recorder.run_id else None
        # Outside of a stage there is no span; what is called from here still has to name one.
        self.span_id = remote.span_id if remote else trace_id[-16:]

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
        self._outer = open_scope.get()
        self._open = True
        open_scope.set(self)
        self._started_perf_ns = clock.perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._open:
            return
        self._open = False
        leave(self)
        self._recorder.end_trace(self._trace, (clock.perf_counter_ns() - self._started_perf_ns) / 1_000_000)

    async def __aenter__(self) -> TraceContext:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


def _new_trace_id() -> str:
    span = current_span()
    return span[0] if span else trace_id_of(new_stage_id())


def _with_parent_span(metadata: Mapping[str, Any] | None, remote: Remote | None, run_id: str) -> dict[str, Any] | None:
    """Return the metadata, and the span that called us where it is no stage of this run: else nothing would tell."""
    try:
        own = dict(metadata) if metadata else None
    except Exception:  # noqa: BLE001 - what a user gave
        own = {"value": metadata}
    if remote is None or remote.run_id == run_id:
        return own
    return {**(own or {}), "parent_span_id": remote.span_id}
