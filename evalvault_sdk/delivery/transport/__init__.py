"""
Carry one batch to where it is kept, once, and say what came of it.

A transport neither waits nor tries again (`delivery.retry` decides that) and keeps no events. Three
outcomes, never two: *delivered* (with the verdict on each event), *retry later*, and *refused*. A batch
that is too large is refused as it stands, and delivered in halves.
"""

from evalvault_sdk.delivery.transport.base import (
    Delivered,
    Outcome,
    Refused,
    RejectedEvent,
    RetryLater,
    TooLarge,
    Transport,
)

__all__ = ["Delivered", "Outcome", "Refused", "RejectedEvent", "RetryLater", "TooLarge", "Transport"]
