"""
Decide how many waiting events go into the next request, and give it its form.

In:   encoded events, oldest first, and ceilings.
Out:  a `Batch`, its JSON body, and its parts when it has to be cut.
Pure: no clock, thread or socket. The worker decides when, this decides how many.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

import attrs

from evalvault_sdk.delivery.account import Share

_OPEN = b'{"events":['
_CLOSE = b"]}"
#: Bytes of a body around its events.
ENVELOPE_BYTES = len(_OPEN) + len(_CLOSE)


@attrs.frozen
class Batch:
    """Events of one request, owned by the worker until their outcome is known."""

    events: tuple[bytes, ...]
    #: Whose events they are, in their order; their counts add up to the batch's.
    shares: tuple[Share, ...] = ()

    def __len__(self) -> int:
        return len(self.events)

    def body(self) -> bytes:
        """Return the JSON body: the events' own bytes, unchanged."""
        if not self.events:
            return _OPEN + _CLOSE
        # Joined in one go: of some megabytes, a copy costs as much as a request.
        first, *rest = self.events
        events = [_OPEN + first, *rest]
        events[-1] += _CLOSE
        return b",".join(events)

    def split(self, count: int) -> tuple[Batch, Batch]:
        """Return the first `count` events and the rest."""
        first, rest = split_shares(self.shares, count)
        return Batch(self.events[:count], first), Batch(self.events[count:], rest)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and the second half, for a server that found the whole too large."""
        return self.split(len(self.events) // 2)


def split_shares(shares: tuple[Share, ...], count: int) -> tuple[tuple[Share, ...], tuple[Share, ...]]:
    """Return whose the first `count` events are, and whose the rest."""
    first: list[Share] = []
    for number, share in enumerate(shares):
        if share.count > count:
            cut = [share.part(count)] if count else []
            return (*first, *cut), (share.part(share.count - count), *shares[number + 1 :])
        first.append(share)
        count -= share.count
    return tuple(first), ()


@attrs.frozen(kw_only=True)
class BatchLimits:
    """How large one request may grow; whichever ceiling is met first wins."""

    #: Events in one request.
    max_events: int = 8192
    #: Bytes of JSON before compression, brackets and commas included. A larger event goes alone.
    max_bytes: int = 4 << 20

    def fitting(self, events: Sequence[bytes], before: int, size: int) -> tuple[int, int]:
        """
        Return how many of `events` fit into a body of `size` bytes that has `before` events, and its new size.

        At least one, if it has none yet.
        """
        events = events[: self.max_events - before]
        most = self.max_bytes + 1  # the last event has no comma
        whole = size + sum(map(len, events)) + len(events)
        if whole <= most:  # as it is almost always
            return len(events), whole
        sizes = list(itertools.accumulate((len(event) + 1 for event in events), initial=size))
        count = max(bisect.bisect_right(sizes, most) - 1, 0 if before else 1)
        return count, sizes[count]
