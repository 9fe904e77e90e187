"""
Carry events from the queues or the spool to the destination, and see to it that each meets its fate.

In:   a `Hand`: events taken from where they were.
Out:  every one of them delivered, rejected (and in the dead letter), back on disk, or back in memory.

A hand is known to the courier from the moment its events leave their place until their fate is entered into the
account. So whoever has no more time can `snatch` what is in hand, even while it is being sent, and put it on
disk: the one from whom it was snatched finds out under the ledger's lock, and leaves it alone.

What the destination refuses as a whole, or finds too large, is halved until the event at fault is alone. If
something on the way refuses it, no one can say at first who is at fault: such an event is put aside as a suspect,
and tried again. Only if others pass meanwhile, again and again, it is given up.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import Account, Ledger, Share, size_of
from evalvault_sdk.delivery.batch import ENVELOPE_BYTES, Batch, BatchLimits
from evalvault_sdk.delivery.breaker import Breaker
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.queue import EventQueue
from evalvault_sdk.delivery.segment import Segment
from evalvault_sdk.delivery.spool import Reading, Spool
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RetryLater, TooLarge, Transport
from evalvault_sdk.oversize import shrink

#: A batch that is refused as a whole is halved at most so often in the search for the events at fault.
_MAX_HALVINGS = 64
#: So many single events are suspected in a row; if then none has passed, the destination is at fault.
_MAX_SUSPECTED = 3
#: An event that was refused on the way so often while others passed will never pass. Of a destination that fails
#: every third request for minutes, one good event in a hundred thousand would be misjudged.
_MAX_FAILURES = 10
#: A suspect waits so long for its next try, twice as long each time, and at most so long.
_SUSPECT_WAITS_S, _SUSPECT_WAITS_AT_MOST_S = 0.25, 60.0
#: So many events are taken at once under the lock: more would hold up the program's threads.
_AT_ONCE = 256
#: So long whoever has no more time waits for who is just putting the same events on disk.
_KEEP_WAIT_S = 0.1


@attrs.define(eq=False)
class Hand:
    """Events on their way, in parts: the next one is the last."""

    parts: list[Batch]
    #: Where they are on disk, if they are.
    segment: Segment | None = None
    reading: Reading | None = None
    #: Or whose memory they take up: account, events, bytes.
    lent: list[tuple[Account, int, int]] = attrs.field(factory=list)

    def rest(self) -> Batch:
        """Return what is left, in order."""
        parts = self.parts[::-1]
        return Batch(
            tuple(event for part in parts for event in part.events), tuple(s for part in parts for s in part.shares)
        )


class Courier:
    """One worker's way to its destination."""

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        ledger: Ledger,
        spool: Spool | None,
        notices: Notices,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.transport = transport
        self.breaker = Breaker(initial_s=settings.retry_initial_s, max_s=settings.retry_max_s, clock=clock)
        self.limits = BatchLimits(max_events=settings.max_batch_events, max_bytes=settings.max_batch_bytes)
        self._max_batch_bytes = settings.max_batch_bytes
        self._ledger = ledger
        self._spool = spool
        self._notices = notices
        self._clock = clock
        #: Whether somebody waits for what is sent.
        self.urgent = False
        self.start_over()

    def start_over(self) -> None:
        """Begin with empty hands: at first, and in a forked child."""
        self.breaker.start_over()
        #: When a request has to be over, on the clock.
        self.deadline = float("inf")
        self._hands: list[Hand] = []
        self._keeping = False
        self._successes = 0
        #: Whether the last failure may be for what the request held.
        self.suspicious = False
        #: Whether to send no more.
        self.stopped = False

    # -- taking -------------------------------------------------------------------------------------

    def take(self, queues: Iterable[EventQueue], limits: BatchLimits, *, last: bool = False) -> Hand | None:
        """
        Move the oldest events of `queues` from queued to in flight, into a hand; None if there are none.

        Once all is stopped, only for whoever puts the `last` of them on disk: nobody would look after another's hand.
        """
        ledger, hand = self._ledger, Hand([])
        taken: tuple[bytes, ...] = ()
        shares: tuple[Share, ...] = ()
        size = ENVELOPE_BYTES
        for queue in queues:
            account = queue.account
            while recorded := account.first(_AT_ONCE):
                finished = queue.finished(recorded)
                with ledger.lock:
                    if self.stopped and not last:
                        return None
                    if not account.begins_with(recorded):
                        continue
                    events = [event for event in finished if not isinstance(event, str)]
                    if len(events) < len(recorded):  # some are lost
                        account.replace_first(recorded, finished)
                        continue
                    count, size = limits.fitting(events, len(taken), size)
                    if not count:
                        break
                    if not taken:
                        self._hands.append(hand)
                    elif not self._holds(hand):  # snatched while we were still taking
                        return None
                    # In the hand before they leave the queue: an interrupt may leave them in both, but not in neither.
                    new = events[:count]
                    taken, shares = (*taken, *new), (*shares, account.take(count))
                    hand.parts = [Batch(taken, shares)]
                    # And counted there before: whoever puts meanwhile, without the lock, must not see room too early.
                    new_bytes = sum(map(len, new))
                    account.lent += count
                    account.lent_bytes += new_bytes
                    account.remove_first(count, sum(map(size_of, recorded[:count])))
                    hand.lent.append((account, count, new_bytes))
                    ledger.settled.notify_all()
                if count < len(recorded) or count < _AT_ONCE:
                    break
        return hand if taken else None

    def take_from(self, segment: Segment, limits: BatchLimits) -> Hand | None:
        """Read the next events of a segment into a hand; None if there are none left. Raises `OSError`."""
        spool = self._spool
        assert spool is not None  # noqa: S101 - the segment is its
        while True:
            lines = spool.read(segment, limits)
            if not lines:
                return None
            with self._ledger.lock:
                reading = spool.claim(segment, lines)
                hand = Hand([reading.batch], segment, reading)
                if len(reading.batch):
                    self._hands.append(hand)
            spool.bury_damaged()
            if len(reading.batch):
                return hand

    def _holds(self, hand: Hand) -> bool:
        return any(other is hand for other in self._hands)

    def _release(self, hand: Hand) -> None:
        self._hands = [other for other in self._hands if other is not hand]
        for account, events, size in hand.lent:
            account.lent -= events
            account.lent_bytes -= size

    def snatch(self) -> list[Hand]:
        """Take all that is in hand away from whoever carries it; what is on disk stays there."""
        with self._ledger.lock:
            self._ledger.settled.wait_for(lambda: not self._keeping, _KEEP_WAIT_S)
            hands, self._hands = self._hands, []
            for hand in hands:
                if hand.segment is not None and hand.reading is not None and self._spool is not None:
                    self._spool.advance(hand.segment, hand.reading, hand.rest())
            mine = [Hand([hand.rest()], lent=hand.lent) for hand in hands if hand.segment is None]
            self._hands += mine
            return mine

    # -- putting down -------------------------------------------------------------------------------

    def keep(self, hand: Hand, *, alone: bool = False, last: bool = False) -> bool:
        """
        Put what is in hand on disk; say whether all of it is there.

        If not, it goes back to where it was, or at the very `last` is counted as lost. `alone`: in a thread that
        is not the worker's.
        """
        spool = self._spool
        with self._ledger.lock:
            if self._holds(hand) and spool is not None:
                hand.parts = _pieces(hand.rest(), spool.segment_bytes)
        kept, self._keeping = 0, True
        try:  # whatever happens to the disk, the events must not be left in a hand that nobody holds
            while spool is not None and hand.parts and self._holds(hand):
                piece = hand.parts[-1]
                if not spool.store(piece, functools.partial(self._claim, hand, piece), alone=alone):
                    break
                kept += len(piece)
        except Exception as fault:  # noqa: BLE001
            self._notices.fault(fault)
        finally:
            self._keeping = False
        self._notices.spooled(kept)
        with self._ledger.lock:
            self._ledger.settled.notify_all()
            if not self._holds(hand):
                return False
            rest = hand.rest()
            if last:
                for share in rest.shares:
                    share.account.lose(share, "shutdown", in_flight=True)
            else:
                _put_back(rest)
            self._release(hand)  # at the end: until then there is no room for others
            return not len(rest)

    def _claim(self, hand: Hand, piece: Batch) -> bool:
        """Whether a piece that was just written to disk is still in our hand; it is no more. The lock is held."""
        if not (self._holds(hand) and hand.parts and hand.parts[-1] is piece):
            return False
        hand.parts.pop()
        return True

    def _put_down(self, hand: Hand) -> bool:
        """Put down what could not be delivered; say whether nothing was left."""
        with self._ledger.lock:
            if not self._holds(hand):
                return False
            if hand.segment is not None and hand.reading is not None and self._spool is not None:
                rest = hand.rest()
                self._release(hand)
                self._spool.advance(hand.segment, hand.reading, rest)
                self._notices.delivered_from_spool(len(hand.reading.batch) - len(rest))
                return not len(rest)
            if not hand.parts:
                self._release(hand)
                return True
        self.keep(hand)
        return False

    # -- delivering ---------------------------------------------------------------------------------

    def deliver(self, hand: Hand) -> bool:
        """Send what is in hand until its outcome is final; put down what could not be sent. Was all of it sent?"""
        try:
            self._send_all(hand)
        except Exception as fault:  # noqa: BLE001 - the events are not to blame: they are sent again
            self._notices.fault(fault)
            self._failed(RetryLater(f"a fault of its own, {type(fault).__name__}"))
        finally:
            complete = self._put_down(hand)
        return complete

    def _send_all(self, hand: Hand) -> None:
        halvings, too_large, suspected, parts = 0, False, 0, hand.parts
        failure: RetryLater | None = None
        while parts and self._holds(hand):
            part = self._fitting(hand)
            outcome = self._send(part)
            if isinstance(outcome, RetryLater):
                failure = outcome
                probe = self.breaker.failing
                if hand.segment is not None and hand.segment.suspect:
                    refused = self._judge_suspect(hand.segment, outcome)
                    if refused is None:
                        return
                    outcome = refused
                elif outcome.blame == "request" and len(part) > 1 and not probe and halvings < _MAX_HALVINGS:
                    halvings += 1
                    self._replace(hand, *part.halves())
                    continue
                elif (
                    outcome.blame != "destination"
                    and len(part) == 1
                    and suspected < _MAX_SUSPECTED
                    and self._suspect(hand, part)
                ):
                    suspected += 1
                    if probe:
                        break
                    continue
                else:
                    break
            failure, suspected = None, 0
            if isinstance(outcome, TooLarge):
                too_large = True
                if outcome.limit_bytes is not None:
                    self._learn_limit(outcome.limit_bytes)
            elif isinstance(outcome, Delivered) and too_large:
                self._learn_limit(len(part.body()))  # from what passed: a gateway may refuse everything for a while
            if len(part) > 1 and (
                isinstance(outcome, TooLarge) or (isinstance(outcome, Refused) and halvings < _MAX_HALVINGS)
            ):
                # Refused as a whole: one event may be the reason, and must not cost its neighbours.
                halvings += isinstance(outcome, Refused)
                self._replace(hand, *part.halves())
            elif isinstance(outcome, TooLarge) and (shrunk := _shrunk(part, outcome.limit_bytes)) is not None:
                self._replace(hand, shrunk)
            else:
                self._settle(hand, part, outcome)
        if failure is not None:
            self._failed(failure)

    def _replace(self, hand: Hand, *smaller: Batch) -> None:
        """Put smaller parts in the place of the next one."""
        with self._ledger.lock:
            if self._holds(hand):
                hand.parts[-1:] = smaller[::-1]

    def _fitting(self, hand: Hand) -> Batch:
        """Return the next part, but an event that no request may hold made smaller."""
        part = hand.parts[-1]
        if len(part) == 1 and len(part.body()) > self._max_batch_bytes:
            smaller = _shrunk(part, self._max_batch_bytes)
            if smaller is not None:
                self._replace(hand, smaller)
                return smaller
        return part

    def _send(self, batch: Batch) -> Outcome:
        if self.stopped:
            return RetryLater("shut down")
        left_s = self.deadline - self._clock() if self.deadline != float("inf") else None
        try:
            return self.transport.send(batch, timeout_s=left_s)
        except Exception as fault:  # noqa: BLE001 - whatever a transport meets, the events are not to blame
            self._notices.fault(fault)
            return RetryLater(f"a fault in sending, {type(fault).__name__}")

    def _learn_limit(self, max_bytes: int) -> None:
        self.limits = attrs.evolve(self.limits, max_bytes=min(self.limits.max_bytes, max(max_bytes, 1024)))

    def _settle(self, hand: Hand, part: Batch, outcome: Delivered | Refused | TooLarge) -> None:
        """Enter the outcome of a part into the account, and the refused events into the dead letter."""
        unnamed = 0
        if isinstance(outcome, Delivered):
            refused = {rejected.index: rejected.reason for rejected in outcome.rejected}
            unnamed = min(outcome.unnamed, len(part) - len(refused))
        else:
            reason = outcome.reason if isinstance(outcome, Refused) else "it is too large for the server"
            refused = dict.fromkeys(range(len(part)), reason)
        kept = True
        if refused and self._spool is not None:
            kept = self._spool.dead_letter.add((part.events[index], refused[index]) for index in sorted(refused))
        with self._ledger.lock:
            if not self._holds(hand):
                return
            hand.parts.pop()
            begin, unsettled = 0, unnamed
            for share in part.shares:
                end = begin + share.count
                named = sum(begin <= index < end for index in refused) if refused else 0
                # Whose they are nobody knows: of several tracers it is the first that counts them.
                guessed = min(unsettled, share.count - named)
                unsettled -= guessed
                share.account.settle(share, named + guessed)
                begin = end
            self._ledger.settled.notify_all()
        self._successes += isinstance(outcome, Delivered)
        if self.breaker.failing:
            self.breaker.succeeded()
            self._notices.recovered()
        if refused:
            self._notices.rejected(len(refused), next(iter(refused.values())), kept=kept)
        if unnamed and isinstance(outcome, Delivered):  # which to keep in the dead letter, nobody knows either
            self._notices.rejected(unnamed, outcome.reason, kept=False)

    def _failed(self, outcome: RetryLater) -> None:
        self.suspicious = outcome.blame != "destination"
        self.breaker.failed(outcome, urgent=self.urgent)
        if not self.stopped:
            self._notices.failed(outcome, is_outage=self.breaker.open, since=self.breaker.failing_since)

    # -- who is at fault ----------------------------------------------------------------------------

    def _suspect(self, hand: Hand, event: Batch) -> bool:
        """
        Put a single event aside that may be the reason why its request failed; say whether that worked.

        On disk, to be judged; without a disk at the end of its queue, so that it lets others go first.
        """
        if self._spool is not None and self._spool.usable:
            return self._spool.store_suspect(event, self._successes, lambda: self._claim(hand, event))
        with self._ledger.lock:
            if hand.segment is not None or not self._claim(hand, event):
                return False
            (share,) = event.shares
            share.account.put_back(share, event.events, last=True)
            self._ledger.settled.notify_all()
        return True

    def _judge_suspect(self, segment: Segment, outcome: RetryLater) -> Refused | None:
        """Say whether an event that failed again is at fault: only if others have passed since it failed before."""
        assert self._spool is not None  # noqa: S101 - the segment is its
        if outcome.blame == "destination" or self.breaker.failing:
            self._failed(outcome)
            return None
        if self._successes > segment.failed_after:  # others have passed since
            segment.failed_after = self._successes
            segment.failures += 1
            if outcome.blame == "request" and segment.failures >= _MAX_FAILURES:
                return Refused(f"{outcome.reason}, again and again, while other events pass")
        segment.tries += 1
        self._spool.set_aside(segment, min(_SUSPECT_WAITS_S * 2**segment.tries, _SUSPECT_WAITS_AT_MOST_S))
        return None


def _put_back(batch: Batch) -> None:
    """Return events in flight to where they were. The ledger's lock is held."""
    events = batch.events
    # The last first: each is put before what waits already.
    for share in reversed(batch.shares):
        events, own = events[: len(events) - share.count], events[len(events) - share.count :]
        share.account.put_back(share, own)


def _pieces(batch: Batch, max_bytes: int) -> list[Batch]:
    """Return the batch in pieces of at most about so many bytes, the first one last."""
    pieces: list[Batch] = []
    begin = size = 0
    rest = batch
    for number, event in enumerate(batch.events):
        if size and size + len(event) > max_bytes:
            piece, rest = rest.split(number - begin)
            pieces.append(piece)
            begin, size = number, 0
        size += len(event) + 1
    if len(rest):
        pieces.append(rest)
    return pieces[::-1]


def _shrunk(part: Batch, limit_bytes: int | None) -> Batch | None:
    """Return a batch of one event with less in it, or None if it cannot be made small enough."""
    (event,) = part.events
    half = len(event) // 2
    # A limit that the event was within all the time is not to be believed.
    most = half if limit_bytes is None or limit_bytes >= len(part.body()) else limit_bytes - ENVELOPE_BYTES
    smaller = shrink(event, most) if most > 0 else None
    return None if smaller is None else Batch((smaller,), part.shares)
