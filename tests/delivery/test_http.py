from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests
import responses
import zstandard

from evalvault_sdk import MissingDependencyError, Settings, StageTracer
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport import Delivered, Refused, RejectedEvent, RetryLater, TooLarge
from evalvault_sdk.delivery.transport.http import HttpTransport, retry_after_s

URL = "http://evalvault.test/api/stage/events"
EVENTS = tuple(orjson.dumps({"run_id": "r", "stage_type": "x", "stage_id": str(number)}) for number in range(4))
STORED = {"stored": 4, "run_id": "r", "stage_ids": ["0", "1", "2", "3"]}


@pytest.fixture
def http() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


def transport(**settings: Any) -> HttpTransport:
    return HttpTransport(Settings(run_id="r", api_url="http://evalvault.test", **settings))


def send(**settings: Any) -> Any:
    sender = transport(**settings)
    try:
        return sender.send(Batch(EVENTS))
    finally:
        sender.close()


def rejected(*indices: int) -> list[dict[str, Any]]:
    return [{"index": i, "stage_id": None, "error": "Invalid stage event", "details": f"bad {i}"} for i in indices]


def test_a_batch_is_posted_as_its_events_own_bytes(http: responses.RequestsMock) -> None:
    http.post(URL, json=STORED)
    assert send(token="s3cret", headers={"X-Gateway": "a"}) == Delivered()
    request = http.calls[0].request
    assert request.body == Batch(EVENTS).body()
    assert request.headers["Content-Type"] == "application/json"
    assert request.headers["Authorization"] == "Bearer s3cret"
    assert request.headers["X-Gateway"] == "a"
    assert request.headers["User-Agent"].startswith("evalvault-sdk/")


def test_a_large_batch_is_packed_unless_that_is_turned_off(http: responses.RequestsMock) -> None:
    large = Batch(EVENTS * 100)
    http.post(URL, json={"stored": 400, "run_id": "r", "stage_ids": []})
    for compression in ("gzip", "zstd", "none"):
        sender = transport(compression=compression)
        assert sender.send(large) == Delivered()
        sender.close()
    packed, smaller, plain = (call.request for call in http.calls)
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.body) == large.body() == plain.body  # type: ignore[arg-type]
    assert smaller.headers["Content-Encoding"] == "zstd"
    assert zstandard.decompress(smaller.body) == large.body()  # type: ignore[arg-type]
    assert "Content-Encoding" not in plain.headers


def test_a_missing_zstd_is_said_when_the_tracer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'evalvault-sdk\[zstd\]'"):
        StageTracer("r", "http://127.0.0.1:1", compression="zstd")


def test_a_token_is_not_replaced_by_a_netrc_entry(
    http: responses.RequestsMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine evalvault.test login someone password else")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    http.post(URL, json=STORED)
    send(token="s3cret")
    assert http.calls[0].request.headers["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize(
    ("url", "posted_to"),
    [
        ("http://h", "http://h/api/stage/events"),
        ("https://h:1/evalvault/", "https://h:1/evalvault/api/stage/events"),
        ("http://h/api/stage/events", "http://h/api/stage/events"),
    ],
)
def test_the_path_is_added_to_the_address_unless_it_is_there(url: str, posted_to: str) -> None:
    assert HttpTransport(Settings(run_id="r", api_url=url)).destination == posted_to


def test_the_verdict_on_each_event_is_read(http: responses.RequestsMock) -> None:
    http.post(URL, status=207, json={**STORED, "stored": 2, "rejected": rejected(3, 1)})
    assert send() == Delivered((RejectedEvent(1, "bad 1"), RejectedEvent(3, "bad 3")))


def test_all_refused_one_by_one_is_a_verdict_too(http: responses.RequestsMock) -> None:
    http.post(URL, status=422, json={"error": "x", "details": "y", "index": 0, "rejected": rejected(0, 1, 2, 3)})
    outcome = send()
    assert isinstance(outcome, Delivered)
    assert len(outcome.rejected) == 4


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"<html>Please log in</html>"),
        (200, b"{}"),
        (200, b"[]"),
        (200, orjson.dumps({**STORED, "stored": 3})),
        (207, orjson.dumps({**STORED, "stored": 3, "rejected": rejected(7)})),
        (207, orjson.dumps({**STORED, "stored": 3, "rejected": [{"index": "x"}]})),
        (204, b""),
    ],
)
def test_success_from_what_is_not_evalvault_is_no_delivery(
    http: responses.RequestsMock, status: int, body: bytes
) -> None:
    http.post(URL, status=status, body=body)
    outcome = send()
    assert isinstance(outcome, RetryLater)
    assert outcome.advice is not None
    assert "EVALVAULT_API_URL" in outcome.advice


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_what_may_pass_is_tried_again_later(http: responses.RequestsMock, status: int) -> None:
    http.post(URL, status=status, headers={"Retry-After": "7"})
    assert send() == RetryLater(f"HTTP {status}", wait_s=7.0, blame="unclear" if status == 500 else "destination")


@pytest.mark.parametrize("status", [301, 307, 401, 403, 404, 405])
def test_what_a_person_must_correct_is_kept_and_says_so(http: responses.RequestsMock, status: int) -> None:
    http.post(URL, status=status, headers={"Location": "http://elsewhere.test/"})
    outcome = send()
    assert isinstance(outcome, RetryLater)
    assert outcome.advice is not None
    assert "EVALVAULT_" in outcome.advice


def test_a_refusal_of_evalvault_is_final_and_one_of_something_else_is_not(http: responses.RequestsMock) -> None:
    http.post(URL, status=400, json={"error": "Malformed JSON", "details": "at line 1"})
    http.post(URL, status=400, body=b"<html>Bad Request</html>")
    assert send() == Refused("Malformed JSON: at line 1")
    assert isinstance(send(), RetryLater)


def test_too_large_tells_the_limit_if_the_server_does(http: responses.RequestsMock) -> None:
    http.post(URL, status=413, json={"error": "x", "details": "y", "limit_bytes": 5000})
    http.post(URL, status=413, body=b"nginx")
    assert send() == TooLarge(5000)
    assert send() == TooLarge(None)


@pytest.mark.parametrize(
    "error",
    [
        requests.ConnectionError("secret question"),
        requests.ReadTimeout("secret question"),
        requests.exceptions.ChunkedEncodingError("secret question"),
        OSError("secret path"),
    ],
)
def test_a_network_error_is_tried_again_and_its_text_is_not_logged(
    http: responses.RequestsMock, error: Exception
) -> None:
    http.post(URL, body=error)
    outcome = send()
    assert isinstance(outcome, RetryLater)
    assert outcome.reason.startswith(type(error).__name__)
    assert "secret" not in outcome.reason


def test_an_untrusted_certificate_says_what_to_set(http: responses.RequestsMock) -> None:
    http.post(URL, body=requests.exceptions.SSLError(ssl.SSLError("x")))
    outcome = send()
    assert isinstance(outcome, RetryLater)
    assert "EVALVAULT_CA_BUNDLE" in (outcome.advice or "")


def test_a_missing_ca_bundle_is_no_crash() -> None:
    sender = HttpTransport(Settings(run_id="r", api_url="https://127.0.0.1:9", verify="/no/such/file"))
    outcome = sender.send(Batch(EVENTS))
    assert isinstance(outcome, RetryLater)
    assert "EVALVAULT_CA_BUNDLE" in (outcome.advice or "")


def test_tls_and_proxy_settings_win_over_the_environment(
    http: responses.RequestsMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/from/environment")
    monkeypatch.setenv("HTTP_PROXY", "http://environment.test")
    http.post(URL, json=STORED)
    send(verify="/from/settings", proxies={"http": "http://settings.test"})
    options = http.calls[0].request.req_kwargs  # type: ignore[attr-defined]
    assert options["verify"] == "/from/settings"
    assert options["proxies"]["http"] == "http://settings.test"


def test_a_client_certificate_and_the_timeouts_reach_the_request(http: responses.RequestsMock) -> None:
    http.post(URL, json=STORED)
    http.post(URL, json=STORED)
    sender = transport(cert=("/cert.pem", "/key.pem"), connect_timeout_s=1.5, read_timeout_s=7.0)
    sender.send(Batch(EVENTS))
    sender.send(Batch(EVENTS), timeout_s=2.0)
    sender.close()
    first, second = (call.request.req_kwargs for call in http.calls)  # type: ignore[attr-defined]
    assert first["cert"] == ("/cert.pem", "/key.pem")
    assert (first["timeout"], second["timeout"]) == ((1.5, 7.0), (1.5, 2.0))


def test_batches_go_over_one_connection() -> None:
    connections = 0

    class Counting(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            nonlocal connections
            connections += 1
            super().setup()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = orjson.dumps(STORED)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sender = HttpTransport(Settings(run_id="r", api_url=f"http://127.0.0.1:{server.server_port}"))
        assert [sender.send(Batch(EVENTS)) for _ in range(5)] == [Delivered()] * 5
        sender.close()
        server.shutdown()
    assert connections == 1


def test_retry_after_is_read_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_767_780_000.0
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        assert retry_after_s(time.asctime(time.gmtime(now + 30)), now) == 30, "asctime's form is UTC, too"
    finally:
        monkeypatch.undo()
        time.tzset()
    assert retry_after_s("120", now) == 120
    assert retry_after_s(formatdate(now + 90, usegmt=True), now) == 90
    assert retry_after_s(formatdate(now - 90, usegmt=True), now) == 0
    assert retry_after_s("86400", now) == 600, "a server must not silence us for a day"
    assert retry_after_s("soon", now) is None
    assert retry_after_s("-5", now) is None
    assert retry_after_s("²", now) is None
    assert retry_after_s(None, now) is None


@pytest.mark.parametrize("part", ["status line", "headers", "body"])
def test_an_answer_that_trickles_in_is_given_up_in_time(part: str) -> None:
    answer = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 64\r\n\r\n{"stored": 1'
    at_once = {"status line": 0, "headers": 20, "body": len(answer)}[part]
    stop = threading.Event()

    def trickle(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            with contextlib.suppress(OSError):
                connection.sendall(answer[:at_once])
                for byte in answer[at_once:] + b" " * 1000:
                    if stop.wait(0.05):
                        break
                    connection.sendall(bytes([byte]))

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = threading.Thread(target=trickle, args=(listener,))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        transport = HttpTransport(Settings(run_id="r", api_url=url, read_timeout_s=0.5))
        started = time.monotonic()
        outcome = transport.send(Batch((b"{}",)))
        took_s = time.monotonic() - started
        stop.set()
        server.join()
        transport.close()
    assert isinstance(outcome, RetryLater)
    assert 0.4 < took_s < 2
