from __future__ import annotations

import random

import pytest

from evalvault_sdk.delivery.breaker import Breaker
from evalvault_sdk.delivery.transport import RetryLater


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(draw: float = 1.0, **settings: float) -> tuple[Breaker, Clock]:
    """Return a breaker whose random draws are always at that part of their range."""
    clock = Clock()
    breaker = Breaker(
        **{"initial_s": 0.5, "max_s": 8.0, **settings}, clock=clock, uniform=lambda low, high: low + draw * (high - low)
    )
    return breaker, clock


def test_while_all_is_well_nothing_waits() -> None:
    breaker, _ = make()
    assert (breaker.wait_s(), breaker.failing, breaker.open) == (0.0, False, False)


def test_waits_are_drawn_below_a_ceiling_that_doubles_up_to_its_maximum() -> None:
    highest, _ = make(1.0)
    lowest, _ = make(0.0)
    for ceiling in (0.5, 1, 2, 4, 8, 8, 8):
        highest.failed(RetryLater("x"))
        lowest.failed(RetryLater("x"))
        assert highest.wait_s() == pytest.approx(ceiling)
        assert lowest.wait_s() == 0.0, "full jitter reaches down to nothing"


def test_after_thousands_of_failures_the_wait_is_still_the_maximum() -> None:
    breaker, _ = make()
    for _ in range(3000):
        breaker.failed(RetryLater("x"))
    assert breaker.wait_s() == pytest.approx(8.0)


def test_a_success_closes_it_and_the_next_failure_begins_anew() -> None:
    breaker, _ = make()
    for _ in range(5):
        breaker.failed(RetryLater("x"))
    assert breaker.open
    breaker.succeeded()
    assert (breaker.wait_s(), breaker.failing, breaker.open) == (0.0, False, False)
    breaker.failed(RetryLater("x"))
    assert breaker.wait_s() == pytest.approx(0.5)
    assert not breaker.open


def test_it_opens_after_three_failures_after_five_seconds_of_failure_or_when_a_person_is_wanted() -> None:
    in_a_row, _ = make()
    opened = []
    for _ in range(3):
        in_a_row.failed(RetryLater("x"))
        opened.append(in_a_row.open)
    assert opened == [False, False, True]
    slow, clock = make()
    slow.failed(RetryLater("a timeout"))
    clock.now += 10
    slow.failed(RetryLater("a timeout"))
    assert slow.open
    advised, _ = make()
    advised.failed(RetryLater("HTTP 401", advice="set a token"))
    assert advised.open


def test_what_the_server_asks_for_is_the_floor_of_the_wait_and_a_fleet_does_not_come_back_as_one() -> None:
    drawn = []
    for _ in range(50):
        breaker = Breaker(initial_s=0.5, max_s=8.0, clock=Clock())
        breaker.failed(RetryLater("x", wait_s=7.0))
        drawn.append(breaker.wait_s())
    assert min(drawn) >= 7.0
    assert max(drawn) <= 7.06
    assert len(set(drawn)) > 40


def test_while_somebody_waits_the_waits_stay_short() -> None:
    breaker, _ = make()
    for _ in range(20):
        breaker.failed(RetryLater("x"), urgent=True)
        assert breaker.wait_s() == pytest.approx(0.5)


def test_hurry_ends_our_own_wait_but_not_the_server_s() -> None:
    breaker, _ = make()
    breaker.failed(RetryLater("x"))
    breaker.hurry()
    assert breaker.wait_s() == 0.0
    breaker.failed(RetryLater("x", wait_s=7.0))
    breaker.hurry()
    assert 7.0 <= breaker.wait_s() <= 7.2
    assert breaker.wait_s(ending=True) == 0.0, "there is no later"


def test_the_wait_passes_with_time() -> None:
    breaker, clock = make()
    breaker.failed(RetryLater("x"))
    clock.now += 0.3
    assert breaker.wait_s() == pytest.approx(0.2)
    clock.now += 10
    assert breaker.wait_s() == 0.0


def test_the_program_s_own_random_numbers_are_left_alone() -> None:
    random.seed(42)
    expected = random.Random(42).random()
    breaker = Breaker(initial_s=0.5, max_s=8.0)
    breaker.failed(RetryLater("x"))
    assert random.random() == expected
