"""A server that is treated badly: it goes on serving, within bounds, and keeps what it acknowledged."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import requests

from tests.server.wire import connect, exchange, memory_mib, request, seconds_of, status_of, stream, with_variables
from tests.support import LiveServer, live_server

EVENT = json.dumps({"run_id": "r", "stage_type": "x"}).encode()


def test_a_thousand_connections_that_say_little_or_nothing_cost_little(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        before = memory_mib(server)
        connections = [connect(server) for _ in range(1000)]
        for connection in connections[:300]:
            connection.sendall(b"GET /health HTTP/1.1\r\nHo")
        for connection in connections[300:400]:
            connection.sendall(request(b"{", Content_Length="1000"))
        for connection in connections[400:500]:
            connection.shutdown(1)
        assert seconds_of(lambda: server.post(EVENT).raise_for_status()) < 5
        assert memory_mib(server) < before + 60
        for connection in connections:
            connection.close()
        assert server.post(EVENT).status_code == 200


def test_bodies_that_are_too_much_together_are_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variables(monkeypatch, EVALVAULT_SERVER_MAX_WAITING_BYTES=16 << 20)
    with live_server(tmp_path / "x.db") as server:
        events = [
            {"run_id": "r", "stage_type": "x", "stage_id": f"{n}", "attributes": {"t": "보험" * 1000}}
            for n in range(500)
        ]
        body = json.dumps({"events": events}, ensure_ascii=False).encode()
        answers: list[requests.Response] = []
        senders = [threading.Thread(target=lambda: answers.append(server.post(body))) for _ in range(60)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        found = Counter(answer.status_code for answer in answers)
        assert set(found) <= {200, 503}
        assert found[200] > 0
        assert {answer.headers.get("Retry-After") for answer in answers if answer.status_code == 503} <= {"2"}
        assert memory_mib(server, "VmHWM") < 400
        assert server.post(body).status_code == 200


def test_a_body_that_does_not_come_is_answered_and_its_place_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variables(monkeypatch, EVALVAULT_SERVER_BODY_TIMEOUT_S=1, EVALVAULT_SERVER_MAX_WAITING_REQUESTS=5)
    with live_server(tmp_path / "x.db") as server:
        slow = [connect(server) for _ in range(5)]
        for connection in slow:
            connection.sendall(request(EVENT[:5], Content_Length="1000"))
        for connection in slow:
            assert status_of(connection.recv(1000)) == 408
            connection.close()
        assert server.post(EVENT).status_code == 200


def test_a_body_without_end_is_refused_and_never_held(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server, connect(server) as connection:
        connection.sendall(request(Content_Length="", Transfer_Encoding="chunked"))
        with contextlib.suppress(OSError):  # it may well close before it is told all
            for _ in range(64):
                connection.sendall(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            assert status_of(connection.recv(1000)) == 413
        assert memory_mib(server, "VmHWM") < 150


def test_what_is_no_http_is_refused_and_says_nothing_of_itself(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        for said in (
            b"\x16\x03\x01\x02\x00\x01" + bytes(100),
            b"FOO / HTTP/1.1\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            bytes(99),
        ):
            assert exchange(server, said).startswith(b"HTTP/1.1 400 ")
        for method in ("OPTIONS", "TRACE", "PATCH", "PUT", "HEAD"):
            sent = request(path="/api/stage/runs", method=method, Connection="close")
            assert status_of(exchange(server, sent)) == 405
        server.stop()
        assert "Traceback" not in server.db.with_suffix(".log").read_text()


def test_a_server_that_is_told_to_end_under_load_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    ended = threading.Event()

    def post(server: LiveServer, worker: int) -> None:
        step = 0
        while not ended.is_set():
            step += 1
            names = [f"{worker}-{step}-{number}" for number in range(50)]
            try:
                answer = server.post(
                    {"events": [{"run_id": "r", "stage_type": "x", "stage_id": name} for name in names]}
                )
            except requests.RequestException:
                continue
            assert answer.status_code in (200, 503)
            if answer.status_code == 200:
                acknowledged.update(names)

    with live_server(tmp_path / "x.db") as server, stream(server):
        workers = [threading.Thread(target=post, args=(server, number)) for number in range(4)]
        for worker in workers:
            worker.start()
        time.sleep(1)
        assert seconds_of(lambda: server.stop(signal.SIGTERM)) < 10
        ended.set()
        for worker in workers:
            worker.join()
    with closing(sqlite3.connect(tmp_path / "x.db")) as db:
        stored = {name for (name,) in db.execute("SELECT stage_id FROM stage_events")}
    assert len(acknowledged) > 500
    assert acknowledged <= stored
