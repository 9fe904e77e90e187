from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from evalvault_sdk.delivery.queue import Wakeup
from evalvault_sdk.delivery.retry import Retry
from evalvault_sdk.delivery.transport import Delivered, Outcome, Refused, RetryLater


def run(
    outcomes: Sequence[Outcome], tries: int = 1000, max_s: float = 30.0, urgent: bool = False
) -> tuple[Outcome, list[float], list[str]]:
    waits: list[float] = []
    failures: list[str] = []
    retry = Retry(
        initial_s=0.5,
        max_s=max_s,
        hurry=Wakeup(),
        should_stop=lambda: len(failures) >= tries,
        ending=lambda: False,
        urgent=lambda: urgent,
        on_failure=lambda outcome: failures.append(outcome.reason),
        wait=lambda seconds: waits.append(seconds) is not None,  # type: ignore[func-returns-value]
    )
    waiting = iter(outcomes)
    return retry.run(lambda: next(waiting)), waits, failures


def test_what_is_final_is_not_tried_again() -> None:
    for outcome in (Delivered(), Refused("no")):
        assert run([outcome]) == (outcome, [], [])


def test_it_tries_until_it_is_delivered() -> None:
    outcome, waits, failures = run([RetryLater("a"), RetryLater("b"), Delivered()])
    assert (outcome, len(waits), failures) == (Delivered(), 2, ["a", "b"])


def test_waits_are_drawn_below_a_ceiling_that_doubles_up_to_its_maximum() -> None:
    many = [run([RetryLater("x")] * 10 + [Delivered()], max_s=8.0)[1] for _ in range(300)]
    for number, ceiling in enumerate([0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8]):
        drawn = [waits[number] for waits in many]
        assert 0 <= min(drawn) < 0.3 * ceiling, "full jitter reaches down to nothing"
        assert 0.7 * ceiling < max(drawn) <= ceiling


def test_what_the_server_asks_for_is_the_floor_of_the_wait() -> None:
    waits = [run([RetryLater("x", wait_s=7.0), Delivered()])[1][0] for _ in range(50)]
    assert min(waits) >= 7.0
    assert max(waits) <= 7.1
    assert len(set(waits)) > 40, "a fleet that was told the same must not come back as one"


def test_while_somebody_waits_the_waits_stay_short() -> None:
    _, waits, _ = run([RetryLater("x")] * 50 + [Delivered()], urgent=True)
    assert max(waits) <= 0.5


def test_when_told_to_stop_the_failure_is_the_outcome() -> None:
    outcome, waits, _ = run([RetryLater("x")] * 10, tries=3)
    assert (outcome, len(waits)) == (RetryLater("x"), 2)


def hurried(asked_s: float | None, ending: bool) -> float:
    """Return how long a wait takes that is hurried after 0.1 seconds."""
    hurry = Wakeup()
    retry = Retry(
        initial_s=60,
        max_s=60,
        hurry=hurry,
        should_stop=lambda: False,
        ending=lambda: ending,
        urgent=lambda: ending,
        on_failure=lambda outcome: None,
    )
    outcomes: Iterator[Outcome] = iter([RetryLater("x", wait_s=asked_s), Delivered()])
    timer = threading.Timer(0.1, hurry.set)
    timer.start()
    started = time.monotonic()
    assert retry.run(lambda: next(outcomes)) == Delivered()
    timer.join()
    return time.monotonic() - started


def test_hurry_ends_our_own_wait() -> None:
    assert hurried(None, ending=False) < 5


def test_hurry_waits_out_what_the_server_asked_for_unless_there_is_no_later() -> None:
    assert 0.9 < hurried(1.0, ending=False) < 5
    assert hurried(30.0, ending=True) < 5
