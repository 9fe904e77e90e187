"""Talk to a server below HTTP libraries, and look at what it costs it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.support import LiveServer


def request(body: bytes = b"", *, path: str = "/api/stage/events", method: str = "POST", **headers: str) -> bytes:
    """Return a request's bytes; `Content_Type="..."` is a header, and what is not given is right."""
    given = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect(server: LiveServer, *, receive_buffer: int | None = None) -> socket.socket:
    """Connect; with a small `receive_buffer` it takes little before the server has to wait."""
    connection = socket.socket()
    connection.settimeout(10)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", server.port))
    return connection


def exchange(server: LiveServer, sent: bytes) -> bytes:
    """Send `sent` and return all that comes back until the server closes."""
    with connect(server) as connection:
        connection.sendall(sent)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def memory_mib(server: LiveServer, what: str = "VmRSS") -> int:
    """Return the memory that the server's process has (`VmRSS`), or has had at most (`VmHWM`)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"{what}:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) >> 10


class EventStream:
    """A reader of server-sent events, message by message."""

    def __init__(self, server: LiveServer, query: str = "", **headers: str) -> None:
        self.connection = connect(server)
        head = request(b"", path=f"/api/stage/live{query}", method="GET", **headers)
        self.connection.sendall(head)
        self._file = self.connection.makefile("rb")
        self.status = int(self._file.readline().split()[1])
        while self._file.readline().strip():
            pass

    def messages(self) -> Iterator[tuple[str, int | None, Any]]:
        """Yield kind, id and data of each message; ends with the stream. Raises `TimeoutError` in silence."""
        kind, number, data = "", None, None
        for line in self._lines():
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "id":
                number = int(value)
            elif name == "data":
                data = json.loads(value)
            elif not line and kind:
                yield kind, number, data
                kind, number, data = "", None, None

    def _lines(self) -> Iterator[str]:
        rest = b""
        while size := int(self._file.readline() or b"0", 16):
            rest += self._file.read(size)
            self._file.readline()
            *lines, rest = rest.split(b"\n")
            yield from (line.decode() for line in lines)

    def close(self) -> None:
        self._file.close()
        self.connection.close()


@contextlib.contextmanager
def stream(server: LiveServer, query: str = "", **headers: str) -> Iterator[EventStream]:
    opened = EventStream(server, query, **headers)
    try:
        yield opened
    finally:
        opened.close()


def with_variables(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    """Let servers that are started from now on find these variables."""
    clean: Callable[[], Mapping[str, str]] = support.clean_environment
    added = {name: str(value) for name, value in variables.items()}
    monkeypatch.setattr(support, "clean_environment", lambda: {**clean(), **added})


def seconds_of(what: Callable[[], object]) -> float:
    started = time.monotonic()
    what()
    return time.monotonic() - started
