"""The command, as a user runs it: a process, its output, its status."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

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
        tmp_path / "events.jsonl", [good, "{broken", {**good, "attempt": 0}, "", good, "[1]", {**good, "run_id": ""}]
    )
    done = command("ingest", str(path), "--url", server.url)
    assert done.returncode == 1
    assert "2 events stored, 4 refused" in done.stdout
    for line in (
        "line 2: is no JSON",
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
    ],
)
def test_what_cannot_be_done_is_one_clear_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error:")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


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
