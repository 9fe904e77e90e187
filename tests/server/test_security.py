"""Who may ask what: tokens and their scopes on every endpoint, the address, the browser, the log."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as connect_websocket

from evalvault_sdk import ConfigurationError
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.program import run as run_server
from evalvault_sdk.server.security import Access, Guard, check_exposure
from evalvault_sdk.server.settings import ServerSettings
from tests.server.wire import connect, stream
from tests.support import LiveServer, live_server, wait_for

READS = ("events", "traces", "metrics", "summary", "debug", "export")
SPAN = {"traceId": "0" * 31 + "1", "spanId": "0" * 15 + "1", "name": "x"}
SPANS = {"resourceSpans": [{"resource": {"attributes": []}, "scopeSpans": [{"spans": [SPAN]}]}]}


def entry(name: str, **more: Any) -> str:
    rest = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return f'[[token]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{rest}'


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a token for all, and three for runs that begin with `prod-`; one run of each kind is there."""
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens.toml"
    scoped = {"both": {}, "reader": {"access": ["read"]}, "writer": {"access": ["write"]}}
    tokens.write_text(entry("admin") + "".join(entry(name, runs=["prod-"], **more) for name, more in scoped.items()))
    tokens.chmod(0o600)
    with live_server(folder / "x.db", "--tokens-file", str(tokens)) as server:
        for run in ("other", "prod-1"):
            server.post({"run_id": run, "stage_type": "x", "trace_id": "t"}, headers=bearer("admin")).raise_for_status()
        yield server


def ask(server: LiveServer, token: str, method: str, path: str, **options: Any) -> requests.Response:
    headers = {**bearer(token), **options.pop("headers", {})}
    return requests.request(method, f"{server.url}{path}", headers=headers, timeout=20, **options)


def every_question_about(run: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return a request for each way there is to read one run."""
    live = f"/api/stage/live?run_id={run}"
    return [*(("GET", f"/api/stage/{what}/{run}", {}) for what in READS), ("GET", live, {"stream": True})]


def every_change_of(run: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Return a request for each way there is to change one run."""
    event = {"run_id": run, "stage_type": "x", "stage_id": "s"}
    of_run = {"headers": {"X-EvalVault-Run-Id": run}, "json": SPANS}
    lines = {"Content-Type": "application/jsonl"}
    return [
        ("POST", "/api/stage/events", {"json": event}),
        ("POST", "/api/stage/events", {"data": json.dumps(event), "headers": {"Content-Type": "application/x-ndjson"}}),
        ("POST", "/api/v1/ingest/stage-events", {"data": json.dumps(event), "headers": lines}),
        ("POST", "/api/v1/ingest/otel-traces", of_run),
        ("POST", "/v1/traces", of_run),
        ("POST", f"/api/stage/metrics/{run}", {}),
        ("DELETE", f"/api/stage/runs/{run}", {}),
    ]


@pytest.mark.parametrize("token", ["both", "reader", "writer"])
def test_a_token_for_some_runs_learns_nothing_of_others(guarded: LiveServer, token: str) -> None:
    there = [*every_question_about("other"), *every_change_of("other")]
    absent = [*every_question_about("absent"), *every_change_of("absent")]
    for (method, path, options), (_, absent_path, absent_options) in zip(there, absent, strict=True):
        answer, of_none = (
            ask(guarded, token, method, path, **options),
            ask(guarded, token, method, absent_path, **absent_options),
        )
        assert answer.status_code == of_none.status_code == 403, path
        assert answer.text == of_none.text, "the answer does not tell whether the run is there"
    assert ask(guarded, "admin", "GET", "/api/stage/events/other").json()["total"] == 1
    assert ask(guarded, "admin", "GET", "/api/stage/events/absent").status_code == 404


@pytest.mark.parametrize(("token", "may_read", "may_write"), [("reader", True, False), ("writer", False, True)])
def test_a_token_may_do_what_it_is_for_and_no_more(
    guarded: LiveServer, token: str, may_read: bool, may_write: bool
) -> None:
    general: list[tuple[str, str, dict[str, Any]]] = [("GET", "/api/stage/runs", {}), ("GET", "/metrics", {})]
    for method, path, options in [*every_question_about("prod-1"), *general]:
        with ask(guarded, token, method, path, **options) as answer:
            assert answer.status_code == (200 if may_read else 403), path
    ask(guarded, "admin", "POST", "/api/stage/events", json={"run_id": "prod-2", "stage_type": "x"})
    for method, path, options in every_change_of("prod-2"):
        assert ask(guarded, token, method, path, **options).status_code == (200 if may_write else 403), path


def test_a_batch_for_several_runs_stores_those_of_the_token(guarded: LiveServer) -> None:
    events = [{"run_id": run, "stage_type": "x", "stage_id": run} for run in ("other", "prod-3", "nobody")]
    answer = ask(guarded, "both", "POST", "/api/stage/events", json={"events": events})
    assert (answer.status_code, answer.json()["stage_ids"]) == (207, ["prod-3"])
    assert [entry["index"] for entry in answer.json()["rejected"]] == [0, 2]
    assert {entry["details"] for entry in answer.json()["rejected"]} == {
        "this token is for runs whose id begins with 'prod-'"
    }


def test_lists_and_live_streams_of_all_runs_hold_those_of_the_token(guarded: LiveServer) -> None:
    for run in ("other-live", "prod-live", "proD-live", "prod"):
        ask(guarded, "admin", "POST", "/api/stage/events", json={"run_id": run, "stage_type": "x"})
    listed = {run["run_id"] for run in ask(guarded, "both", "GET", "/api/stage/runs").json()["runs"]}
    assert "prod-live" in listed
    assert all(run.startswith("prod-") for run in listed)
    followed = set()
    with stream(guarded, "?cursor=0", **bearer("both")) as opened:
        for kind, _, data in opened.messages():
            followed.add(data.get("run_id", "prod-"))
            if kind == "stage" and data["run_id"] == "prod-live":
                break
    assert all(run.startswith("prod-") for run in followed)
    url = f"ws://127.0.0.1:{guarded.port}/api/stage/live?cursor=0"
    with connect_websocket(url, additional_headers=bearer("both")) as socket:
        while (event := json.loads(socket.recv(timeout=10)).get("event", {"run_id": "prod-"}))["run_id"] != "prod-live":
            assert event["run_id"].startswith("prod-")


@pytest.mark.parametrize(
    ("token", "run", "status"),
    [("", "prod-1", 401), ("wrong", "prod-1", 401), ("writer", "prod-1", 403), ("reader", "other", 403)],
)
def test_a_websocket_is_refused_before_it_is_opened(guarded: LiveServer, token: str, run: str, status: int) -> None:
    url = f"ws://127.0.0.1:{guarded.port}/api/stage/live?run_id={run}"
    with pytest.raises(InvalidStatus) as refused, connect_websocket(url, additional_headers=bearer(token)):
        pass
    assert refused.value.response.status_code == status
    assert set(json.loads(bytes(refused.value.response.body or b""))) == {"error", "details"}


def test_nothing_but_health_and_the_documentation_is_open(guarded: LiveServer) -> None:
    for method, path, options in [
        *every_question_about("prod-1"),
        *every_change_of("prod-1"),
        ("GET", "/api/stage/runs", {}),
        ("GET", "/metrics", {}),
    ]:
        for header in ({"Authorization": "Bearer"}, {"Authorization": "Basic admin"}, bearer("admi"), bearer("adminn")):
            more = {**options, "headers": {**options.get("headers", {}), **header}}
            answer = requests.request(method, f"{guarded.url}{path}", timeout=10, **more)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), path
    assert ask(guarded, "admin", "GET", "/api/stage/runs", headers={"Authorization": "bEaReR  admin "}).ok
    for path in ("/health", "/ready", "/openapi.json", "/docs"):
        assert requests.get(f"{guarded.url}{path}", timeout=10).ok


def test_every_answer_has_the_headers_that_keep_browsers_safe_and_a_request_id(guarded: LiveServer) -> None:
    for path in ("/health", "/api/stage/runs", "/nowhere", "/docs"):
        headers = requests.get(f"{guarded.url}{path}", headers={"X-Request-ID": "of.mine-1"}, timeout=10).headers
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert (headers["Cache-Control"], headers["X-Request-ID"]) == ("no-store", "of.mine-1")
        assert "Server" not in headers
    odd = requests.get(f"{guarded.url}/health", headers={"X-Request-ID": 'a" b'}, timeout=10).headers["X-Request-ID"]
    assert len(odd) == 32


def test_web_pages_of_elsewhere_get_no_answer_unless_it_is_allowed(tmp_path: Path, guarded: LiveServer) -> None:
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}

    def allowed(server: LiveServer, origin: str) -> list[str | None]:
        headers = {"Origin": origin}
        before = requests.options(f"{server.url}/api/stage/runs", headers={**headers, **asked}, timeout=10)
        answer = ask(server, "admin", "GET", "/api/stage/runs", headers=headers)
        return [found.headers.get("Access-Control-Allow-Origin") for found in (before, answer)]

    assert allowed(guarded, "https://dash.example") == [None, None]
    with live_server(tmp_path / "x.db", "--cors-origin", "https://dash.example", "--token", "admin") as server:
        assert allowed(server, "https://dash.example") == ["https://dash.example"] * 2
        for origin in ("https://evil.example", "https://dash.example.evil", "http://dash.example", "null"):
            assert allowed(server, origin) == [None, None]


class TLSServer(LiveServer):
    """A server that speaks HTTPS, asked with the CA that signed its certificate."""

    ca: str

    def _ready(self) -> bool:
        self.url = f"https://127.0.0.1:{self.port}"
        try:
            return requests.get(f"{self.url}/health", verify=self.ca, timeout=5).ok
        except requests.RequestException:
            assert self.process.poll() is None, self.db.with_suffix(".log").read_text()
            return False


def test_https_is_served_with_a_certificate_of_ones_own_ca_and_no_old_tls(tmp_path: Path) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    TLSServer.ca = str(tmp_path / "ca.pem")
    files = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
    server = TLSServer(tmp_path / "x.db", *files)
    try:
        stalled = [connect(server) for _ in range(50)]
        answer = requests.get(f"{server.url}/health", verify=TLSServer.ca, timeout=10)
        assert answer.headers["Strict-Transport-Security"].startswith("max-age=")
        context = ssl.create_default_context(cafile=TLSServer.ca)
        with context.wrap_socket(connect(server), server_hostname="127.0.0.1") as secure:
            assert secure.version() in ("TLSv1.2", "TLSv1.3")
        for connection in stalled:
            connection.close()
    finally:
        server.stop(signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"host": "0.0.0.0"}, "give --token"),
        ({"host": "::"}, "give --token"),
        ({"tls_key": "key.pem"}, "tls_key needs tls_cert"),
        ({"tls_cert": "none.pem"}, "cannot be used: No such file"),
        ({"tokens_file": "none.toml"}, "cannot be read: No such file"),
        ({"workers": 2}, "2 workers need PostgreSQL"),
        ({"token": " "}, "token is empty"),
        ({"profile": "x"}, "profile must be one of: dev, prod"),
        ({"rate_limit": 0}, "rate_limit must be"),
    ],
)
def test_the_server_does_not_start_with_what_cannot_work(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        run_server(ServerSettings.resolve({}, db=str(tmp_path / "x.db"), **options))
    assert words in str(refused.value)
    assert not (tmp_path / "x.db").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    check_exposure(host, guarded=False, insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.1", "localhost.example", "127.1", "[::1]"])
def test_what_is_not_surely_loopback_needs_a_token_or_a_word(host: str) -> None:
    with pytest.raises(ConfigurationError, match="without a token would let anyone"):
        check_exposure(host, guarded=False, insecure=False)
    check_exposure(host, guarded=True, insecure=False)
    check_exposure(host, guarded=False, insecure=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no"),
        ("token = 3", "has no"),
        ("token = []", "has no"),
        ("[[token]\n", "is no TOML"),
        ("token = [3]", "token 1 must be a table"),
        ('[[token]]\nsha256 = "00"', "needs a name"),
        ('[[token]]\nname = "a"\nsha256 = "00"', "needs sha256: 64 hexadecimal digits"),
        (entry("a", runs=[]), "runs must be a list with at least one text"),
        (entry("a", runs="prod-"), "runs must be a list"),
        (entry("a", runs=[1]), "runs must be a list of texts"),
        (entry("a", access=["admin"]), "access must be some of: read, write"),
        (entry("a", scopes=["x"]), "unknown key 'scopes'"),
        (entry("a") + entry("a"), "token 2 is there already, as 'a'"),
    ],
)
def test_a_wrong_file_of_tokens_is_named_with_the_place(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"tokens\.toml") as raised:
        Guard.of(ServerSettings(tokens_file=str(path)))
    assert words in str(raised.value)


def test_a_file_of_tokens_that_others_can_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(entry("a"))
    path.chmod(0o620)
    with pytest.raises(ConfigurationError, match="chmod go-w"):
        Guard.of(ServerSettings(tokens_file=str(path)))


def test_tokens_may_be_in_yaml_and_beside_those_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    digest = hashlib.sha256(b"of-file").hexdigest().upper()
    path.write_text(f"token:\n  - name: a\n    sha256: '{digest}'\n    runs: [a-, b-]\n")
    path.chmod(0o600)
    guard = Guard.of(ServerSettings(tokens_file=str(path), token=("plain",)))
    assert guard.access("Bearer plain").runs == ("",)
    access = guard.access("Bearer of-file")
    assert [access.covers(run) for run in ("a-1", "b-1", "a", "c-a-", "")] == [True, True, False, False, False]
    assert "plain" not in repr(vars(guard))
    with pytest.raises(ApiError):
        guard.access(f"Bearer {digest}")


def test_every_token_is_compared_whichever_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("evalvault_sdk.server.security.hmac.compare_digest", compare)
    guard = Guard({hashlib.sha256(name.encode()).digest(): Access(name=name) for name in "abc"})
    for said in ("Bearer a", "Bearer c", "Bearer ", None):
        compared.clear()
        with contextlib.suppress(ApiError):
            guard.access(said)
        assert len(compared) == 3


def test_a_log_for_programs_is_json_and_holds_no_run_and_no_content(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--log-format", "json", "--log-requests") as server:
        server.post({"run_id": "secret-run", "stage_type": "x", "attributes": {"query": "secret"}})
        server.post(b'{"secret')
        for path in ("/api/stage/events/secret-run?trace_id=secret", "/secret", "/api/stage/debug/secret-none"):
            requests.get(f"{server.url}{path}", headers={"X-Request-ID": "named"}, timeout=10)
        with stream(server, "?run_id=secret-run&cursor=0"):
            pass
        wait_for(lambda: "/api/stage/live" in server.db.with_suffix(".log").read_text())
        time.sleep(0.1)
        server.stop()
        written = server.db.with_suffix(".log").read_text()
    assert "secret" not in written
    lines = [json.loads(line) for line in written.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    assert [line["message"].split(" answered ")[0] for line in lines if line.get("request_id") == "named"] == [
        "GET /api/stage/events/{run_id:path}",
        "GET unknown",
        "GET /api/stage/debug/{run_id:path}",
    ]


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example", 403), ("localhost:1", 404), ("127.0.0.1", 404), ("[::1]:8", 404)]
)
def test_a_server_without_a_token_is_asked_under_names_of_its_machine_only(
    server: LiveServer, host: str, status: int
) -> None:
    answer = requests.get(f"{server.url}/api/stage/summary/nobody", headers={"Host": host}, timeout=10)
    assert answer.status_code == status
