"""`evalvault-sdk spool`, as an operator runs it beside services that live and services that have ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.cli import spool
from evalvault_sdk.delivery.deadletter import DeadLetter
from evalvault_sdk.delivery.folder import folder_of
from evalvault_sdk.delivery.transport.http import HttpTransport
from tests.cli.test_commands import command
from tests.support import LiveServer, clean_environment, free_port, live_server, wait_for

SERVICE = textwrap.dedent(
    """
    import sys, time
    from evalvault_sdk import StageTracer
    from evalvault_sdk.delivery.spool import Spool
    Spool.look_around = lambda self: None  # it would adopt what ended services left, sooner or later
    run, url, first, count, stay = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
    tracer = StageTracer(run, url, durability="journal", shutdown_timeout_s=0.1, retry_initial_s=30.0)
    for number in range(first, first + count):
        tracer.record_stage("work", stage_id=f"s{number}", attributes={"number": number})
    print("ready", flush=True)
    time.sleep(stay)
    """
)


def start_service(run: str, url: str, first: int, count: int, stay_s: int = 0) -> subprocess.Popen[str]:
    arguments = [run, url, str(first), str(count), str(stay_s)]
    service = subprocess.Popen(
        [sys.executable, "-c", SERVICE, *arguments], env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    assert service.stdout.readline() == "ready\n"
    return service


def ended_service(run: str, url: str, first: int = 0, count: int = 3) -> None:
    """Leave what a service that was killed leaves."""
    service = start_service(run, url, first, count, 60)
    end(service)


def end(service: subprocess.Popen[str]) -> None:
    service.kill()
    service.communicate(timeout=10)


@contextlib.contextmanager
def live_service(run: str, url: str, first: int, count: int) -> Iterator[None]:
    service = start_service(run, url, first, count, 60)
    try:
        yield
    finally:
        end(service)


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


@pytest.fixture
def url() -> str:
    """An address where no server is, yet."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture
def root() -> Path:
    return Path(os.environ["EVALVAULT_SPOOL_DIR"])


def only(root: Path) -> spool.Destination:
    (destination,) = spool.destinations(root)
    return destination


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*-*-*.jsonl"))


def stored(server: LiveServer, run: str) -> list[int]:
    events = server.get(f"events/{run}", limit=10_000)["events"]
    return sorted(event["attributes"]["number"] for event in events)


def row(output: str, name: str) -> str:
    """Return the second cell of the table's row of that name."""
    (line,) = (line for line in output.splitlines() if line.strip("│ ").startswith(name))
    return line.strip("│ ").removeprefix(name).strip("│ ")


def refuse(root: Path, *letters: tuple[dict[str, Any], str]) -> None:
    destination = only(root)
    dead_letter = DeadLetter(destination.folder, destination.address, max_bytes=1 << 20)
    assert dead_letter.add((json.dumps(event).encode(), reason) for event, reason in letters)


# -- looking ----------------------------------------------------------------------------------------


def test_status_and_list_tell_what_is_in_use_from_what_is_left_over(run: str, url: str, root: Path) -> None:
    ended_service(run, url, count=3)
    with live_service(run, url, first=3, count=4):
        status = command("spool", "status")
        listed = command("spool", "list")
    assert (status.returncode, listed.returncode) == (0, 0)
    assert f"{url}/api/stage/events" in status.stdout
    assert row(status.stdout, "events") == "7"
    assert row(status.stdout, "dead letter") == "0"
    assert row(status.stdout, "segments in use") != "0"
    assert row(status.stdout, "segments left over") == "1"
    (left,) = (line for line in listed.stdout.splitlines() if "left over" in line)
    assert [cell.strip() for cell in left.strip("│").split("│")][4] == "3"
    assert "in use" in listed.stdout


def test_status_shows_only_the_destination_that_is_asked_for(run: str, url: str, root: Path) -> None:
    other = f"http://localhost:{free_port()}"
    ended_service(run, url)
    ended_service(run, other)
    both = command("spool", "status").stdout
    assert url in both
    assert other in both
    one = command("spool", "status", "--url", other).stdout
    assert other in one
    assert url not in one
    missing = command("spool", "status", "--url", "http://nobody.test")
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: nothing for http://nobody.test")


def test_an_empty_spool_is_said_to_be_one(tmp_path: Path) -> None:
    for arguments in (("status",), ("list",), ("replay",), ("purge",), ("export", str(tmp_path / "x.jsonl"))):
        done = command("spool", *arguments, "--dir", str(tmp_path / "none"))
        assert (done.returncode, done.stderr) == (0, "")
        assert "Nothing is spooled in" in done.stdout
    assert not list(tmp_path.iterdir())


def test_what_a_destination_file_holds_does_not_steer_the_terminal(root: Path) -> None:
    folder = root / "odd-123456789abc.0"
    folder.mkdir(parents=True)
    (folder / "destination").write_text("http://x/\x1b[2J[bold]\n")
    done = command("spool", "status")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "[bold]" in done.stdout


# -- replay -----------------------------------------------------------------------------------------


def test_replay_delivers_what_ended_services_left_and_nothing_of_a_live_one(
    tmp_path: Path, run: str, url: str, root: Path
) -> None:
    ended_service(run, url, count=3)
    with live_service(run, url, first=3, count=4):
        with live_server(tmp_path / "x.db") as server:  # elsewhere, so that the live service cannot deliver
            done = command("spool", "replay", "--to", server.url)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "3 events stored, 0 refused, 0 left" in done.stdout
            assert "in use: running services deliver them" in done.stdout
            assert stored(server, run) == [0, 1, 2]
        assert all(kept.in_use for kept in only(root).segments())
        assert sum(kept.count() for kept in only(root).segments()) == 4
    with live_server(tmp_path / "x.db") as server:
        assert command("spool", "replay", "--to", server.url).returncode == 0
        assert stored(server, run) == [0, 1, 2, 3, 4, 5, 6]
    assert {path.name for path in only(root).folder.iterdir()} == {"destination"}, "the lock files are gone, too"


def test_replay_sends_to_the_server_that_the_events_were_recorded_for(tmp_path: Path, run: str, root: Path) -> None:
    port = free_port()
    ended_service(run, f"http://127.0.0.1:{port}", count=2500)
    server = LiveServer(tmp_path / "x.db", "--token", "s3cret", port=port)
    try:
        refused = command("spool", "replay")
        assert refused.returncode == 1
        assert "set EVALVAULT_API_TOKEN" in refused.stdout
        assert "0 events stored, 0 refused, 2,500 left" in refused.stdout
        done = command("spool", "replay", "--token", "s3cret")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2,500 events stored" in done.stdout
        assert "s3cret" not in refused.stdout + done.stdout
    finally:
        server.stop()


def test_replay_sends_spans_to_the_endpoint_that_they_were_recorded_for(tmp_path: Path, run: str, root: Path) -> None:
    port = free_port()
    with StageTracer(run, otlp_endpoint=f"http://127.0.0.1:{port}", shutdown_timeout_s=0.1) as tracer:
        for number in range(3):
            tracer.record_stage("work", attributes={"number": number})
    assert only(root).address == f"http://127.0.0.1:{port}/v1/traces"
    server = LiveServer(tmp_path / "x.db", port=port)
    try:
        done = command("spool", "replay", "--url", f"{server.url}/v1/traces")
        assert done.returncode == 0, done.stdout + done.stderr
        assert stored(server, run) == [0, 1, 2]
    finally:
        server.stop()


def test_replay_that_is_killed_half_way_is_completed_by_the_next_and_each_event_is_stored_once(
    tmp_path: Path, run: str, url: str, root: Path
) -> None:
    ended_service(run, url, count=8000)
    with live_server(tmp_path / "x.db") as server:
        arguments = [sys.executable, "-m", "evalvault_sdk.cli", "spool", "replay", "--to", server.url]
        process = subprocess.Popen(arguments, env=clean_environment(), stdout=subprocess.DEVNULL)
        wait_for(lambda: server.db.with_name("x.db-wal").stat().st_size > 100_000)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert segments(root), "killed before its end"
        done = command("spool", "replay", "--to", server.url)
        assert done.returncode == 0, done.stdout + done.stderr
        assert stored(server, run) == list(range(8000))
    assert not segments(root)


def test_replay_without_a_server_loses_nothing_and_says_why(run: str, url: str, root: Path) -> None:
    ended_service(run, url)
    before = [path.read_bytes() for path in segments(root)]
    settings = spool.spool_settings(root, url)
    spool_patch = pytest.MonkeyPatch()
    spool_patch.setattr(spool, "_GIVE_UP_AFTER_S", 0.5)
    try:
        result = spool.replay(only(root), settings, lambda size: None)
    finally:
        spool_patch.undo()
    assert (result.stored, result.left, result.complete) == (0, 3, False)
    assert result.failure is not None
    assert "try later" in result.failure
    assert [path.read_bytes() for path in segments(root)] == before
    assert all(kept.in_use is False for kept in only(root).segments()), "it let go of the locks"


def test_what_the_server_refuses_goes_to_the_dead_letter_and_the_status_says_so(
    server: LiveServer, run: str, url: str, root: Path
) -> None:
    ended_service(run, url)
    (path,) = segments(root)
    lines = path.read_bytes().splitlines()
    bad = json.dumps({"run_id": run, "stage_type": "x", "attempt": 0}).encode()
    path.write_bytes(b"\n".join([lines[0], bad, b"\x00damaged", lines[1], lines[2], b'{"run_id": "to']))
    done = command("spool", "replay", "--to", server.url)
    assert done.returncode == 1
    assert "3 events stored, 1 refused, 0 left" in done.stdout
    assert "1 damaged lines" in done.stdout
    assert stored(server, run) == [0, 1, 2]
    assert not segments(root)
    letters = [json.loads(line) for line in only(root).letters()]
    assert sorted(letter["reason"][:8] for letter in letters) == ["attempt ", "it is no"]


def test_the_dead_letter_is_delivered_once_its_cause_is_gone_and_the_rest_of_it_stays(
    server: LiveServer, run: str, url: str, root: Path
) -> None:
    ended_service(run, url)
    good = {"run_id": run, "stage_type": "x", "stage_id": "a", "attributes": {"number": 7}}
    refuse(root, (good, "not then"), ({**good, "stage_id": "b", "attempt": 0}, "attempt must be at least 1"))
    destination = only(root)
    with destination.dead_letter.open("ab") as file:
        file.write(b'{"reason": "no JSON", "damaged": "x"}\n')
    done = command("spool", "replay", "--dead-letter", "--to", server.url)
    assert done.returncode == 1
    assert "1 events stored, 1 refused, 0 left" in done.stdout
    assert stored(server, run) == [7]
    reasons = sorted(json.loads(line)["reason"] for line in destination.letters())
    assert reasons[0].startswith("attempt must be")
    assert reasons[1:] == ["no JSON"]
    assert len(segments(root)) == 1, "what was in the spool is left alone"


def test_a_dead_letter_that_cannot_be_delivered_now_is_in_the_spool_and_not_lost(
    run: str, url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_service(run, url)
    refuse(root, ({"run_id": run, "stage_type": "x"}, "not then"))
    monkeypatch.setattr(spool, "_GIVE_UP_AFTER_S", 0.2)
    result = spool.replay(only(root), spool.spool_settings(root, url), lambda size: None, dead_letter=True)
    assert (result.stored, result.left) == (0, 1)
    assert sum(kept.count() for kept in only(root).left_over()) == 4
    assert not list(only(root).letters())


def test_what_is_refused_while_the_dead_letter_is_emptied_is_not_lost(run: str, url: str, root: Path) -> None:
    ended_service(run, url)
    destination = only(root)
    dead_letter = DeadLetter(destination.folder, destination.address, max_bytes=1 << 20)
    count = 200
    found: list[int] = []

    def refuse_all() -> None:
        for number in range(count):
            assert dead_letter.add([(json.dumps({"n": number}).encode(), "not then")])

    def take(lines: Iterator[bytes]) -> list[bytes]:
        found.extend(json.loads(line)["event"]["n"] for line in lines)
        return []

    thread = threading.Thread(target=refuse_all)
    thread.start()
    while thread.is_alive():
        destination.empty_letters(take)
    thread.join()
    destination.empty_letters(take)
    assert sorted(found) == list(range(count))


def test_a_fault_in_sending_ends_the_replay_and_loses_nothing(
    run: str, url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise ValueError("a fault")

    ended_service(run, url)
    monkeypatch.setattr(HttpTransport, "send", fail)
    monkeypatch.setattr(spool, "_GIVE_UP_AFTER_S", 0.2)
    result = spool.replay(only(root), spool.spool_settings(root, url), lambda size: None)
    assert (result.stored, result.left) == (0, 3)
    assert "a fault in sending" in str(result.failure)


def test_a_token_is_not_sent_to_several_servers(run: str, root: Path) -> None:
    for _ in range(2):
        ended_service(run, f"http://127.0.0.1:{free_port()}")
    done = command("spool", "replay", EVALVAULT_API_TOKEN="s3cret")
    assert done.returncode == 1
    assert "say which with --url" in done.stderr
    assert len(segments(root)) == 2


def test_what_waits_for_a_file_is_replayed_only_to_a_server_that_is_named(
    tmp_path: Path, server: LiveServer, run: str, root: Path
) -> None:
    ended_service(run, "http://127.0.0.1:9")
    folder = only(root).folder
    path = str(tmp_path / "events.jsonl")
    target = folder_of(root, path)
    folder.rename(target)
    (target / "destination").write_text(path + "\n")
    done = command("spool", "replay")
    assert done.returncode == 1
    assert "with --to" in done.stderr
    assert command("spool", "replay", "--url", path, "--to", server.url).returncode == 0
    assert stored(server, run) == [0, 1, 2]


def test_the_folder_of_another_user_is_looked_at_and_left_alone(run: str, url: str, root: Path) -> None:
    ended_service(run, url)
    folder = only(root).folder
    folder.rename(folder.with_suffix(".4711"))
    assert command("spool", "status").returncode == 0
    for arguments in (("replay",), ("purge", "--yes")):
        done = command("spool", *arguments)
        assert done.returncode == 1
        assert "run the command as its user" in done.stderr
    assert len(segments(root)) == 1


def test_without_locks_replay_and_purge_want_force(
    server: LiveServer, run: str, url: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    ended_service(run, url)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    (kept,) = only(root).segments()
    assert kept.in_use is None
    settings = spool.spool_settings(root, server.url)
    result = spool.replay(only(root), settings, lambda size: None)
    assert (result.stored, result.left) == (0, 3)
    assert "--force" in str(result.failure)
    assert spool.Purge.of(only(root)).run(settings) == 0
    result = spool.replay(only(root), settings, lambda size: None, force=True)
    assert (result.stored, result.left, result.failure) == (3, 0, None)
    assert not segments(root)


# -- export and purge -------------------------------------------------------------------------------


def test_export_copies_everything_oldest_first_and_changes_nothing(
    tmp_path: Path, run: str, url: str, root: Path
) -> None:
    ended_service(run, url, count=2)
    time.sleep(0.01)
    ended_service(run, f"http://localhost:{free_port()}", first=2, count=2)
    (first, second) = sorted(segments(root), key=lambda path: path.name)
    with first.open("ab") as file:
        file.write(b"\x00damaged\n")
    with second.open("ab") as file:
        file.write(b'{"torn')
    before = [path.read_bytes() for path in segments(root)]
    out = tmp_path / "out.jsonl"
    with live_service(run, url, first=4, count=2):
        done = command("spool", "export", str(out))
        assert [path for path in segments(root) if path in (first, second)] == sorted((first, second))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("6 events copied, 1 damaged lines left out")
    assert "2 of them running services will deliver as well" in done.stdout
    assert [json.loads(line)["attributes"]["number"] for line in out.read_text().splitlines()] == list(range(6))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [path.read_bytes() for path in sorted((first, second))] == before
    again = command("spool", "export", str(out))
    assert again.returncode == 1
    assert "--force" in again.stderr
    out.chmod(0o644)
    assert command("spool", "export", str(out), "--force").returncode == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    ingested = command("ingest", str(out), "--db", str(tmp_path / "x.db"))
    assert "6 events stored, 0 refused" in ingested.stdout


def test_the_dead_letter_is_exported_with_its_reasons(tmp_path: Path, run: str, url: str, root: Path) -> None:
    ended_service(run, url)
    refuse(root, ({"run_id": run}, "stage_type is required"))
    out = tmp_path / "out.jsonl"
    assert "1 refused events copied" in command("spool", "export", "--dead-letter", str(out)).stdout
    assert json.loads(out.read_text())["reason"] == "stage_type is required"


def test_purge_asks_first_and_deletes_what_it_counted_and_nothing_of_a_live_service(
    run: str, url: str, root: Path
) -> None:
    ended_service(run, url, count=3)
    refuse(root, ({"run_id": run}, "stage_type is required"))
    with live_service(run, url, first=3, count=4):
        unanswered = command("spool", "purge")
        assert unanswered.returncode == 1
        assert "Delete 3 events for good?" in unanswered.stdout + unanswered.stderr
        assert sum(kept.count() for kept in only(root).segments()) == 7
        done = command("spool", "purge", "--yes")
        assert done.returncode == 0, done.stderr
        assert "3 events deleted" in done.stdout
        assert sum(kept.count() for kept in only(root).segments()) == 4
        assert "Nothing to delete" in command("spool", "purge", "--yes").stdout
    assert "1 events deleted" in command("spool", "purge", "--dead-letter", "--yes").stdout
    assert not list(only(root).letters())
    assert sum(kept.count() for kept in only(root).segments()) == 4


def test_purge_leaves_what_comes_after_it_was_asked_for(run: str, url: str, root: Path) -> None:
    ended_service(run, url, count=3)
    purge = spool.Purge.of(only(root))
    ended_service(run, url, first=3, count=2)
    assert purge.run(spool.spool_settings(root)) == 3
    assert sum(kept.count() for kept in only(root).segments()) == 2


def test_a_narrow_terminal_cuts_the_owner_and_never_a_count(tmp_path: Path) -> None:
    spool = tmp_path / "spool" / "x-1.0"
    spool.mkdir(parents=True)
    (spool / "destination").write_text("http://x.test/api/stage/events\n")
    (spool / "1767780000123-9f86d081884c7d65-000001.jsonl").write_text('{"n": 1}\n' * 12_345)
    command = [sys.executable, "-m", "evalvault_sdk.cli", "spool", "list", "--dir", str(tmp_path / "spool")]
    environ = {**clean_environment(), "COLUMNS": "80"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "12,345" in done.stdout
    assert "111.1 kB" in done.stdout
