"""A server among pages of elsewhere, readers that take nothing, bombs, slow senders: it keeps serving, and ends."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests
import trustme
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as connect_websocket

from evalvault_sdk.server import create_app
from evalvault_sdk.server.store import MemoryStore
from tests.server.test_routes import ask_app
from tests.server.test_security import TLSServer, bearer
from tests.server.wire import connect, memory_mib, request, stream, with_variables
from tests.support import LiveServer, live_server

if TYPE_CHECKING:
    from tests.postgres import Postgres

EVENT = json.dumps({"run_id": "r", "stage_type": "x", "stage_id": "s"}).encode()


@contextlib.contextmanager
def unread(server: LiveServer, count: int, sent: bytes) -> Iterator[None]:
    """Send `sent` over many connections, and take no answer."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(server, receive_buffer=4096)).sendall(sent)
        yield


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_a_web_page_of_elsewhere_cannot_follow_runs_over_a_websocket(server: LiveServer, origin: str) -> None:
    url = f"ws://127.0.0.1:{server.port}/api/stage/live?cursor=0"
    with pytest.raises(InvalidStatus), connect_websocket(url, additional_headers={"Origin": origin}):
        pass


@pytest.mark.parametrize("what", ["one header of many bytes", "many headers", "a long path"])
def test_a_head_without_end_is_refused_and_never_held(tmp_path: Path, what: str) -> None:
    with live_server(tmp_path / "x.db") as server, connect(server) as connection:
        before = memory_mib(server)
        connection.sendall(b"GET /" if what == "a long path" else b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        piece = b"a: b\r\n" * 10_000 if what == "many headers" else b"a" * 60_000
        with pytest.raises(OSError):  # noqa: PT011, PT012 - reset, or a broken pipe: the server does not listen any more
            for _ in range(500):
                connection.sendall(piece)
            assert memory_mib(server, "VmHWM") < before + 20


def test_answers_that_nobody_takes_are_bounded(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        for _ in range(10):
            server.post({"events": [{"run_id": "r", "stage_type": "x", "attributes": {"t": "a" * (1 << 20)}}]})
        before = memory_mib(server)
        with unread(server, 40, request(path="/api/stage/events/r", method="GET")):
            time.sleep(3)
            grown = memory_mib(server) - before
        assert grown < 256  # 40 answers of 10 MiB


def test_streams_of_large_events_that_nobody_takes_are_bounded(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        for _ in range(60):
            server.post({"events": [{"run_id": "r", "stage_type": "x", "attributes": {"t": "a" * (1 << 20)}}]})
        before = memory_mib(server)
        with unread(server, 10, request(path="/api/stage/live?cursor=0", method="GET")):
            time.sleep(4)
            grown = memory_mib(server) - before
        assert grown < 256  # a page of 60 MiB each


def test_lines_that_end_in_carriage_returns_are_counted_before_they_become_a_list(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        bomb = gzip.compress(b"  \r" * 11_000_000)  # 32 KB on the wire
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        assert server.post(bomb, headers=headers).status_code == 413
        assert memory_mib(server, "VmHWM") < 300


def test_many_small_values_cost_no_more_memory_than_many_containers(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        texts = b'"ab",' * 6_500_000
        bomb = gzip.compress(EVENT[:-1] + b', "attributes": {"a": [' + texts + b"0]}}")
        headers = {"Content-Encoding": "gzip"}
        senders = [threading.Thread(target=server.post, args=(bomb,), kwargs={"headers": headers}) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        assert memory_mib(server, "VmHWM") < 1000


def test_slow_bodies_do_not_keep_others_from_storing(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        with unread(server, 300, request(b"{", Content_Length="1000")):
            time.sleep(0.5)
            answer = server.post(EVENT)
        assert answer.status_code == 200


def test_events_that_a_stuck_database_keeps_are_counted_as_waiting_bytes() -> None:
    release = threading.Event()

    class Stuck(MemoryStore):
        def save(self, events: Any) -> Any:
            release.wait(30)
            return super().save(events)

    app = create_app(store=Stuck(), store_timeout_s=0.1)
    services = app.state.evalvault

    async def post_all() -> None:
        for _ in range(10):
            await ask_app(app, {"run_id": "r", "stage_type": "x", "attributes": {"a": "x" * 1_000_000}})

    try:
        asyncio.run(post_all())
        assert services.commit.waiting_events == 0 or services.bodies.bytes > 0
    finally:
        release.set()
        services.close()


def ends_within(server: LiveServer, seconds: float) -> bool:
    """Return whether a server that was told to end has ended by then; then it has in any case."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.process.wait(seconds)
    ended = server.process.poll() is not None
    server.stop(signal.SIGKILL)
    return ended


@pytest.mark.parametrize("what", ["a stream", "an export"])
def test_a_reader_that_takes_nothing_does_not_hold_up_the_end(tmp_path: Path, what: str) -> None:
    with live_server(tmp_path / "x.db") as server:
        events = [{"run_id": "r", "stage_type": "x", "attributes": {"t": "a" * 20_000}} for _ in range(500)]
        for _ in range(2):
            server.post({"events": events})
        path = "/api/stage/live?cursor=0" if what == "a stream" else "/api/stage/export/r"
        with connect(server, receive_buffer=4096) as reader:
            reader.sendall(request(path=path, method="GET"))
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            assert ends_within(server, 8)


def test_a_connection_kept_open_over_tls_does_not_hold_up_the_end(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    TLSServer.ca = str(tmp_path / "ca.pem")
    server = TLSServer(tmp_path / "x.db", "--tls-cert", str(tmp_path / "both.pem"))
    with requests.Session() as session:  # as a client has it that keeps its connection
        session.get(f"{server.url}/health", verify=TLSServer.ca, timeout=10)
        server.process.send_signal(signal.SIGTERM)
        assert ends_within(server, 8)


def test_what_a_browser_says_when_it_comes_again_wins_over_where_it_began(server: LiveServer) -> None:
    names = [f"again-{number}" for number in range(10)]
    server.post({"events": [{"run_id": "again", "stage_type": "x", "stage_id": name} for name in names]})
    with stream(server, "?run_id=again&cursor=0") as opened:
        places = [number for kind, number, _ in zip_first(opened.messages(), 11) if kind == "stage"]
    # new EventSource("/api/stage/live?run_id=again&cursor=0") keeps its address, and adds Last-Event-ID.
    with stream(server, "?run_id=again&cursor=0", Last_Event_ID=str(places[6])) as opened:
        got = [data["stage_id"] for kind, _, data in zip_first(opened.messages(), 4) if kind == "stage"]
    assert got == names[7:]


def zip_first(messages: Any, count: int) -> list[Any]:
    return [next(messages) for _ in range(count)]


def test_the_log_holds_no_run_of_a_websocket(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--token", "t") as server:
        url = f"ws://127.0.0.1:{server.port}/api/stage/live?run_id=secret-run"
        with connect_websocket(url, additional_headers=bearer("t")) as socket:
            socket.recv(timeout=10)
        server.stop()
        assert "secret" not in server.db.with_suffix(".log").read_text()


def test_a_websocket_that_is_refused_is_no_error_in_the_log(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--token", "t") as server:
        with pytest.raises(InvalidStatus), connect_websocket(f"ws://127.0.0.1:{server.port}/api/stage/live"):
            pass
        server.stop()
        assert "ERROR" not in server.db.with_suffix(".log").read_text()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "events/a%00"),
        ("GET", "export/a%00"),
        ("GET", "summary/a%00"),
        ("DELETE", "runs/a%00"),
        ("POST", "metrics/a%00"),
        ("GET", "traces/r?status=%00"),
        ("GET", "metrics/r?stage_id=%00"),
        ("GET", "metrics/r?stored=1&metric_name=%00"),
        ("GET", "events/r?since=2026-01-01T00:00:00%2B23:59"),
    ],
)
def test_postgresql_is_not_asked_what_it_cannot_be_asked(
    tmp_path: Path, postgres: Postgres, method: str, path: str
) -> None:
    with live_server(tmp_path / "x.db", "--db", postgres.new_database()) as server:
        server.post(EVENT).raise_for_status()
        answer = requests.request(method, f"{server.url}/api/stage/{path}", timeout=10)
        assert answer.status_code < 500, answer.text


def test_a_rate_limit_is_not_evaded_by_a_header(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--rate-limit", "0.1") as server:
        answers = [
            requests.get(f"{server.url}/api/stage/runs", headers={"X-Forwarded-For": f"10.0.0.{n}"}, timeout=10)
            for n in range(5)
        ]
        assert [answer.status_code for answer in answers].count(429) == 4


def test_wrong_tokens_are_limited_too(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--rate-limit", "1", "--token", "t") as server:
        answers = [
            requests.get(f"{server.url}/api/stage/runs", headers=bearer(f"guess-{n}"), timeout=10) for n in range(30)
        ]
        assert {answer.status_code for answer in answers} == {401, 429}


def test_a_body_that_can_never_be_taken_is_not_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variables(monkeypatch, EVALVAULT_SERVER_MAX_WAITING_BYTES=1 << 20)
    with live_server(tmp_path / "x.db") as server:
        answer = server.post({"run_id": "r", "stage_type": "x", "attributes": {"a": "x" * (3 << 20)}})
        assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/v1/traces", "/api/v1/ingest/otel-traces"])
def test_a_body_of_spans_that_is_no_object_is_refused(server: LiveServer, path: str) -> None:
    answer = requests.post(
        f"{server.url}{path}", data=b"null", headers={"Content-Type": "application/json"}, timeout=10
    )
    assert answer.status_code == 400


def test_a_request_whose_sender_has_nothing_more_to_say_is_answered(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(request(EVENT))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_blank_lines_are_not_counted_as_events(server: LiveServer) -> None:
    lines = [EVENT.replace(b'"s"', b'"s%d"' % number) for number in range(8000)]
    headers = {"Content-Type": "application/x-ndjson"}
    answer = server.post(b"\n\n\n".join(lines), headers=headers)
    assert answer.json().get("stored") == 8000, answer.text


def test_what_comes_after_a_body_was_refused_is_not_taken_for_ever(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(request(Content_Length="", Transfer_Encoding="chunked"))
        with pytest.raises(OSError):  # noqa: PT011, PT012 - reset, or a broken pipe: the server does not listen any more
            for _ in range(200):
                connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
