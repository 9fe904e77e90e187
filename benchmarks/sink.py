"""
A server that takes what SDKs send and counts it, in a process of its own.

In:   EvalVault batches (JSON) and OTLP traces (protobuf), gzip or not.
Out:  the answer each SDK expects; `GET /count`, the number of stages or spans that arrived.

Bodies are kept and counted only when asked, so that counting costs nothing while the SDK is measured.
"""

from __future__ import annotations

import gzip
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

bodies: list[tuple[str, bytes]] = []


def count() -> int:
    """Count the stages and spans in all bodies so far."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    total = 0
    for path, body in bodies:
        if path == "/v1/traces":
            request = ExportTraceServiceRequest.FromString(body)
            total += sum(len(scope.spans) for spans in request.resource_spans for scope in spans.scope_spans)
        else:
            total += len(json.loads(body)["events"])
    return total


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:  # noqa: D102 - the name that http.server wants
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        bodies.append((self.path, body))
        if self.path == "/v1/traces":
            self._answer(b"", "application/x-protobuf")
        else:
            events = body.count(b'"stage_id"')
            self._answer(json.dumps({"stored": events, "run_id": "bench", "stage_ids": []}).encode())

    def do_GET(self) -> None:  # noqa: D102
        total = count()
        bodies.clear()
        self._answer(json.dumps(total).encode())

    def _answer(self, body: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: D102
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    sys.stdout.close()
    server.serve_forever()
