"""
Decide whether a batch is sent again, and after how long.

In:   a way to send, and its outcomes.
Out:  the outcome that ended it.
Worker's thread. Exponential backoff with full jitter, a server's `Retry-After` as the floor, and a sleep
that a flush shortens to that floor and the end of the program ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from evalvault_sdk.delivery.late import load
from evalvault_sdk.delivery.queue import Wakeup
from evalvault_sdk.delivery.transport.base import Outcome, RetryLater

if TYPE_CHECKING:
    import tenacity


class Retry:
    """
    Send until the outcome is final, or until told to stop.

    `hurry` ends our own part of the current wait, and `urgent` keeps the next ones short: somebody waits for a
    flush, or the process ends. What the server asked for is waited out, unless `ending` says that there is no
    later. No wait is longer than `left_s`. `should_stop` is asked after every failure; when it says yes, the
    failure is the outcome.
    """

    def __init__(
        self,
        *,
        initial_s: float,
        max_s: float,
        hurry: Wakeup,
        should_stop: Callable[[], bool],
        ending: Callable[[], bool],
        urgent: Callable[[], bool],
        left_s: Callable[[], float] = lambda: float("inf"),
        on_failure: Callable[[RetryLater], None],
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._should_stop = should_stop
        self._ending = ending
        self._urgent = urgent
        self._left_s = left_s
        self._on_failure = on_failure
        self._wait = wait or hurry.wait
        self._clock = clock
        self._asked_s = 0.0

    def run(self, send: Callable[[], Outcome]) -> Outcome:
        """Call `send` until its outcome is no `RetryLater`, waiting in between."""
        load("tenacity")
        import tenacity

        jitter = tenacity.wait_random_exponential(multiplier=self._initial_s, max=self._max_s)

        def failed(outcome: Outcome) -> bool:
            if isinstance(outcome, RetryLater):
                self._on_failure(outcome)
                self._asked_s = outcome.wait_s or 0.0
                return True
            return False

        def wait(state: tenacity.RetryCallState) -> float:
            ours = jitter(state)
            if self._urgent():
                ours = min(ours, self._initial_s)
            if self._ending() or not self._asked_s:
                return ours
            # Jitter on top of what the server asks for keeps a fleet from coming back as one.
            return self._asked_s + ours / 10

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(failed),
            wait=wait,
            stop=lambda state: self._should_stop(),
            sleep=self._sleep,
            retry_error_callback=_result,
        )
        outcome: Outcome = retrying(send)
        return outcome

    def _sleep(self, seconds: float) -> None:
        asked_until = self._clock() + self._asked_s
        woken = self._wait(min(seconds, self._left_s()))
        while woken and not self._ending() and (left_s := asked_until - self._clock()) > 0:
            woken = self._wait(left_s)


def _result(state: tenacity.RetryCallState) -> Outcome:
    assert state.outcome is not None  # noqa: S101 - tenacity sets it before it asks us
    outcome: Outcome = state.outcome.result()
    return outcome
