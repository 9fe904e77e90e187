"""The command, as a user runs it: a process, its output, its status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.support import DATA, LiveServer, clean_environment, free_port, wait_for


def command(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evalvault_sdk.cli", *arguments],
        env={**clean_environment(), "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
    )


def write_events(path: Path, events: list[Any]) -> Path:
    path.write_text("".join(f"{event if isinstance(event, str) else json.dumps(event)}\n" for event in events))
    return path


def test_the_version_is_told() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", command("--version").stdout)


def test_a_file_is_ingested_into_a_database_and_shown_from_it(tmp_path: Path) -> None:
    db = str(tmp_path / "x.db")
    done = command("ingest", str(DATA / "run_20260103_001.jsonl"), "--db", db)
    assert (done.returncode, done.stdout) == (0, "5 events stored, 0 refused\n")
    shown = command("show", "run_20260103_001", "--db", db)
    assert shown.returncode == 0
    assert "rerank" in shown.stdout
    assert "220.00" in shown.stdout
    assert "Every metric holds its threshold." in shown.stdout


def test_show_draws_the_waterfall_failing_metrics_and_recommendations(server: LiveServer) -> None:
    run = f"run-{uuid.uuid4()}"
    times = {"started_at": "2026-01-07T10:00:00Z", "trace_id": "t1"}
    server.post(
        {
            "events": [
                {"run_id": run, "stage_type": "request", "stage_id": "a", "duration_ms": 9000, **times},
                {
                    "run_id": run,
                    "stage_type": "output",
                    "stage_id": "b",
                    "parent_stage_id": "a",
                    "duration_ms": 8000,
                    "status": "error",
                    "attributes": {"error": {"type": "TimeoutError", "message": "[bold]my secret"}},
                    **times,
                },
                {"run_id": run, "stage_type": "[red]odd", "stage_id": "c", "parent_stage_id": "c", "trace_id": "t1"},
            ]
        }
    )
    shown = command("show", run, "--url", server.url)
    assert shown.returncode == 0, shown.stderr
    assert "Trace t1" in shown.stdout
    assert "TimeoutError" in shown.stdout
    assert "[red]odd" in shown.stdout, "what events hold is no markup"
    assert "output.latency_ms" in shown.stdout
    assert "[p0_critical] generator" in shown.stdout
    assert "Missing required stages: system_prompt, input, retrieval" in shown.stdout
    assert command("show", run, "--url", server.url, "--trace", "t1").returncode == 0
    assert "has no trace t2" in command("show", run, "--url", server.url, "--trace", "t2").stderr


def test_bad_lines_are_named_and_the_others_stored(server: LiveServer, tmp_path: Path) -> None:
    run = f"run-{uuid.uuid4()}"
    good = {"run_id": run, "stage_type": "x"}
    path = write_events(
        tmp_path / "events.jsonl",
        [
            f"\N{ZERO WIDTH NO-BREAK SPACE}{json.dumps(good)}",  # as Windows editors begin a file
            "{broken",
            {**good, "attempt": 0},
            "",
            good,
            "[1]",
            {**good, "run_id": ""},
            {**good, "attributes": {"a": float("nan")}},
        ],
    )
    done = command("ingest", str(path), "--url", server.url)
    assert done.returncode == 1
    assert "2 events stored, 5 refused" in done.stdout
    for line in (
        "line 2: Malformed JSON",
        "line 8: attributes.a must be a finite number",
        "line 3: attempt must be at least 1",
        "line 6: event must be an object",
        "line 7: run_id is required",
    ):
        assert line in done.stdout
    assert server.get(f"events/{run}")["total"] == 2


def test_a_long_file_is_ingested_in_batches_and_again_to_no_effect(server: LiveServer, tmp_path: Path) -> None:
    run = f"run-{uuid.uuid4()}"
    events = [{"run_id": run, "stage_type": "x", "stage_id": f"s{number}"} for number in range(2500)]
    path = write_events(tmp_path / "events.jsonl", events)
    for _ in range(2):
        assert "2,500 events stored, 0 refused" in command("ingest", str(path), "--url", server.url).stdout
    assert server.get(f"events/{run}")["total"] == 2500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "r", "--db", "no-such.db"), "there is no database file no-such.db"),
        (("show", "r", "--url", f"http://127.0.0.1:{free_port()}"), "start one with `evalvault-sdk serve`"),
        (("serve", "--host", "0.0.0.0"), "--token"),
        (("serve", "--db", "/no/such/folder/x.db"), "/no/such/folder/x.db"),
        (("serve", "--db", "redis://x"), "redis://"),
        (("serve", "--db", ":memory:"), "give the path of a file"),
        (("serve", "--host", "0.0.0.0", "--token", ""), "token is empty"),
        (("serve", "--token", " "), "token is empty"),
        (("show", "\udcff", "--url", "http://127.0.0.1:1"), "run id"),
        (("ingest", "/proc/self/mem", "--db", "x.db"), "Input/output error"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error:")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir()) or arguments[0] == "ingest"


def test_a_run_that_is_not_there_is_said_for_both_sources(server: LiveServer, tmp_path: Path) -> None:
    command("ingest", str(DATA / "run_20260103_001.jsonl"), "--db", str(tmp_path / "x.db"))
    for source in (("--url", server.url), ("--db", str(tmp_path / "x.db"))):
        done = command("show", "nobody", *source)
        assert done.returncode == 1
        assert "there are no stage events of the run 'nobody'" in done.stderr


def test_a_missing_extra_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('hidden', name='typer')")
    environment = clean_environment()
    done = subprocess.run(
        [sys.executable, "-m", "evalvault_sdk.cli", "--version"],
        env={**environment, "PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'evalvault-sdk[cli]'" in done.stderr


def test_the_demo_shows_a_real_run_and_leaves_no_process_behind(tmp_path: Path) -> None:
    done = command("demo", "--db", str(tmp_path / "demo.db"))
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("language_detection", "Trace ", "Failing metrics", "Recommendations", "[p0_critical] retriever"):
        assert words in done.stdout
    account = re.search(r"recorded ([\d,]+) = delivered ([\d,]+); stored, says the server: ([\d,]+)", done.stdout)
    assert account is not None
    assert len(set(account.groups())) == 1
    with sqlite3.connect(tmp_path / "demo.db") as db:
        (stored,) = db.execute("SELECT COUNT(*) FROM stage_events").fetchone()
    db.close()
    assert f"{stored:,}" == account[1]
    assert stored > 900
    assert not processes_that_name(tmp_path)


def test_the_demo_leaves_no_process_behind_when_it_is_interrupted(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "evalvault_sdk.cli", "demo", "--db", str(tmp_path / "x.db")],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(lambda: (tmp_path / "x.db").exists(), 30)
    time.sleep(0.5)
    demo.send_signal(signal.SIGINT)
    demo.communicate(timeout=30)
    assert demo.returncode != 0
    assert not processes_that_name(tmp_path)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def processes_that_name(path: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(path) in line and "pytest" not in line:
            found.append(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_demo_ends_its_server_when_it_is_told_to_end(tmp_path: Path, number: int) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "evalvault_sdk.cli", "demo", "--db", str(tmp_path / "x.db")],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    wait_for(lambda: (tmp_path / "x.db").exists(), 30)
    demo.send_signal(number)
    demo.communicate(timeout=30)
    assert demo.returncode == 128 + number
    assert not processes_that_name(tmp_path)


def test_the_demo_works_behind_a_proxy_that_is_not_for_this_machine(tmp_path: Path) -> None:
    done = command(
        "demo", "--db", str(tmp_path / "x.db"), HTTP_PROXY="http://127.0.0.1:9", http_proxy="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_port_in_use_is_one_clear_line(tmp_path: Path, server: LiveServer) -> None:
    done = command("serve", "--db", str(tmp_path / "x.db"), "--port", str(server.port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: cannot listen on 127.0.0.1 port {server.port} (Address already in use)")
    assert "docs" not in done.stdout


@pytest.mark.parametrize(("status", "body"), [(200, b'{"a": 1}'), (200, b"<html>"), (404, b'["not found"]')])
def test_another_server_is_not_taken_for_ours(status: int, body: bytes) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        done = command("show", "r", "--url", f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    assert done.returncode == 1
    assert "is not an EvalVault server" in done.stderr


def test_a_terminal_of_another_encoding_shows_what_it_can(tmp_path: Path) -> None:
    db = str(tmp_path / "x.db")
    command("ingest", str(DATA / "r3_dense_faiss.jsonl"), "--db", db)
    for encoding in ("ascii", "euc-kr"):
        done = subprocess.run(
            [sys.executable, "-m", "evalvault_sdk.cli", "show", "r3-dense-faiss-1767506494", "--db", db],
            env={**clean_environment(), "PYTHONIOENCODING": encoding},
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert b"retrieval.latency_ms" in done.stdout


def test_what_events_hold_does_not_steer_the_terminal(server: LiveServer) -> None:
    run = f"run-{uuid.uuid4()}"
    steering = "\x1b[2J\x1b]0;mine\x07"
    server.post({"run_id": run, "stage_type": f"x{steering}", "stage_name": steering, "trace_id": steering})
    shown = command("show", run, "--url", server.url)
    assert shown.returncode == 0
    assert not {"\x1b", "\x07"} & set(shown.stdout)


def test_stages_that_are_each_others_parents_are_drawn(server: LiveServer) -> None:
    run = f"run-{uuid.uuid4()}"
    pair = [("left", "a", "b"), ("right", "b", "a")]
    server.post(
        {
            "events": [
                {"run_id": run, "stage_type": kind, "stage_id": own, "parent_stage_id": parent, "trace_id": "t"}
                for kind, own, parent in pair
            ]
        }
    )
    waterfall = command("show", run, "--url", server.url).stdout.split("Trace t")[1]
    assert waterfall.count("left") == waterfall.count("right") == 1


def test_a_file_from_a_read_only_folder_can_be_shown(tmp_path: Path) -> None:
    folder = tmp_path / "carried"
    folder.mkdir()
    command("ingest", str(DATA / "run_20260103_001.jsonl"), "--db", str(folder / "x.db"))
    before = (folder / "x.db").read_bytes()
    folder.chmod(0o500)
    try:
        shown = command("show", "run_20260103_001", "--db", str(folder / "x.db"))
    finally:
        folder.chmod(0o700)
    assert shown.returncode == 0, shown.stderr
    assert (folder / "x.db").read_bytes() == before


@pytest.mark.parametrize("columns", ["80", "200"])
def test_the_waterfall_fits_the_terminal(server: LiveServer, columns: str) -> None:
    run = f"run-{uuid.uuid4()}"
    long_name = "a_stage_with_quite_a_long_name"
    events = [
        {"run_id": run, "stage_type": long_name, "stage_name": long_name, "stage_id": "a", "duration_ms": 12345.678},
        {"run_id": run, "stage_type": "output", "parent_stage_id": "a", "duration_ms": 9, "status": "error"},
    ]
    for event in events:
        server.post({**event, "trace_id": "t", "started_at": "2026-01-07T10:00:00Z"})
    waterfall = command("show", run, "--url", server.url, COLUMNS=columns).stdout.split("Trace t")[1]
    rows = [line for line in waterfall.splitlines() if line.startswith(("│", "┃"))]
    assert "outcome" in rows[0]
    assert "success" in rows[1]
    assert all(len(row) <= int(columns) for row in rows)


def test_a_run_without_trace_ids_has_a_waterfall_too(tmp_path: Path) -> None:
    db = str(tmp_path / "x.db")
    command("ingest", str(DATA / "run_20260103_001.jsonl"), "--db", db)
    shown = command("show", "run_20260103_001", "--db", db).stdout
    tree = shown.split("without trace ids")[1].split("Every metric")[0]
    assert "no times recorded" in tree
    for kind in ("system_prompt", "  input", "    retrieval", "      rerank", "        output"):
        assert f"│ {kind}" in tree


def test_show_trusts_the_ca_that_the_sdk_trusts(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    script = textwrap.dedent(
        """
        import sys, uvicorn
        from evalvault_sdk.server import create_app
        uvicorn.run(create_app("x.db"), port=int(sys.argv[1]), ssl_certfile="server.pem")
        """
    )
    port = free_port()
    url = f"https://localhost:{port}"
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(port)], cwd=tmp_path, env=clean_environment(), stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: listens(port), 30)
        refused = command("show", "run_20260103_001", "--url", url)
        assert "set EVALVAULT_CA_BUNDLE" in refused.stderr
        bundle = str(tmp_path / "ca.pem")
        file = str(DATA / "run_20260103_001.jsonl")
        assert command("ingest", file, "--url", url, EVALVAULT_CA_BUNDLE=bundle).returncode == 0
        assert command("show", "run_20260103_001", "--url", url, EVALVAULT_CA_BUNDLE=bundle).returncode == 0
        assert "EVALVAULT_CA_BUNDLE" in command("ingest", str(DATA / "run_20260103_001.jsonl"), "--url", url).stderr
    finally:
        server.terminate()
        server.wait(10)


def test_a_large_file_is_sent_in_its_order_so_that_the_later_of_two_equals_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from evalvault_sdk import StageEvent
    from evalvault_sdk.cli.ingest import ServerTarget
    from evalvault_sdk.delivery.transport import Delivered, TooLarge

    sent: list[int] = []

    def send(self: ServerTarget, batch: Any) -> Any:
        if len(batch.events) > 1:
            return TooLarge()
        sent.append(json.loads(batch.events[0])["attempt"])
        return Delivered()

    monkeypatch.setattr(ServerTarget, "_send", send)
    events = [StageEvent(run_id="r", stage_type="x", stage_id="s", attempt=number) for number in range(1, 6)]
    assert ServerTarget("http://localhost:1", None).store(events) == ()
    assert sent == [1, 2, 3, 4, 5]
