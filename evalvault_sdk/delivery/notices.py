"""
Tell the operator, and the program if it wants to know, how delivery goes.

In:   failures, recoveries, losses, as the worker meets them.
Out:  lines of the log: one when an outage begins, one when it is over, losses at most once a minute by reason;
      calls of `on_error`, `on_drop` and `on_state_change`.
Worker's thread, or that of whoever ends it. A callback that raises, or a logging handler that does, is not felt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import DropReason, Ledger
from evalvault_sdk.delivery.spool import Spool
from evalvault_sdk.delivery.transport.base import RetryLater
from evalvault_sdk.log import Rarely, warn

#: How delivery goes: `outage` from the failures that began it to the first event that is taken again.
State = Literal["delivering", "outage"]

#: An outage whose backlog takes longer to deliver than this is said to be over before it is.
_TELL_RECOVERY_S = 60.0
#: So long the end waits for another thread that is saying what was lost.
_TELL_WAIT_S = 0.05
#: So long it waits for what is said last.
_TELL_END_S = 0.15
#: The recorder says these, with their cause.
_TOLD_BY_RECORDER: frozenset[DropReason] = frozenset({"invalid", "internal_error"})


@attrs.define
class _Outage:
    began: float
    ended: float | None = None
    spooled: int = 0
    delivered: int = 0
    #: Taken by who says that it is over: the thread, or whoever shuts down.
    telling: threading.Lock = attrs.field(factory=threading.Lock)


class Notices:
    """What was said of one destination, and what is to be said."""

    def __init__(
        self, destination: str, ledger: Ledger, settings: Settings, spool: Spool | None, clock: Callable[[], float]
    ) -> None:
        self._destination = destination
        self._ledger = ledger
        self._settings = settings
        self._spool = spool
        self._clock = clock
        self.start_over()

    def start_over(self) -> None:
        """Begin with nothing said: at first, and in a forked child."""
        self._log = Rarely(self._clock)
        self._telling = threading.RLock()
        self._told: dict[DropReason, int] = {}
        self._reported: dict[DropReason, int] = {}
        self._outage: _Outage | None = None
        self._spooled = 0

    def failed(self, outcome: RetryLater, *, is_outage: bool, since: float) -> None:
        """A request failed; that is an outage only if the breaker says so."""
        self._call(self._settings.on_error, f"cannot deliver to {self._destination}: {outcome.reason}")
        if not is_outage or (self._outage is not None and self._outage.ended is None):
            return
        self.tell_recovery(at_once=True)
        self._outage = _Outage(since, spooled=self._spooled)
        kept = "in memory" if self._spool is None else f"in {self._spool.folder}"
        advice = f"; {outcome.advice}" if outcome.advice else ""
        warn(
            "cannot deliver to %s (%s); events are kept %s and sent later%s",
            self._destination,
            outcome.reason,
            kept,
            advice,
        )
        self._call(self._settings.on_state_change, "outage")

    def recovered(self) -> None:
        """A request was taken after one that failed."""
        self._spooled = 0
        if self._outage is not None and self._outage.ended is None:
            self._outage.ended = self._clock()
            self._call(self._settings.on_state_change, "delivering")
            self.tell_recovery()

    def spooled(self, count: int) -> None:
        """Events were put on disk since they could not be delivered."""
        self._spooled += count
        outage = self._outage  # another thread may just be saying that it is over
        if outage is not None and outage.ended is None:
            outage.spooled += count

    def delivered_from_spool(self, count: int) -> None:
        """Events from disk met their fate."""
        outage = self._outage
        if outage is not None:
            outage.delivered += count

    def rejected(self, count: int, reason: str, *, kept: bool) -> None:
        """The server refused events for what they are."""
        where = ""
        if self._spool is not None:
            path = self._spool.dead_letter.path
            where = f"; they are in {path}" if kept else f"; they could not be kept in {path}"
        self._log.warn("rejected", "the server rejected %d events, the first because: %s%s", count, reason, where)
        self._call(self._settings.on_error, f"{self._destination} rejected {count} events, the first because: {reason}")

    def fault(self, fault: Exception) -> None:
        """Something of our own went wrong."""
        self._log.warn("fault", "delivery failed by a fault of its own (%s)", type(fault).__name__)
        self._call(self._settings.on_error, f"a fault of delivery's own: {type(fault).__name__}")

    def tell_recovery(self, *, at_once: bool = False) -> None:
        """Say once that an outage is over: when what it left on disk is delivered, or after a minute."""
        outage = self._outage
        if outage is None or outage.ended is None:
            return
        backlog = self._spool is not None and self._spool.has_backlog
        if backlog and not at_once and self._clock() - outage.ended < _TELL_RECOVERY_S:
            return
        if not outage.telling.acquire(blocking=False):
            return
        self._outage = None
        on_disk = ""
        if outage.spooled:
            on_disk = f"; of {outage.spooled:,} events put on disk meanwhile {outage.delivered:,} are delivered"
            on_disk += ", the others follow" if backlog else ""
        warn("delivering to %s again after %.1f s%s", self._destination, outage.ended - outage.began, on_disk)

    def tell_losses(self, *, at_once: bool = False) -> None:
        """Say that events were lost, by reason, at most once a minute; at the end, what was not said yet."""
        # The thread and whoever shuts down may both be here: one says it, and the other waits until it is said,
        # for the process may end right after. A logging handler of the host that hangs is not waited for.
        if not self._telling.acquire(timeout=_TELL_WAIT_S):
            return
        try:
            self._tell_faults()
            for reason, count in dict(self._ledger.lost).items():
                if new := count - self._reported.get(reason, 0):
                    self._reported[reason] = count
                    self._call(self._settings.on_drop, reason, new)
                new = count - self._told.get(reason, 0)
                if not new or reason in _TOLD_BY_RECORDER:
                    continue
                line = ("%d events for %s were lost (%s)", new, self._destination, reason)
                if at_once:
                    warn(*line)
                elif not self._log.warn(reason, *line):
                    continue
                self._told[reason] = count
        finally:
            self._telling.release()

    def _tell_faults(self) -> None:
        spool = self._spool
        if spool is None:
            return
        fault, spool.fault = spool.fault, None
        if fault is not None:
            self._log.warn(
                "disk",
                "cannot write to %s (%s); events stay in memory as far as its bounds allow: "
                "check the folder's room and rights, or set EVALVAULT_SPOOL_DIR",
                spool.folder,
                fault,
            )
            self._call(self._settings.on_error, f"cannot write to {spool.folder}: {fault}")
        if not spool.locks_work:
            self._log.warn(
                "locks",
                "the file system of %s has no locks: what ended processes leave there is not delivered by itself, "
                "but by `evalvault-sdk spool replay --force`",
                spool.folder,
            )

    def tell_end(self, left: int) -> None:
        """Say what there is to say before the end; `left` events are on disk."""
        if not (left or self._outage or self._ledger.lost or (self._spool is not None and self._spool.fault)):
            return
        # A logging handler or a callback may take its time, over a network perhaps; the end does not.
        thread = threading.Thread(target=self._tell_end, args=(left,), name="evalvault-notices", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending, and starts no more threads
            self._tell_end(left)
        else:
            thread.join(_TELL_END_S)

    def _tell_end(self, left: int) -> None:
        self.tell_losses(at_once=True)
        self.tell_recovery(at_once=True)
        if left and self._spool is not None:
            warn(
                "%d events for %s are kept in %s; the next process that delivers there sends them",
                left,
                self._destination,
                self._spool.folder,
            )

    @staticmethod
    def _call(callback: Callable[..., Any] | None, *values: object) -> None:
        if callback is None:
            return
        try:
            callback(*values)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001,S110 - not even sys.exit in a callback may end delivery
            pass
