"""Requests to ASGI apps: one trace each, and if wanted a stage, whatever the framework does in between."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import (
    APIRouter,
    BackgroundTasks,
    FastAPI,
    HTTPException,
    Request,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount
from starlette.types import Message
from websockets.sync.client import connect

from evalvault_sdk import StageTracer, trace_headers
from evalvault_sdk.capture.context import open_scope
from evalvault_sdk.integrations.asgi import EvalVaultMiddleware
from evalvault_sdk.testing import RecordedStages, record_stages
from tests.support import free_port, wait_for

App = Callable[..., Awaitable[None]]
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages
    assert open_scope.get() is None


def ask(
    app: App,
    path: str = "/",
    *,
    headers: dict[str, str] | None = None,
    receive: list[Message] | None = None,
    **scope: Any,
) -> list[Message]:
    """Run one request as a server does, and return what the app sent."""
    sent: list[Message] = []
    messages = [{"type": "http.request", "body": b"", "more_body": False}] if receive is None else receive

    async def receive_next() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    given = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"q=secret",
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
        **scope,
    }
    asyncio.run(asyncio.wait_for(app(given, receive_next, send), 10))
    return sent


def answering(work: Callable[[], Any] = lambda: None, status: int = 200) -> App:
    """Return an app that works and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        work()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


def test_all_stages_of_a_request_are_of_one_trace_and_those_of_another_are_not(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    def work() -> None:
        tracer.record_stage("input")
        with tracer.stage("retrieval"):
            pass

    app = EvalVaultMiddleware(answering(work), tracer)
    with tracer.stage("around"):
        ask(app)
    ask(app)
    assert recorded.outline() == "around\ninput\nretrieval\ninput\nretrieval"
    assert len({event.trace_id for event in recorded.events}) == 3


def test_a_request_without_stages_records_nothing(tracer: StageTracer, recorded: RecordedStages) -> None:
    ask(EvalVaultMiddleware(answering(), tracer))
    assert len(recorded) == 0


def test_the_trace_is_that_of_the_caller(tracer: StageTracer, recorded: RecordedStages) -> None:
    handed_on: dict[str, str] = {}

    def work() -> None:
        with tracer.stage("retrieval"):
            handed_on.update(trace_headers())

    app = EvalVaultMiddleware(answering(work), tracer, request_stage=True)
    ask(app, headers={"traceparent": PARENT, "tracestate": "vendor=1"})
    with tracer.stage("caller"):
        headers = trace_headers()
    ask(app, headers=headers)
    events = recorded.events
    assert {event.trace_id for event in events[:2]} == {PARENT.split("-")[1]}
    assert events[0].metadata["parent_span_id"] == PARENT.split("-")[2]
    assert "evalvault=" in handed_on["tracestate"]
    assert recorded.outline() == "request\n  retrieval\ncaller\n  request\n    retrieval"


@pytest.mark.parametrize(
    "headers",
    [
        [(b"traceparent", b"00-broken")],
        [(b"traceparent", PARENT.encode()), (b"traceparent", PARENT.encode())],
        [(b"traceparent", b"01" + PARENT[2:].encode() + b"-" + b"a" * 300)],
        [(b"traceparent", b"\xff\x00")],
    ],
    ids=["malformed", "two", "endless", "no text"],
)
def test_a_header_that_names_no_trace_is_ignored(
    tracer: StageTracer, recorded: RecordedStages, headers: list[tuple[bytes, bytes]]
) -> None:
    app = EvalVaultMiddleware(answering(lambda: tracer.record_stage("x")), tracer)

    async def with_headers(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "headers": headers}, receive, send)

    ask(with_headers)
    (event,) = recorded.events
    assert event.trace_id != PARENT.split("-")[1]


def test_a_tracestate_without_end_is_left_out(tracer: StageTracer, recorded: RecordedStages) -> None:
    handed_on: dict[str, str] = {}
    app = EvalVaultMiddleware(answering(lambda: handed_on.update(trace_headers())), tracer)
    ask(app, headers={"traceparent": PARENT, "tracestate": "vendor=" + "a" * 9_000})
    assert handed_on["traceparent"].split("-")[1] == PARENT.split("-")[1]
    assert "vendor" not in handed_on.get("tracestate", "")


def test_who_asks_is_known_to_all_stages_and_a_function_that_fails_costs_nothing(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    def broken(scope: Any) -> str:
        raise KeyError("session")

    def session(scope: Any) -> str:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        return headers[b"x-session"].decode()

    app = EvalVaultMiddleware(answering(lambda: tracer.record_stage("x")), tracer, session_id=session, user_id=broken)
    assert ask(app, headers={"x-session": "s-1"})[0]["status"] == 200
    (event,) = recorded.events
    assert event.metadata == {"session_id": "s-1"}
    assert recorded.notes["hook_errors"] == 1


def test_the_stage_of_a_request_says_what_was_asked_and_not_what_with(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    app = EvalVaultMiddleware(
        answering(lambda: tracer.record_stage("x")), tracer, request_stage=True, skip_paths=("/health",)
    )
    ask(app, "/ask")
    ask(app, "/health")
    assert recorded.outline() == "request\n  x\nx"
    assert recorded.find("request").attributes == {"path": "/ask", "method": "GET", "status_code": 200}


def test_one_skipped_path_may_be_given_as_it_is(tracer: StageTracer, recorded: RecordedStages) -> None:
    ask(EvalVaultMiddleware(answering(), tracer, request_stage=True, skip_paths="/health"), "/health")
    assert len(recorded) == 0


def test_an_answer_5xx_is_a_failure_and_4xx_is_none(tracer: StageTracer, recorded: RecordedStages) -> None:
    for status in (404, 503):
        ask(EvalVaultMiddleware(answering(status=status), tracer, request_stage=True))
    found, failed = recorded.events
    assert (found.status, found.attributes["status_code"]) == ("success", 404)
    assert (failed.status, failed.attributes["error"]["type"]) == ("error", "503")


def test_what_the_app_raises_passes_through_and_is_recorded(tracer: StageTracer, recorded: RecordedStages) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("no index")

    async def broken_after_saying_so(scope: Any, receive: Any, send: Any) -> None:
        await answering(status=500)(scope, receive, send)
        raise LookupError("no index")

    for app in (broken, broken_after_saying_so):
        with pytest.raises(LookupError):
            ask(EvalVaultMiddleware(app, tracer, request_stage=True))
    for event in recorded.events:
        assert (event.status, event.attributes["error"]) == ("error", {"type": "LookupError", "message": "no index"})


def test_an_answer_that_was_never_completed_is_a_failure(tracer: StageTracer, recorded: RecordedStages) -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    ask(EvalVaultMiddleware(silent, tracer, request_stage=True))
    assert recorded.find("request").attributes["error"]["type"] == "IncompleteAnswer"


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x"
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_a_client_that_goes_away_cancels_its_request(
    tracer: StageTracer, recorded: RecordedStages, spec_version: str
) -> None:
    # Up to 2.3 the app is told when it listens; from 2.4 on sending fails.
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if spec_version == "2.4":

            async def gone(message: Message) -> None:
                if message["type"] == "http.response.body":
                    raise ConnectionResetError

            send = gone
        await middleware(scope, receive, send)

    middleware = EvalVaultMiddleware(StreamingResponse(tracer.stage("output")(endless)()), tracer, request_stage=True)
    with contextlib.suppress(Exception):  # ClientDisconnect; of an older Starlette a group with the server's error
        ask(app, receive=[{"type": "http.disconnect"}], asgi={"spec_version": spec_version})
    request = recorded.find("request")
    assert (request.status, request.attributes["cancelled_by"]) == ("cancelled", "client_disconnect")


def test_a_request_that_is_called_off_is_cancelled(tracer: StageTracer, recorded: RecordedStages) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
        app = EvalVaultMiddleware(slow, tracer, request_stage=True)
        task = asyncio.ensure_future(app(scope, slow, slow))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    request = recorded.find("request")
    assert (request.status, request.attributes["cancelled_by"]) == ("cancelled", "CancelledError")


def test_lifespan_and_unknown_protocols_are_none_of_our_business(tracer: StageTracer, recorded: RecordedStages) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    for kind in ("lifespan", "something else"):
        arguments: Any = ({"type": kind}, object(), object())
        asyncio.run(EvalVaultMiddleware(app, tracer, request_stage=True)(*arguments))
        assert seen.pop() == arguments
        assert arguments[0] == {"type": kind}


def test_where_nothing_is_recorded_the_app_is_called_as_if_nothing_were_there() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    with StageTracer("r", "http://127.0.0.1:1", enabled=False) as tracer:
        arguments: Any = ({"type": "http", "path": "/"}, object(), object())
        asyncio.run(EvalVaultMiddleware(app, tracer, request_stage=True)(*arguments))
    assert seen == [arguments]
    assert arguments[0] == {"type": "http", "path": "/"}


def test_the_packages_own_functions_record_if_no_tracer_is_given(recorded: RecordedStages) -> None:
    import evalvault_sdk

    ask(EvalVaultMiddleware(answering(lambda: evalvault_sdk.record_stage("x")), request_stage=True))
    assert recorded.outline() == "request\n  x"


def test_a_mounted_app_with_the_same_middleware_has_no_second_trace(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    def endpoint() -> None:
        tracer.record_stage("x")

    app = FastAPI()
    app.get("/items/{item}")(endpoint)
    inner = EvalVaultMiddleware(app, tracer, request_stage=True)
    outer = Starlette(routes=[Mount("/tenants/{tenant}", app=inner)])
    assert ask(EvalVaultMiddleware(outer, tracer, request_stage=True), "/tenants/kim/items/7")[0]["status"] == 200
    assert recorded.outline() == "request\n  x"
    assert recorded.find("request").attributes["route"] == "/tenants/{tenant}/items/{item}"


def test_the_route_is_what_the_program_wrote_whatever_it_is_included_in(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    router, sub = APIRouter(), FastAPI()

    def endpoint() -> str:
        return "done"

    router.get("/files/{path:path}/of/{number}")(endpoint)
    sub.get("/items/{number}")(endpoint)
    app = FastAPI()
    app.include_router(router, prefix="/v1/{tenant}")
    app.mount("/sub", sub)
    app.add_middleware(EvalVaultMiddleware, tracer=tracer, request_stage=True)
    for path in ("/v1/kim/files/a/b/c/of/3", "/sub/items/3", "/nowhere"):
        ask(app, path)
    assert [event.attributes.get("route") for event in recorded.events] == [
        "/v1/{tenant}/files/{path}/of/{number}",
        "/sub/items/{number}",
        None,
    ]
    assert recorded.events[-1].attributes["path"] == "/nowhere"


# -- a real server ------------------------------------------------------------------------------------


class Service:
    """A FastAPI app under uvicorn."""

    def __init__(self, tracer: StageTracer, **options: Any) -> None:
        self.app = FastAPI()
        self.app.add_middleware(EvalVaultMiddleware, tracer=tracer, **options)
        self._port = free_port()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        assert self._server is not None
        self._server.run()

    def address(self, path: str, scheme: str = "http") -> str:
        if self._server is None:
            config = uvicorn.Config(self.app, port=self._port, log_level="critical", loop="asyncio")
            server = self._server = uvicorn.Server(config)
            self._thread.start()
            wait_for(lambda: server.started)
        return f"{scheme}://127.0.0.1:{self._port}{path}"

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.address(path), timeout=30, **options)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(20)
            assert not self._thread.is_alive()


@pytest.fixture
def service(tracer: StageTracer, recorded: RecordedStages) -> Iterator[Service]:
    running = Service(tracer, request_stage=True)
    yield running
    running.stop()


@pytest.mark.parametrize("other_middleware", ["none", "around", "inside"])
def test_handlers_streams_and_background_tasks_are_below_their_request(
    tracer: StageTracer, recorded: RecordedStages, service: Service, other_middleware: str
) -> None:
    app = service.app

    def note(name: str) -> None:
        tracer.record_stage(name)

    @app.get("/sync")
    def sync_handler(tasks: BackgroundTasks) -> str:
        note("handler")
        tasks.add_task(note, "background")
        return threading.current_thread().name

    @app.get("/async")
    async def async_handler(tasks: BackgroundTasks) -> str:
        note("handler")
        tasks.add_task(note, "background")
        return "done"

    def sync_stream() -> Iterator[str]:
        for number in range(3):
            note(f"item {number}")
            yield "x"

    async def async_stream() -> AsyncIterator[str]:
        for number in range(3):
            note(f"item {number}")
            yield "x"

    @app.get("/stream/{kind}")
    def streaming(kind: str) -> StreamingResponse:
        return StreamingResponse(sync_stream() if kind == "sync" else async_stream())

    async def dispatch(request: Request, call_next: Any) -> Any:
        if other_middleware == "around":
            return await call_next(request)
        with tracer.stage("middleware"):
            return await call_next(request)

    if other_middleware != "none":
        place = 0 if other_middleware == "around" else 1
        app.user_middleware.insert(place, Middleware(BaseHTTPMiddleware, dispatch=dispatch))
    for path in ("/sync", "/async", "/stream/sync", "/stream/async"):
        service.get(path).raise_for_status()
    count = 2 * 3 + 2 * 4 + 4 * (other_middleware == "inside")
    wait_for(lambda: len(recorded) == count)
    assert [event.status for event in recorded.events] == ["success"] * count
    for root in recorded.roots:
        assert root.stage_type == "request"
        assert len({stage.event.trace_id for stage in root._all()}) == 1
        below = [stage.stage_type for stage in root._all() if stage.stage_type not in ("request", "middleware")]
        expected = (
            ["handler", "background"] if "stream" not in root.attributes["route"] else ["item 0", "item 1", "item 2"]
        )
        assert below == expected
    assert {root.attributes["route"] for root in recorded.roots} == {"/sync", "/async", "/stream/{kind}"}


def test_the_stage_ends_with_the_last_byte_and_not_with_what_is_done_after_it(
    tracer: StageTracer, recorded: RecordedStages, service: Service
) -> None:
    may_end = threading.Event()

    @service.app.get("/")
    def handler(tasks: BackgroundTasks) -> str:
        tasks.add_task(may_end.wait, 20)
        return "done"

    service.get("/")
    wait_for(lambda: len(recorded) == 1)  # while the background task runs
    may_end.set()
    assert recorded.find("request").status == "success"


def test_a_hundred_requests_at_once_do_not_see_each_other(
    tracer: StageTracer, recorded: RecordedStages, service: Service
) -> None:
    @service.app.get("/sync/{number}")
    def sync_handler(number: int) -> None:
        with tracer.stage("outer", attributes={"number": number}):
            time.sleep(0.005)
            tracer.record_stage("inner", attributes={"number": number})

    @service.app.get("/async/{number}")
    async def async_handler(number: int) -> None:
        with tracer.stage("outer", attributes={"number": number}):
            await asyncio.sleep(0.005)
            tracer.record_stage("inner", attributes={"number": number})

    service.address("/")
    paths = [f"/{kind}/{number}" for number in range(50) for kind in ("sync", "async")]
    threads = [threading.Thread(target=service.get, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: len(recorded) == 300)
    roots = recorded.roots
    assert {root.outline() for root in roots} == {"request\n  outer\n    inner"}
    assert len({root.event.trace_id for root in roots}) == 100
    for root in roots:
        (outer,) = root.children
        assert outer.attributes == outer.children[0].attributes


def test_what_a_handler_raises_is_answered_by_the_framework_and_recorded_as_it_was(
    tracer: StageTracer, recorded: RecordedStages, service: Service
) -> None:
    @service.app.get("/")
    def handler(status: int) -> None:
        if status == 500:
            raise LookupError("no index")
        raise HTTPException(status)

    assert [service.get("/", params={"status": status}).status_code for status in (500, 418, 503)] == [500, 418, 503]
    wait_for(lambda: len(recorded) == 3)
    by_error = [event.attributes.get("error", {}).get("type") for event in recorded.events]
    assert by_error == ["LookupError", None, "503"]


def test_a_client_of_a_real_server_that_leaves_a_stream_cancels_its_request(
    tracer: StageTracer, recorded: RecordedStages, service: Service
) -> None:
    @service.app.get("/")
    def handler() -> StreamingResponse:
        return StreamingResponse(tracer.stage("output")(endless)())

    with service.get("/", stream=True) as response:
        next(response.iter_content(1))
    wait_for(lambda: len(recorded) == 2)
    assert recorded.outline() == "request (cancelled)\n  output (cancelled)"


def test_a_websocket_is_one_trace_from_its_handshake_to_its_end(
    tracer: StageTracer, recorded: RecordedStages, service: Service
) -> None:
    @service.app.websocket("/chat/{room}")
    async def chat(websocket: WebSocket, room: str) -> None:
        if room == "closed":
            await websocket.close(1008)
            return
        await websocket.accept()
        async for question in websocket.iter_text():
            with tracer.stage("output"):
                await websocket.send_text(question.upper())
            if question == "fail":
                raise LookupError("no such room")

    with connect(service.address("/chat/a", "ws"), additional_headers={"traceparent": PARENT}) as socket:
        for question in ("one", "two"):
            socket.send(question)
            assert socket.recv() == question.upper()
    wait_for(lambda: len(recorded) == 3)
    assert recorded.outline() == "request\n  output\n  output"
    request = recorded.find("request")
    assert request.event.trace_id == PARENT.split("-")[1]
    assert request.attributes == {"route": "/chat/{room}", "status_code": 101, "close_code": 1000}
    recorded.clear()
    with connect(service.address("/chat/a", "ws")) as socket:
        socket.send("fail")
        assert socket.recv() == "FAIL"
    wait_for(lambda: len(recorded) == 2)
    assert recorded.find("request").attributes["error"]["type"] == "LookupError"
    recorded.clear()
    with pytest.raises(Exception, match="403"), connect(service.address("/chat/closed", "ws")):
        pass
    wait_for(lambda: len(recorded) == 1)
    assert recorded.find("request").attributes["status_code"] == 403


@pytest.mark.parametrize(
    ("code", "status"), [(1000, "success"), (1001, "success"), (1006, "cancelled"), (1011, "error")]
)
def test_a_websocket_ends_as_its_close_code_says(
    tracer: StageTracer, recorded: RecordedStages, code: int, status: str
) -> None:
    # Servers differ in the code that they give for a broken connection: uvicorn has 1005 or 1006.
    app = FastAPI()
    app.add_middleware(EvalVaultMiddleware, tracer=tracer, request_stage=True)

    @app.websocket("/")
    async def chat(websocket: WebSocket) -> None:
        await websocket.accept()
        if code == 1011:
            await websocket.close(code)
        else:
            await websocket.receive_text()  # which raises

    told: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": code}]
    with contextlib.suppress(WebSocketDisconnect):
        ask(app, type="websocket", receive=told)
    request = recorded.find("request")
    assert (request.status, request.attributes["close_code"]) == (status, code)


def test_a_file_that_the_server_sends_itself_completes_the_answer(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": "/a.pdf"})

    ask(EvalVaultMiddleware(app, tracer, request_stage=True))
    assert recorded.find("request").status == "success"


def test_what_is_completed_after_the_client_left_is_cancelled(tracer: StageTracer, recorded: RecordedStages) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"", "more_body": False})  # as BaseHTTPMiddleware does

    ask(EvalVaultMiddleware(app, tracer, request_stage=True), receive=[{"type": "http.disconnect"}])
    assert recorded.find("request").status == "cancelled"
