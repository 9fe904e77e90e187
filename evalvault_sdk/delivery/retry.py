"""
Decide whether a batch is sent again, and after how long.

In:   a way to send, and its outcomes.
Out:  the outcome that ended it.
Worker's thread. Exponential backoff with full jitter, a server's `Retry-After` as the floor, and a sleep
that shutdown and flush wake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evalvault_sdk.delivery.queue import Wakeup
from evalvault_sdk.delivery.transport.base import Outcome, RetryLater

if TYPE_CHECKING:
    import tenacity


class Retry:
    """
    Send until the outcome is final, or until told to stop.

    `hurry` ends the current wait: the next try comes at once (a flush was asked for, or the process ends).
    `should_stop` is asked after every failure; when it says yes, the failure is the outcome.
    """

    def __init__(
        self,
        *,
        initial_s: float,
        max_s: float,
        hurry: Wakeup,
        should_stop: Callable[[], bool],
        on_failure: Callable[[RetryLater], None] = lambda outcome: None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._should_stop = should_stop
        self._on_failure = on_failure
        self._sleep = sleep or hurry.wait

    def run(self, send: Callable[[], Outcome]) -> Outcome:
        """Call `send` until its outcome is no `RetryLater`, waiting in between."""
        import tenacity  # with the first batch, not with the program's start

        jitter = tenacity.wait_random_exponential(multiplier=self._initial_s, max=self._max_s)

        def failed(outcome: Outcome) -> bool:
            if isinstance(outcome, RetryLater):
                self._on_failure(outcome)
                return True
            return False

        def wait(state: tenacity.RetryCallState) -> float:
            outcome = _result(state)
            asked = outcome.wait_s if isinstance(outcome, RetryLater) else None
            # What the server asks for is a floor: jitter on top keeps a fleet from coming back as one.
            return jitter(state) if asked is None else asked + jitter(state) / 10

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(failed),
            wait=wait,
            stop=lambda state: self._should_stop(),
            sleep=self._sleep,
            retry_error_callback=_result,
        )
        outcome: Outcome = retrying(send)
        return outcome


def _result(state: tenacity.RetryCallState) -> Outcome:
    assert state.outcome is not None  # noqa: S101 - tenacity sets it before it asks us
    outcome: Outcome = state.outcome.result()
    return outcome
