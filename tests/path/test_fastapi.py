"""A service with FastAPI under uvicorn, whose endpoints, dependencies, streams and background tasks are stages."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from evalvault_sdk import trace_headers
from evalvault_sdk.capture.context import open_scope
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stages import Stages
from tests.support import ListSink, free_port, wait_for


class Service:
    """The app of a test, run for as long as the test needs it."""

    def __init__(self) -> None:
        self.sink = ListSink()
        self.tracer = Stages(Recorder("run", self.sink))
        self.app = FastAPI()
        self.said: list[str] = []
        self._port = free_port()
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        assert self._server is not None
        self._server.run()

    def get(self, path: str, **options: Any) -> requests.Response:
        if self._server is None:
            # asyncio: with uvloop nothing differs, but it need not be there.
            config = uvicorn.Config(self.app, port=self._port, log_level="critical", loop="asyncio", lifespan="off")
            server = self._server = uvicorn.Server(config)
            self._thread.start()
            wait_for(lambda: server.started)
        return requests.get(f"http://127.0.0.1:{self._port}{path}", timeout=30, **options)

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(20)
            assert not self._thread.is_alive()

    def only(self, stage_type: str) -> dict[str, Any]:
        """Return the only event of a type, which may come after the response."""
        wait_for(lambda: any(event["stage_type"] == stage_type for event in self.sink.events))
        (event,) = [event for event in self.sink.events if event["stage_type"] == stage_type]
        return event


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.stop()
    assert running.sink.refused == []
    assert open_scope.get() is None


def test_decorated_endpoints_keep_their_signature(service: Service) -> None:
    app, tracer = service.app, service.tracer

    @app.get("/async/{key}")
    @tracer.stage("async endpoint", capture_args=True)
    async def async_endpoint(key: int, query: str, top_k: int = 5) -> dict[str, Any]:
        with tracer.stage("inner of async"):
            await asyncio.sleep(0)
        return {"key": key, "query": query, "top_k": top_k}

    @app.get("/sync/{key}")
    @tracer.stage("sync endpoint", capture_args=True, capture_result=True)
    def sync_endpoint(key: int, query: str, top_k: int = 5) -> dict[str, Any]:
        with tracer.stage("inner of sync"):
            service.said.append(threading.current_thread().name)
        return {"key": key, "query": query, "top_k": top_k}

    expected = {"key": 7, "query": "보험", "top_k": 3}
    for kind in ("async", "sync"):
        assert service.get(f"/{kind}/7", params={"query": "보험", "top_k": 3}).json() == expected
        assert service.get(f"/{kind}/x", params={"query": "보험"}).status_code == 422
        assert service.get(f"/{kind}/7").status_code == 422
        endpoint = service.only(f"{kind} endpoint")
        assert {name: endpoint["attributes"][name] for name in expected} == expected
        assert service.only(f"inner of {kind}")["parent_stage_id"] == endpoint["stage_id"]
    assert service.only("sync endpoint")["attributes"]["result"] == expected
    assert service.said[0].startswith("AnyIO worker thread")


def test_requests_at_once_do_not_see_each_other(service: Service) -> None:
    tracer = service.tracer

    @service.app.get("/async/{number}")
    @tracer.stage("endpoint", capture_args=True)
    async def async_endpoint(number: int) -> None:
        await asyncio.sleep(0.02)
        with tracer.stage("inner", attributes={"number": number}):
            await asyncio.sleep(0.01)

    @service.app.get("/sync/{number}")
    @tracer.stage("endpoint", capture_args=True)
    def sync_endpoint(number: int) -> None:
        time.sleep(0.02)
        with tracer.stage("inner", attributes={"number": number}):
            time.sleep(0.01)

    service.get("/")
    paths = [f"/{kind}/{number}" for number in range(20) for kind in ("async", "sync")]
    threads = [threading.Thread(target=service.get, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.sink.events) == 80
    endpoints = {event["stage_id"]: event for event in service.sink.events if event["stage_type"] == "endpoint"}
    assert len({event["trace_id"] for event in endpoints.values()}) == 40
    for event in service.sink.events:
        if event["stage_type"] == "inner":
            parent = endpoints[event["parent_stage_id"]]
            assert parent["trace_id"] == event["trace_id"]
            assert parent["attributes"]["number"] == event["attributes"]["number"]


def test_a_decorated_yield_dependency_is_cleaned_up_and_sees_exceptions(service: Service) -> None:
    tracer, said = service.tracer, service.said

    @tracer.stage("sync dependency")
    def sync_dependency(query: str) -> Iterator[str]:
        try:
            with tracer.stage("opening"):
                pass
            yield query
        except HTTPException as error:
            said.append(f"sync {error.status_code}")
            raise
        finally:
            said.append("sync closed")

    @tracer.stage("async dependency")
    async def async_dependency(query: str) -> AsyncIterator[str]:
        try:
            yield query
        except HTTPException as error:
            said.append(f"async {error.status_code}")
            raise
        finally:
            await asyncio.sleep(0)
            said.append("async closed")

    sync_one, async_one = Depends(sync_dependency), Depends(async_dependency)

    @service.app.get("/")
    @tracer.stage("endpoint")
    async def endpoint(fail: bool = False, one: str = sync_one, other: str = async_one) -> list[str]:
        assert said == []
        if fail:
            raise HTTPException(418)
        return [one, other]

    assert service.get("/", params={"query": "q"}).json() == ["q", "q"]
    for kind in ("sync", "async"):
        event = service.only(f"{kind} dependency")
        assert (event["status"], event["attributes"]["item_count"]) == ("success", 1)
        assert "parent_stage_id" not in event
    assert service.only("opening")["parent_stage_id"] == service.only("sync dependency")["stage_id"]
    assert sorted(said) == ["async closed", "sync closed"]
    said.clear()
    service.sink.put_events.clear()
    assert service.get("/", params={"query": "q", "fail": 1}).status_code == 418
    for stage_type in ("endpoint", "sync dependency", "async dependency"):
        event = service.only(stage_type)
        assert event["status"] == "error"
        assert event["attributes"]["error"]["type"].endswith("HTTPException")
    assert sorted(said) == ["async 418", "async closed", "sync 418", "sync closed"]


def streams(service: Service) -> dict[str, Any]:
    tracer = service.tracer

    @tracer.stage("stream")
    def sync_stream(count: int) -> Iterator[str]:
        try:
            with tracer.stage("step"):
                pass
            for number in range(count):
                yield f"{number}\n"
                if count > 1000:
                    time.sleep(0.002)
        finally:
            service.said.append("closed")

    @tracer.stage("stream")
    async def async_stream(count: int) -> AsyncIterator[str]:
        try:
            with tracer.stage("step"):
                pass
            for number in range(count):
                yield f"{number}\n"
                if count > 1000:
                    await asyncio.sleep(0.002)
        finally:
            service.said.append("closed")

    return {"sync": sync_stream, "async": async_stream}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_streaming_response_is_a_stage_below_the_one_that_asked_for_it(service: Service, kind: str) -> None:
    tracer, stream = service.tracer, streams(service)[kind]

    @service.app.get("/")
    @tracer.stage("endpoint")
    async def endpoint(count: int) -> StreamingResponse:
        with tracer.stage("part"):
            return StreamingResponse(stream(count))

    @service.app.get("/trace")
    def in_a_trace(count: int) -> StreamingResponse:
        with tracer.trace(session_id="s", trace_id="t" * 32):
            return StreamingResponse(stream(count))

    expected = "".join(f"{number}\n" for number in range(500))
    assert service.get("/", params={"count": 500}).text == expected
    event, part = service.only("stream"), service.only("part")
    assert (event["status"], event["attributes"]["item_count"]) == ("success", 500)
    assert event["parent_stage_id"] == part["stage_id"]
    assert part["parent_stage_id"] == service.only("endpoint")["stage_id"]
    assert service.only("step")["parent_stage_id"] == event["stage_id"]
    assert len({event["trace_id"] for event in service.sink.events}) == 1
    service.sink.put_events.clear()
    assert service.get("/trace", params={"count": 500}).text == expected
    event = service.only("stream")
    assert (event["trace_id"], event["metadata"]) == ("t" * 32, {"session_id": "s"})
    assert "parent_stage_id" not in event


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_client_that_leaves_in_the_middle_cancels_the_stream(service: Service, kind: str) -> None:
    stream = streams(service)[kind]

    @service.app.get("/")
    async def endpoint() -> StreamingResponse:
        return StreamingResponse(stream(1_000_000))

    with service.get("/", stream=True) as response:
        assert next(response.iter_lines()) == b"0"

    def was_closed() -> bool:
        gc.collect()  # Starlette leaves a generator that is not async to the garbage collector
        return bool(service.said)

    wait_for(was_closed)
    wait_for(lambda: len(service.sink.events) > 1)
    events = [event for event in service.sink.events if event["stage_type"] == "stream"]
    assert {event["status"] for event in events} == {"cancelled"}
    assert 1 <= events[0]["attributes"]["item_count"] < 1_000_000
    assert service.said == ["closed"]


def test_an_error_in_the_middle_of_a_stream_is_recorded(service: Service) -> None:
    @service.tracer.stage("stream")
    async def stream() -> AsyncIterator[str]:
        yield "a"
        raise LookupError("no more")

    @service.app.get("/")
    async def endpoint() -> StreamingResponse:
        return StreamingResponse(stream())

    with pytest.raises(requests.RequestException):
        service.get("/")
    event = service.only("stream")
    assert (event["status"], event["attributes"]["item_count"]) == ("error", 1)
    assert event["attributes"]["error"] == {"type": "LookupError", "message": "no more"}


def test_bound_background_tasks_are_below_the_request_that_left_them_behind(service: Service) -> None:
    tracer = service.tracer

    def work(stage_type: str) -> None:
        with tracer.stage(stage_type):
            pass

    async def async_work(stage_type: str) -> None:
        await asyncio.sleep(0.01)
        with tracer.stage(stage_type):
            pass

    @service.app.get("/")
    @tracer.stage("endpoint")
    async def endpoint(tasks: BackgroundTasks) -> str:
        with tracer.stage("part"):
            tasks.add_task(tracer.bind(work), "work")
            tasks.add_task(tracer.bind(async_work), "async work")
        tasks.add_task(work, "not bound")
        return "done"

    assert service.get("/").json() == "done"
    part = service.only("part")
    for stage_type in ("work", "async work"):
        event = service.only(stage_type)
        assert (event["parent_stage_id"], event["trace_id"]) == (part["stage_id"], part["trace_id"])
    assert "parent_stage_id" not in service.only("not bound")


def test_the_trace_of_a_request_is_taken_from_its_headers(service: Service) -> None:
    tracer = service.tracer

    async def endpoint(request: Request) -> dict[str, str]:
        headers = request.headers
        async with tracer.trace(traceparent=headers.get("traceparent"), tracestate=headers.get("tracestate")):
            with tracer.stage("callee"):
                return trace_headers()

    service.app.get("/")(endpoint)
    with tracer.stage("caller") as caller:
        handed_on = service.get("/", headers=trace_headers()).json()
    callee = service.only("callee")
    assert (callee["parent_stage_id"], callee["trace_id"]) == (caller.stage_id, caller.trace_id)
    assert handed_on["traceparent"] == f"00-{caller.trace_id}-{callee['span_id']}-01"
    assert service.get("/", headers={"traceparent": "00-broken"}).status_code == 200
