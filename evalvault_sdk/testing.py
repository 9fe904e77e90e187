"""
For the tests of programs that record stages: what was recorded, as a tree to assert on.

In:   a block of test code; the tracers whose stages are wanted (that of the package is included).
Out:  `RecordedStages`: the events, the tree they make, its outline.

    def test_an_answer_is_retrieved_first(evalvault_stages):
        answer("보험 보장금액은?")
        assert evalvault_stages.outline().splitlines() == ["request", "  retrieval", "  output"]
        assert evalvault_stages.find("retrieval").attributes["top_k"] == 5

`evalvault_stages` is a fixture for pytest, there as soon as this package is installed. It has `watch(tracer)` for
tracers of the program's own. Nothing is sent anywhere, and no thread is started.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any

import attrs
import orjson

from evalvault_sdk.capture.clock import clock as real_clock
from evalvault_sdk.capture.recorder import Note, RefusalReason
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.default import default
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, RejectedEvent
from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent, StagePayloadRef

__all__ = ["CapturingTransport", "FakeClock", "RecordedStage", "RecordedStages", "record_stages"]


class CapturingTransport:
    """
    A transport that keeps what a tracer delivers: `StageTracer("test", transport=CapturingTransport())`.

    For tests of delivery itself. Events are there after `tracer.flush()`.
    """

    destination = "memory"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[StageEvent] = []

    @property
    def events(self) -> list[StageEvent]:
        """What was delivered so far, in order."""
        with self._lock:
            return list(self._events)

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Keep a batch, but for events that break EvalVault's rules."""
        rejected: list[RejectedEvent] = []
        for place, event in enumerate(batch.events):
            try:
                taken = StageEvent.from_dict(orjson.loads(event))
            except InvalidStageEventError as error:
                rejected.append(RejectedEvent(place, str(error)))
            else:
                with self._lock:
                    self._events.append(taken)
        return Delivered(tuple(rejected))

    def close(self) -> None:
        """Do nothing."""

    def after_fork_in_child(self) -> None:
        """Begin empty."""
        self._lock = threading.Lock()
        self._events = []


class FakeClock:
    """
    A clock that stands still until it is advanced. `with FakeClock() as clock:` puts it in place of the real one.

    For all stages of the process that begin and end inside; delivery keeps its own time.
    """

    def __init__(self, now_s: float = 1_767_225_600.0) -> None:
        self._now_ns = round(now_s * 1e9)
        self._read = 0
        self._replaced: list[tuple[Any, Any]] = []

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now_ns += round(seconds * 1e9)

    def __enter__(self) -> FakeClock:
        self._replaced.append((real_clock.time_ns, real_clock.perf_counter_ns))
        real_clock.time_ns = self._time_ns
        real_clock.perf_counter_ns = lambda: self._now_ns
        return self

    def _time_ns(self) -> int:
        self._read += 1  # a microsecond a look: stages keep the order in which they began
        return self._now_ns + self._read * 1000

    def __exit__(self, *_: object) -> None:
        if self._replaced:
            real_clock.time_ns, real_clock.perf_counter_ns = self._replaced.pop()


@attrs.define(eq=False)
class RecordedStage:
    """One stage, and the stages inside it in the order in which they began."""

    event: StageEvent
    children: list[RecordedStage] = attrs.field(factory=list)

    @property
    def stage_type(self) -> str:
        """The type."""
        return self.event.stage_type

    @property
    def status(self) -> str:
        """The status: "success", "error", "cancelled", "skipped"."""
        return self.event.status

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes."""
        return self.event.attributes

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata."""
        return self.event.metadata

    def find(self, stage_type: str) -> RecordedStage:
        """Return the only stage of a type below this one. Raises `LookupError` if there is none, or are several."""
        return _only(stage_type, [stage for stage in self._all() if stage is not self])

    def outline(self, depth: int = 0) -> str:
        """Return this stage and those below, a line each, indented by two; what did not succeed says so."""
        line = "  " * depth + self.stage_type + ("" if self.status == "success" else f" ({self.status})")
        return "\n".join([line, *(child.outline(depth + 1) for child in self.children)])

    def _all(self) -> Iterator[RecordedStage]:
        yield self
        for child in self.children:
            yield from child._all()


class Payloads:
    """A payload store in memory."""

    def __init__(self) -> None:
        self._payloads: dict[str, bytes] = {}

    def put(self, payload: bytes, *, type: str = "json") -> StagePayloadRef:
        """Keep a payload."""
        id = f"payload-{len(self._payloads) + 1}"
        self._payloads[id] = payload
        return StagePayloadRef("test", id, type)

    def get(self, ref: StagePayloadRef | Mapping[str, str]) -> bytes:
        """Return a payload. Raises `LookupError`."""
        return self._payloads[ref.id if isinstance(ref, StagePayloadRef) else ref["id"]]


class RecordedStages:
    """What was recorded in a block, by the tracers that are watched."""

    closed = False

    def __init__(self) -> None:
        self._encoded: list[bytes] = []
        self._restore = ExitStack()
        #: What was given to `save_input` and `save_output`, where a tracer has a payload store.
        self.payloads = Payloads()
        #: Events that could not be recorded, by reason.
        self.refused: dict[str, int] = {}
        #: Fields that were cut, functions of the program's that failed, stages that were not drawn.
        self.notes: dict[str, int] = {}

    # -- a sink ---------------------------------------------------------------------------------------

    def put(self, event: bytes) -> bool:
        """Take an event."""
        self._encoded.append(event)
        return True

    def refuse(self, reason: RefusalReason) -> None:
        """Count an event that could not be recorded."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def note(self, what: Note, count: int = 1) -> None:
        """Count something else."""
        self.notes[what] = self.notes.get(what, 0) + count

    # -- for tests ------------------------------------------------------------------------------------

    def watch(self, tracer: Stages) -> None:
        """Keep what `tracer` records, instead of having it delivered. It samples nothing out meanwhile."""
        recorder = tracer._recorder
        recorder.watch(self, self.payloads)
        self._restore.callback(recorder.unwatch, self)

    @property
    def events(self) -> list[StageEvent]:
        """All events, in the order in which their stages ended."""
        return [StageEvent.from_dict(orjson.loads(event)) for event in self._encoded]

    @property
    def roots(self) -> list[RecordedStage]:
        """The stages without a parent among those recorded, with all below them, in the order in which they began."""
        stages = {event.stage_id: RecordedStage(event) for event in self.events}
        roots: list[RecordedStage] = []
        for stage in sorted(stages.values(), key=lambda stage: (_began(stage.event), stage.event.stage_id)):
            parent = stages.get(stage.event.parent_stage_id or "")
            (roots if parent is None else parent.children).append(stage)
        return roots

    def find(self, stage_type: str) -> RecordedStage:
        """Return the only stage of a type. Raises `LookupError` if there is none, or are several."""
        return _only(stage_type, [stage for root in self.roots for stage in root._all()])

    def outline(self) -> str:
        """Return the whole tree, a line for each stage, indented by two spaces; what did not succeed says so."""
        return "\n".join(root.outline() for root in self.roots)

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self._encoded.clear()

    def __len__(self) -> int:
        return len(self._encoded)


def _only(stage_type: str, stages: list[RecordedStage]) -> RecordedStage:
    found = [stage for stage in stages if stage.stage_type == stage_type]
    if len(found) != 1:
        there = ", ".join(stage.stage_type for stage in stages) or "none"
        raise LookupError(f"there are {len(found)} stages of the type {stage_type!r}; recorded were: {there}")
    return found[0]


def _began(event: StageEvent) -> datetime:
    return event.started_at or event.finished_at or datetime.min.replace(tzinfo=timezone.utc)


@contextmanager
def record_stages(*tracers: Stages) -> Iterator[RecordedStages]:
    """Keep what `tracers` and the package's own functions record inside the block, instead of having it delivered."""
    recorded = RecordedStages()
    with recorded._restore:
        for tracer in (default, *tracers):
            recorded.watch(tracer)
        yield recorded
