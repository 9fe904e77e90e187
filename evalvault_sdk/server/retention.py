"""
Delete what is too old, or too much of one run.

In:   a store, and how long and how much is to be kept.
Out:  fewer events. In a thread of its own, in small steps with pauses: whoever stores meanwhile does not feel it.

Every event is looked at once in a round; a round begins every ten minutes. Several processes on one
database may do so at once: what one has deleted the other does not find.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

from evalvault_sdk.errors import StoreError, UnsupportedError
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store.base import Store

logger = logging.getLogger("evalvault_sdk.server")

_ROUND_S = 600.0
#: Events looked at in one step, and the pause after it.
_STEP = 5_000
_PAUSE_S = 0.05
_RUNS = 100
_CLOSE_S = 2.0


class Retention:
    """Keeps a store from growing for ever."""

    def __init__(
        self, store: Store, settings: ServerSettings, *, on_deleted: Callable[[int], None] = lambda count: None
    ) -> None:
        self._store = store
        self._days = settings.retain_days
        self._run_events = settings.retain_run_events
        self._on_deleted = on_deleted
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if anything is to be deleted at all."""
        if self._days is not None or self._run_events is not None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, name="evalvault-retention", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End soon; a large run that is being trimmed is not waited for."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            try:
                self.sweep()
            except UnsupportedError as error:
                logger.error("evalvault: nothing is deleted, whatever the settings for retention say: %s", error)
                return
            except StoreError as error:
                logger.warning("evalvault: old events were not deleted, which is tried again later: %s", error)
            except Exception:  # the thread must outlive a fault: the disk would fill up
                logger.exception("evalvault: old events were not deleted by a fault of the server")
            if self._stop.wait(_ROUND_S):
                return

    def sweep(self) -> None:
        """Go once through everything. Raises `StoreError`."""
        if self._days is not None:
            self._sweep_old(datetime.now(timezone.utc) - timedelta(days=self._days))
        if self._run_events is not None:
            self._trim_runs(self._run_events)

    def _sweep_old(self, older_than: datetime) -> None:
        place: int | None = 0
        while place is not None:
            place, deleted = self._store.sweep(place, older_than=older_than, limit=_STEP)
            self._deleted(deleted)
            if self._stop.wait(_PAUSE_S):
                return

    def _trim_runs(self, keep: int) -> None:
        before: int | None = None
        while True:
            with self._store.snapshot() as view:
                runs = view.runs(prefixes=[""], before=before, limit=_RUNS)
            for run in runs:
                if self._stop.is_set():
                    return
                if run.events > keep:
                    self._deleted(self._store.trim_run(run.run_id, keep))
            if len(runs) < _RUNS or self._stop.wait(_PAUSE_S):
                return
            before = runs[-1].last_place

    def _deleted(self, count: int) -> None:
        if count:
            self._on_deleted(count)
            logger.info("evalvault: %d events were deleted, as the settings for retention say", count)
