"""
Tell operators how the server does: Prometheus metrics, request ids, lines in the log.

In:   requests as they pass, and what the other modules count.
Out:  `/metrics`, the header `X-Request-ID`, one line for a request that failed (or for each, if wanted).
Nothing of the content: no path (it holds run ids), no query, no body.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

logger = logging.getLogger("evalvault_sdk.server.requests")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

#: What a request id of the client's may look like, to go into our log.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
#: The variable by which prometheus_client knows where processes put their numbers together.
MULTIPROCESS_DIR = "PROMETHEUS_MULTIPROC_DIR"

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("evalvault_request_id", default=None)


class Telemetry:
    """The server's own metrics."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "evalvault_server_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "evalvault_server_request_seconds",
            "Seconds from a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.events = Counter(
            "evalvault_server_events", "Events that were `stored` or `rejected`.", ["outcome"], registry=registry
        )
        self.refusals = Counter(
            "evalvault_server_refusals", "Requests that were refused, by reason.", ["reason"], registry=registry
        )
        self.store_seconds = Histogram(
            "evalvault_server_store_seconds",
            "Seconds of one transaction that stores events.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.deleted = Counter(
            "evalvault_server_deleted_events", "Events that retention or a request deleted.", registry=registry
        )
        self.waiting_events = self._gauge(
            "evalvault_server_waiting_events", "Events that wait to be stored, or are being stored."
        )
        self.waiting_bytes = self._gauge(
            "evalvault_server_waiting_bytes", "Bytes of requests that are being read, parsed or stored."
        )
        self.live_streams = self._gauge("evalvault_server_live_streams", "Live streams that are open.")

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(name, help, registry=self._registry, multiprocess_mode="livesum")

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format, of all worker processes together."""
        if MULTIPROCESS_DIR not in os.environ:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


class RequestTelemetry:
    """ASGI middleware: counts, times and names each request, and sets the headers that keep browsers safe."""

    def __init__(self, app: _App, *, telemetry: Telemetry, log_requests: bool, https: bool) -> None:
        self._app = app
        self._telemetry = telemetry
        self._log_requests = log_requests
        self._headers = [(name.encode(), value.encode()) for name, value in _headers(https=https).items()]

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(own)
        started = time.perf_counter()
        status = 0

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message.get("headers", ())}
                extra = [header for header in self._headers if header[0] not in present]
                message["headers"] = [*message.get("headers", ()), *extra, (b"x-request-id", own.encode())]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            self._note(scope, status, time.perf_counter() - started)
            request_id.reset(token)

    def _note(self, scope: _Scope, status: int, seconds: float) -> None:
        # The route's pattern, not the path: there are few of them, and they hold no run id.
        route = getattr(scope.get("route"), "path", "unknown")
        self._telemetry.requests.labels(scope["method"], route, str(status)).inc()
        self._telemetry.request_seconds.labels(route).observe(seconds)
        # To ask for a run that is not there is no failure; whatever else is refused, somebody has to mend.
        failed = status >= 500 or status == 0 or (status >= 400 and status != 404)
        if failed or self._log_requests:
            access = scope.get("state", {}).get("access")
            client = scope.get("client") or ("unknown",)
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "duration_ms": round(seconds * 1000, 1),
                "client": f"{access.name} at {client[0]}" if access else str(client[0]),
            }
            logger.log(
                logging.WARNING if failed else logging.INFO,
                "%(method)s %(route)s answered %(status)d in %(duration_ms).1f ms to %(client)s",
                fields,
                extra={"fields": fields},
            )


def _headers(*, https: bool) -> dict[str, str]:
    headers = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "content-security-policy": "frame-ancestors 'none'; base-uri 'none'",
        "cache-control": "no-store",
    }
    return {**headers, "strict-transport-security": "max-age=31536000"} if https else headers


class _OftenSaid(logging.Filter):
    """Lets the same sentence pass ten times a minute: a fleet in trouble must not fill the disk with it."""

    _EVERY_S = 60.0
    _TIMES = 10
    _SENTENCES = 1_000

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record passes."""
        fields: dict[str, object] = getattr(record, "fields", {})
        sentence = (record.msg, fields.get("route"), fields.get("status"))
        if len(self._said) > self._SENTENCES:
            self._said.clear()
        since, times = self._said.get(sentence, (record.created, 0))
        if record.created - since >= self._EVERY_S:
            if times > self._TIMES:
                record.msg = f"{record.msg} (and {times - self._TIMES} more in the minute before)"
            since, times = record.created, 0
        self._said[sentence] = (since, times + 1)
        return times < self._TIMES


class _Noise(logging.Filter):
    """
    Keeps out what uvicorn says of each WebSocket (its query!), and of those that are refused or given up; and
    each try of psycopg's to connect again: that the database is away is said once, by us.
    """

    _BEGINNINGS = ('%s - "WebSocket', "connection ", "ASGI callable returned without completing")

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record passes."""
        if record.name.startswith("psycopg"):
            return False
        return record.name != "uvicorn.error" or not str(record.msg).startswith(self._BEGINNINGS)


class _Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps({key: value for key, value in line.items() if value is not None}, ensure_ascii=False)


class _Text(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        own = request_id.get()
        return super().format(record) + (f" [{own}]" if own else "")


def forget_dead_processes() -> None:
    """Take back what processes that were killed said last of things that come and go."""
    for file in Path(os.environ[MULTIPROCESS_DIR]).glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
        except OSError:
            pass  # it lives, and is somebody else's


def set_up_logging(log_format: str) -> None:
    """Send this process's log to standard error, line by line, in the form that is wanted."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if log_format == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_Noise())
    handler.addFilter(_OftenSaid())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
