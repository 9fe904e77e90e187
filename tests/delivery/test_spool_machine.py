"""The spool on a disk that fails at any operation, in a process that dies at any operation."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from evalvault_sdk.delivery import folder, lock, segment, spool
from evalvault_sdk.delivery.account import Account, Ledger
from evalvault_sdk.delivery.batch import BatchLimits
from evalvault_sdk.delivery.queue import EventQueue
from evalvault_sdk.delivery.spool import Spool
from tests.delivery.test_spool import drain
from tests.support import balances, take_all


class Died(BaseException):
    """The process died here."""


class FaultyOs:
    """`os`, until its `countdown` is over: then one operation fails, or the process dies before or within it."""

    def __init__(self) -> None:
        self.countdown = -1
        self.times = 1
        self.kind = ""
        self.dead = False
        self.files: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _fault(self) -> str:
        if self.dead:
            raise Died  # nothing that a dead process would still have done
        self.countdown -= 1
        return self.kind if -self.times < self.countdown <= 0 else ""

    def _raise(self, kind: str) -> None:
        if kind == "dies":
            self.dead = True
            raise Died
        if kind:
            raise OSError(getattr(errno, kind), "injected")

    def write(self, file: int, data: Any) -> int:
        kind = self._fault()
        if kind:
            os.write(file, bytes(data)[: len(data) // 2])  # the fault comes half-way
        self._raise(kind)
        return os.write(file, data)

    def open(self, *arguments: Any) -> int:
        self._raise(self._fault())
        file = os.open(*arguments)
        self.files.add(file)
        return file

    def close(self, file: int) -> None:
        os.close(file)
        self.files.discard(file)

    def close_all(self) -> None:
        """What the system does when a process dies."""
        while self.files:
            os.close(self.files.pop())

    def unlink(self, path: str) -> None:
        self._raise(self._fault())
        Path(path).unlink()

    def ftruncate(self, file: int, size: int) -> None:
        self._raise(self._fault())
        os.ftruncate(file, size)


class SpoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.os = FaultyOs()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(segment, "os", self.os)
        self.patch.setattr(spool, "os", self.os)
        self.patch.setattr(lock, "os", self.os)
        self.patch.setattr(spool, "_FAULT_PAUSE_S", 0.0)
        self.patch.setattr(spool, "_UNREADABLE_PAUSE_S", 0.0)
        self.patch.setattr(spool, "UNLOCKED_AGE_S", -1.0)
        self.patch.setattr(spool, "_EMPTY_LOCK_AGE_S", -1.0)
        self.patch.setattr(spool, "_SEGMENT_BYTES", 200)
        self.number = 0
        #: Events whose writing returned, and is not acknowledged; those of which nobody knows; those deleted.
        self.promised: set[int] = set()
        self.unknown: set[int] = set()
        self.gone: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """A process starts."""
        self.os.dead, self.os.countdown = False, 10**9
        self.ledger = Ledger()
        self.spool = Spool(self.root, "http://x.test", self.ledger, max_bytes=1 << 30, max_age_s=1e9)
        self.queue = EventQueue(self.ledger)
        self.account: Account = self.queue.account
        self.spool.look_around()

    @contextlib.contextmanager
    def process(self) -> Iterator[None]:
        """What happens in here happens in a process that may die; then it is started again."""
        try:
            yield
        except Died:
            self.os.close_all()
            self.begin()

    def new(self, count: int) -> dict[int, bytes]:
        numbers = range(self.number, self.number + count)
        self.number += count
        return {number: orjson.dumps({"n": number}) for number in numbers}

    @rule(
        countdown=st.integers(1, 6),
        times=st.integers(1, 4),
        kind=st.sampled_from(["dies", "ENOSPC", "EIO", "EACCES"]),
    )
    def arm(self, countdown: int, times: int, kind: str) -> None:
        self.os.countdown, self.os.times, self.os.kind = countdown, times, kind

    @rule()
    def everything_is_delivered(self) -> None:
        self.os.countdown = 10**9
        drained = self.drain()
        assert self.promised <= drained
        self.unknown |= self.promised
        self.promised = set()
        stats = self.account.stats()
        assert stats.pending == 0, stats

    @rule(count=st.integers(1, 5))
    def record(self, count: int) -> None:
        for number, event in self.new(count).items():
            self.unknown.add(number)
            with self.process():
                with self.ledger.lock:
                    written = self.spool.append(event, self.account)
                if written:  # if not, it may yet be there: the write failed half-way, and so did cutting it off
                    self.unknown.discard(number)
                    self.promised.add(number)

    @rule(count=st.integers(1, 20), alone=st.booleans())
    def store(self, count: int, alone: bool) -> None:
        events = self.new(count)
        with self.process():
            for event in events.values():
                self.queue.put(event)
            batch = take_all(self.queue)
            self.unknown |= set(events)
            written = self.spool.store(batch, lambda: True, alone=alone)
            if written:
                self.unknown -= set(events)
                self.promised |= set(events)
            else:
                with self.ledger.lock:
                    for share in batch.shares:
                        share.account.lose(share, "shutdown", in_flight=True)

    @rule(limit=st.integers(1, 10), passes=st.integers(0, 10), fresh=st.booleans())
    def deliver(self, limit: int, passes: int, fresh: bool) -> None:
        with self.process():
            found = self.spool.take_fresh() if fresh else self.spool.take_backlog(probe=False)
            if found is not None:
                self.deliver_from(found, limit, passes)

    def deliver_from(self, found: segment.Segment, limit: int, passes: int) -> None:
        try:
            lines = self.spool.read(found, BatchLimits(max_events=limit))
        except OSError:
            return
        if not lines:
            self.spool.finish(found)
            return
        with self.ledger.lock:
            reading = self.spool.claim(found, lines)
        passed, rest = reading.batch.split(passes)
        numbers = {orjson.loads(event)["n"] for event in passed.events}
        assert not numbers & self.gone, "what was acknowledged and deleted came back"
        # From here on the server has them: they may come back after a crash, but need not.
        self.promised -= numbers
        self.unknown |= numbers
        with self.ledger.lock:
            for share in passed.shares:
                share.account.settle(share, 0)
        self.spool.advance(found, reading, rest)
        if not len(rest) and found.offset >= found.size:
            self.spool.finish(found)

    @rule()
    def put_off(self) -> None:
        with self.process():
            self.spool.put_off()

    @rule()
    def look_around(self) -> None:
        with self.process():
            self.spool.look_around()

    @rule()
    def ends_and_is_started_again(self) -> None:
        with self.process():
            self.spool.close()
            self.begin()

    @precondition(lambda self: not self.os.dead)
    @invariant()
    def the_account_balances(self) -> None:
        stats = self.account.stats()
        assert balances(stats), stats
        assert min(stats.spooled, stats.in_flight, stats.queued) >= 0

    def teardown(self) -> None:
        try:
            with self.process():
                self.os.countdown = 10**9
                self.spool.close()
            self.begin()
            back = self.drain()
            assert self.promised <= back, f"lost: {self.promised - back}"
            assert back <= self.promised | self.unknown, f"came back: {back - self.promised - self.unknown}"
            self.spool.close()
            self.begin()
            assert self.drain() == set(), "what was acknowledged must not come back for ever"
            self.spool.close()
            left = {path.name for path in self.spool.folder.glob("*")}
            assert left <= {folder.DESTINATION_FILE}, "no segment and no lock is left over"
        finally:
            self.patch.undo()
            shutil.rmtree(self.root)

    def drain(self) -> set[int]:
        return {event["n"] for event in drain(self.spool, self.ledger, limit=7)}


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", "150")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
