"""
Hold together the stages of each request to an ASGI app: FastAPI, Starlette, Litestar, Quart, Django.

In:   what the server hands to the app: requests and WebSockets, with `traceparent` and `tracestate` in their headers.
Out:  one trace around each, streamed answers and background tasks included; if wanted, its root stage `request`.
In the task of the request. Nothing is imported but this package, and what passes through is not changed::

    app.add_middleware(EvalVaultMiddleware, tracer=tracer)  # or, outermost: app = EvalVaultMiddleware(app)
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import here, open_scope
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.default import default

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Marks a request that has a trace, for the same middleware further in: that of a mounted app, say.
_TRACED = "evalvault_sdk.traced"
#: Longer headers are none of W3C Trace Context: a `traceparent` of version 00 has 55 bytes, and of `tracestate`
#: 32 members are kept.
_MAX_TRACEPARENT_BYTES = 256
_MAX_TRACESTATE_BYTES = 8_192
#: What frameworks raise when the client has gone.
_DISCONNECTS = ("ClientDisconnect", "WebSocketDisconnect")
#: The parts of an answer; a file may be handed to the server by its path, or as a descriptor.
_BODIES = frozenset(
    {
        "http.response.body",
        "http.response.pathsend",
        "http.response.zerocopysend",
        "websocket.http.response.body",
    }
)
#: A WebSocket that is closed with one of these came to its end (RFC 6455, 7.4.1).
_ORDERLY_CLOSES = (1000, 1001, 1005)
#: The connection was lost; the app could not go on.
_LOST, _BROKEN = 1006, 1011
_PARAMETER = re.compile(r"\{(\w+)\}")


class EvalVaultMiddleware:
    """
    Open one trace for each request and each WebSocket; `tracer` records, that of the package if None.

    The trace is the caller's, if the headers name one. `session_id` and `user_id` are functions of the ASGI scope;
    what they return is in the metadata of all stages. With `request_stage` the root is a stage `request`, from the
    first byte to the last one of the answer: with `method`, `route` (or, if the framework tells none, `path`; never
    the query string) and `status_code`. It has failed if the app raises or answers 5xx, and is cancelled if the
    client goes away. Requests to `skip_paths` get neither: `skip_paths=("/health", "/ready")`.
    """

    def __init__(
        self,
        app: App,
        tracer: Stages | None = None,
        *,
        request_stage: bool = False,
        skip_paths: Collection[str] = (),
        session_id: Callable[[Scope], str | None] | None = None,
        user_id: Callable[[Scope], str | None] | None = None,
    ) -> None:
        self._app = app
        self._tracer = default if tracer is None else tracer
        self._request_stage = request_stage
        self._skip_paths = frozenset((skip_paths,) if isinstance(skip_paths, str) else skip_paths)
        self._about = {"session_id": session_id, "user_id": user_id}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app."""
        if (
            scope["type"] not in ("http", "websocket")
            or _TRACED in scope
            or scope.get("path") in self._skip_paths
            or not self._tracer._recorder.enabled
        ):
            await self._app(scope, receive, send)
            return
        # Not in a copy: the framework leaves the route in this very scope.
        scope[_TRACED] = True
        traceparent, tracestate = _caller(scope)
        with self._tracer.trace(traceparent=traceparent, tracestate=tracestate, **self._asked(scope)):
            if self._request_stage:
                await _Request(self._tracer._recorder, scope, receive, send).run(self._app)
            else:
                await self._app(scope, receive, send)

    def _asked(self, scope: Scope) -> dict[str, Any]:
        """Return what the program's functions know of who asks."""
        known: dict[str, Any] = {}
        for name, tell in self._about.items():
            if tell is not None:
                try:
                    known[name] = tell(scope)
                except Exception as error:  # noqa: BLE001 - a function of the program's
                    self._tracer._recorder.hook_failed(name, error)
        return known


def _caller(scope: Scope) -> tuple[str | None, str | None]:
    """Return `traceparent` and `tracestate`, which name the caller's trace."""
    parents: list[bytes] = []
    states: list[bytes] = []
    for name, value in scope.get("headers") or ():
        if name == b"traceparent":
            parents.append(value)
        elif name == b"tracestate":
            states.append(value)
    # Of two parents neither is one; a state may come in parts (W3C Trace Context, 3.2 and 3.3).
    if len(parents) != 1 or len(parents[0]) > _MAX_TRACEPARENT_BYTES:
        return None, None
    state = b",".join(states)
    return parents[0].decode("latin-1"), state.decode("latin-1") if len(state) <= _MAX_TRACESTATE_BYTES else None


class _Request:
    """The stage of one request, and what was seen of it on the way."""

    def __init__(self, recorder: Recorder, scope: Scope, receive: Receive, send: Send) -> None:
        self._stage = StageContext(recorder, "request")
        self._scope = scope
        self._path = scope.get("path")
        self._receive = receive
        self._send = send
        self._is_complete = False
        #: Whether the client went away before that, and what the server raised then.
        self._has_gone = False
        self._send_error: OSError | None = None
        self._status_code: int | None = None

    async def run(self, app: App) -> None:
        """Run the app inside the stage."""
        before = open_scope.get()
        self._stage._start(here())
        open_scope.set(self._stage)
        try:
            await app(self._scope, self._receive_and_look, self._send_and_look)
        except BaseException as error:
            self._end(error)
            raise
        else:
            self._end(None)
        finally:
            open_scope.set(before)

    async def _receive_and_look(self) -> Message:
        message = await self._receive()
        kind = message.get("type")
        if kind == "http.disconnect":
            self._has_gone = self._has_gone or not self._is_complete
        elif kind == "websocket.disconnect" and not self._is_complete:
            self._closed_with(message.get("code", 1005))
        return message

    async def _send_and_look(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:
            self._has_gone, self._send_error = True, error
            raise
        kind = message.get("type")
        if kind in ("http.response.start", "websocket.http.response.start"):
            self._status_code = message.get("status")
        elif kind in _BODIES:
            if not message.get("more_body", False) and not self._has_gone:
                self._is_complete = True
                # What the app does now is done in the background. But where it failed, it may yet say how.
                if self._status_code is not None and self._status_code < 500:
                    self._end(None)
        elif kind == "websocket.accept":
            self._status_code = 101
        elif kind == "websocket.close":
            if self._status_code is None:  # as servers answer who is not accepted
                self._status_code = 403
            self._closed_with(message.get("code", 1000))

    def _closed_with(self, code: int | None) -> None:
        """See the end of a WebSocket."""
        self._is_complete = code in _ORDERLY_CLOSES
        self._has_gone = self._has_gone or code == _LOST
        self._stage.set(close_code=code)
        if code == _BROKEN:
            self._stage.fail(f"the WebSocket was closed with {code}", kind=str(code))

    def _end(self, error: BaseException | None) -> None:
        """Record the stage, unless that was done when the answer was complete."""
        ended_perf_ns = clock.perf_counter_ns()
        stage = self._stage
        if not stage._open:
            return
        scope = self._scope
        route = _route(scope, self._path)
        stage.set(**({"path": self._path} if route is None else {"route": route}))
        if scope["type"] == "http":
            stage.set(method=scope.get("method"))
        if self._status_code is not None:
            stage.set(status_code=self._status_code)
        cause = _unwrapped(error)
        if type(cause).__name__ in _DISCONNECTS or (self._has_gone and cause in (None, self._send_error)):
            error = None
            if not self._is_complete:
                stage.status = "cancelled"
                stage.set(cancelled_by="client_disconnect")
        elif error is None and self._status_code is not None and self._status_code >= 500:
            stage.fail(f"the answer has the status {self._status_code}", kind=str(self._status_code))
        elif error is None and not self._is_complete and scope["type"] == "http":
            stage.fail("the answer was not completed", kind="IncompleteAnswer")
        stage._end(error, ended_perf_ns)


def _unwrapped(error: BaseException | None) -> BaseException | None:
    """Return the one exception in a group: task groups, as those in frameworks, raise no other."""
    inner: Sequence[BaseException] = getattr(error, "exceptions", ())
    return _unwrapped(inner[0]) if len(inner) == 1 else error


def _route(scope: Mapping[str, Any], path: object) -> str | None:
    """
    Return the route as the program wrote it, "/users/{user_id}", if the framework left it in the scope.

    What it leaves is the innermost part of it, below mounted apps and included routers: these are the first segments
    of the path.
    """
    form, given = getattr(scope.get("route"), "path_format", None), scope.get("path_params")
    if not isinstance(form, str) or not isinstance(path, str) or not isinstance(given, Mapping):
        return None
    values = {name: str(value) for name, value in given.items()}
    names = _PARAMETER.findall(form)
    if not all(name in values for name in names):  # a mount: the rest of the path is its own affair
        return form
    in_parameters = sum(values[name].count("/") for name in names)
    above = path.split("/")[: max(1, path.count("/") - form.count("/") - in_parameters + 1)]
    called = {value: f"{{{name}}}" for name, value in values.items() if name not in names}
    return "/".join(called.get(segment, segment) for segment in above) + form
