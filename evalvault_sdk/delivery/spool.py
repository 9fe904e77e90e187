"""
Keep events on disk until they are delivered. This is the specification of the folder.

In:   events that cannot stay in memory: batches that could not be delivered (outage, exit), events for which
      the queue has no room, or with a journal every event.
Out:  batches, oldest first, for the worker; what an ended process left behind is adopted and delivered, too.

The folder
    A root (`delivery.folder`) holds one folder for each destination and user, 0700; in it, all files 0600::

        destination                                 where its events go, one line
        1767780000123-9f86d081884c7d65-000001.jsonl a segment: events as lines of JSON, nothing else
        9f86d081884c7d65.lock                       the lock of the owner 9f86d081884c7d65
        dead-letter.jsonl                           see `delivery.deadletter`

    A segment's name is its first event's time (Unix milliseconds, 13 digits), its owner (16 random hex digits) and
    a running number. So names sort by age, and every segment is a file that `evalvault stage ingest` takes.

Ownership
    An owner is one worker of one process. It holds an exclusive lock (flock) on its lock file as long as it lives;
    the system lets go of it when the process ends, however it ends. Process ids play no part: they mislead across
    containers that share a volume. Whoever gets the lock of another owner adopts its segments. A lock counts
    only if the file it is on still has its name, since an adopter removes the file with the last segment. A lock
    file that is missing while segments are there is made by the adopter, once they are a minute old. On a file
    system without locks nothing is adopted; `evalvault-sdk spool replay --force` delivers what is left there.

Writing
    One `write` with O_APPEND for each append, a line's end after every event. What fails half-way is cut off
    again, and the segment is closed. A segment is closed at 4 MiB, or earlier to be delivered. Nothing waits for the
    disk itself (no fsync): events survive the death of the process, not that of the machine within the seconds
    until the system has written them.

Acknowledgement
    A segment is deleted when every event of it has met its fate: stored, as the server said after its commit, or
    rejected and in the dead letter. Until then it stays as it is. A crash in between delivers events again,
    which the server stores once, since their ids are the same.

Recovery
    A last line without its end is an event if it is whole JSON; if not it is torn, and cut. Any other line that
    is no JSON object is damaged: it goes to the dead letter and is counted. Neither stops the rest.

Bounds
    All segments of the folder together, of all processes, take at most `max_bytes`; processes that write at the same
    time may each exceed that by the segment they are at. When there is no room for another segment, the policy says
    whether the oldest that we own or have adopted is deleted (`drop_oldest`) or nothing more is written
    (`drop_newest`). Segments older than `max_age_s` are deleted. Each event lost is counted.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import attrs

from evalvault_sdk.delivery.account import Account, DropReason, Ledger, Share
from evalvault_sdk.delivery.batch import ENVELOPE_BYTES, Batch, BatchLimits, split_shares
from evalvault_sdk.delivery.deadletter import DeadLetter
from evalvault_sdk.delivery.folder import folder_of, make_folder
from evalvault_sdk.delivery.lock import Owners
from evalvault_sdk.delivery.segment import Line, Segment

#: What becomes of events for which the disk has no room: the oldest ones make it, or they are not written.
SpoolPolicy = Literal["drop_oldest", "drop_newest"]

SEGMENT_NAME = re.compile(r"(?P<created>\d{13})-(?P<owner>[0-9a-f]{16})-\d{6,}\.jsonl")
LOCK_NAME = re.compile(r"(?P<owner>[0-9a-f]{16})\.lock")

_SEGMENT_BYTES = 4 << 20
#: After the disk failed or was full, so many seconds pass before it is tried again: a try costs system calls.
_FAULT_PAUSE_S = 1.0
#: Segments without a lock file are adopted when nobody has written to them for so many seconds.
UNLOCKED_AGE_S = 60.0
#: A segment that cannot be read is tried again after so many seconds.
_UNREADABLE_PAUSE_S = 10.0
#: A lock file without segments is removed when it is so many seconds old: its owner may just be beginning.
_EMPTY_LOCK_AGE_S = 10.0
#: When more single events than this fail, it is not for what they hold.
_MAX_SUSPECTS = 256
#: Owners adopted at a time: the others are left to other processes, or for later.
_MAX_ADOPTED = 16


@attrs.frozen
class Reading:
    """What was read of a segment at once."""

    batch: Batch
    #: For each event, where the segment goes on after it.
    ends: tuple[int, ...]


class Spool:
    """
    One worker's way to the folder of its destination.

    `append` is called in the program's threads with the ledger's lock held. All else is the worker's, or of
    whoever ends it, but for the list of segments, which is changed under the lock.
    """

    def __init__(
        self,
        root: str | Path,
        destination: str,
        ledger: Ledger,
        *,
        max_bytes: int,
        max_age_s: float,
        policy: SpoolPolicy = "drop_oldest",
        without_locks: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder_of(root, destination)
        self._path = str(self.folder)
        self._destination = destination
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._policy = policy
        self._owners = Owners(self._path, without_locks=without_locks)
        self._clock = clock
        self.segment_bytes = max(1, min(_SEGMENT_BYTES, max_bytes // 8))
        self.dead_letter = DeadLetter(self.folder, destination, max_bytes=max(1 << 16, max_bytes // 16))
        self._start_over()

    def _start_over(self) -> None:
        #: Closed segments whose events are to be delivered, oldest first; a journal's newest are apart.
        self._backlog: list[Segment] = []
        self._fresh: list[Segment] = []
        self._direct: Segment | None = None  # the program's threads append to it
        self._parked: Segment | None = None  # the worker appends to it
        self._parked_shares: list[Share] = []
        self._sending: Segment | None = None
        self._left_others = False
        self._closed = False
        #: Segments that are done with and could not be deleted.
        self._undeletable: set[str] = set()
        self._damaged: list[tuple[bytes, str]] = []
        self._number = 0
        self._last_ms = 0
        self._bytes = 0
        self._failed_at = float("-inf")
        self._full_at = float("-inf")
        #: Whether the last event was refused because the bounds on disk are reached.
        self.full = False
        #: What is wrong with the folder, for a log line; the worker says it.
        self.fault: str | None = None

    # -- writing ------------------------------------------------------------------------------------

    def append(self, event: bytes, account: Account) -> bool:
        """Write an event of the program's own thread; say whether it is on disk. The ledger's lock is held."""
        line = event + b"\n"
        count = len(line)
        while True:
            segment = self._direct
            if segment is None or self._is_full(segment, count):
                self._seal_direct()
                segment = self._direct = self._new_segment(count)
                if segment is None:
                    return False
            try:
                segment.append(line)
            except OSError as error:
                if self._direct is segment:
                    self._failed(error)
                    self._seal_direct()
                    return False
            # Between this question and the entry nothing is called, so no signal handler comes between.
            if self._direct is segment:
                self._ledger.direct.append(account)
                self._bytes += count
                return True
            # A signal handler has flushed or shut down in the middle of this, and the segment was closed without
            # counting the line: it is written again, and the stray one is left out by `claim`.

    def _is_full(self, segment: Segment, more: int) -> bool:
        return segment.size > 0 and segment.size + more > self.segment_bytes

    def store_suspect(self, event: Batch, failed_after: int, claim: Callable[[], bool]) -> bool:
        """Put an event aside that may be the reason why requests fail; not if there are many such already."""
        with self._ledger.lock:
            if sum(segment.suspect for segment in self._backlog) >= _MAX_SUSPECTS:
                return False
        if not self.store(event, claim, alone=True):
            return False
        with self._ledger.lock:
            for segment in self._backlog:
                if segment.shares == event.shares:
                    segment.suspect, segment.failed_after = True, failed_after
        return True

    def store(self, batch: Batch, claim: Callable[[], bool], *, alone: bool = False) -> bool:
        """
        Write a batch in flight; say whether it is on disk: all of it, or nothing.

        `claim` is asked, with the ledger's lock held, whether the events are still the caller's; only then they are
        counted as spooled. `alone`: into a segment of its own, for a thread other than the worker's, and whatever
        the disk did a moment ago.
        """
        lines = b"\n".join(batch.events) + b"\n"
        with self._ledger.lock:
            segment = None if alone else self._parked
            if segment is not None and (self._is_full(segment, len(lines)) or not segment.is_there):
                self._seal_parked()
                segment = None
            if segment is None:
                segment = self._new_segment(len(lines), at_any_rate=alone)
                if segment is None:
                    return False
                if not alone:
                    self._parked = segment
            segment.busy = True  # from here on nobody else may close or delete it
        try:
            segment.append(lines)
        except BaseException as error:
            with self._ledger.lock:
                segment.busy = False
                if alone or self._parked is not segment:
                    self._abandon(segment)
                else:
                    self._seal_parked()
                if not isinstance(error, OSError):
                    raise
                self._failed(error)
            return False
        with self._ledger.lock:
            segment.busy = False
            self._bytes += len(lines)
            shares = batch.shares
            if claim():
                for share in shares:
                    share.account.park(share)
            else:  # somebody has written them elsewhere meanwhile: these will be delivered a second time
                shares = (self._ledger.inherited.seal(len(batch)),)
            if self._parked is segment:
                self._parked_shares += shares
            else:
                segment.shares = (*segment.shares, *shares)
                if self._closed:
                    self._abandon(segment)
                else:
                    self._keep(segment)
        return True

    def _abandon(self, segment: Segment) -> None:
        """Leave a file as it is, for whoever adopts it."""
        with contextlib.suppress(OSError):
            segment.close()
        if not segment.size:
            segment.delete()

    def _new_segment(self, size: int, *, at_any_rate: bool = False) -> Segment | None:
        """Return an empty segment that is ours, or None if there is no room or the disk does not work."""
        now = self._clock()
        if self._closed or (not at_any_rate and not self.usable):
            return None
        # Looked up, not remembered: others write there, too.
        self._bytes = _bytes_of(entry for entry in self._entries() if SEGMENT_NAME.fullmatch(entry.name))
        self.full = not self._make_room(max(size, self.segment_bytes))
        if self.full:
            if size <= self.segment_bytes:  # there may be no room for a large one, and yet for others
                self._full_at = now
            return None
        try:
            try:
                return self._create(now)
            except FileNotFoundError:  # somebody removed the folder: then our lock is gone, too
                self._owners.let_go()
                return self._create(now)
        except OSError as error:
            self._failed(error)
            return None

    def _create(self, now: float) -> Segment:
        if self._owners.own is None:
            make_folder(self.folder, self._destination)
        owner = self._owners.begin()
        self._number += 1
        self._last_ms = max(int(now * 1000), self._last_ms)  # a clock that was set back must not change the order
        name = f"{self._last_ms:013d}-{owner}-{self._number:06d}.jsonl"
        return Segment.create(f"{self._path}/{name}", self._last_ms, owner)

    def _failed(self, error: OSError) -> None:
        self._failed_at = self._clock()
        self.fault = _described(error)

    # -- bounds -------------------------------------------------------------------------------------

    def _make_room(self, size: int) -> bool:
        if self._bytes + size <= self._max_bytes:
            return True
        if self._policy == "drop_oldest":
            ours = [segment for segment in (*self._backlog, *self._fresh) if segment is not self._sending]
            if self._bytes - sum(segment.size for segment in ours) + size > self._max_bytes:
                return False  # to give up all of them would not help
            for segment in ours:
                self._discard(segment, "spool_full")
                if self._bytes + size <= self._max_bytes:
                    return True
        return False

    def _discard(self, segment: Segment, reason: DropReason) -> None:
        """Delete a segment, and count what was in it as lost. The ledger's lock is held."""
        lost = sum(share.count for share in segment.shares)
        for share in segment.shares:
            share.account.lose(share, reason, in_flight=False)
        if self._owners.has_adopted(segment.owner):
            inherited = self._ledger.inherited
            with contextlib.suppress(OSError):
                count = max(0, _count_lines(segment) - lost)
                inherited.lose(inherited.seal(count), reason, in_flight=False)
        segment.shares = ()
        self._remove(segment)
        self._ledger.settled.notify_all()

    def _remove(self, segment: Segment) -> None:
        for segments in (self._backlog, self._fresh):
            if segment in segments:
                segments.remove(segment)
                self._bytes = max(0, self._bytes - segment.size)
        if not segment.delete():
            self._undeletable.add(segment.path)

    # -- delivering ---------------------------------------------------------------------------------

    def seal(self) -> None:
        """Close the segments that are being written, so that they can be delivered."""
        with self._ledger.lock:
            self._seal_direct()
            self._seal_parked()

    def _seal_direct(self) -> None:
        segment, self._direct = self._direct, None
        if segment is not None:
            segment.shares = self._ledger.seal_direct()
            _finish_writing(segment)
            if segment.size:
                self._fresh.append(segment)
            else:
                segment.delete()
            self._ledger.settled.notify_all()

    def _seal_parked(self) -> None:
        segment, self._parked = self._parked, None
        if segment is not None:
            segment.shares, self._parked_shares = tuple(self._parked_shares), []
            if segment.busy:
                return  # whoever is writing to it will see
            if segment.size:
                self._keep(segment)
            else:
                segment.delete()

    def _keep(self, segment: Segment) -> None:
        _finish_writing(segment)
        bisect.insort(self._backlog, segment, key=lambda other: other.path)

    def take_fresh(self) -> Segment | None:
        """Return the oldest segment that the program's threads have written since the last call, if any."""
        with self._ledger.lock:
            if not self._fresh:
                self._seal_direct()
            if not self._fresh:
                return None
            self._sending = self._fresh[0]
            return self._sending

    def take_backlog(self, *, probe: bool) -> Segment | None:
        """Return the oldest segment that was not delivered, if any; as a `probe` rather one that is above suspicion."""
        with self._ledger.lock:
            segment = self._ready(probe)
            if segment is None or (probe and segment.suspect):
                self._seal_parked()
                if probe:
                    self.put_off(seal=True)
                segment = self._ready(probe)
            self._sending = segment
            return segment

    def _ready(self, probe: bool = False) -> Segment | None:
        """Return the oldest segment that may be sent now; as a probe rather one that is above suspicion."""
        now = self._clock()
        ready = (segment for segment in self._backlog if segment.resume_at <= now)
        first = next(ready, None)
        if first is None or not (probe and first.suspect):
            return first
        return next((segment for segment in ready if not segment.suspect), first)

    def set_aside(self, segment: Segment, wait_s: float) -> None:
        """Let others go first for so many seconds: something is wrong with this one."""
        segment.resume_at = self._clock() + wait_s

    def put_off(self, more_than: int = 0, *, seal: bool = False) -> None:
        """Let what is fresh wait its turn, if it is more than so many segments: for now it cannot be delivered."""
        with self._ledger.lock:
            if seal:
                self._seal_direct()
            if len(self._fresh) > more_than:
                fresh, self._fresh = self._fresh, []
                for segment in fresh:
                    self._keep(segment)

    @property
    def has_fresh(self) -> bool:
        """Whether the program's threads have written anything that was not put off."""
        return bool(self._fresh or self._direct is not None)

    @property
    def has_backlog(self) -> bool:
        """Whether anything waits its turn that can be delivered now."""
        with self._ledger.lock:
            return self._parked is not None or self._ready() is not None

    @property
    def usable(self) -> bool:
        """Whether it is worth a try to write now: after a failure, or when there was no room, not with every event."""
        return not 0 <= self._clock() - max(self._failed_at, self._full_at) < _FAULT_PAUSE_S

    def read(self, segment: Segment, limits: BatchLimits) -> list[Line]:
        """
        Return the next lines of a segment; none if there are none left. Then it is to be finished.

        Raises `OSError` when it cannot be read for now.
        """
        try:
            lines = segment.read(limits.max_events, max(1, limits.max_bytes - ENVELOPE_BYTES))
        except FileNotFoundError:  # somebody removed it
            with self._ledger.lock:
                self._discard(segment, "damaged")
            return []
        except OSError as error:  # it may be readable later: too many open files, say
            self.fault = _described(error)
            self.set_aside(segment, _UNREADABLE_PAUSE_S)
            raise
        if not lines:
            with self._ledger.lock:
                for share in segment.shares:  # the file is shorter than what was written to it
                    share.account.lose(share, "damaged", in_flight=False)
                segment.shares = ()
        return lines

    def claim(self, segment: Segment, lines: list[Line]) -> Reading:
        """
        Say whose the lines just read are, and count them as in flight. The ledger's lock is held.

        Damaged lines before the first event are counted as lost, and left behind for good; a reading ends before
        the next damaged one.
        """
        known = sum(share.count for share in segment.shares)
        if known < len(lines) and segment.owner == self._owners.own:
            # Strays of our own: what a signal handler interrupted, or a disk that failed, was written once more.
            if not known:
                segment.offset = lines[-1].end
            lines = lines[:known]
        elif known < len(lines):
            segment.shares = (*segment.shares, self._ledger.inherited.seal(len(lines) - known))
        damaged = list(itertools.takewhile(lambda line: not line.sound, lines))
        if damaged:
            lost, segment.shares = split_shares(segment.shares, len(damaged))
            for share in lost:
                share.account.lose(share, "damaged", in_flight=False)
            segment.offset = damaged[-1].end
            self._damaged += [(line.text, "it is no JSON object: the file was damaged") for line in damaged]
            self._ledger.settled.notify_all()
        sound = list(itertools.takewhile(lambda line: line.sound, lines[len(damaged) :]))
        shares, segment.shares = split_shares(segment.shares, len(sound))
        for share in shares:
            share.account.pick_up(share)
        return Reading(Batch(tuple(line.text for line in sound), shares), tuple(line.end for line in sound))

    def bury_damaged(self) -> None:
        """Put the damaged lines that were met into the dead letter."""
        damaged, self._damaged = self._damaged, []
        if damaged:
            self.dead_letter.add(damaged, damaged=True)

    def advance(self, segment: Segment, reading: Reading, rest: Batch) -> None:
        """Take note that all of a reading has met its fate but for `rest`, which stays."""
        with self._ledger.lock:
            settled = len(reading.batch) - len(rest)
            if settled:
                segment.offset = reading.ends[settled - 1]
            for share in rest.shares:
                share.account.park(share)
            segment.shares = (*rest.shares, *segment.shares)
            if len(rest) and segment in self._fresh:
                self._fresh.remove(segment)
                self._keep(segment)

    def finish(self, segment: Segment) -> None:
        """Delete a segment whose events have all met their fate."""
        with self._ledger.lock:
            self._remove(segment)
            self._sending = None
            self._ledger.settled.notify_all()
            if self._owners.has_adopted(segment.owner) and all(other.owner != segment.owner for other in self._backlog):
                self._clear_adopted()

    # -- other owners -------------------------------------------------------------------------------

    def has_orphans(self) -> bool:
        """Whether the folder holds segments that are not ours: of ended processes, or of others that run."""
        with contextlib.suppress(OSError), os.scandir(self._path) as entries:
            return any(SEGMENT_NAME.fullmatch(entry.name) for entry in entries)
        return False

    def look_around(self) -> None:
        """See what is in the folder: how much of it, what is too old, and what can be adopted."""
        found: dict[str, list[os.DirEntry[str]]] = {}
        locks: set[str] = set()
        for entry in self._entries():
            if match := SEGMENT_NAME.fullmatch(entry.name):
                found.setdefault(match["owner"], []).append(entry)
            elif match := LOCK_NAME.fullmatch(entry.name):
                locks.add(match["owner"])
        total = _bytes_of(entry for entries in found.values() for entry in entries)
        with self._ledger.lock:
            self._bytes = total
            self._owners.check()

        def oldest(owner: str) -> str:
            return min((entry.name for entry in found.get(owner, [])), default="")

        self._left_others = False
        for owner in sorted(found.keys() | locks, key=oldest):
            if owner == self._owners.own:
                continue
            if self._owners.adopted == _MAX_ADOPTED and not self._owners.has_adopted(owner):
                self._left_others = True
                break
            self._adopt(owner, found.get(owner, []), has_lock=owner in locks)
        self._drop_expired()
        self._clear_adopted()
        self._left_others = self._left_others and bool(self._backlog)

    @property
    def wants_more(self) -> bool:
        """Whether others were left when we last looked around, and all that we had is delivered since."""
        return self._left_others and not self._backlog

    def _adopt(self, owner: str, entries: list[os.DirEntry[str]], *, has_lock: bool) -> None:
        if not self._owners.has_adopted(owner):
            now = self._clock()
            if not self.locks_work:
                return
            if not has_lock and not all(_age_s(entry.path, now) > UNLOCKED_AGE_S for entry in entries):
                return
            if not entries and _age_s(self._owners.path(owner), now) < _EMPTY_LOCK_AGE_S:
                return
            if not self._owners.adopt(owner, make=not has_lock):
                return
            # Listed again: whoever had the lock may have delivered some since, and written more.
            entries = self._segments_of(owner)
        known = {segment.path for segment in self._backlog}
        for entry in entries:
            match = SEGMENT_NAME.fullmatch(entry.name)
            if match and entry.path not in known and entry.path not in self._undeletable:
                with contextlib.suppress(OSError):
                    size = entry.stat(follow_symlinks=False).st_size
                    segment = Segment(entry.path, int(match["created"]), owner, size)
                    with self._ledger.lock:
                        bisect.insort(self._backlog, segment, key=lambda other: other.path)

    def _segments_of(self, owner: str) -> list[os.DirEntry[str]]:
        return [e for e in self._entries() if (match := SEGMENT_NAME.fullmatch(e.name)) and match["owner"] == owner]

    def _entries(self) -> list[os.DirEntry[str]]:
        with contextlib.suppress(OSError), os.scandir(self._path) as entries:
            return list(entries)
        return []

    def _clear_adopted(self) -> None:
        """Let go of the owners that have no segment left."""
        if self._owners.adopted:
            with self._ledger.lock:
                self._owners.keep_adopted(segment.owner for segment in self._backlog)

    @property
    def locks_work(self) -> bool:
        """Whether the folder's file system has locks."""
        return self._owners.locks_work

    def _drop_expired(self) -> None:
        oldest_ms = (self._clock() - self._max_age_s) * 1000
        with self._ledger.lock:
            for segment in [*self._backlog, *self._fresh]:
                if segment.created_ms < oldest_ms:
                    self._discard(segment, "expired")

    # -- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave what is here to the next process of this destination. From now on nothing is written."""
        with self._ledger.lock:
            busy = self._parked is not None and self._parked.busy
            self._seal_direct()
            self._seal_parked()
            for segment in [*self._fresh, *self._backlog]:
                if not segment.is_there and not self._write_again(segment):
                    self._discard(segment, "damaged")
                with contextlib.suppress(OSError):
                    segment.close()
            own = self._owners.own
            self._owners.close(left=busy or any(segment.owner == own for segment in (*self._fresh, *self._backlog)))
            fault = self.fault
            self._start_over()
            self._closed, self.fault = True, fault

    def _write_again(self, segment: Segment) -> bool:
        """Somebody removed the file: save what can still be read of it, as long as it is open; say whether it is."""
        try:
            lines = segment.read(1 << 30, 1 << 30)
            copy = self._new_segment(segment.size, at_any_rate=True) if lines else None
            if copy is None:
                return not lines
            copy.append(b"".join(line.text + b"\n" for line in lines))
        except OSError:
            return False
        self._backlog.append(copy)
        return True

    def after_fork_in_child(self) -> None:
        """Leave the parent's files alone: they are its own to deliver. Closing our copies frees no lock of its."""
        for segment in (self._direct, self._parked, *self._fresh, *self._backlog):
            if segment is not None:
                with contextlib.suppress(OSError):
                    segment.close()
        self._owners.after_fork_in_child()
        self._start_over()


def _described(error: OSError) -> str:
    return f"{type(error).__name__}: {error.strerror or error}"


def _finish_writing(segment: Segment) -> None:
    if segment.is_there:  # if somebody removed it, the open file is all there is
        with contextlib.suppress(OSError):
            segment.close()


def _count_lines(segment: Segment) -> int:
    count = 0
    with open(segment.path, "rb") as file:
        file.seek(segment.offset)
        while chunk := file.read(1 << 20):
            count += chunk.count(b"\n")
    return count


def _bytes_of(entries: Iterable[os.DirEntry[str]]) -> int:
    total = 0
    for entry in entries:
        with contextlib.suppress(OSError):
            total += entry.stat(follow_symlinks=False).st_size
    return total


def _age_s(path: str, now: float) -> float:
    try:
        return now - os.stat(path, follow_symlinks=False).st_mtime
    except OSError:
        return 0.0
