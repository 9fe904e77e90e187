"""
The seam between deciding when to send and sending: a transport's interface, and its outcomes.

In:   a `Batch`.
Out:  exactly one of `Delivered`, `RetryLater`, `Refused`, `TooLarge`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import attrs

from evalvault_sdk.delivery.batch import Batch


@attrs.frozen
class RejectedEvent:
    """One event of a batch that will never be stored as it is."""

    #: Its place in the batch, from 0.
    index: int
    #: Why, in the server's words.
    reason: str


@attrs.frozen
class Delivered:
    """The batch was stored, but for the events named, and for some more if nobody says which."""

    rejected: tuple[RejectedEvent, ...] = ()
    #: So many more were refused, of the others, and why: OTLP counts them only.
    unnamed: int = 0
    reason: str = ""


#: What is at fault when a request fails.
Blame = Literal["destination", "unclear", "request"]


@attrs.frozen
class RetryLater:
    """Nothing of the batch is known to be stored; the same request may succeed later."""

    #: What happened, in words for a log line; no content of events.
    reason: str
    #: Seconds the server asked to wait, if it did.
    wait_s: float | None = None
    #: What a person has to correct before it can succeed, if anything.
    advice: str | None = None
    #: What is at fault: the destination, or the request, as something on the way refuses what it holds.
    blame: Blame = "destination"


@attrs.frozen
class Refused:
    """The batch will never be stored as it is, for `reason`."""

    reason: str


@attrs.frozen
class TooLarge:
    """The batch has to be cut; the server takes at most `limit_bytes` in a request, if it said so."""

    limit_bytes: int | None = None


Outcome = Delivered | RetryLater | Refused | TooLarge


class Transport(Protocol):
    """Where batches go."""

    #: Where that is, for log lines and for keeping destinations apart.
    destination: str

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Send the batch once, within `timeout_s` seconds if given. Raises nothing that a retry could mend."""

    def close(self) -> None:
        """Let go of connections and files. A later `send` may open them again."""

    def after_fork_in_child(self) -> None:
        """Let go of what is the parent's, without waiting for a lock: a thread that is not here may hold it."""
