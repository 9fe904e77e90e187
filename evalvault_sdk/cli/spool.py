"""
Look at what is spooled on disk, deliver it by hand, copy it, or delete it, while services go on running.

In:   the root of the spools (`delivery.spool` has the specification), and which destination.
Out:  what is there, destination by destination; counts of what was done.

What a running process holds the lock of is its own: it is counted and may be copied, since that only reads, but is
neither delivered nor deleted. For both we are an adopter like any other, `delivery.spool` and `delivery.courier`
themselves at work, so that a service that looks around meanwhile leaves alone what we are delivering.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import attrs
import orjson

from evalvault_sdk import log
from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.append import hold
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.courier import Courier
from evalvault_sdk.delivery.deadletter import DEAD_LETTER_FILE, OLDER_DEAD_LETTER_FILE
from evalvault_sdk.delivery.folder import DESTINATION_FILE, default_root, folder_of
from evalvault_sdk.delivery.lock import take_lock
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.outbox import transport_for
from evalvault_sdk.delivery.segment import Line, Segment
from evalvault_sdk.delivery.spool import SEGMENT_NAME, UNLOCKED_AGE_S, Spool
from evalvault_sdk.delivery.transport.base import Outcome, RetryLater
from evalvault_sdk.delivery.transport.http import TRACES_PATH
from evalvault_sdk.errors import EvalVaultError

#: Read, or sent, at once.
_BATCH_EVENTS, _BATCH_BYTES = 1000, 1 << 20
#: How long a server that does not answer is asked again.
_GIVE_UP_AFTER_S = 60.0


@attrs.frozen
class Kept:
    """A segment, as it was found."""

    path: str
    begun_ms: int
    owner: str
    size: int
    #: Whether a running process holds it; None where the file system has no locks and nobody can say.
    in_use: bool | None

    def age_s(self) -> float:
        """Return how long ago it was begun."""
        return max(0.0, time.time() - self.begun_ms / 1000)

    def lines(self) -> Iterator[Line]:
        """Read it from its beginning; it may end early, as whoever holds it delivers it."""
        segment = Segment(self.path, self.begun_ms, self.owner)
        with contextlib.suppress(FileNotFoundError):
            while lines := segment.read(_BATCH_EVENTS, _BATCH_BYTES):
                yield from lines
                segment.offset = lines[-1].end

    def count(self) -> int:
        """Return how many events are in it."""
        return sum(line.sound for line in self.lines())


@attrs.frozen
class Destination:
    """The folder of one destination, and where its events go."""

    folder: Path
    address: str

    @property
    def is_ours(self) -> bool:
        """Whether it is this user's: services of another one could not use what we write there."""
        try:
            return folder_of(self.folder.parent, self.address) == self.folder
        except ValueError:  # something has written over the address
            return False

    @property
    def is_server(self) -> bool:
        """Whether its events go to a server, not into a file."""
        return self.address.startswith(("http://", "https://"))

    @property
    def dead_letter(self) -> Path:
        """The newer file of the dead letter."""
        return self.folder / DEAD_LETTER_FILE

    def segments(self) -> list[Kept]:
        """Return what is there now, oldest first."""
        found: list[Kept] = []
        in_use: dict[str, bool | None] = {}
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if match := SEGMENT_NAME.fullmatch(entry.name):
                owner = match["owner"]
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if owner not in in_use:
                        in_use[owner] = _is_held(f"{self.folder}/{owner}.lock", status.st_mtime)
                    found.append(Kept(entry.path, int(match["created"]), owner, status.st_size, in_use[owner]))
        return found

    def left_over(self) -> list[Kept]:
        """Return those that no running process is known to hold."""
        return [kept for kept in self.segments() if not kept.in_use]

    def letters(self) -> Iterator[bytes]:
        """Return the lines of the dead letter, oldest first."""
        for path in self._letter_files():
            with path.open("rb") as file:
                yield from filter(bytes.strip, file)

    def _letter_files(self) -> list[Path]:
        paths = (self.folder / OLDER_DEAD_LETTER_FILE, self.dead_letter)
        return [path for path in paths if path.is_file()]

    def empty_letters(self, take: Callable[[Iterator[bytes]], Iterable[bytes]]) -> None:
        """Let `take` read the lines of each file of the dead letter, and leave there only those that it returns."""
        for path in self._letter_files():
            with hold(path) as file:  # emptied, not removed: whoever waits to append to it must not do so in vain
                back = b"".join(take(filter(bytes.strip, file)))
                file.seek(0)
                file.write(back)
                file.truncate()


def _is_held(lock: str, written_at: float) -> bool | None:
    if not os.path.exists(lock):  # noqa: PTH110 - text, as in the spool
        return time.time() - written_at <= UNLOCKED_AGE_S
    try:
        file, locked = take_lock(lock, make=False)
    except OSError:  # another user's
        return None
    if file is None:
        return True
    os.close(file)
    return False if locked else None


def spool_settings(directory: Path | None, url: str | None = None, token: str | None = None) -> Settings:
    """Return the settings for a spool below `directory`, or where the environment says. Raises `EvalVaultError`."""
    # An address in any case: what else the environment names as a destination is no matter here.
    url = url or "http://localhost:8000"
    where = {"otlp_endpoint" if url.endswith(TRACES_PATH) else "api_url": url}
    return Settings.resolve(None, run_id="spool", token=token, spool_dir=directory, **where)


def root_of(settings: Settings) -> Path:
    """Return the root of all spools."""
    return Path(settings.spool_dir or default_root(os.environ))


def destinations(root: Path, url: str | None = None) -> list[Destination]:
    """Return what is spooled below `root`, or only what goes to `url`. Raises `EvalVaultError` if that is not there."""
    found: list[Destination] = []
    for path in sorted(root.glob(f"*/{DESTINATION_FILE}")):
        with contextlib.suppress(PermissionError):  # another user's
            address = path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n")
            found.append(Destination(path.parent, address))
    if url is None:
        return found
    if url.startswith(("http://", "https://")):
        url = transport_for(spool_settings(None, url)).destination
    identity = folder_of(root, url).stem  # without the user
    found = [destination for destination in found if destination.folder.stem == identity]
    if not found:
        raise EvalVaultError(f"nothing for {url} is in {root}: see `evalvault-sdk spool status`")
    return found


# -- delivering -------------------------------------------------------------------------------------


@attrs.define
class Replayed:
    """What became of what was to be delivered."""

    stored: int = 0
    #: Events that the server refused: they are in the dead letter, with the reason.
    refused: int = 0
    #: Lines that are no events: they are in the dead letter, too.
    damaged: int = 0
    #: Events that are still in the spool, or in the dead letter.
    left: int = 0
    #: Segments that running processes hold, and deliver themselves.
    in_use: int = 0
    #: Why not everything was delivered, if not.
    failure: str | None = None

    @property
    def complete(self) -> bool:
        """Whether there was nothing that was not stored."""
        return not (self.refused or self.damaged or self.left or self.failure)


class _Watched:
    """The transport, which remembers why the last request failed."""

    def __init__(self, settings: Settings) -> None:
        self._transport = transport_for(settings)
        self.destination = self._transport.destination
        self.failure: RetryLater | None = None

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Send the batch once."""
        self.failure = None
        outcome = self._transport.send(batch, timeout_s=timeout_s)
        self.failure = outcome if isinstance(outcome, RetryLater) else None
        return outcome

    def close(self) -> None:
        """Let go of the connection."""
        self._transport.close()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's connection."""
        self._transport.after_fork_in_child()


def check_replay(found: list[Destination], *, to: str | None, token: str | None) -> None:
    """Raise `EvalVaultError` for what cannot be meant."""
    if to is not None:
        return
    for destination in found:
        if not destination.is_server:
            raise EvalVaultError(
                f"{destination.address} is a file, which the next process that uses it completes: "
                "say where to with --to, or which destination with --url"
            )
    if token is not None and len(found) > 1:
        raise EvalVaultError("the token is for one server, and there are several destinations: say which with --url")


def replay(
    destination: Destination,
    settings: Settings,
    on_progress: Callable[[int], None],
    *,
    dead_letter: bool = False,
    force: bool = False,
) -> Replayed:
    """
    Deliver to the server of `settings` what is left over; `on_progress` is told how many bytes met their fate.

    Of the `dead_letter`, its events instead: they are put into the spool first, so that none is lost on the way.
    `force`: also where the file system has no locks, and nobody can say whether a process still writes.
    """
    _check_ours(destination)
    log.logger().addHandler(logging.NullHandler())  # what there is to say, the command says itself
    ledger = Ledger()
    spool = _open_spool(destination, settings, ledger, force=force)
    transport = _Watched(settings)
    courier = Courier(
        transport, settings, ledger, spool, Notices(transport.destination, ledger, settings, None, time.monotonic)
    )
    try:
        if dead_letter:
            _put_into(spool, ledger, destination)
        failure = _deliver(courier, spool, transport, on_progress, look_around=not dead_letter)
    finally:
        spool.close()
        transport.close()
    inherited = ledger.inherited
    result = Replayed(
        stored=inherited.delivered,
        refused=inherited.rejected,
        damaged=inherited.dropped.get("damaged", 0),
        left=inherited.pending,
        failure=failure,
    )
    if not dead_letter:
        segments = destination.segments()
        result.in_use = sum(kept.in_use is True for kept in segments)
        result.left = sum(kept.count() for kept in segments if not kept.in_use)
        if not force and any(kept.in_use is None for kept in segments):
            result.failure = "the file system has no locks: stop the services that write there, then give --force"
    return result


def _open_spool(destination: Destination, settings: Settings, ledger: Ledger, *, force: bool) -> Spool:
    return Spool(
        destination.folder.parent,
        destination.address,
        ledger,
        max_bytes=settings.spool_max_bytes,
        max_age_s=math.inf,  # whoever asks for it wants it, however old
        policy="drop_newest",
        without_locks=force,
    )


def _check_ours(destination: Destination) -> None:
    if not destination.is_ours:
        raise EvalVaultError(f"{destination.folder} is not of this user and its address: run the command as its user")


def _deliver(
    courier: Courier, spool: Spool, transport: _Watched, on_progress: Callable[[int], None], *, look_around: bool
) -> str | None:
    """Deliver segment after segment; return why not all, if the server does not take them."""
    failing_since = time.monotonic()
    while True:
        if courier.breaker.failing:
            failure = transport.failure or RetryLater("a fault in sending")
            wait_s = courier.breaker.wait_s()
            if failure.advice is not None or time.monotonic() + wait_s > failing_since + _GIVE_UP_AFTER_S:
                return f"{transport.destination}: {failure.reason}; {failure.advice or 'try later'}"
            time.sleep(wait_s)
        else:
            failing_since = time.monotonic()
        segment = spool.take_backlog(probe=courier.breaker.failing)
        if segment is None and look_around:
            spool.look_around()
            segment = spool.take_backlog(probe=courier.breaker.failing)
        if segment is None:
            return None
        before = segment.offset
        limits = attrs.evolve(courier.limits, max_events=min(courier.limits.max_events, _BATCH_EVENTS))
        with contextlib.suppress(OSError):  # it cannot be read: then it is left
            hand = courier.take_from(segment, limits)
            if hand is None:
                spool.finish(segment)
            else:
                courier.deliver(hand)
        on_progress(segment.offset - before)


def _put_into(spool: Spool, ledger: Ledger, destination: Destination) -> None:
    """Move the events of the dead letter into segments; lines without one stay."""

    def take(lines: Iterator[bytes]) -> list[bytes]:
        without: list[bytes] = []
        while some := list(itertools.islice(lines, _BATCH_EVENTS)):
            events = []
            for line in some:
                event = _event_in(line)
                if event is None:
                    without.append(line)
                else:
                    events.append(event)
            if events:
                with ledger.lock:
                    share = ledger.inherited.take(len(events))
                if not spool.store(Batch(tuple(events), (share,)), lambda: True):
                    raise EvalVaultError(
                        f"cannot write to {destination.folder} ({spool.fault or 'its bound is reached'})"
                    )
        return without

    destination.empty_letters(take)


def _event_in(line: bytes) -> bytes | None:
    """Return the event in a line of the dead letter, if there is one."""
    try:
        letter = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    event = letter.get("event") if isinstance(letter, dict) else None
    return orjson.dumps(event) if isinstance(event, dict) else None


# -- copying and deleting ---------------------------------------------------------------------------


@attrs.define
class Exported:
    """What was copied."""

    events: int = 0
    damaged: int = 0
    #: Of those events, in segments of running processes, which will deliver them as well.
    in_use: int = 0


def export(found: Iterable[Destination], path: Path, *, dead_letter: bool = False, force: bool = False) -> Exported:
    """Copy all events into a file, oldest first, or the lines of the dead letters; 0600, and not over another file."""
    result = Exported()
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        file = os.open(path, flags, 0o600)
    except FileExistsError:
        raise EvalVaultError(f"{path} is there already: give --force to overwrite it") from None
    with os.fdopen(file, "wb") as out:
        os.fchmod(file, 0o600)
        for line, in_use in _letters(found) if dead_letter else _events(found):
            if line is None:
                result.damaged += 1
            else:
                out.write(line + b"\n")
                result.events += 1
                result.in_use += in_use
    return result


def _letters(found: Iterable[Destination]) -> Iterator[tuple[bytes | None, bool]]:
    for destination in found:
        for line in destination.letters():
            yield line.rstrip(b"\n") if _is_object(line) else None, False


def _events(found: Iterable[Destination]) -> Iterator[tuple[bytes | None, bool]]:
    segments = [kept for destination in found for kept in destination.segments()]
    for kept in sorted(segments, key=lambda kept: os.path.basename(kept.path)):  # noqa: PTH119 - names sort by age
        for line in kept.lines():
            yield line.text if line.sound else None, kept.in_use is True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


@attrs.frozen
class Purge:
    """What is to be deleted, as it was found: what comes later stays."""

    destination: Destination
    segments: tuple[Kept, ...]
    events: int
    dead_letter: bool = False

    @classmethod
    def of(cls, destination: Destination, *, dead_letter: bool = False) -> Purge:
        """Find what could be deleted."""
        _check_ours(destination)
        if dead_letter:
            return cls(destination, (), sum(1 for _ in destination.letters()), dead_letter=True)
        segments = tuple(destination.left_over())
        return cls(destination, segments, sum(kept.count() for kept in segments))

    def run(self, settings: Settings, *, force: bool = False) -> int:
        """Delete it; return how many events that were. What another process has adopted meanwhile stays."""
        if self.dead_letter:
            return self._empty_letters()
        counts = {kept.path: kept.count for kept in self.segments}
        deleted = 0
        spool = _open_spool(self.destination, settings, Ledger(), force=force)
        try:
            while True:
                segment = spool.take_backlog(probe=False)
                if segment is None:
                    spool.look_around()
                    segment = spool.take_backlog(probe=False)
                if segment is None:
                    return deleted
                if segment.path not in counts:
                    spool.set_aside(segment, math.inf)
                    continue
                count = counts[segment.path]()
                spool.finish(segment)
                deleted += 0 if os.path.exists(segment.path) else count  # noqa: PTH110 - text, as in the spool
        finally:
            spool.close()

    def _empty_letters(self) -> int:
        deleted = 0

        def take(lines: Iterator[bytes]) -> tuple[()]:
            nonlocal deleted
            deleted += sum(1 for _ in lines)
            return ()

        self.destination.empty_letters(take)
        return deleted
