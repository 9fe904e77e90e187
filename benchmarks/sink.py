"""
A server that takes what SDKs send and counts it, in a process of its own.

In:   the milliseconds after which it answers (-1: never). Then what each SDK sends, in its own form and packing.
Out:  its port, and the answer each SDK expects; `GET /count`: stages that arrived since the last count, in bodies and
      bytes (of the requests, with headers).

Bodies are kept, and unpacked and counted only when asked, so that counting costs nothing while an SDK is measured.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
import time
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

requests: list[tuple[str, Message, bytes]] = []
#: What LangSmith's cloud says of itself.
_LANGSMITH_INFO = {
    "version": "0.12.0",
    "batch_ingest_config": {
        "use_multipart_endpoint": True,
        "scale_up_qsize_trigger": 1000,
        "scale_up_nthreads_limit": 16,
        "scale_down_nempty_trigger": 4,
        "size_limit": 100,
        "size_limit_bytes": 20_971_520,
    },
    "instance_flags": {"zstd_compression_enabled": True},
}
#: A part of a body that holds a whole run, or the end of one: its operation, and its id.
_RUN = re.compile(rb'name="(post|patch)\.([0-9a-f-]{36})"\r\n.*?\r\n\r\n(\{.*?\})\r\n', re.DOTALL)


def spans_of_otlp(body: bytes) -> int:
    """Count spans, without those that Logfire sends when a span begins."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    return sum(
        not any(
            item.key == "logfire.span_type" and item.value.string_value == "pending_span" for item in span.attributes
        )
        for spans in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in spans.scope_spans
        for span in scope.spans
    )


def spans_of_sentry(body: bytes) -> int:
    """Count the transactions of an envelope, and the spans in them."""
    lines = [json.loads(line) for line in body.splitlines() if line.startswith(b"{")]
    return sum(1 + len(line["spans"]) for line in lines if line.get("type") == "transaction" and "spans" in line)


def ended_runs(body: bytes) -> set[bytes]:
    """Return the ids of LangSmith's runs that a body ends."""
    return {run for _, run, fields in _RUN.findall(body) if json.loads(fields).get("end_time")}


def unpacked(headers: Message, body: bytes) -> bytes:
    """Return a body as it was before it was packed."""
    packing = headers.get("Content-Encoding")
    if packing == "gzip":
        return gzip.decompress(body)
    if packing == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor().decompressobj().decompress(body)
    assert packing is None, packing
    return body


def count() -> dict[str, int]:
    """Count what arrived, and forget it."""
    arrived, wire_bytes, runs = 0, 0, set()
    taken = requests[:]
    del requests[: len(taken)]
    for path, headers, packed in taken:
        wire_bytes += len(path) + len(headers.as_bytes()) + len(packed)
        body = unpacked(headers, packed)
        if path.endswith("/v1/traces"):
            arrived += spans_of_otlp(body)
        elif path == "/api/stage/events":
            arrived += len(json.loads(body)["events"])
        elif path.endswith("/envelope/"):
            arrived += spans_of_sentry(body)
        elif path == "/batch/":
            arrived += len(json.loads(body)["batch"])
        elif path == "/runs/multipart":
            runs |= ended_runs(body)  # a run may be sent twice, at its beginning and at its end
        else:
            raise SystemExit(f"the sink does not know {path}")
    return {"arrived": arrived + len(runs), "wire_bytes": wire_bytes, "bodies": len(taken)}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    latency_ms = 0.0

    def do_POST(self) -> None:  # noqa: D102 - the name that http.server wants
        body = self._body()
        if self.latency_ms < 0:
            threading.Event().wait()
        time.sleep(self.latency_ms / 1000)
        requests.append((self.path, self.headers, body))
        if self.path.endswith("/v1/traces"):
            self._answer(b"", "application/x-protobuf")
        elif self.path == "/api/stage/events":
            stored = unpacked(self.headers, body).count(b'"stage_id"')  # the SDK holds it against what it sent
            self._answer(b'{"stored":%d,"run_id":"bench","stage_ids":[]}' % stored)
        else:
            self._answer(b"{}")

    def do_GET(self) -> None:  # noqa: D102
        if self.path == "/count":
            self._answer(json.dumps(count()).encode())
        else:
            self._answer(json.dumps(_LANGSMITH_INFO if self.path == "/info" else {}).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, body: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: D102
        pass


class Server(ThreadingHTTPServer):
    """All connections."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say what went wrong, unless it is that a process was ended that was being answered."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


if __name__ == "__main__":
    Handler.latency_ms = float(sys.argv[1])
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    sys.stdout.close()
    server.serve_forever()
