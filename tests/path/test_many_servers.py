"""Several server processes on one PostgreSQL, as behind a balancer: which of them is asked makes no difference."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests

from tests.postgres import Postgres
from tests.support import LiveServer, wait_for

CLIENTS = 16


@contextlib.contextmanager
def servers_on(url: str, folder: Path, number: int, *arguments: str) -> Iterator[list[LiveServer]]:
    """Servers that know of nothing but their database."""
    running: list[LiveServer] = []
    try:
        for index in range(number):
            running.append(LiveServer(folder / f"server-{index}.db", "--db", url, *arguments))
        yield running
    finally:
        for server in running:
            if server.process.poll() is None:
                server.stop()


class Client:
    """Sends numbered events in order, and any of them again at random: a request that failed, or an old one."""

    def __init__(self, name: str, run_id: str, ports: list[int], *, seed: int) -> None:
        self.name = name
        self.run_id = run_id
        self.ports = ports
        self.random = random.Random(seed)
        self.acknowledged = 0
        self.answers: Counter[int] = Counter()

    def event(self, number: int) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "stage_type": "x",
            "stage_id": f"{self.name}-{number}",
            "attributes": {"client": self.name, "number": number, "문자": "보험 " * (number % 7)},
        }

    def send(self, numbers: list[int], *, wait: bool = True) -> int:
        """Return the status; 0 where nothing is known."""
        body = json.dumps({"events": [self.event(number) for number in numbers]})
        connection = http.client.HTTPConnection("127.0.0.1", self.random.choice(self.ports), timeout=60)
        try:
            connection.request("POST", "/api/stage/events", body, {"Content-Type": "application/json"})
            if not wait:
                return 0
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()
        self.answers[answer.status] += 1
        if answer.status == 503:
            assert answer.headers["Retry-After"], said
        elif answer.status == 200:
            assert json.loads(said)["stage_ids"] == [self.event(number)["stage_id"] for number in numbers]
        return answer.status

    def run(self, batches: int, size: int) -> None:
        for batch in range(batches):
            numbers = list(range(batch * size, (batch + 1) * size))
            if self.random.random() < 0.2:
                self.send(numbers, wait=False)
            while self.send(numbers) != 200:
                time.sleep(0.05)
            self.acknowledged = numbers[-1] + 1
            if self.random.random() < 0.4:
                again = self.random.sample(range(self.acknowledged), min(self.acknowledged, size))
                self.send(again, wait=self.random.random() < 0.5)


class LiveReader:
    """Reads `GET /api/stage/live` from the beginning, in a thread."""

    def __init__(self, server: LiveServer, run_id: str) -> None:
        self.seen: list[str] = []
        query = {"cursor": "0", "run_id": run_id}
        self._answer = requests.get(f"{server.url}/api/stage/live", params=query, stream=True, timeout=30)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(requests.RequestException, AttributeError, ValueError):
            for line in self._answer.iter_lines(chunk_size=None):
                if line.startswith(b"data: {") and b"stage_id" in line:
                    self.seen.append(json.loads(line[6:])["stage_id"])

    def join(self) -> None:
        self._thread.join(20)
        self._answer.close()


def run_clients(run_id: str, ports: list[int], *, batches: int, size: int) -> list[Client]:
    clients = [Client(f"c{index}", run_id, ports, seed=index) for index in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(batches, size)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def exported(server: LiveServer, run_id: str) -> list[dict[str, Any]]:
    answer = requests.get(f"{server.url}/api/stage/export/{run_id}", params={"format": "jsonl"}, timeout=60)
    answer.raise_for_status()
    return [json.loads(line) for line in answer.content.splitlines()]


def check_exactly_once_in_order(events: list[dict[str, Any]], clients: list[Client]) -> None:
    found: dict[str, list[int]] = {client.name: [] for client in clients}
    for event in events:
        found[event["attributes"]["client"]].append(event["attributes"]["number"])
    for client in clients:
        assert found[client.name] == list(range(client.acknowledged))
        for event in events:
            if event["attributes"]["client"] == client.name:
                assert event.items() >= client.event(event["attributes"]["number"]).items()
                break


def until_still(count: Callable[[], int]) -> None:
    """Wait until a count has not changed for two seconds."""
    last, since = count(), time.monotonic()
    while time.monotonic() - since < 2:
        time.sleep(0.1)
        if (now := count()) != last:
            last, since = now, time.monotonic()


def test_two_servers_store_what_16_clients_resend_at_random_once_and_in_order(
    postgres: Postgres, tmp_path: Path
) -> None:
    run_id = f"run-{uuid.uuid4()}"
    with servers_on(postgres.new_database(), tmp_path, 2) as servers:
        clients = run_clients(run_id, [server.port for server in servers], batches=15, size=20)
        for server in servers:
            check_exactly_once_in_order(exported(server, run_id), clients)
        assert sum((client.answers for client in clients), Counter()).keys() <= {200, 503}


def test_several_workers_of_one_program_are_as_good_as_several_servers(postgres: Postgres, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4()}"
    with servers_on(postgres.new_database(), tmp_path, 1, "--workers", "2") as (server,):
        clients = run_clients(run_id, [server.port], batches=8, size=20)
        check_exactly_once_in_order(exported(server, run_id), clients)
        assert server.get(f"summary/{run_id}")["total_events"] == CLIENTS * 8 * 20


def test_a_worker_that_is_killed_is_replaced_and_nothing_acknowledged_is_lost(
    postgres: Postgres, tmp_path: Path
) -> None:
    run_id = f"run-{uuid.uuid4()}"
    with servers_on(postgres.new_database(), tmp_path, 1, "--workers", "2") as (server,):
        wait_for(lambda: len(workers_of(server)) == 2)
        first = workers_of(server)
        killer = threading.Timer(0.5, os.kill, (max(first), signal.SIGKILL))
        killer.start()
        clients = run_clients(run_id, [server.port], batches=25, size=20)
        killer.join()
        check_exactly_once_in_order(exported(server, run_id), clients)
        wait_for(lambda: len(workers_of(server)) == 2 and workers_of(server) != first)


def workers_of(server: LiveServer) -> set[int]:
    """Return the processes that serve: children of the one that was started, which run its program."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server.process.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_sigkill_of_a_server_under_load_costs_nothing_acknowledged_and_doubles_nothing(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run_id = f"run-{uuid.uuid4()}"
    database = request.getfixturevalue("postgres").new_database() if kind == "postgres" else str(tmp_path / "x.db")
    port = None
    clients: list[Client] = []
    sending: list[threading.Thread] = []
    for kill in range(3):
        server = LiveServer(tmp_path / "server.db", "--db", database, port=port)
        port = server.port
        if not clients:
            clients = [Client(f"c{index}", run_id, [port], seed=index) for index in range(6)]
            sending = [threading.Thread(target=client.run, args=(100, 20)) for client in clients]
            for thread in sending:
                thread.start()
        time.sleep(0.5 + 0.1 * kill)
        server.stop(signal.SIGKILL)
        assert any(client.acknowledged for client in clients)
    server = LiveServer(tmp_path / "server.db", "--db", database, port=port)
    for thread in sending:
        thread.join()
    check_exactly_once_in_order(exported(server, run_id), clients)
    server.stop()


def test_a_server_follows_what_another_one_stores(postgres: Postgres, tmp_path: Path) -> None:
    run_id = f"run-{uuid.uuid4()}"
    with servers_on(postgres.new_database(), tmp_path, 2) as (storing, following):
        reader = LiveReader(following, run_id)
        for number in range(30):
            assert storing.post({"run_id": run_id, "stage_type": "x", "stage_id": f"s{number}"}).status_code == 200
        wait_for(lambda: len(reader.seen) == 30)
        following.stop()
        reader.join()
        assert reader.seen == [f"s{number}" for number in range(30)]


def test_servers_that_start_at_once_on_an_empty_database_all_serve(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.new_database()
    running: list[LiveServer] = []
    starting = [
        threading.Thread(
            target=lambda index=index: running.append(LiveServer(tmp_path / f"server-{index}.db", "--db", url))
        )
        for index in range(4)
    ]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    try:
        assert len(running) == 4
        for number, server in enumerate(running):
            assert server.post({"run_id": "r", "stage_type": "x", "stage_id": f"s{number}"}).status_code == 200
        assert running[0].get("summary/r")["total_events"] == 4
    finally:
        for server in running:
            server.stop()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM evalvault_sdk_schema").fetchone() == (4,)
