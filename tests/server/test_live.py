"""Following a run as it is stored: nothing lost, nothing twice, and nobody slowed down by a slow reader."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import requests
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

from tests.server.wire import connect, memory_mib, request, seconds_of, stream, with_variables
from tests.support import LiveServer, live_server, wait_for


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


def stages(run: str, *names: str, **fields: Any) -> dict[str, Any]:
    return {"events": [{"run_id": run, "stage_type": "x", "stage_id": name, **fields} for name in names]}


def websocket(server: LiveServer, query: str) -> ClientConnection:
    return connect_websocket(f"ws://127.0.0.1:{server.port}/api/stage/live{query}", max_queue=None)


def open_streams(server: LiveServer) -> float:
    lines = requests.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return float(next(line for line in lines if line.startswith("evalvault_server_live_streams ")).split()[1])


def unread_streams(server: LiveServer, count: int) -> list[socket.socket]:
    """Open streams of everything whose readers take nothing, half of them WebSockets."""
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": "A" * 22 + "==",
        "Sec_WebSocket_Version": "13",
    }
    opened = []
    for number in range(count):
        connection = connect(server, receive_buffer=4096)
        headers = upgrade if number % 2 else {}
        head = request(b"", path="/api/stage/live?cursor=0", method="GET", **headers)
        connection.sendall(head)
        opened.append(connection)
    return opened


def test_a_stream_begins_where_it_is_told_to(server: LiveServer, run: str) -> None:
    server.post(stages(run, "old"))
    with stream(server, f"?run_id={run}") as now, stream(server, f"?run_id={run}&cursor=0") as all_of_it:
        new, old = now.messages(), all_of_it.messages()
        assert [next(new)[0], next(old)[:2]] == ["ready", ("ready", 0)]
        server.post(stages(run, "new"))
        assert next(new)[2]["stage_id"] == "new"
        assert [next(old)[2]["stage_id"] for _ in range(2)] == ["old", "new"]
    with websocket(server, f"?run_id={run}&cursor=0") as reader:
        messages = [json.loads(reader.recv(timeout=10)) for _ in range(3)]
        assert messages[0]["ready"] is True
        assert [message["event"]["stage_id"] for message in messages[1:]] == ["old", "new"]


def test_what_comes_live_is_the_event_as_it_is_read(server: LiveServer, run: str) -> None:
    server.post(stages(run, "s", attributes={"질문": "보험\n금액\u2028"}, started_at="2026-01-07T10:00:00Z"))
    (read,) = server.get(f"events/{run}")["events"]
    with stream(server, f"?run_id={run}&cursor=0") as opened:
        assert list(itertools.islice(opened.messages(), 2))[1][2] == read


def test_readers_that_come_again_and_again_miss_nothing_and_get_nothing_twice(server: LiveServer, run: str) -> None:
    sent: list[str] = []
    written = threading.Event()

    def write(worker: int) -> None:
        for step in range(20):
            names = [f"{worker}-{step}-{number}" for number in range(7)]
            server.post(stages(run, *names)).raise_for_status()
            sent.extend(names)

    def wait_for_writers() -> None:
        for writer in writers:
            writer.join()
        written.set()

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for writer in writers:
        writer.start()
    threading.Thread(target=wait_for_writers).start()
    got: list[str] = []
    cursor = 0
    for turn in itertools.count():
        if written.is_set() and len(got) >= len(sent):
            break
        assert turn < 1000
        if turn % 3:
            header = {} if turn % 3 == 1 else {"Last_Event_ID": str(cursor)}
            query = f"&cursor={cursor}" if turn % 3 == 1 else ""
            with stream(server, f"?run_id={run}{query}", **header) as opened:
                opened.connection.settimeout(2)
                for kind, number, data in itertools.islice(opened.messages(), 1 + min(100, 4 * 140 - len(got))):
                    cursor = number if number is not None else cursor
                    got.extend([data["stage_id"]] if kind == "stage" else [])
        else:
            with websocket(server, f"?run_id={run}&cursor={cursor}") as reader:
                for _ in range(1 + min(100, 4 * 140 - len(got))):
                    message = json.loads(reader.recv(timeout=5))
                    cursor = int(message["cursor"] or cursor)
                    got.extend([message["event"]["stage_id"]] if "event" in message else [])
    assert len(got) == len(set(got)) == len(sent) == 4 * 140
    assert set(got) == set(sent)


@pytest.mark.parametrize("cursor", ["x", "-1", "", "1.5", "%00", "9" * 30])
def test_a_place_that_was_never_given_is_refused(server: LiveServer, cursor: str) -> None:
    answer = requests.get(f"{server.url}/api/stage/live?cursor={cursor}", timeout=10)
    assert (answer.status_code, answer.json()["details"].partition(":")[0]) == (422, "cursor")
    with stream(server, Last_Event_ID="x") as opened:
        assert opened.status == 422


def test_there_are_as_many_streams_as_are_allowed_and_readers_that_go_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_variables(monkeypatch, EVALVAULT_SERVER_MAX_LIVE_STREAMS=4)
    with live_server(tmp_path / "x.db") as server:
        with stream(server), stream(server), websocket(server, ""), websocket(server, ""):
            wait_for(lambda: open_streams(server) == 4)
            refused = requests.get(f"{server.url}/api/stage/live", timeout=10)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        wait_for(lambda: open_streams(server) == 0)
        gone = unread_streams(server, 4)
        wait_for(lambda: open_streams(server) == 4)
        for connection in gone:
            connection.close()
        wait_for(lambda: open_streams(server) == 0)


def test_readers_that_take_nothing_cost_little_memory_and_do_not_hold_up_storing(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        body = {"events": [{"run_id": "r", "stage_type": "x", "attributes": {"t": "a" * 2000}} for _ in range(500)]}

        def store() -> None:
            for _ in range(5):
                server.post(body).raise_for_status()

        store()
        alone_s = min(seconds_of(store), seconds_of(store))
        before = memory_mib(server)
        readers = unread_streams(server, 30)
        wait_for(lambda: open_streams(server) == 30)
        time.sleep(0.5)
        watched_s = min(seconds_of(store), seconds_of(store), seconds_of(store))
        assert memory_mib(server) - before < 30 * 8
        for reader in readers:
            reader.close()
    assert watched_s < 3 * alone_s + 0.5


def test_open_streams_end_when_the_server_does_and_their_readers_are_told(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server, stream(server) as events, websocket(server, "") as reader:
        messages = events.messages()
        next(messages)
        reader.recv(timeout=10)
        assert seconds_of(lambda: server.stop(signal.SIGTERM)) < 5
        assert list(messages) == []
        with pytest.raises(Exception, match=r"1001|1012"):
            reader.recv(timeout=10)


def test_a_stream_that_begins_beyond_the_end_begins_at_the_end(server: LiveServer) -> None:
    # As a browser does that comes again after the database was restored from a backup.
    with stream(server, "?run_id=beyond&cursor=999999999") as opened:
        messages = opened.messages()
        kind, place, _ = next(messages)
        assert (kind, int(str(place)) < 999_999_999) == ("ready", True)
        server.post({"run_id": "beyond", "stage_type": "x", "stage_id": "s1"})
        assert next(messages)[2]["stage_id"] == "s1"
