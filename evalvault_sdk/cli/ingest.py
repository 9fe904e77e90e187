"""
Send a file of events to a server, or into a database.

In:   a JSONL file, as EvalVault's tools and our own spool write it: one event a line.
Out:  a `Tally` of what was stored, and of each refused line its number and the reason.

Lines are judged here as the server judges them, so that a bad one is named and costs no neighbour. The file
is read as it is sent: its size does not matter.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import attrs

from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.nostage import NOWHERE
from evalvault_sdk.capture.plain import Limits
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.breaker import Breaker
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RejectedEvent, RetryLater, TooLarge
from evalvault_sdk.delivery.transport.http import HttpTransport
from evalvault_sdk.errors import EvalVaultError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.ingest import judge, parse_json
from evalvault_sdk.server.store import open_store

_BATCH_EVENTS = 1000
#: How long a server that does not answer is asked again.
_GIVE_UP_AFTER_S = 60.0
#: What is in a file was recorded before: it is handed on whole.
_AS_IT_IS = Encoder(
    Limits(max_attribute_bytes=1 << 40, max_event_bytes=1 << 40, max_depth=200, max_items=1 << 40),
    Redactor(secrets=False),
)


@attrs.define
class Tally:
    """What became of a file."""

    stored: int = 0
    #: Line number, from 1, and reason.
    refused: list[tuple[int, str]] = attrs.field(factory=list)


class Target(Protocol):
    """Where events go."""

    def store(self, events: list[StageEvent]) -> tuple[RejectedEvent, ...]:
        """Store `events`; return those that are refused. Raises `EvalVaultError` when it cannot."""


class ServerTarget:
    """A running server, over the client's own transport and retry."""

    def __init__(self, url: str | None, token: str | None) -> None:
        settings = Settings.resolve(run_id="ingest", api_url=url, token=token)
        self._transport = HttpTransport(settings)
        self._breaker = Breaker(initial_s=settings.retry_initial_s, max_s=5.0)

    def store(self, events: list[StageEvent]) -> tuple[RejectedEvent, ...]:
        """Post `events` in one request, or in halves where that is too large."""
        batch = Batch(tuple(_AS_IT_IS.encode(event.to_dict(), NOWHERE) or b"" for event in events))
        outcome = self._send(batch)
        if isinstance(outcome, Delivered):
            return outcome.rejected
        if isinstance(outcome, RetryLater):
            raise EvalVaultError(
                f"{self._transport.destination} cannot be reached: {outcome.reason}; {outcome.advice or 'try later'}"
            )
        if len(events) == 1:
            reason = outcome.reason if isinstance(outcome, Refused) else "too large for the server"
            return (RejectedEvent(0, reason),)
        assert isinstance(outcome, (Refused, TooLarge))  # noqa: S101 - the two that are left
        middle = len(events) // 2
        first = self.store(events[:middle])  # in their order: where a stage occurs twice, the later one wins
        return first + tuple(attrs.evolve(r, index=r.index + middle) for r in self.store(events[middle:]))

    def _send(self, batch: Batch) -> Outcome:
        until = time.monotonic() + _GIVE_UP_AFTER_S
        while isinstance(outcome := self._transport.send(batch), RetryLater):
            self._breaker.failed(outcome)
            wait_s = self._breaker.wait_s()
            if outcome.advice is not None or time.monotonic() + wait_s > until:
                return outcome  # with an advice it wants a person: waiting does not help
            time.sleep(wait_s)
        self._breaker.succeeded()
        return outcome


class DatabaseTarget:
    """A database."""

    def __init__(self, address: str) -> None:
        self._store = open_store(address)

    def store(self, events: list[StageEvent]) -> tuple[RejectedEvent, ...]:
        """Store `events` in one transaction."""
        refused = self._store.save(events)
        return tuple(RejectedEvent(index, why) for index, why in refused.items())


def ingest_file(path: Path, target: Target, on_progress: Callable[[int], None]) -> Tally:
    """Send all events of the file; `on_progress` is told how many bytes were read."""
    tally = Tally()
    waiting: list[tuple[int, StageEvent]] = []

    def send() -> None:
        try:
            rejected = target.store([event for _, event in waiting])
        except EvalVaultError as error:
            raise EvalVaultError(
                f"{error} ({tally.stored:,} events before line {waiting[0][0]:,} are stored; "
                "ingest the file again: that stores each of them once)"
            ) from None
        tally.stored += len(waiting) - len(rejected)
        tally.refused += [(waiting[entry.index][0], entry.reason) for entry in rejected]
        waiting.clear()

    for number, line in _lines(path, on_progress):
        try:
            value, odd = parse_json(line)
        except ApiError as error:
            tally.refused.append((number, f"{error.error}: {error.details}"))
            continue
        verdict = judge([value], odd=odd)
        waiting += [(number, event) for event in verdict.events]
        tally.refused += [(number, entry["details"]) for entry in verdict.rejected]
        if len(waiting) >= _BATCH_EVENTS:
            send()
    if waiting:
        send()
    tally.refused.sort()
    return tally


def _lines(path: Path, on_progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            on_progress(len(line))
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line
