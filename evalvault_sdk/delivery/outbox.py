"""
One tracer's way out: a queue of its own, and a worker that it shares.

In:   the settings of a tracer.
Out:  an `Outbox`: a sink for its events, `flush`, `shutdown`, and the truth about them.

One worker per process and destination, however many tracers are made: those whose settings differ in nothing
but the run share it, and with it one thread, one connection and one place on disk. Each has an account of its
own. The worker ends with the last of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import FlushReport, Stats
from evalvault_sdk.delivery.queue import EventQueue, Finish
from evalvault_sdk.delivery.transport.base import Transport
from evalvault_sdk.delivery.transport.file import FileTransport
from evalvault_sdk.delivery.transport.http import HttpTransport
from evalvault_sdk.delivery.transport.store import StoreTransport
from evalvault_sdk.delivery.worker import Worker

# Reentrant: a finalizer may shut a tracer down while its thread makes another. Whoever holds it takes no other lock.
_sharing = threading.RLock()
_shared: dict[Hashable, Worker] = {}


def open_outbox(settings: Settings, transport: Transport | None = None, *, finish: Finish | None = None) -> Outbox:
    """Return a new outbox for events, and drafts if there is a `finish`; one with a transport shares nothing."""
    if transport is not None:
        worker = Worker(transport, settings, on_unused=_retire)
        outbox = Outbox(worker, worker.open_queue(finish), settings)
    else:
        key = _key(settings)
        with _sharing:
            for other, shared in list(_shared.items()):
                if shared.closing or (shared.unused and not shared.is_alive):
                    _shared.pop(other, None)
            while True:
                worker = _shared.setdefault(key, Worker(transport_for(settings), settings, on_unused=_retire))
                outbox = Outbox(worker, worker.open_queue(finish), settings)
                if not worker.closing:  # as it may be, if a finalizer has just shut down the last of its tracers
                    break
                _shared.pop(key, None)
    if settings.enabled:
        worker.adopt_orphans()
    return outbox


def _retire(worker: Worker) -> None:
    """Close a worker that no tracer uses any more. Called by its own thread."""
    with _sharing:
        if worker.unused:
            worker.close()


@attrs.define(eq=False)
class Outbox:
    """A queue and its worker."""

    worker: Worker
    queue: EventQueue
    _settings: Settings

    @property
    def destination(self) -> str:
        """Where events go."""
        return self.worker.destination

    def flush(self, timeout_s: float) -> FlushReport:
        """Deliver what was recorded before this call, waiting at most `timeout_s` seconds."""
        in_time = self.worker.flush(self.queue, timeout_s)
        return self.queue.account.report(in_time=in_time)

    def shutdown(self, timeout_s: float | None = None) -> FlushReport:
        """Take no more events, deliver those taken; put on disk what is left after `timeout_s` seconds."""
        if timeout_s is None:
            timeout_s = self._settings.shutdown_timeout_s
        with _sharing:  # from here on nobody joins a worker that is about to end
            self.worker.leave(self.queue, timeout_s)
        self.worker.see_off(self.queue, timeout_s)
        account = self.queue.account
        with self.worker.ledger.lock:
            return account.report(in_time=not account.pending and not account.dropped.get("shutdown"))

    def close(self) -> None:
        """Take no more events, and leave it to the thread to deliver those taken, and to end. Takes no lock."""
        self.queue.close()
        self.worker.speed_up()

    def stats(self) -> Stats:
        """Return what became of all events recorded so far."""
        return self.queue.account.stats()


def transport_for(settings: Settings) -> Transport:
    """Return the way to where the settings say that events go. Raises `MissingDependencyError`."""
    if settings.file is not None:
        return FileTransport(settings.file)
    if settings.db_path is not None:
        return StoreTransport(settings.db_path)
    if settings.otlp_endpoint is not None:
        from evalvault_sdk.delivery.transport.otlp import OtlpTransport  # an extra

        return OtlpTransport(settings)
    return HttpTransport(settings)


def _key(settings: Settings) -> Hashable:
    """Return what two settings have in common that may share a worker."""
    values: dict[str, Any] = attrs.asdict(
        settings, recurse=False, filter=lambda field, _: field.name != "run_id" and not field.metadata["capture"]
    )
    return tuple((name, _hashable(value)) for name, value in values.items())


def _hashable(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return id(value) if callable(value) else value  # the settings keep a callback, and so its id


def _after_fork_in_child() -> None:
    global _sharing
    _sharing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
