"""Delivery without a server: into a file that is carried by hand, or straight into a database."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import ConfigurationError, Settings, StageEvent, StageTracer
from evalvault_sdk.server.store import open_store
from tests.support import clean_environment


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ingest(path: Path, db: Path) -> str:
    command = [sys.executable, "-m", "evalvault_sdk.cli", "ingest", str(path), "--db", str(db)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout


def test_events_go_into_a_file_that_can_be_ingested_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        with StageTracer("r", file=path) as tracer:
            with tracer.stage("retrieval") as stage:
                stage.set(query="보험 보장금액은?")
            tracer.record_stage("output")
        assert tracer.stats().complete
    events = lines(path)
    assert [event["stage_type"] for event in events] == ["retrieval", "output"] * 2
    assert all(StageEvent.from_dict(event).run_id == "r" for event in events)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "4 events stored, 0 refused" in ingest(path, tmp_path / "x.db")


def test_events_go_into_a_database_without_a_server(tmp_path: Path) -> None:
    path = tmp_path / "eval.db"
    with StageTracer("r", db_path=path) as tracer:
        with tracer.stage("request"):
            tracer.record_stage("retrieval", attributes={"doc_ids": ["d1"]})
        tracer.record_stage("output", duration_ms=-1)
        report = tracer.flush(10)
        assert (report.delivered, report.rejected, report.in_time) == (2, 1, True)
        assert repr(tracer) == f"StageTracer(run_id='r', destination='{path}')"
    store = open_store(str(path), read_only=True)
    with store.snapshot() as view:
        child, root = (stored.event for stored in view.events("r"))
    assert child.parent_stage_id == root.stage_id
    store.close()


def test_many_processes_append_to_one_file_and_no_line_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    script = textwrap.dedent(
        f"""
        import sys
        from evalvault_sdk import StageTracer
        with StageTracer("r", file={str(path)!r}, flush_interval_s=0.01, batch_events=5) as tracer:
            for number in range(500):
                tracer.record_stage("x", stage_id=f"{{sys.argv[1]}}-{{number}}", attributes={{"text": "보험" * 500}})
        assert tracer.stats().complete, tracer.stats()
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], env=clean_environment()) for number in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert len({event["stage_id"] for event in lines(path)}) == 2000
    assert len(lines(path)) == 2000


def test_a_batch_waits_until_another_process_has_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tracer = StageTracer("r", file=path)
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b'{"half a li')
        other.flush()
        tracer.record_stage("x")
        assert not tracer.flush(0.2).in_time
        other.write(b'ne": 1}\n')
    assert tracer.shutdown(10).complete
    assert [*lines(path)[0]] == ["half a line"]
    assert lines(path)[1]["stage_type"] == "x"


def test_a_full_disk_tears_no_line_and_loses_nothing_that_fits_later(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracer = StageTracer("r", file=path, retry_initial_s=0.01, retry_max_s=0.02)
    tracer.record_stage("x", stage_id="fits")
    assert tracer.flush(10).complete
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 500, before[1]))
    try:
        for number in range(10):
            tracer.record_stage("x", stage_id=str(number), attributes={"text": "x" * 100})
        report = tracer.flush(0.3)
        assert (report.in_time, report.delivered, report.pending) == (False, 1, 10)
        assert [event["stage_id"] for event in lines(path)] == ["fits"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert tracer.shutdown(10).complete
    assert [event["stage_id"] for event in lines(path)] == ["fits", *map(str, range(10))]


@pytest.mark.parametrize("setting", ["file", "db_path"])
def test_a_folder_that_is_not_there_is_said_and_not_felt(
    tmp_path: Path, setting: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = StageTracer("r", **{setting: tmp_path / "later" / "x"}, retry_initial_s=0.01, retry_max_s=0.02)  # type: ignore[arg-type]
    tracer.record_stage("x")
    assert not tracer.flush(0.3).in_time
    assert "check the file's folder" in caplog.text
    (tmp_path / "later").mkdir()
    assert tracer.shutdown(10).complete


@pytest.mark.parametrize("setting", ["file", "db_path"])
def test_forked_children_write_beside_their_parent(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "x"
    script = textwrap.dedent(
        f"""
        import os
        from evalvault_sdk import StageTracer
        tracer = StageTracer("r", {setting}={str(path)!r}, flush_interval_s=60)
        tracer.record_stage("before")
        assert tracer.flush(10).complete
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                tracer.record_stage("child")
                assert tracer.shutdown(10).complete
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        tracer.record_stage("after")
        assert tracer.shutdown(10).complete
        """
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if setting == "db_path":
        store = open_store(str(path), read_only=True)
        with store.snapshot() as view:
            kinds = sorted(stored.event.stage_type for stored in view.events("r"))
        store.close()
    else:
        kinds = sorted(event["stage_type"] for event in lines(path))
    assert kinds == ["after", "before", "child", "child", "child"]


def test_events_go_to_one_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="api_url and file"):
        StageTracer("r", "http://h", file="x")
    with pytest.raises(ConfigurationError, match="EVALVAULT_API_URL and EVALVAULT_FILE"):
        Settings.resolve({"EVALVAULT_API_URL": "http://h", "EVALVAULT_FILE": "x"}, run_id="r")
    with pytest.raises(ConfigurationError, match="file must be the path"):
        StageTracer("r", file=" ")
    settings = Settings.resolve({"EVALVAULT_API_URL": "http://h"}, run_id="r", file=tmp_path / "x")
    assert settings.file == os.fspath(tmp_path / "x")
    assert Settings.resolve({"EVALVAULT_FILE": "x"}, run_id="r", api_url="http://h").file is None
