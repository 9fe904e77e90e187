"""
Decide how many waiting events go into the next request, and give it its form.

In:   encoded events, oldest first, and ceilings.
Out:  a `Batch`, its JSON body, and its halves when it proved too large.
Pure: no clock, thread or socket. The worker decides when, this decides how many.
"""

from __future__ import annotations

import collections

import attrs

_OPEN = b'{"events":['
_CLOSE = b"]}"
#: Bytes of a body around its events.
ENVELOPE_BYTES = len(_OPEN) + len(_CLOSE)


@attrs.frozen
class Batch:
    """Events of one request, owned by the worker until their outcome is known."""

    events: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.events)

    def body(self) -> bytes:
        """Return the JSON body: the events' own bytes, unchanged."""
        return _OPEN + b",".join(self.events) + _CLOSE

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and the second half, for a server that found the whole too large."""
        middle = len(self.events) // 2
        return Batch(self.events[:middle]), Batch(self.events[middle:])


@attrs.frozen(kw_only=True)
class BatchLimits:
    """How large one request may grow; whichever ceiling is met first wins."""

    #: Events in one request.
    max_events: int = 8192
    #: Bytes of JSON before compression, brackets and commas included. A larger event goes alone.
    max_bytes: int = 4 << 20

    def take_from(self, events: collections.deque[bytes]) -> Batch:
        """Move the first events that fit out of `events`, at least one if there is one."""
        taken: list[bytes] = []
        size = ENVELOPE_BYTES - 1  # the last event has no comma
        while events and len(taken) < self.max_events:
            size += len(events[0]) + 1
            if taken and size > self.max_bytes:
                break
            taken.append(events.popleft())
        return Batch(tuple(taken))
