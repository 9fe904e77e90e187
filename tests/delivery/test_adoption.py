"""What two processes may do to each other in the folder they share, at the worst moment."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import Settings
from evalvault_sdk.delivery.account import Account, Ledger
from evalvault_sdk.delivery.outbox import open_outbox
from evalvault_sdk.delivery.spool import Spool
from tests.support import MemoryTransport, wait_for


def make(root: Path) -> Spool:
    return Spool(root, MemoryTransport.destination, Ledger(), max_bytes=1 << 30, max_age_s=60)


def append(spool: Spool, event: bytes) -> bool:
    with spool._ledger.lock:
        return spool.append(event, Account(spool._ledger))


def die(spool: Spool) -> None:
    """End as a killed process does: the system lets go of the lock."""
    assert spool._owners._lock is not None
    os.close(spool._owners._lock)


@pytest.mark.parametrize("adopter", ["has it", "has let go of it"])
def test_a_process_can_write_although_another_takes_its_lock_file_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adopter: str
) -> None:
    new, other = make(tmp_path), make(tmp_path)
    lock = fcntl.flock
    in_the_way: list[int] = []

    def flock(file: int, operation: int) -> None:
        if not in_the_way:
            in_the_way.append(file)
            if adopter == "has it":
                (path,) = new.folder.glob("*.lock")
                copy = os.open(path, os.O_RDWR)
                in_the_way.append(copy)
                lock(copy, operation)
            else:
                other.look_around()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert append(new, b'{"n": 1}'), "recorded with a journal, it is on disk"
    assert new.fault is None
    for copy in in_the_way[1:]:
        os.close(copy)


def test_what_a_process_wrote_last_is_found_by_who_was_already_looking_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, adopter = make(tmp_path), make(tmp_path)
    assert append(dying, b'{"n": 1}')
    dying.seal()
    take_lock = adopter._owners._take

    def die_just_before(owner: str, **options: Any) -> Any:
        assert append(dying, b'{"n": 2}')
        die(dying)
        return take_lock(owner, **options)

    monkeypatch.setattr(adopter._owners, "_take", die_just_before)
    adopter.look_around()
    found = b"".join(Path(segment.path).read_bytes() for segment in adopter._backlog)
    assert found == b'{"n": 1}\n{"n": 2}\n'


# 50 are more than are adopted at a time.
@pytest.mark.parametrize("count", [1, 50])
def test_what_ended_processes_left_is_delivered_at_once_and_without_a_pause(tmp_path: Path, count: int) -> None:
    for number in range(count):
        ended = make(tmp_path)
        assert append(ended, b'{"n": %d}' % number)
        die(ended)
    transport = MemoryTransport()
    outbox = open_outbox(Settings(run_id="r", spool_dir=str(tmp_path), flush_interval_s=60), transport)
    wait_for(lambda: len(transport.events) == count, 4)
    wait_for(lambda: not list(ended.folder.glob("*.lock")), 4)
    outbox.shutdown(5)


def test_what_the_thread_was_just_taking_when_time_was_up_is_left_to_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = open_outbox(Settings(run_id="r", spool_dir=str(tmp_path), flush_interval_s=60), MemoryTransport())
    worker, taken = outbox.worker, threading.Event()
    take = worker._courier.take

    def take_too_late(*arguments: Any) -> Any:
        hand = take(*arguments)
        if hand is not None and threading.current_thread() is worker._thread:
            taken.set()
            wait_for(lambda: worker._finished)
        return hand

    monkeypatch.setattr(worker._courier, "take", take_too_late)
    outbox.queue.put(b'{"n": 1}')
    worker.speed_up()
    taken.wait(5)
    outbox.shutdown(0)
    wait_for(lambda: not worker.is_alive)
    assert outbox.stats().spooled == 1
    next_one = make(tmp_path)
    next_one.look_around()
    assert next_one.has_backlog
