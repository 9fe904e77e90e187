"""
Hand what was recorded to delivery, as bytes.

In:   the fields of an event, from a stage that ended or from `record_stage`.
Out:  one encoded event in the sink, or one counted drop.
Caller's thread. Never raises: whatever goes wrong here is ours, and the host program must not feel it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import attrs

from evalvault_sdk.capture.context import Trace
from evalvault_sdk.capture.draft import Draft
from evalvault_sdk.late import load
from evalvault_sdk.log import Rarely

if TYPE_CHECKING:
    from evalvault_sdk.capture.encode import Encoder
    from evalvault_sdk.capture.sample import Sampling
    from evalvault_sdk.payload import PayloadStore

#: Why an event was recorded and yet could not be put.
RefusalReason = Literal["invalid", "internal_error", "too_large"]
#: What is counted of events besides what becomes of them.
Note = Literal["truncated", "sampled_out", "hook_errors"]


class Sink(Protocol):
    """Where encoded events go: the queue, or in tests a list."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False. Never raises, never blocks."""

    def refuse(self, reason: RefusalReason) -> None:
        """Count an event that was recorded and could not be put."""

    def note(self, what: Note, count: int = 1) -> None:
        """Count something else."""


class Source(Protocol):
    """What observes a framework, and may have stages open."""

    def close(self, why: str) -> None:
        """Record what is open as cancelled by `why`."""


@attrs.frozen(kw_only=True)
class Setup:
    """How a recorder records. Replaced as one, so that no event goes half the old way and half the new one."""

    run_id: str
    sink: Sink
    encoder: Encoder
    #: Puts a draft into the sink, which has `encoder.finish` called when it is to leave the memory. None, as with
    #: sampling: events are wanted as bytes at once.
    put_draft: Callable[[Draft], bool] | None = None
    #: None: everything is recorded.
    sampling: Sampling | None = None
    payload_store: PayloadStore | None = None
    #: So many frames of an error's traceback are recorded.
    traceback_frames: int = 0
    #: False: stages need not even be measured.
    enabled: bool = True


class _LateEncoder:
    """An encoder with all defaults. It is made with its first use: programs that have a tracer never need it."""

    _made: Encoder | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            load("evalvault_sdk.capture.encode")
            from evalvault_sdk.capture.encode import Encoder

            self._made = Encoder()  # without a lock: where two threads make one each, either does
        return getattr(self._made, name)


class Recorder:
    """One run's way from fields to the sink. As long as it is referred to, its worker goes on."""

    __slots__ = ("__weakref__", "_log", "_own", "_sources", "_watches", "setup")

    def __init__(
        self,
        run_id: str,
        sink: Sink,
        log: Rarely | None = None,
        *,
        encoder: Encoder | None = None,
        put_draft: Callable[[Draft], bool] | None = None,
        sampling: Sampling | None = None,
        payload_store: PayloadStore | None = None,
        traceback_frames: int = 0,
        enabled: bool = True,
    ) -> None:
        self._log = log or Rarely()
        self._watches: tuple[tuple[Sink, PayloadStore], ...] = ()
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self.follow(
            Setup(
                run_id=run_id,
                sink=sink,
                encoder=encoder or cast("Encoder", _LateEncoder()),
                put_draft=put_draft,
                sampling=sampling,
                payload_store=payload_store,
                traceback_frames=traceback_frames,
                enabled=enabled,
            )
        )

    @property
    def run_id(self) -> str:
        """The run that is recorded for."""
        return self.setup.run_id

    @property
    def enabled(self) -> bool:
        """Whether stages need to be measured."""
        return self.setup.enabled

    def add_source(self, source: Source) -> None:
        """Have `source` record what it has open before recording ends."""
        self._sources.add(source)

    def end_sources(self) -> None:
        """Have what is open recorded as it is: nothing can be recorded later."""
        for source in list(self._sources):
            try:
                source.close("shutdown")
            except Exception as error:  # noqa: BLE001 - see the module's promise
                self.fault("ending what is open", error)

    def make_ready(self) -> None:
        """See to it that `run_id` and the rest are those that will be recorded with."""

    # -- for tests of programs: what is recorded goes elsewhere meanwhile ------------------------------

    def follow(self, setup: Setup) -> None:
        """From now on record like this."""
        self._own = setup
        self.setup = self._as_watched(setup)

    def watch(self, sink: Sink, payload_store: PayloadStore) -> None:
        """Record into `sink`, everything, until `unwatch`. Who came last has what is recorded."""
        self._watches = (*self._watches, (sink, payload_store))
        self.setup = self._as_watched(self._own)

    def unwatch(self, sink: Sink) -> None:
        """Go back to what it was without `sink`."""
        self._watches = tuple(watch for watch in self._watches if watch[0] is not sink)
        self.setup = self._as_watched(self._own)

    def _as_watched(self, setup: Setup) -> Setup:
        if not self._watches:
            return setup
        sink, payload_store = self._watches[-1]
        return attrs.evolve(
            setup,
            run_id=setup.run_id or "test",
            sink=sink,
            put_draft=None,
            sampling=None,
            enabled=True,
            payload_store=payload_store if setup.payload_store is not None else None,
        )

    def record(self, fields: dict[str, Any], trace: Trace | None = None) -> bool:
        """Encode an event, put it into the sink unless its trace is not drawn; say whether it was taken."""
        try:
            setup = self.setup
            if setup.sampling is not None:
                return setup.sampling.record(self, fields, trace)
            event = setup.encoder.encode(fields, self)
            return (event is not None and setup.sink.put(event)) or self.not_taken(event)
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("recording a stage", error)
            return False

    def put(self, fields: dict[str, Any]) -> bool:
        """Encode an event and put it into the sink."""
        event = self.encode(fields)
        return event is not None and self.put_encoded(event)

    def encode(self, fields: dict[str, Any]) -> bytes | None:
        """Return an event as bytes; None if it is too large whatever is cut, and counted as dropped."""
        event = self.setup.encoder.encode(fields, self)
        if event is None:
            self.not_taken(event)
        return event

    def put_encoded(self, event: bytes) -> bool:
        """Put an event into the sink."""
        return self.setup.sink.put(event) or self.not_taken(event)

    def not_taken(self, event: bytes | Draft | None) -> bool:
        """See to it that the loss of an event is counted, and said if it is one of ours to avoid. Returns False."""
        if event is None:
            self.setup.sink.refuse("too_large")
        elif self.setup.sink.closed:
            self._log.warn(
                "closed", "a stage was recorded after shutdown() and is lost; further ones are counted as 'closed'"
            )
        return False

    def draws(self, trace_id: str | None) -> bool:
        """Whether a trace is recorded from its beginning to its end."""
        return self.setup.sampling is None or self.setup.sampling.draws(trace_id)

    def end_trace(self, trace: Trace, duration_ms: float) -> None:
        """Decide over what is held of a trace that was not drawn: the scope that opened it was left."""
        trace.ended = True
        trace.longest_ms = max(trace.longest_ms, duration_ms)
        if trace.held is not None:
            self._release(trace)

    def fail_trace(self, trace: Trace) -> None:
        """Say that a stage failed: whoever samples may want to keep the trace."""
        trace.failed = True
        if trace.held is not None:
            self._release(trace)

    def _release(self, trace: Trace) -> None:
        from evalvault_sdk.capture.sample import release  # loaded, or nothing would be held

        try:
            release(trace)
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("ending a trace", error)

    def note(self, what: Note, count: int = 1) -> None:
        """Count something that is no loss of an event."""
        self.setup.sink.note(what, count)

    def hook_failed(self, hook: str, error: BaseException) -> None:
        """Count that a function of the user's raised, and say so; of the error only its kind."""
        try:
            self.setup.sink.note("hook_errors", 1)
            self._log.warn(
                f"{hook} {type(error).__name__}",
                "the function given as %s= raised %s; further errors are counted in stats() as 'hook_errors'",
                hook,
                type(error).__name__,
            )
        except Exception:  # noqa: BLE001,S110 - a sink that fails even at counting
            pass

    def misread(self, framework: str, error: BaseException) -> None:
        """Count that what a framework told could not be read, and say so; of the error only its kind."""
        try:
            self.setup.sink.note("hook_errors", 1)
            self._log.warn(
                f"{framework} {type(error).__name__}",
                "what %s told could not be read (%s): a stage of it may be incomplete, or end late; "
                "further errors are counted in stats() as 'hook_errors'",
                framework,
                type(error).__name__,
            )
        except Exception:  # noqa: BLE001,S110 - a sink that fails even at counting
            pass

    def fault(self, doing: str, error: Exception, reason: RefusalReason = "internal_error") -> None:
        """Count an event lost to `error`, and say so; of the error only its kind, since its text may quote content."""
        try:
            self.setup.sink.refuse(reason)
            self._log.warn(
                reason,
                "an event was lost while %s (%s); further ones are counted in stats() as %r",
                doing,
                type(error).__name__,
                reason,
            )
        except Exception:  # noqa: BLE001,S110 - a sink that fails even at counting
            pass
