"""`evalvault-sdk doctor` names what is wrong, one thing at a time, and gives nothing away."""

from __future__ import annotations

import base64
import contextlib
import datetime
import errno
import fcntl
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pytest
import trustme

from evalvault_sdk import Settings, StageTracer
from evalvault_sdk.cli import doctor
from tests.cli.test_commands import command
from tests.support import LiveServer, free_port, is_compiled, live_server

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
EMPTY = {"error": "Invalid request", "details": "events must hold at least one event"}


@pytest.fixture(autouse=True)
def no_proxy_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def examine(**environ: str) -> dict[str, doctor.Finding]:
    """Return what the doctor finds in an environment, by what was checked."""
    environ = {"EVALVAULT_SPOOL_DIR": os.environ["EVALVAULT_SPOOL_DIR"], **environ}
    settings, _shown = doctor.resolve(environ)
    return {finding.what: finding for finding in doctor.examine(settings, environ)}


def test_it_says_whether_recording_is_compiled(server: LiveServer) -> None:
    finding = examine(EVALVAULT_API_URL=server.url, EVALVAULT_RUN_ID="r")["recording"]
    assert finding.text.startswith("compiled" if is_compiled() else "not compiled")


@contextlib.contextmanager
def other_server(
    status: int = 422,
    body: Any = EMPTY,
    headers: Mapping[str, str] | None = None,
    certificate: trustme.LeafCert | None = None,
) -> Iterator[int]:
    """A server that gives every request the same answer; yield its port."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with quiet_server(Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextlib.contextmanager
def quiet_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that do not trust us hang up

    with Quiet(("127.0.0.1", 0), handler) as server:
        yield server


def test_all_is_well_with_a_server_that_runs(server: LiveServer) -> None:
    done = command("doctor", "--url", server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "problem" not in done.stdout
    assert "warning" not in done.stdout
    for words in ("OK      server: EvalVault's, version", "OK      token: none is wanted", "OK      spool locks: they"):
        assert words in done.stdout


def test_it_is_said_where_each_setting_comes_from_and_secrets_are_not_shown(server: LiveServer) -> None:
    done = command(
        "doctor",
        "--url",
        server.url,
        EVALVAULT_API_TOKEN="s3cret-1",
        EVALVAULT_BATCH_EVENTS="7",
        EVALVAULT_API_URL="http://nobody.test",
    )
    rows = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if line.startswith("│") and len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 3
    }
    assert rows["api_url"] == [f"'{server.url}'", "argument"]
    assert rows["token"] == ["'***'", "EVALVAULT_API_TOKEN"]
    assert rows["batch_events"] == ["7", "EVALVAULT_BATCH_EVENTS"]
    assert rows["compression"] == ["'gzip'", "default"]
    assert "s3cret" not in done.stdout + done.stderr


def test_sources_and_settings_agree() -> None:
    environ = {"EVALVAULT_FILE": "x.jsonl", "EVALVAULT_TOKEN": "no variable of ours", "EVALVAULT_SDK_DISABLED": "1"}
    assert Settings.resolve(environ, run_id="r", api_url="http://h").file is None
    sources = Settings.sources(environ, run_id="r", api_url="http://h", token=None)
    assert (sources["file"], sources["api_url"], sources["token"]) == ("default", "argument", "default")
    assert sources["enabled"] == "EVALVAULT_SDK_DISABLED"
    assert Settings.sources({"EVALVAULT_FILE": "x.jsonl"}, run_id="r")["file"] == "EVALVAULT_FILE"


def test_wrong_settings_are_one_clear_line() -> None:
    done = command("doctor", EVALVAULT_BATCH_EVENTS="many")
    assert done.returncode == 1
    assert done.stderr == "Error: the variable EVALVAULT_BATCH_EVENTS must be a whole number\n"


def test_a_server_that_is_not_there_is_a_problem_and_the_disk_is_checked_all_the_same() -> None:
    found = examine(EVALVAULT_API_URL=f"http://127.0.0.1:{free_port()}")
    assert found["connection"].state == "problem"
    assert "refused" in found["connection"].text
    assert "server" not in found
    assert found["spool"].state == "ok"


def test_a_name_that_is_not_known_is_told_within_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert "Name or service not known" in examine(EVALVAULT_API_URL="http://nobody.test")["name"].text
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: released.wait(30) and [])
    monkeypatch.setattr(doctor, "_DNS_TIMEOUT_S", 0.2)
    began = time.monotonic()
    found = examine(EVALVAULT_API_URL="http://slow.test")
    released.set()
    assert time.monotonic() - began < 5
    assert found["name"].state == "problem"
    assert "no answer within" in found["name"].text


def test_tokens_that_are_missing_wrong_and_right_are_told_apart_and_nothing_is_stored(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--token", "s3cret") as server:
        missing, wrong, right = (
            command("doctor", "--url", server.url, *arguments)
            for arguments in ((), ("--token", "gu3ssed"), ("--token", "s3cret"))
        )
        assert (missing.returncode, wrong.returncode, right.returncode) == (1, 1, 0)
        assert "problem token: the server wants one, and none is set" in missing.stdout
        assert "problem token: it is not the server's" in wrong.stdout
        assert "OK      token: accepted" in right.stdout
        assert "gu3ssed" not in wrong.stdout + wrong.stderr
    import sqlite3

    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as db:
        assert db.execute("SELECT COUNT(*) FROM stage_events").fetchone() == (0,)


@pytest.mark.parametrize(
    ("answer", "what", "words"),
    [
        ((200, b"<html>Please log in</html>"), "server", "not EvalVault"),
        ((404, {"detail": "Not Found"}), "server", "HTTP 404"),
        ((302, b"", {"Location": "https://login.test/"}), "server", "a redirect"),
        ((503, b"busy"), "server", "HTTP 503"),
        ((403, b"no"), "token", "it may not write"),
    ],
)
def test_what_answers_instead_of_the_server_is_not_taken_for_it(answer: Any, what: str, words: str) -> None:
    with other_server(*answer) as port:
        finding = examine(EVALVAULT_API_URL=f"http://127.0.0.1:{port}")[what]
    assert finding.state == "problem"
    assert words in finding.text
    assert finding.advice


def test_the_endpoints_in_an_app_of_one_s_own_need_no_health() -> None:
    with other_server() as port:
        found = examine(EVALVAULT_API_URL=f"http://127.0.0.1:{port}/api/stage/events")
    assert found["server"].state == "ok"
    assert "no /health" in found["server"].text
    assert found["clock"].text == "the server does not tell its time"


@pytest.mark.parametrize(("off_s", "words"), [(-3600, "ahead of"), (3600, "behind"), (-1, "within")])
def test_a_clock_that_differs_from_the_server_s_is_told(off_s: int, words: str) -> None:
    with other_server(headers={"Date": formatdate(time.time() + off_s, usegmt=True)}) as port:
        finding = examine(EVALVAULT_API_URL=f"http://127.0.0.1:{port}")["clock"]
    assert words in finding.text
    assert finding.state == ("warning" if abs(off_s) > 5 else "ok")


# -- TLS and proxies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> str:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return str(tmp_path / "ca.pem")


def test_a_certificate_is_trusted_through_the_bundle_that_the_sdk_uses(authority: trustme.CA, bundle: str) -> None:
    with other_server(certificate=authority.issue_cert("localhost")) as port:
        url = f"https://localhost:{port}"
        untrusted = examine(EVALVAULT_API_URL=url)
        trusted = examine(EVALVAULT_API_URL=url, EVALVAULT_CA_BUNDLE=bundle)
        missing = examine(EVALVAULT_API_URL=url, EVALVAULT_CA_BUNDLE=bundle + "x")
    assert untrusted["TLS"].state == "problem"
    assert "EVALVAULT_CA_BUNDLE" in untrusted["TLS"].advice
    assert "server" not in untrusted
    assert trusted["TLS"].state == "ok"
    assert "expires in" in trusted["TLS"].text
    assert trusted["server"].state == "ok"
    assert missing["TLS"].state == "problem"
    assert "cannot be used" in missing["TLS"].text


def test_a_certificate_of_another_name_is_told_from_one_that_is_not_trusted(authority: trustme.CA, bundle: str) -> None:
    with other_server(certificate=authority.issue_cert("other.test")) as port:
        finding = examine(EVALVAULT_API_URL=f"https://localhost:{port}", EVALVAULT_CA_BUNDLE=bundle)["TLS"]
    assert finding.state == "problem"
    assert "another name" in finding.advice


@pytest.mark.parametrize(("days", "state", "words"), [(3, "warning", "renewed"), (-3, "problem", "renewed")])
def test_a_certificate_that_expires_is_told(
    authority: trustme.CA, bundle: str, days: int, state: str, words: str
) -> None:
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    with other_server(certificate=authority.issue_cert("localhost", not_after=end)) as port:
        finding = examine(EVALVAULT_API_URL=f"https://localhost:{port}", EVALVAULT_CA_BUNDLE=bundle)["TLS"]
    assert finding.state == state
    assert words in finding.advice


def test_an_https_address_of_a_server_without_tls_is_told() -> None:
    with other_server() as port:
        finding = examine(EVALVAULT_API_URL=f"https://localhost:{port}")["TLS"]
    assert finding.state == "problem"
    assert "http://" in finding.advice


class Proxy(BaseHTTPRequestHandler):
    """Takes CONNECT from those who know the password."""

    def do_CONNECT(self) -> None:
        if self.headers.get("Proxy-Authorization") != "Basic " + base64.b64encode(b"me:s3cret").decode():
            self.send_error(407)
            return
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            near = self.connection
            while True:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    (far if ready is near else near).sendall(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_proxy_is_named_without_its_password_and_tls_goes_through_it(
    authority: trustme.CA, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other_server(certificate=authority.issue_cert("localhost")) as port, quiet_server(Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        arguments = ("doctor", "--url", f"https://localhost:{port}")
        address = f"127.0.0.1:{proxy.server_port}"
        allowed = command(*arguments, EVALVAULT_CA_BUNDLE=bundle, HTTPS_PROXY=f"http://me:s3cret@{address}")
        refused = command(*arguments, EVALVAULT_CA_BUNDLE=bundle, HTTPS_PROXY=f"http://me:gu3ssed@{address}")
        proxy.shutdown()
    assert allowed.returncode == 0, allowed.stdout + allowed.stderr
    assert f"OK      proxy: http://{address}, from HTTPS_PROXY" in allowed.stdout
    assert "certificate trusted for localhost" in allowed.stdout
    assert refused.returncode == 1
    assert "HTTPS_PROXY" in refused.stdout.split("problem TLS")[1]
    assert not any(secret in done.stdout + done.stderr for done in (allowed, refused) for secret in ("s3cret", "gu3"))


# -- disk -------------------------------------------------------------------------------------------


def test_the_spool_is_tried_and_left_as_it_was(tmp_path: Path, server: LiveServer) -> None:
    root = Path(os.environ["EVALVAULT_SPOOL_DIR"])
    assert examine(EVALVAULT_API_URL=server.url)["spool"].state == "ok"
    assert not root.exists(), "what it made is removed: another user's service may be the one to make it"
    url = f"http://127.0.0.1:{free_port()}"
    with StageTracer("r", url, durability="journal", shutdown_timeout_s=0.1) as tracer:
        for _ in range(3):
            tracer.record_stage("x")
    before = sorted(root.rglob("*"))
    found = examine(EVALVAULT_API_URL=url)
    assert found["spool events"].text == "3 wait to be delivered"
    assert sorted(root.rglob("*")) == before


def test_a_spool_that_cannot_be_written_is_a_problem(tmp_path: Path, server: LiveServer) -> None:
    (tmp_path / "file").write_text("")
    found = examine(EVALVAULT_API_URL=server.url, EVALVAULT_SPOOL_DIR=str(tmp_path / "file"))
    assert found["spool"].state == "problem"
    assert "EVALVAULT_SPOOL_DIR" in found["spool"].advice


def test_a_disk_with_less_room_than_the_spool_may_take_is_told(server: LiveServer) -> None:
    found = examine(EVALVAULT_API_URL=server.url, EVALVAULT_SPOOL_MAX_BYTES=str((1 << 48) - 1))
    assert found["spool room"].state == "warning"


def test_a_file_system_without_locks_is_told(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    found = examine(EVALVAULT_API_URL=server.url)
    assert found["spool locks"].state == "problem"
    assert "spool replay --force" in found["spool locks"].advice


def test_a_spool_that_is_switched_off_is_not_looked_for(server: LiveServer) -> None:
    found = examine(EVALVAULT_API_URL=server.url, EVALVAULT_DURABILITY="memory", EVALVAULT_SDK_DISABLED="1")
    assert found["spool"].text == "not used: durability is memory"
    assert found["settings"].state == "warning"


def test_an_otlp_endpoint_is_asked_in_its_own_way(server: LiveServer) -> None:
    found = examine(EVALVAULT_OTLP_ENDPOINT=server.url)
    assert (found["server"].state, found["server"].text) == ("ok", "an OTLP endpoint, which takes spans")
    assert found["spool"].state == "ok"
    with other_server(status=200, body=b"<html>login</html>", headers={"Content-Type": "text/html"}) as port:
        found = examine(EVALVAULT_OTLP_ENDPOINT=f"http://127.0.0.1:{port}")
    assert found["server"].state == "problem"
    assert "EVALVAULT_OTLP_ENDPOINT" in (found["server"].advice or "")


@pytest.mark.parametrize("variable", ["EVALVAULT_FILE", "EVALVAULT_SDK_DB_PATH"])
def test_a_file_as_destination_is_checked_instead_of_the_network(tmp_path: Path, variable: str) -> None:
    what = "file" if variable == "EVALVAULT_FILE" else "database"
    found = examine(**{variable: str(tmp_path / "events")})
    assert found[what].state == "ok"
    assert "server" not in found
    assert not (tmp_path / "events").exists()
    assert examine(**{variable: str(tmp_path / "none" / "events")})[what].state == "problem"
    (tmp_path / "events").write_text("no database, " * 100)
    assert examine(**{variable: str(tmp_path / "events")})[what].state == ("ok" if what == "file" else "problem")
