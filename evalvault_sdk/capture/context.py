"""
In which trace, and in which stage, is the code running?

In:   scopes (stages and traces) as they are entered and left, in the caller's thread or task.
Out:  the innermost open scope, so that a new stage finds its parent and its trace.

A contextvar, so that nested calls, asyncio tasks and `contextvars.copy_context()` see the right one. Frameworks that
are observed have context variables of their own: `finders` look there for the scope of what they run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeGuard
from uuid import UUID

from evalvault_sdk.ids import NO_ID, Id, digits_of, stage_id_of, trace_id_of

if TYPE_CHECKING:
    from evalvault_sdk.capture.recorder import Recorder
    from evalvault_sdk.capture.sample import Held


# Reentrant: a finalizer may record while its thread makes such a place.
_holding = threading.RLock()


def _after_fork_in_child() -> None:
    global _holding
    _holding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Trace:
    """What the stages of one request have in common. Made by the scope that opens it, and ended with that."""

    __slots__ = ("ended", "failed", "given_id", "held", "longest_ms", "metadata", "opened", "tracestate")

    def __init__(self, trace_id: str | None = None, metadata: dict[str, Any] | None = None, opened: Id = NO_ID) -> None:
        #: The id as text: a given one, or that of the stage which opened the trace, if somebody asked for it.
        self.given_id = trace_id
        #: What the id of that stage is made of.
        self.opened = opened
        #: Metadata of each of its stages.
        self.metadata = metadata
        #: What other systems have to say of it (W3C Trace Context), to be handed on.
        self.tracestate = ""
        #: Whether the scope that opened it was left; stages may come later still.
        self.ended = False
        #: Whether a stage of it failed, and how long the longest took so far, as far as tracers that sample have seen.
        self.failed = False
        self.longest_ms = 0.0
        #: The events of a trace that was not drawn.
        self.held: Held | None = None

    @property
    def trace_id(self) -> str:
        """The id that all of its stages share: 32 hexadecimal digits, unless another was given."""
        if self.given_id is None:
            self.given_id = digits_of(*self.opened)
        return self.given_id

    @trace_id.setter
    def trace_id(self, trace_id: str) -> None:
        self.given_id, self.opened = trace_id, NO_ID

    def hold(self) -> Held:
        """Return a place for such events."""
        from evalvault_sdk.capture.sample import Held  # loaded: who samples asks for it

        with _holding:
            if self.held is None or self.held.pid != os.getpid():
                self.held = Held()
            return self.held


class Scope:
    """A place in the program that stages are recorded in: an open stage, or an open trace."""

    __slots__ = ("_before", "_made_of", "_open", "_outer", "_recorder", "_span_id", "_stage_id", "_trace")

    #: What the id of the stage is made of, unless it is a text, or there is none.
    _made_of: Id
    #: The ids as texts: given ones, or those that somebody asked for.
    _stage_id: str | None
    _span_id: str | None
    _recorder: Recorder
    _trace: Trace
    #: The scope around it, as long as this one is open: what has ended must not keep alive what ended before it.
    _outer: Scope | None
    #: What `open_scope` was when this one was entered: the same, unless a finder knew of one further in.
    _before: Scope | None
    _open: bool
    #: Whether a framework told of it, so that it was never made `open_scope`.
    _is_observed = False

    @property
    def stage_id(self) -> str | None:
        """The parent of stages in this scope, if there is any: a UUIDv7 of 36 characters."""
        # Of most stages nobody asks for it: then it is made from the numbers where the event leaves the memory.
        if self._stage_id is None and self._made_of is not NO_ID:
            self._stage_id = stage_id_of(digits_of(*self._made_of))
        return self._stage_id

    @property
    def span_id(self) -> str | None:
        """The span that this scope is in W3C Trace Context: 16 hexadecimal digits."""
        if self._span_id is None and self._made_of is not NO_ID:
            self._span_id = digits_of(*self._made_of)[16:]
        return self._span_id

    def is_around(self, scope: Scope | None) -> bool:
        """Whether `scope` is this one, or one inside it."""
        while scope is not None and scope is not self:
            scope = scope._outer
        return scope is self


open_scope: ContextVar[Scope | None] = ContextVar("evalvault_open_scope", default=None)
#: Looked up but once: every stage calls them.
get_open_scope, set_open_scope = open_scope.get, open_scope.set

#: Each returns the scope that a framework's own context says the code runs in. Replaced as one, never changed.
finders: tuple[Callable[[], Scope | None], ...] = ()


def add_finder(finder: Callable[[], Scope | None]) -> None:
    """Ask `finder`, too, where code runs."""
    global finders
    with _holding:
        finders = (*finders, finder)


def remove_finder(finder: Callable[[], Scope | None]) -> None:
    """Ask it no longer."""
    global finders
    with _holding:
        finders = tuple(other for other in finders if other != finder)


def here() -> Scope | None:
    """Return the innermost scope that the code runs in, whoever knows of it."""
    scope = get_open_scope()
    for finder in finders:
        try:
            found = finder()
        except Exception:  # noqa: BLE001,S112 - a framework of another version, or a span of another make
            continue
        if found is not None and not found.is_around(scope):
            scope = found
    return scope


def has_begun(scope: object) -> TypeGuard[Scope]:
    """Whether this is a scope that was entered: one of a tracer that is switched off never is."""
    return issubclass(type(scope), Scope) and getattr(scope, "_trace", None) is not None


def leave(scope: Scope) -> None:
    """Make what was the innermost scope before `scope` that again; if another one was entered since, take it out."""
    inner = get_open_scope()
    if inner is scope:
        set_open_scope(scope._before)
        return
    while inner is not None:
        if inner._before is scope:
            inner._before = scope._before
        if inner._outer is scope:
            inner._outer = scope._outer
            return
        inner = inner._outer


def is_in_stage_of(scope: Scope | None, span_id: str) -> bool:
    """Whether a span of OpenTelemetry is a stage itself, and one that `scope` is in: then it is no other stage's."""
    while scope is not None and not (scope._is_observed and scope.span_id == span_id):
        scope = scope._outer
    return scope is not None


def place(
    outer: Scope | None, recorder: Recorder, parent_id: str | None, trace_id: str | None
) -> tuple[str | None, Trace | None]:
    """
    Return the parent and the trace of a new stage: what was given, or else those of the scope around it.

    None is a trace of the stage's own, which gets its id from that of the stage.

    A trace goes through all runs that a request touches; a parent is one only within the same run, since
    that is where EvalVault looks it up. A given parent id tells its trace if that stage opened it; of any
    other the caller has to give `trace_id` too (or the stage itself as `parent`), unless the scope around it
    is of the same trace.
    """
    if outer is None:
        if trace_id is None and _is_our_id(parent_id):
            trace_id = trace_id_of(parent_id)
        return parent_id, None if trace_id is None else Trace(trace_id)
    trace = outer._trace
    if trace_id is not None and trace_id != trace.trace_id:
        return parent_id, Trace(trace_id, trace.metadata)
    if parent_id is None and (outer._recorder is recorder or outer._recorder.run_id == recorder.run_id):
        parent_id = outer.stage_id
    return parent_id, trace


def as_id(value: Any) -> str:
    """Return an id as text: 32 hexadecimal digits of a UUID, which are a trace id in W3C Trace Context."""
    if isinstance(value, str):
        return value
    try:
        return value.hex if isinstance(value, UUID) else str(value)
    except Exception:  # noqa: BLE001 - an object of a user's
        return type(value).__qualname__


def _is_our_id(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or len(value) != 36 or value[14] != "7":
        return False
    digits = value.replace("-", "")
    return len(digits) == 32 and not digits.strip("0123456789abcdef")
