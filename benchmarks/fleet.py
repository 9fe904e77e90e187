"""
Clients of a server, each in a process of its own, that send bodies made beforehand as fast as they are answered.

In:   orders, a line of JSON on standard input each: to which port, which run, how many requests of how many events.
Out:  "ready" once the bodies are made, and after the next line of input what it took, as a line of JSON.

A body is what the SDK sends: stages recorded with a tracer (`benchmarks.options.with_blocks`), a new id for each, and
gzip of its level. An answer other than "all stored" ends the process; "come again" is counted, and done.
"""

from __future__ import annotations

import gzip
import http.client
import json
import math
import subprocess
import sys
import time
from typing import Any

import attrs

from benchmarks.options import with_blocks
from benchmarks.workload import STAGES_PER_REQUEST
from evalvault_sdk import StageTracer
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome

_HEADERS = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
#: As in `evalvault_sdk.delivery.transport.http`.
_GZIP_LEVEL = 1


class Keeper:
    """Keeps what a tracer sends."""

    destination = "keeper"

    def __init__(self) -> None:
        self.events: list[bytes] = []

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Keep the events as they are encoded."""
        self.events += batch.events
        return Delivered()

    def close(self) -> None:
        """Do nothing."""

    def after_fork_in_child(self) -> None:
        """Do nothing."""


def recorded(count: int, run_id: str) -> list[bytes]:
    """Return `count` stages as a tracer encodes them."""
    keeper = Keeper()
    tracer = StageTracer(run_id, transport=keeper, durability="memory", max_queue_events=10**7, max_queue_bytes=1 << 32)
    request = with_blocks(tracer)
    for _ in range(math.ceil(count / STAGES_PER_REQUEST)):
        request()
    stats = tracer.shutdown(120)
    assert stats.complete, str(stats)
    return keeper.events[:count]


@attrs.frozen(kw_only=True)
class Ran:
    """What a fleet's sending amounted to."""

    events_per_s: float
    requests_per_s: float
    #: Of each request that was answered with "stored", in seconds.
    took: list[float]
    #: CPU that the clients took while they sent: what the server could not have.
    cpu_s: float
    #: How often the server said "come again".
    put_off: int


class Fleet:
    """Client processes, to be used again and again."""

    def __init__(self, size: int) -> None:
        command = [sys.executable, "-m", "benchmarks.fleet"]
        self._clients = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(size)
        ]

    def send(self, port: int, *, clients: int, batch: int, events: int, run_id: str) -> Ran:
        """Let some clients send about `events` together, the same number of requests each."""
        requests = max(1, round(events / batch / clients))
        order = {"port": port, "batch": batch, "requests": requests, "run_id": run_id}
        sending = self._clients[:clients]
        for client in sending:
            _say(client, json.dumps(order))
        for client in sending:
            _hear(client)
        for client in sending:
            _say(client, "go")
        answers: list[dict[str, Any]] = [json.loads(_hear(client)) for client in sending]
        elapsed = max(answer["ended"] for answer in answers) - min(answer["started"] for answer in answers)
        return Ran(
            events_per_s=requests * clients * batch / elapsed,
            requests_per_s=requests * clients / elapsed,
            took=[seconds for answer in answers for seconds in answer["took"]],
            cpu_s=sum(answer["cpu_s"] for answer in answers),
            put_off=sum(answer["put_off"] for answer in answers),
        )

    def close(self) -> None:
        """End the processes."""
        for client in self._clients:
            client.communicate()


def _say(client: subprocess.Popen[str], line: str) -> None:
    assert client.stdin is not None
    client.stdin.write(line + "\n")
    client.stdin.flush()


def _hear(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise SystemExit("a client failed: what it says is above")
    return line


def _bodies(batch: int, requests: int, run_id: str) -> list[bytes]:
    events = recorded(batch * requests, run_id)
    batches = (Batch(tuple(events[start : start + batch])) for start in range(0, len(events), batch))
    return [gzip.compress(one.body(), _GZIP_LEVEL) for one in batches]


def _send(port: int, bodies: list[bytes], batch: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.connect()
    took, put_off, started, cpu_s = [], 0, time.monotonic(), time.process_time()
    while bodies:
        asked = time.monotonic()
        connection.request("POST", "/api/stage/events", bodies[-1], _HEADERS)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status == 200 and text.startswith(b'{"stored":%d,' % batch):
            took.append(time.monotonic() - asked)
            bodies.pop()
        elif answer.status in (429, 503):
            put_off += 1
            time.sleep(0.1)
        else:
            raise SystemExit(f"{answer.status} {text[:200]!r}: this run does not count")
    cpu_s = time.process_time() - cpu_s
    return {"started": started, "ended": time.monotonic(), "cpu_s": cpu_s, "took": took, "put_off": put_off}


def main() -> None:
    """Do what is ordered until standard input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        bodies = _bodies(order["batch"], order["requests"], order["run_id"])
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(_send(order["port"], bodies, order["batch"])), flush=True)


if __name__ == "__main__":
    main()
