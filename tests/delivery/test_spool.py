from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from evalvault_sdk.delivery import segment as segment_module
from evalvault_sdk.delivery import spool as spool_module
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.batch import Batch, BatchLimits
from evalvault_sdk.delivery.folder import default_root, folder_of
from evalvault_sdk.delivery.lock import take_lock
from evalvault_sdk.delivery.queue import EventQueue, QueueLimits
from evalvault_sdk.delivery.spool import Spool
from evalvault_sdk.events import StageEvent
from tests.support import balances, clean_environment, take_all

URL = "http://localhost:8000/api/stage/events"


class Life:
    """One process's life with the spool, as the worker leads it."""

    def __init__(self, root: Path, url: str = URL, **settings: Any) -> None:
        self.ledger = Ledger()
        self.spool = Spool(root, url, self.ledger, **{"max_bytes": 1 << 30, "max_age_s": 1e9, **settings})
        self.queue = EventQueue(self.ledger)

    def store(self, *events: dict[str, Any]) -> bool:
        for event in events:
            self.queue.put(orjson.dumps(event))
        batch = take_all(self.queue)
        if self.spool.store(batch, lambda: True):
            return True
        with self.ledger.lock:
            for share in batch.shares:
                share.account.lose(share, "shutdown", in_flight=True)
        return False

    def append(self, event: dict[str, Any]) -> bool:
        with self.ledger.lock:
            return self.spool.append(orjson.dumps(event), self.queue.account)

    def drain(self) -> list[dict[str, Any]]:
        return drain(self.spool, self.ledger)

    @property
    def files(self) -> list[Path]:
        return sorted(self.spool.folder.glob("*-*-*.jsonl"))


def drain(spool: Spool, ledger: Ledger, limit: int = 1000) -> list[dict[str, Any]]:
    """Deliver all there is, and return it."""
    found: list[dict[str, Any]] = []
    spool.put_off(seal=True)
    while (oldest := spool.take_backlog(probe=False)) is not None:
        lines = spool.read(oldest, BatchLimits(max_events=limit))
        if not lines:
            spool.finish(oldest)
            continue
        with ledger.lock:
            reading = spool.claim(oldest, lines)
            for share in reading.batch.shares:
                share.account.settle(share, 0)
        spool.bury_damaged()
        found += [orjson.loads(event) for event in reading.batch.events]
        spool.advance(oldest, reading, Batch(()))
    return found


def numbers(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"n": number} for number in range(start, start + count)]


def test_the_folder_is_as_its_specification_says(tmp_path: Path) -> None:
    life = Life(tmp_path / "root")
    assert life.store(*numbers(3))
    folder = life.spool.folder
    assert folder.parent == tmp_path / "root"
    (path,) = life.files
    name = spool_module.SEGMENT_NAME.fullmatch(path.name)
    assert name is not None
    assert abs(int(name["created"]) / 1000 - time.time()) < 60
    assert path.read_bytes() == b'{"n":0}\n{"n":1}\n{"n":2}\n'
    assert (folder / f"{name['owner']}.lock").exists()
    assert (folder / "destination").read_text() == URL + "\n"
    for found in [folder.parent, folder, *folder.iterdir()]:
        assert stat.S_IMODE(found.stat().st_mode) == (0o700 if found.is_dir() else 0o600), found
    life.spool.close()


def test_a_segment_can_be_ingested_as_it_is(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store(*(StageEvent(run_id="r", stage_type="x", attributes={"보험": n}).to_dict() for n in range(5)))
    life.spool.close()
    command = [sys.executable, "-m", "evalvault_sdk.cli", "ingest", str(life.files[0]), "--db", str(tmp_path / "x.db")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True)
    assert "5 events stored, 0 refused" in done.stdout


def test_destinations_are_kept_apart_and_each_is_found_again() -> None:
    places = [
        "http://localhost:8000/api/stage/events",
        "https://localhost:8000/api/stage/events",
        "http://localhost:8001/api/stage/events",
        "http://localhost:8000/other/api/stage/events",
        "/data/events.jsonl",
        "/data2/events.jsonl",
    ]
    assert len({folder_of("/r", place) for place in places}) == len(places)
    assert folder_of("/r", "http://LOCALHOST:80/a") == folder_of("/r", "http://localhost/a")
    assert all("/" not in folder_of("/r", place).name for place in places)


def test_the_default_root_suits_servers_and_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert default_root({"HOME": str(home)}) == home / ".local" / "state" / "evalvault" / "spool"
    assert default_root({"HOME": str(home), "XDG_STATE_HOME": "/x"}) == Path("/x/evalvault/spool")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    temporary = default_root({"HOME": str(home)})
    assert temporary.name == f"evalvault-{os.geteuid()}"
    assert default_root({"HOME": "/"}) == temporary
    assert not list(home.iterdir()), "asking makes nothing"


def test_a_torn_last_line_is_cut_and_a_whole_one_without_its_end_is_kept(tmp_path: Path) -> None:
    for tail, expected in [(b'{"n": 2, "te', [0, 1]), (b'{"n": 2}', [0, 1, 2])]:
        life = Life(tmp_path)
        life.store(*numbers(2))
        with life.files[0].open("ab") as file:
            file.write(tail)
        life.spool.close()
        after = Life(tmp_path)
        after.spool.look_around()
        assert [event["n"] for event in after.drain()] == expected
        assert not (after.spool.folder / "dead-letter.jsonl").exists()
        after.spool.close()


def test_damaged_lines_are_set_aside_and_counted_and_stop_nothing(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store(*numbers(3))
    path = life.files[0]
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"\x00\x00garbage\xff", b"[1]", lines[2]]) + b"\n")
    life.spool.close()
    after = Life(tmp_path)
    after.spool.look_around()
    assert [event["n"] for event in after.drain()] == [0, 2]
    stats = after.queue.account.stats()
    assert (stats.recovered, stats.recovered_lost) == (2, 2)
    letters = [json.loads(line) for line in (after.spool.folder / "dead-letter.jsonl").read_text().splitlines()]
    assert [letter["damaged"] for letter in letters] == ["\x00\x00garbage\ufffd", "[1]"]
    assert after.files == []


def test_our_own_events_that_something_damages_are_counted_and_the_account_balances(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store(*numbers(4))
    path = life.files[0]
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], b"x" * len(lines[1]), lines[2]]) + b"\n")
    assert [event["n"] for event in life.drain()] == [0, 2]
    stats = life.queue.account.stats()
    assert (stats.delivered, dict(stats.dropped), stats.pending) == (2, {"damaged": 2}, 0)
    assert balances(stats)


def test_a_segment_that_was_removed_is_a_counted_loss(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.store(*numbers(4))
    life.spool.seal()
    shutil.rmtree(life.spool.folder)
    assert life.drain() == []
    stats = life.queue.account.stats()
    assert (dict(stats.dropped), stats.pending, balances(stats)) == ({"damaged": 4}, 0, True)


def test_a_folder_that_is_removed_while_running_is_made_again_and_open_segments_are_not_lost(tmp_path: Path) -> None:
    life = Life(tmp_path / "root")
    life.append({"n": 0})
    life.store({"n": 1})
    shutil.rmtree(tmp_path / "root")
    life.append({"n": 2})
    life.store({"n": 3})
    assert sorted(event["n"] for event in life.drain()) == [0, 1, 2, 3]
    life.append({"n": 4})
    shutil.rmtree(tmp_path / "root")
    life.spool.close()
    after = Life(tmp_path / "root")
    after.spool.look_around()
    assert [event["n"] for event in after.drain()] == [4]


def test_events_of_a_live_process_are_left_alone(tmp_path: Path) -> None:
    one, other = Life(tmp_path), Life(tmp_path)
    one.store(*numbers(3))
    one.append({"n": 3})
    one.spool.seal()
    other.spool.look_around()
    assert other.drain() == []
    one.spool.close()
    other.spool.look_around()
    assert sorted(event["n"] for event in other.drain()) == [0, 1, 2, 3]
    assert one.files == []
    other.spool.close()
    assert {path.name for path in other.spool.folder.iterdir()} == {"destination"}


def test_only_one_of_many_adopts_what_an_ended_process_left(tmp_path: Path) -> None:
    for number in range(30):
        ended = Life(tmp_path)
        ended.store({"n": number})
        ended.spool.close()
    lives = [Life(tmp_path) for _ in range(4)]
    found: list[list[int]] = [[] for _ in lives]

    def work(index: int) -> None:
        deadline = time.monotonic() + 20
        while lives[index].files and time.monotonic() < deadline:
            lives[index].spool.look_around()
            found[index] += [event["n"] for event in lives[index].drain()]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(lives))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for numbers in found for number in numbers) == list(range(30))


def test_the_lock_of_a_killed_process_is_free_and_that_of_a_running_one_is_not(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from tests.delivery.test_spool import Life, numbers
        life = Life(Path({str(tmp_path)!r}))
        life.store(*numbers(5))
        life.append({{"n": 5}})
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=clean_environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    life = Life(tmp_path)
    life.spool.look_around()
    assert life.drain() == []
    process.kill()
    process.wait(10)
    process.stdout.close()
    life.spool.look_around()
    assert sorted(event["n"] for event in life.drain()) == [0, 1, 2, 3, 4, 5]


def test_a_lost_lock_file_takes_nothing_from_a_process_that_still_writes(tmp_path: Path) -> None:
    one, other = Life(tmp_path), Life(tmp_path)
    one.store({"n": 1})
    (lock,) = one.spool.folder.glob("*.lock")
    lock.unlink()
    other.spool.look_around()
    assert other.drain() == [], "the segment is young: its owner may live"
    one.spool.look_around()
    one.spool.seal()
    one.store({"n": 2})
    assert [path.stem for path in one.spool.folder.glob("*.lock")] != [lock.stem]
    assert [event["n"] for event in one.drain()] == [1, 2]


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_the_bound_in_bytes_holds_and_what_is_lost_is_counted(tmp_path: Path, policy: Any) -> None:
    life = Life(tmp_path, max_bytes=1 << 16, policy=policy)
    written = 0
    for number in range(2000):
        written += life.append({"n": number, "padding": "x" * 80})
    size = sum(path.stat().st_size for path in life.files)
    assert (1 << 16) * 0.7 < size <= 1 << 16
    kept = [event["n"] for event in life.drain()]
    stats = life.queue.account.stats()
    assert balances(stats)
    if policy == "drop_oldest":
        assert written == 2000
        assert kept == list(range(2000 - len(kept), 2000))
        assert dict(stats.dropped) == {"spool_full": 2000 - len(kept)}
    else:
        assert kept == list(range(written))
        assert life.spool.full


def test_events_of_ended_processes_count_in_the_bound_and_make_room_first(tmp_path: Path) -> None:
    now = time.time()
    ended = Life(tmp_path, max_bytes=1 << 16, clock=lambda: now)
    for number in range(300):
        ended.append({"n": number, "padding": "x" * 100})
    ended.spool.close()
    life = Life(tmp_path, max_bytes=1 << 16, clock=lambda: now + 60)
    life.spool.look_around()
    for number in range(300, 600):
        assert life.append({"n": number, "padding": "x" * 100})
    kept = [event["n"] for event in life.drain()]
    assert kept == list(range(600 - len(kept), 600))
    stats = life.queue.account.stats()
    assert stats.recovered + stats.recovered_lost == 300
    assert stats.recovered_lost > 0
    assert dict(stats.dropped) == {}


def test_what_is_too_old_is_given_up_and_counted(tmp_path: Path) -> None:
    now = [time.time()]
    ended = Life(tmp_path, clock=lambda: now[0])
    ended.store(*numbers(3))
    ended.spool.close()
    life = Life(tmp_path, clock=lambda: now[0], max_age_s=3600)
    life.store(*numbers(2, start=3))
    life.spool.seal()
    life.spool.look_around()
    now[0] += 3601
    life.store({"n": 5})
    life.spool.look_around()
    assert [event["n"] for event in life.drain()] == [5]
    stats = life.queue.account.stats()
    assert (dict(stats.dropped), stats.recovered_lost, balances(stats)) == ({"expired": 2}, 3, True)


@pytest.mark.parametrize("fault", ["ENOSPC", "EROFS", "EACCES", "EDQUOT"])
def test_a_disk_that_cannot_be_written_is_said_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, *arguments: Any) -> int:
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

        def write(self, *arguments: Any) -> int:
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    now = [1e9]
    life = Life(tmp_path, clock=lambda: now[0])
    life.append({"n": 0})
    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "os", Broken())
        assert not life.append({"n": 1})
        assert life.spool.fault is not None
        assert os.strerror(getattr(errno, fault)) in life.spool.fault
        assert not life.store({"n": 2})
    assert not life.append({"n": 3}), "it is not tried with every event"
    now[0] += 1.1
    assert life.append({"n": 4})
    assert [event["n"] for event in life.drain()] == [0, 4]
    assert balances(life.queue.account.stats())


def test_a_half_written_line_is_cut_off_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, file: int, data: Any) -> int:
            if len(data) > 5:
                return os.write(file, bytes(data)[:5])
            raise OSError(errno.ENOSPC, "full")

    life = Life(tmp_path)
    life.append({"n": 0})
    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "os", Full())
        assert not life.append({"number": 1})
    assert life.files[0].read_bytes() == b'{"n":0}\n'


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path)
    life.spool.folder.symlink_to(tmp_path)
    assert not life.append({"n": 1})
    assert "is no folder" in str(life.spool.fault)
    life = Life(tmp_path, url="http://other.test")
    life.spool.folder.mkdir()
    somebody = os.stat_result([0o40777, 0, 0, 0, 4711, 0, 0, 0, 0, 0])
    monkeypatch.setattr("evalvault_sdk.private.os.lstat", lambda path: somebody)
    assert not life.append({"n": 1})
    assert "belongs to another user" in str(life.spool.fault)


def test_a_folder_that_is_open_to_others_is_closed(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.spool.folder.mkdir(mode=0o755)
    assert life.append({"n": 1})
    assert stat.S_IMODE(life.spool.folder.stat().st_mode) == 0o700


def test_without_locks_nothing_is_adopted_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    ended = Life(tmp_path)
    ended.store(*numbers(3))
    ended.spool.close()
    idle = Life(tmp_path)
    idle.spool.look_around()
    assert idle.drain() == [], "also by a process that has written nothing so far"
    life = Life(tmp_path)
    life.store({"n": 3})
    life.spool.look_around()
    assert not life.spool.locks_work
    assert [event["n"] for event in life.drain()] == [3]
    assert len(life.files) == 1, "what the ended process left is still there"


def test_a_file_that_cannot_be_opened_now_is_kept_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exhausted:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, *arguments: Any) -> int:
            raise OSError(errno.EMFILE, "too many open files")

    now = [1e9]
    life = Life(tmp_path, clock=lambda: now[0])
    life.store(*numbers(3))
    life.spool.seal()
    segment = life.spool.take_backlog(probe=False)
    assert segment is not None
    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "os", Exhausted())
        with pytest.raises(OSError, match="too many"):
            life.spool.read(segment, BatchLimits())
    assert life.spool.take_backlog(probe=False) is None
    now[0] += 11
    assert len(life.drain()) == 3


def test_lines_longer_than_a_batch_and_empty_ones_are_read(tmp_path: Path) -> None:
    life = Life(tmp_path)
    large = {"n": 1, "text": "x" * 300_000}
    life.store({"n": 0}, large, {"n": 2})
    path = life.files[0]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n"))
    life.spool.close()
    after = Life(tmp_path)
    after.spool.look_around()
    segment = after.spool.take_backlog(probe=False)
    assert segment is not None
    lines = segment.read(100, 1000)
    assert [len(line.text) for line in lines] == [len(b'{"n":0}')]
    segment.offset = lines[-1].end
    assert [len(line.text) for line in segment.read(1, 1000)] == [len(orjson.dumps(large))]
    segment.offset = 0
    assert [event["n"] for event in after.drain()] == [0, 1, 2]


def test_an_overflowing_queue_goes_to_disk_in_the_caller_s_thread(tmp_path: Path) -> None:
    life = Life(tmp_path)
    queue = EventQueue(life.ledger, QueueLimits(max_events=10, policy="spool"), overflow=life.spool)
    for number in range(100):
        assert queue.put(orjson.dumps({"n": number}))
    stats = queue.account.stats()
    assert (stats.queued, stats.spooled, balances(stats)) == (10, 90, True)
    assert [event["n"] for event in life.drain()] == list(range(10, 100))


def test_one_large_event_does_not_exceed_the_bound(tmp_path: Path) -> None:
    life = Life(tmp_path, max_bytes=1 << 16)
    assert life.append({"n": 0})
    assert not life.append({"n": 1, "padding": "x" * (1 << 17)})
    assert life.spool.full
    assert life.append({"n": 2})
    assert sum(path.stat().st_size for path in life.files) < 1 << 16
    assert [event["n"] for event in life.drain()] == [0, 2]


def test_what_several_processes_write_counts_in_the_bound_of_each(tmp_path: Path) -> None:
    lives = [Life(tmp_path, max_bytes=1 << 18) for _ in range(4)]
    for number in range(1500):
        for life in lives:
            life.append({"n": number, "padding": "x" * 100})
    assert sum(path.stat().st_size for path in lives[0].files) <= (1 << 18) + 4 * (1 << 15)


@pytest.mark.parametrize("when", ["before the write", "after the write"])
def test_a_signal_handler_that_seals_in_the_middle_of_an_append_breaks_no_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    life = Life(tmp_path)
    life.append({"n": 0})
    append, armed = segment_module.Segment.append, [1]

    def interrupted(self: segment_module.Segment, lines: bytes) -> None:
        if armed and when == "before the write":
            armed.pop()
            life.spool.seal()
        append(self, lines)
        if armed:
            armed.pop()
            life.spool.seal()

    monkeypatch.setattr(segment_module.Segment, "append", interrupted)
    assert life.append({"n": 1})
    assert life.append({"n": 2})
    life.spool.seal()
    assert [event["n"] for event in life.drain()] == [0, 1, 2]
    stats = life.queue.account.stats()
    assert (stats.delivered, stats.pending, stats.recovered, dict(stats.dropped)) == (3, 0, 0, {})


def test_a_full_spool_is_not_looked_through_with_every_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1e9]
    life = Life(tmp_path, max_bytes=1 << 16, policy="drop_newest", clock=lambda: now[0])
    while life.append({"n": 0, "padding": "x" * 1000}):
        pass
    assert life.spool.full
    looked: list[int] = []
    entries = life.spool._entries
    monkeypatch.setattr(life.spool, "_entries", lambda: looked.append(1) or entries())  # type: ignore[func-returns-value]
    for _ in range(1000):
        assert not life.append({"n": 1})
    assert looked == []
    life.drain()
    now[0] += 1.1
    assert life.append({"n": 2}), "there is room again"


def test_what_was_snatched_while_it_was_written_stays_with_who_has_it(tmp_path: Path) -> None:
    life = Life(tmp_path)
    for event in numbers(2):
        life.queue.put(orjson.dumps(event))
    batch = take_all(life.queue)
    assert life.spool.store(batch, lambda: False)
    stats = life.queue.account.stats()
    assert (stats.in_flight, stats.spooled) == (2, 0)
    assert len(life.drain()) == 2
    stats = life.queue.account.stats()
    assert (stats.in_flight, stats.delivered, stats.recovered, balances(stats)) == (2, 0, 2, True)


def test_the_end_leaves_alone_a_file_that_another_thread_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(tmp_path)
    life.store({"n": 0})
    append, writing, go_on = segment_module.Segment.append, threading.Event(), threading.Event()

    def slow(self: segment_module.Segment, lines: bytes) -> None:
        writing.set()
        go_on.wait(10)
        append(self, lines)

    monkeypatch.setattr(segment_module.Segment, "append", slow)
    writer = threading.Thread(target=life.store, args=({"n": 1},))
    writer.start()
    assert writing.wait(10)
    life.spool.close()
    go_on.set()
    writer.join()
    stats = life.queue.account.stats()
    assert (stats.spooled, stats.in_flight, balances(stats)) == (2, 0, True)
    after = Life(tmp_path)
    after.spool.look_around()
    assert [event["n"] for event in after.drain()] == [0, 1]


def test_a_lock_on_a_file_that_lost_its_name_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.lock"
    path.touch()
    flock = fcntl.flock

    def removed_just_before(file: int, operation: int) -> None:
        path.unlink()
        path.touch()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_just_before)
    assert take_lock(str(path), make=False) == (None, False)
