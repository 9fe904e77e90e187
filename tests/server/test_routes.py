"""The endpoints, asked over real HTTP of a server in a process of its own."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import signal
import socket
import sqlite3
import threading
import time
import uuid
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from evalvault_sdk import ConfigurationError
from evalvault_sdk.server import create_app, mount
from evalvault_sdk.server.store import SQLiteStore, open_store
from tests.support import LiveServer, live_server


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


def stage(run: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"run_id": run, "stage_type": "x", "stage_id": f"s{number}", **fields}


async def ask_app(app: Any, body: Any, method: str = "POST", path: str = "/api/stage/events") -> tuple[int, Any]:
    """Ask an ASGI app without a server."""
    sent: list[Any] = []
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(b"content-type", b"application/json")],
        "scheme": "http",
        "server": ("x", 80),
    }

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_one_event_is_stored_and_answered_as_the_plan_says(server: LiveServer, run: str) -> None:
    response = server.post(
        {
            "run_id": run,
            "stage_type": "query_rewrite",
            "stage_name": "query_rewriter_v2",
            "parent_stage_id": "input-123",
            "status": "success",
            "started_at": "2026-01-07T10:00:00Z",
            "finished_at": "2026-01-07T10:00:00.045Z",
            "duration_ms": 45.2,
            "attributes": {"original": "보험 보장금액은?", "rewritten": "보험 보장금액이 얼마인지 알려주세요"},
            "metadata": {"model": "gpt-4", "temperature": 0.7},
            "trace_id": "trace-456",
            "span_id": "span-789",
        }
    )
    assert response.status_code == 200
    answer = response.json()
    (stage_id,) = answer["stage_ids"]
    assert answer == {"stored": 1, "run_id": run, "stage_ids": [stage_id]}
    (event,) = server.get(f"events/{run}")["events"]
    assert event["stage_id"] == stage_id
    assert event["attributes"]["original"] == "보험 보장금액은?"
    assert event["started_at"] == "2026-01-07T10:00:00+00:00"


def test_a_batch_answers_with_the_first_run_and_the_ids_in_order(server: LiveServer, run: str) -> None:
    response = server.post({"events": [stage(run, 2), stage(run, 1), stage(f"{run}-b", 3)]})
    assert response.json() == {"stored": 3, "run_id": run, "stage_ids": ["s2", "s1", "s3"]}


def test_sending_again_stores_once(server: LiveServer, run: str) -> None:
    for _ in range(3):
        assert server.post({"events": [stage(run, 1), stage(run, 2)]}).json()["stored"] == 2
    assert server.get(f"events/{run}")["total"] == 2


BAD_EVENTS: list[tuple[dict[str, Any], str]] = [
    ({"run_id": None}, "run_id is required"),
    ({"stage_type": " "}, "stage_type is required and must not be empty"),
    ({"attempt": 0}, "attempt must be at least 1"),
    ({"duration_ms": -1}, "duration_ms must not be negative"),
    ({"started_at": "2026-01-07T10:00:01Z", "finished_at": "2026-01-07T10:00:00Z"}, "finished_at must not be before"),
    ({"attributes": [1]}, "attributes must be an object"),
    ({"started_at": "2026-02-30T00:00:00Z"}, "started_at is not a possible time"),
    ({"duration_ms": float("nan")}, "duration_ms must be a finite number"),
    ({"attributes": {"deep": [{"x": float("inf")}]}}, "attributes.deep[0].x must be a finite number"),
    ({"attributes": {"text": "\ud800"}}, "attributes.text holds a lone surrogate"),
    ({"input_ref": {"store": "s"}}, "input_ref.id is required"),
]


@pytest.mark.parametrize(("change", "details"), BAD_EVENTS)
def test_a_bad_event_is_named_and_its_neighbours_are_stored(
    server: LiveServer, run: str, change: dict[str, Any], details: str
) -> None:
    response = server.post({"events": [stage(run, 0), {**stage(run, 1), **change}, stage(run, 2)]})
    assert response.status_code == 207
    answer = response.json()
    assert (answer["stored"], answer["run_id"], answer["stage_ids"]) == (2, run, ["s0", "s2"])
    (rejected,) = answer["rejected"]
    assert (rejected["index"], rejected["error"]) == (1, "Invalid stage event")
    assert details in rejected["details"]
    assert server.get(f"events/{run}")["total"] == 2


@pytest.mark.parametrize(("change", "details"), BAD_EVENTS)
def test_a_bad_event_alone_is_answered_with_the_plans_error(
    server: LiveServer, run: str, change: dict[str, Any], details: str
) -> None:
    response = server.post({**stage(run), **change})
    assert response.status_code == 422
    answer = response.json()
    assert (answer["error"], answer["index"]) == ("Invalid stage event", 0)
    assert details in answer["details"]
    assert len(answer["rejected"]) == 1
    assert requests.get(f"{server.url}/api/stage/events/{run}", timeout=10).status_code == 404


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [126, 249, 250, 251, 252, 253, 254, 300, 900])
def test_nesting_that_could_not_be_given_back_is_not_taken(server: LiveServer, run: str, depth: int) -> None:
    deep = stage(run, 1, attributes={"a": nested(depth)})
    answer = server.post({"events": [stage(run, 0), deep, stage(run, 2)]}).json()
    assert answer["stored"] + len(answer.get("rejected", ())) == 3
    for rejected in answer.get("rejected", ()):
        assert (rejected["index"], rejected["stage_id"]) == (1, "s1")
        assert "attributes is nested too deeply" in rejected["details"]
    assert server.get(f"events/{run}")["total"] == answer["stored"]
    assert server.get(f"debug/{run}")["run_summary"]["total_events"] == answer["stored"]


def test_an_integer_beyond_all_floats_costs_its_own_event_only(server: LiveServer, run: str) -> None:
    body = json.dumps({"events": [stage(run, 0), stage(run, 1, attributes={"n": 7}), stage(run, 2)]})
    for digits, stored in ((25, 3), (5000, 2)):
        answer = server.post(body.replace('"n": 7', '"n": ' + "9" * digits).encode()).json()
        assert answer["stored"] == stored, answer
    exact = {"id": 1234567890123456789, "most": 2**64 - 1, "least": -(2**63)}
    beside_nan = json.dumps(
        {"events": [stage(run, 3, attributes=exact), stage(run, 4, attributes={"v": float("nan")})]}
    )
    assert server.post(beside_nan.encode()).json()["stored"] == 1
    assert [e["attributes"] for e in server.get(f"events/{run}")["events"] if e["stage_id"] == "s3"] == [exact]
    mixed = body.replace('"n": 7', '"n": ' + "9" * 25).replace(
        '"stage_id": "s2"', '"stage_id": "s2", "duration_ms": NaN'
    )
    answer = server.post(mixed.encode()).json()
    assert (answer["stored"], answer["rejected"][0]["index"], answer["rejected"][0]["stage_id"]) == (2, 2, "s2")
    server.get(f"events/{run}")


def test_an_event_with_huge_numbers_does_not_cost_its_run_the_report(server: LiveServer, run: str) -> None:
    server.post(stage(run, 1, stage_type="retrieval", attributes={"scores": [1e308, 1e308]}))
    server.post(stage(run, 2, stage_type="rerank", attributes={"input_count": 1e300, "output_count": 1}))
    server.get(f"metrics/{run}")
    server.get(f"debug/{run}")


@pytest.mark.parametrize("event", [None, 7, "text", [], [[]]])
def test_what_is_no_event_is_refused_where_it_stands(server: LiveServer, run: str, event: Any) -> None:
    answer = server.post({"events": [event, stage(run)]}).json()
    assert answer["stored"] == 1
    assert answer["rejected"][0]["index"] == 0
    assert "must be an object" in answer["rejected"][0]["details"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "Malformed JSON"),
        (b"{", 400, "line 1 column"),
        (b"\xff\xfe", 400, "Malformed JSON"),
        (b'{"events": [{"run_id": "r", ', 400, "Malformed JSON"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"a":' * 100_000, 400, "nested too deeply"),
        (b"[]", 422, "must be one event object"),
        (b"null", 422, "must be one event object"),
        (b"7", 422, "must be one event object"),
        (b"{}", 422, "run_id is required"),
        (b'{"events": []}', 422, "at least one event"),
        (b'{"events": {}}', 422, "must be a list"),
        (b'{"events": null}', 422, "must be a list"),
    ],
)
def test_a_bad_body_is_a_clear_error(server: LiveServer, body: bytes, status: int, words: str) -> None:
    response = server.post(body)
    assert response.status_code == status
    answer = response.json()
    assert set(answer) >= {"error", "details"}
    assert words in f"{answer['error']}: {answer['details']}"


def test_too_many_events_are_refused_with_the_number_that_is_allowed(server: LiveServer, run: str) -> None:
    response = server.post({"events": [stage(run, number) for number in range(100_000)]})
    assert response.status_code == 413
    answer = response.json()
    assert "100000" in answer["details"]
    assert answer["limit_events"] == 10_000
    assert server.post({"events": [stage(run, number) for number in range(10_000)]}).json()["stored"] == 10_000


def test_a_body_over_the_limit_is_refused_while_it_comes(server: LiveServer) -> None:
    response = server.post(b" " * (17 << 20))
    assert response.status_code == 413
    assert response.json()["limit_bytes"] == 16 << 20


def test_a_small_body_that_would_be_large_in_memory_is_refused_before_it_is_parsed(server: LiveServer) -> None:
    bomb = gzip.compress(b'{"events":[' + b"{}," * 5_000_000 + b"{}]}")
    response = server.post(bomb, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 413
    assert response.json()["limit_containers"] == 500_000
    peak_kib = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])  # type: ignore[index]
    assert peak_kib < 500 << 10


def test_gzip_is_understood_and_a_bomb_is_not_unpacked(server: LiveServer, run: str) -> None:
    packed = gzip.compress(json.dumps(stage(run)).encode())
    headers = {"Content-Encoding": "gzip"}
    assert server.post(packed, headers=headers).json()["stored"] == 1
    bomb = zlib.compressobj(9, wbits=31)
    small = b"".join(bomb.compress(b" " * (1 << 20)) for _ in range(1000)) + bomb.flush()
    response = server.post(small, headers=headers)
    assert (len(small) < 2 << 20, response.status_code) == (True, 413)
    assert response.json()["limit_bytes"] == 32 << 20
    halves = json.dumps(stage(run, 2)).encode()
    members = gzip.compress(halves[:20]) + gzip.compress(halves[20:])
    assert server.post(members, headers=headers).json()["stored"] == 1, "a gzip file may have several members"
    for body in (b"not gzip", packed[:-10], packed[:30], packed + b"garbage", gzip.compress(b"") * 100_000):
        response = server.post(body, headers=headers)
        assert response.status_code == 400
        assert "gzip" in response.json()["error"]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"Content-Type": "text/xml"}, "Content-Type must be application/json"),
        ({"Content-Type": ""}, "Content-Type must be application/json"),
        ({"Content-Encoding": "br"}, "Content-Encoding must be gzip, zstd, or absent"),
    ],
)
def test_what_is_not_understood_is_said(server: LiveServer, run: str, headers: dict[str, str], words: str) -> None:
    response = server.post(stage(run), headers=headers)
    assert response.status_code == 415
    assert words in response.json()["details"]


def test_the_content_type_may_name_its_charset(server: LiveServer, run: str) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert server.post(stage(run), headers=headers).status_code == 200


def test_events_are_listed_by_type_and_limit_in_order(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, n, stage_type="ab"[n % 2], trace_id=f"t{n % 2}") for n in range(250)]})
    page = server.get(f"events/{run}")
    assert (page["run_id"], page["total"], page["returned"], len(page["events"])) == (run, 250, 200, 200)
    page = server.get(f"events/{run}", stage_type=" A ", limit=3)
    assert (page["total"], page["returned"]) == (125, 3)
    assert [event["stage_id"] for event in page["events"]] == ["s0", "s2", "s4"]
    assert server.get(f"events/{run}", trace_id="t1", limit=1)["total"] == 125
    assert server.get(f"events/{run}", stage_type="none")["events"] == []


@pytest.mark.parametrize("limit", ["0", "-1", "many", "10001"])
def test_a_bad_query_is_named(server: LiveServer, run: str, limit: str) -> None:
    response = requests.get(f"{server.url}/api/stage/events/{run}", params={"limit": limit}, timeout=10)
    assert response.status_code == 422
    assert response.json()["details"].startswith("limit: ")


@pytest.mark.parametrize("what", ["events", "metrics", "summary", "debug"])
def test_a_run_without_events_is_not_found_on_every_read(server: LiveServer, what: str) -> None:
    response = requests.get(f"{server.url}/api/stage/{what}/nobody", timeout=10)
    assert response.status_code == 404
    assert response.json() == {
        "error": "Run not found",
        "details": "there are no stage events of the run 'nobody'",
    }


def test_metrics_are_found_by_stage_and_name(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, n, stage_type="retrieval", duration_ms=600 * n) for n in range(3)]})
    everything = server.get(f"metrics/{run}")
    assert (everything["total"], everything["returned"]) == (6, 6)
    (latency,) = server.get(f"metrics/{run}", stage_id="s1", metric_name="retrieval.latency_ms")["metrics"]
    assert latency == {
        "run_id": run,
        "stage_id": "s1",
        "metric_name": "retrieval.latency_ms",
        "score": 600.0,
        "threshold": 500.0,
        "passed": False,
        "evidence": {"duration_ms": 600.0, "comparison": "max"},
    }
    limited = server.get(f"metrics/{run}", limit=2)
    assert (limited["total"], limited["returned"]) == (6, 2)


def test_the_summary_is_the_contracts_and_longer_when_asked(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, n, stage_type="input", duration_ms=n) for n in range(1, 4)]})
    assert server.get(f"summary/{run}") == {
        "run_id": run,
        "total_events": 3,
        "stage_type_counts": {"input": 3},
        "stage_type_avg_durations": {"input": 2.0},
        "missing_required_stage_types": ["system_prompt", "retrieval", "output"],
    }
    assert server.get(f"summary/{run}", detail=True)["stage_types"]["input"]["p95_ms"] == 3.0


def test_the_report_is_to_be_had_as_json_and_as_markdown(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, 1, stage_type="output", duration_ms=9000, trace_id="t")]})
    report = server.get(f"debug/{run}")
    assert report["run_summary"]["total_traces"] == 1
    assert report["recommendations"][0].startswith("[p0_critical] generator:")
    response = requests.get(f"{server.url}/api/stage/debug/{run}", params={"format": "markdown"}, timeout=10)
    assert response.headers["Content-Type"] == "text/markdown; charset=utf-8"
    assert f"# Debug report: {run}" in response.text
    assert requests.get(f"{server.url}/api/stage/debug/{run}?format=pdf", timeout=10).status_code == 422


def test_a_run_id_with_any_character_can_be_read(server: LiveServer) -> None:
    for run in (f"실행 {uuid.uuid4()}", f"a%2F'\"?&#{uuid.uuid4()}", f"team/rag/{uuid.uuid4()}"):
        server.post(stage(run))
        assert server.get(f"events/{quote(run, safe='')}")["total"] == 1


def test_health_openapi_and_unknown_paths(server: LiveServer) -> None:
    assert requests.get(f"{server.url}/health", timeout=10).json()["status"] == "ok"
    schema = requests.get(f"{server.url}/openapi.json", timeout=10).json()
    post = schema["paths"]["/api/stage/events"]["post"]
    assert set(post["requestBody"]["content"]["application/json"]["examples"]) == {"one event", "a batch"}
    assert {"200", "207", "400", "413", "415", "422", "503"} <= set(post["responses"])
    for path in ("events", "metrics", "summary", "debug"):
        answers = schema["paths"][f"/api/stage/{path}/{{run_id}}"]["get"]["responses"]
        assert answers["200"]["content"]["application/json"]["example"]
        for status in ("401", "404", "422", "503"):
            assert answers[status]["content"]["application/json"]["schema"]["required"] == ["error", "details"]
    assert "HTTPValidationError" not in json.dumps(schema["paths"])
    docs = requests.get(f"{server.url}/docs", timeout=10).text
    assert not re.search(r"(src|href)=\"https?://", docs), "closed networks have no CDN"
    for asset in re.findall(r'(?:src|href)="(/[^"]+)"', docs):
        assert requests.get(f"{server.url}{asset}", timeout=10).ok
    nowhere = requests.get(f"{server.url}/api/stage/nowhere", timeout=10)
    assert (nowhere.status_code, nowhere.json()["error"]) == (404, "Not Found")
    wrong = requests.put(f"{server.url}/api/stage/events", timeout=10)
    assert (wrong.status_code, wrong.json()["error"]) == (405, "Method Not Allowed")


def test_a_token_is_asked_of_every_request(tmp_path: Path, run: str) -> None:
    with live_server(tmp_path / "x.db", "--token", "s3cret") as server:
        paths = ["events/r", "metrics/r", "summary/r", "debug/r"]
        assert (
            "HTTPBearer"
            in requests.get(f"{server.url}/openapi.json", timeout=10).json()["components"]["securitySchemes"]
        )
        bad_query = requests.get(f"{server.url}/api/stage/events/r?limit=x", timeout=10)
        assert bad_query.status_code == 401, "who may not ask is not told what is wrong with the question"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            refused = server.post(stage(run), headers=headers)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            for path in paths:
                url = f"{server.url}/api/stage/{path}"
                assert requests.get(url, headers=headers, timeout=10).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert server.post(stage(run), headers=right).status_code == 200
        assert requests.get(f"{server.url}/api/stage/summary/{run}", headers=right, timeout=10).ok
        assert requests.get(f"{server.url}/health", timeout=10).ok


def test_a_client_that_goes_away_in_the_middle_does_no_harm(server: LiveServer, run: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(
            b"POST /api/stage/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"run_id":'
        )
    assert server.post(stage(run)).status_code == 200


def test_nothing_of_the_content_is_logged(tmp_path: Path, run: str) -> None:
    with live_server(tmp_path / "x.db") as server:
        server.post({"events": [stage(run, 1, attributes={"query": "my secret"}), {"stage_type": "my secret"}]})
        server.post(b'{"my secret')
        server.get(f"debug/{run}")
        server.stop()
        assert "secret" not in server.db.with_suffix(".log").read_text()


def test_the_router_keeps_its_answers_in_another_app(tmp_path: Path, run: str) -> None:
    from fastapi import FastAPI, HTTPException

    store = open_store(str(tmp_path / "x.db"))
    app = FastAPI()
    mount(app, store=store, prefix="/evalvault", insecure=True)

    def refuse() -> None:
        raise HTTPException(401, "who are you?", {"WWW-Authenticate": "Bearer"})

    mount(app, store=store, prefix="/guarded", dependencies=[refuse])

    def ask(method: str, path: str, body: Any = None) -> Any:
        return ask_app(app, body, method, path)

    assert asyncio.run(ask("POST", "/evalvault/api/stage/events", stage(run)))[0] == 200
    assert asyncio.run(ask("GET", f"/evalvault/api/stage/summary/{run}"))[1]["total_events"] == 1
    assert asyncio.run(ask("GET", "/evalvault/api/stage/events/nobody"))[1]["error"] == "Run not found"
    status, answer = asyncio.run(ask("GET", f"/evalvault/api/stage/events/{run}?limit=x"))
    assert (status, answer["error"]) == (422, "Invalid request")
    status, answer = asyncio.run(ask("GET", f"/guarded/api/stage/summary/{run}"))
    assert (status, answer) == (401, {"error": "Unauthorized", "details": "who are you?"})
    store.close()


def test_create_app_serves_a_store_that_somebody_else_made(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "x.db"))
    app = create_app(store=store)
    assert "/api/stage/events" in app.openapi()["paths"]
    store.close()


def test_a_blank_token_guards_nothing_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="token is empty"):
        create_app(str(tmp_path / "x.db"), token=" ")


def test_a_failing_database_is_an_answer_and_a_line_in_the_log(tmp_path: Path, run: str) -> None:
    with live_server(tmp_path / "x.db") as server:
        server.post(stage(run))
        for file in tmp_path.glob("x.db*"):
            file.rename(f"{file}.away")
        response = server.post(stage(run))
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
        assert response.json()["error"] == "Database unavailable"
        assert requests.get(f"{server.url}/api/stage/summary/{run}", timeout=10).status_code == 503
        for file in tmp_path.glob("*.away"):
            file.rename(str(file).removesuffix(".away"))
        assert server.post(stage(run, 2)).status_code == 200
        assert server.get(f"events/{run}")["total"] == 2
        server.stop()
        assert "x.db failed" in server.db.with_suffix(".log").read_text()


def test_requests_beyond_what_may_wait_are_told_to_come_again(tmp_path: Path, run: str) -> None:
    store = open_store(str(tmp_path / "x.db"))
    app = create_app(store=store, max_waiting_requests=1)
    app.state.evalvault.bodies.requests = 1
    status, answer = asyncio.run(ask_app(app, stage(run)))
    assert (status, answer["error"]) == (503, "Overloaded")
    app.state.evalvault.bodies.requests = 0
    assert asyncio.run(ask_app(app, stage(run)))[0] == 200
    store.close()


def test_sigkill_under_load_costs_nothing_that_was_acknowledged(tmp_path: Path, run: str) -> None:
    acknowledged: set[str] = set()

    def post_until_it_dies(server: LiveServer, worker: int) -> None:
        for step in range(10_000):
            ids = [f"{worker}-{step}-{number}" for number in range(20)]
            try:
                response = server.post({"events": [stage(run) | {"stage_id": stage_id} for stage_id in ids]})
            except requests.RequestException:
                return
            if response.status_code == 200:
                acknowledged.update(ids)

    for _ in range(3):
        server = LiveServer(tmp_path / "x.db")
        threads = [threading.Thread(target=post_until_it_dies, args=(server, worker)) for worker in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        server.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert len(acknowledged) > 500
    with sqlite3.connect(tmp_path / "x.db") as db:
        stored = {stage_id for (stage_id,) in db.execute("SELECT stage_id FROM stage_events")}
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    assert acknowledged <= stored


def test_a_slow_database_does_not_hold_up_the_event_loop(tmp_path: Path, run: str) -> None:
    class Slow(SQLiteStore):
        def save(self, events: Any) -> Any:
            time.sleep(2)
            return super().save(events)

    store = Slow(tmp_path / "x.db")
    app = create_app(store=store)

    async def ask_both() -> tuple[float, float]:
        started = time.monotonic()
        posting = asyncio.create_task(ask_app(app, stage(run)))
        await asyncio.sleep(0.1)
        assert (await ask_app(app, None, "GET", "/health"))[0] == 200
        healthy_s = time.monotonic() - started
        assert (await posting)[0] == 200
        return healthy_s, time.monotonic() - started

    healthy_s, stored_s = asyncio.run(ask_both())
    assert healthy_s < 1.5 < 2 <= stored_s
    store.close()
