"""
What the endpoints work with, as one thing to hand around and to close.

In:   a store, and the settings.
Out:  the parts that stand between a request and the store: guard, limits, group commit, reader, live streams.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from evalvault_sdk.errors import StoreError
from evalvault_sdk.server.answers import ApiError, come_again
from evalvault_sdk.server.body import Body, BodyBudget
from evalvault_sdk.server.commit import GroupCommit, Refused
from evalvault_sdk.server.criteria import Criteria
from evalvault_sdk.server.ingest import Submission
from evalvault_sdk.server.limiter import RateLimiter
from evalvault_sdk.server.live import LiveFeed
from evalvault_sdk.server.reader import RunReader
from evalvault_sdk.server.retention import Retention
from evalvault_sdk.server.security import Access, Guard, is_loopback
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store.base import Store
from evalvault_sdk.server.telemetry import Telemetry

#: Bodies parsed at once: each may cost some hundred megabytes, and has the interpreter to itself nearly all the time.
_PARSERS = 1
#: Looks whether the store can be reached at once, and seconds that one may take: who asks needs no token.
_CHECKERS = 2
_CHECK_TIMEOUT_S = 5.0
#: Questions answered at once; each may need a connection to the database.
_READERS = 8

_Params = ParamSpec("_Params")
_Answer = TypeVar("_Answer")


class Services:
    """Everything between a request and the store, of one app."""

    def __init__(self, store: Store, settings: ServerSettings) -> None:
        """Raise `ConfigurationError` for a file of settings that cannot be used. Whoever made the store closes it."""
        self.store = store
        self.settings = settings
        self.guard = Guard.of(settings)
        self.reader = RunReader(store, Criteria.of(settings))
        self.limiter = RateLimiter(settings.rate_limit) if settings.rate_limit else None
        self.live = LiveFeed(store, max_streams=settings.max_live_streams)
        self.telemetry = telemetry = Telemetry()
        self.bodies = BodyBudget(settings, on_change=telemetry.waiting_bytes.set)
        self.commit = GroupCommit(
            store,
            on_commit=self.live.stored,
            on_timed=telemetry.store_seconds.observe,
            on_waiting=telemetry.waiting_events.set,
        )
        self.retention = Retention(store, settings, on_deleted=telemetry.deleted.inc)
        #: Whether it may be asked under names of this machine only.
        self.local_only = False
        self._parsers: CapacityLimiter | None = None
        self._readers: CapacityLimiter | None = None
        self._checkers: CapacityLimiter | None = None

    def start(self) -> None:
        """Begin: also again, after `close`."""
        self.live.closing = False
        self.commit.open()
        self.retention.start()

    def close(self) -> None:
        """Store what was accepted, and end all threads."""
        self.commit.close()
        self.retention.close()

    def admit(self, headers: Mapping[str, str], address: str | None, *, write: bool) -> Access:
        """Return what the sender of a request may do. Raises `ApiError`."""
        authorization = headers.get("authorization")
        if self.local_only and not _means_this_machine(headers.get("host", "")):
            raise ApiError(
                403,
                "Forbidden",
                "without a token this server is asked as localhost only: give it a token, or --insecure",
                reason="forbidden",
            )
        try:
            access = self.guard.access(authorization)
        except ApiError:
            if self.limiter is not None:  # who guesses is slowed down, too
                self.limiter.check(f"address {address}")
            raise
        if self.limiter is not None:
            self.limiter.check(f"address {address}" if self.guard.is_open else f"token {access.name}")
        access.check(write=write)
        return access

    async def take(self, body: Body, access: Access, read: Callable[[bytes], Iterable[Submission]]) -> Submission:
        """
        Unpack a body, `read` and judge what is in it, and store what is good of it.

        Returns what is stored, durably, and what was refused. Raises `ApiError` and `StoreError`: then
        nothing is known to be stored.
        """
        if self._parsers is None:
            self._parsers = CapacityLimiter(_PARSERS)
        parts: list[Submission] = []
        storing: list[Future[Refused]] = []

        def submit() -> None:
            found = read(body.unpack())
            if self.store.writers > 1:  # then a part could overtake the one before it
                found = [Submission.joined(found)]
            not_the_senders: str | None = None
            for part in found:
                foreign = {
                    index: f"this token is for runs whose id begins with {access.scope}"
                    for index, event in enumerate(part.events)
                    if not access.covers(event.run_id)
                }
                for index in foreign:
                    not_the_senders = not_the_senders or part.events[index].run_id
                part = part.without(foreign).prepared(self.store)
                if part.events:
                    storing.append(self.commit.submit(part.events, continued=bool(storing)))
                parts.append(part)
            if not storing and not_the_senders is not None:
                access.check_run(not_the_senders)  # raises

        try:
            await to_thread.run_sync(submit, limiter=self._parsers)
        finally:
            # What was submitted goes on, when the client does not wait for it, and when what came after it failed.
            stored = asyncio.gather(*map(asyncio.wrap_future, storing), return_exceptions=True)
            body.count_until(stored)
        done, _ = await asyncio.wait([stored], timeout=self.settings.store_timeout_s)
        if not done:
            raise come_again("Database slow", "storing takes too long; send the same again later", reason="database")
        refused = iter([_answer_of(verdict) for verdict in stored.result()])
        submission = Submission.joined(part.without(next(refused)) if part.events else part for part in parts)
        self.telemetry.events.labels("stored").inc(len(submission.events))
        self.telemetry.events.labels("rejected").inc(len(submission.rejected))
        return submission

    async def ask(
        self, question: Callable[_Params, _Answer], *values: _Params.args, **named: _Params.kwargs
    ) -> _Answer:
        """Ask the store in a thread; who asks when all are busy waits."""
        if self._readers is None:
            self._readers = CapacityLimiter(_READERS)
        return await to_thread.run_sync(functools.partial(question, *values, **named), limiter=self._readers)

    async def check_store(self) -> None:
        """Raise `StoreError` unless the store can be reached within some seconds."""
        if self._checkers is None:
            self._checkers = CapacityLimiter(_CHECKERS)
        check = to_thread.run_sync(self.store.check, abandon_on_cancel=True, limiter=self._checkers)
        try:
            await asyncio.wait_for(check, _CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise StoreError(f"the database {self.store.address} does not answer") from None


def _answer_of(verdict: Refused | BaseException) -> Refused:
    if isinstance(verdict, BaseException):
        raise verdict
    return verdict


def _means_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return is_loopback(name.strip("[]").lower())
