"""How often, how much, how long: the rate limit, and what retention deletes."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import requests

from evalvault_sdk.errors import UnsupportedError
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.limiter import RateLimiter
from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.retention import Retention
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store import MemoryStore, SQLiteStore, Store
from tests.server.stores import event, now
from tests.support import live_server, wait_for

TODAY = datetime.now(timezone.utc)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def allowed(limiter: RateLimiter, name: str, tries: int) -> int:
    """Return how many of `tries` requests passed."""
    passed = 0
    for _ in range(tries):
        try:
            limiter.check(name)
        except ApiError:
            continue
        passed += 1
    return passed


def test_ten_seconds_worth_may_come_at_once_and_then_a_steady_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(5, clock)
    assert allowed(limiter, "a", 100) == 50
    clock.now += 1
    assert allowed(limiter, "a", 100) == 5
    clock.now += 3600
    assert allowed(limiter, "a", 100) == 50


def test_one_who_asks_too_often_does_not_wait_longer_for_it() -> None:
    clock = Clock()
    limiter = RateLimiter(1, clock)
    allowed(limiter, "a", 10)
    for _ in range(100):
        clock.now += 0.1
        allowed(limiter, "a", 1)
    assert allowed(limiter, "a", 1) == 0
    clock.now += 1
    assert allowed(limiter, "a", 2) == 1


@pytest.mark.parametrize(("rate", "wait_s"), [(0.01, 100), (0.5, 2), (3, 1), (1000, 1)])
def test_the_answer_says_when_the_next_request_will_pass(rate: float, wait_s: int) -> None:
    clock = Clock()
    limiter = RateLimiter(rate, clock)
    allowed(limiter, "a", 20_000)
    with pytest.raises(ApiError) as refused:
        limiter.check("a")
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, str(wait_s))
    clock.now += wait_s
    limiter.check("a")


def test_names_do_not_share_a_limit_and_are_forgotten_when_there_are_too_many() -> None:
    limiter = RateLimiter(0.1, Clock())
    assert [allowed(limiter, name, 5) for name in "abc"] == [1, 1, 1]
    for number in range(20_000):
        limiter.check(str(number))
    assert len(limiter._buckets) == 10_000


def test_a_rate_limit_is_429_with_the_time_to_wait_and_spares_health(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--rate-limit", "1") as server:
        answers = [requests.get(f"{server.url}/api/stage/runs", timeout=10) for _ in range(20)]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert 8 <= len(refused) <= 10
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        assert refused[0].json() == {"error": "Too many requests", "details": "1 a second are allowed; try again later"}
        assert requests.post(f"{server.url}/v1/traces", json={}, timeout=10).status_code == 429
        for path in ("/health", "/ready"):
            assert requests.get(f"{server.url}{path}", timeout=10).ok


def test_each_token_has_a_rate_of_its_own(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db", "--rate-limit", "0.1", "--token", "one", "--token", "two") as server:

        def ask(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return requests.get(f"{server.url}/api/stage/runs", headers=headers, timeout=10).status_code

        assert [ask("one"), ask("one"), ask("two"), ask("two")] == [200, 429, 200, 429]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else SQLiteStore(tmp_path / "x.db")


def ids(store: Store, run: str) -> list[str]:
    return [stored.event.stage_id for stored in now(store).events(run)]


def test_what_ended_too_long_ago_goes_and_the_rest_stays(store: Store) -> None:
    old, young = TODAY - timedelta(days=8), TODAY - timedelta(days=6)
    seoul = timezone(timedelta(hours=9))
    store.save(
        [
            event(1, started_at=old, finished_at=old),
            event(2, started_at=old, finished_at=young),
            event(3, started_at=old.astimezone(seoul)),
            event(4),
            event(5, finished_at=young.astimezone(seoul)),
            event(6, started_at=old, run_id="other"),
            event(7, run_id="other"),
        ]
    )
    deleted: list[int] = []
    Retention(store, ServerSettings(retain_days=7), on_deleted=deleted.append).sweep()
    assert (ids(store, "r"), ids(store, "other")) == (["s2", "s5"], ["s7"]), "what has no time goes with its neighbours"
    assert sum(deleted) == 4
    store.close()


def test_of_each_run_the_newest_events_stay(store: Store) -> None:
    for run, count in (("large", 25), ("small", 3), ("even", 10)):
        store.save([event(number, run_id=run) for number in range(count)])
    store.save_metrics([StageMetric("large", f"s{number}", "x.y", 1.0, None, None) for number in (0, 24)])
    deleted: list[int] = []
    keeper = Retention(store, ServerSettings(retain_run_events=10), on_deleted=deleted.append)
    keeper.sweep()
    keeper.sweep()
    assert ids(store, "large") == [f"s{number}" for number in range(15, 25)]
    assert (len(ids(store, "small")), len(ids(store, "even")), deleted) == (3, 10, [15])
    assert [metric.stage_id for metric in now(store).metrics("large")] == ["s24"]
    store.close()


def test_every_run_is_trimmed_however_many_there_are(store: Store) -> None:
    for number in range(250):
        store.save([event(place, run_id=f"run-{number}") for place in range(3)])
    Retention(store, ServerSettings(retain_run_events=2)).sweep()
    assert {len(ids(store, f"run-{number}")) for number in range(250)} == {2}
    store.close()


def test_without_a_setting_nothing_is_deleted_and_no_thread_runs(store: Store) -> None:
    store.save([event(1, started_at=TODAY - timedelta(days=36_000))])
    keeper = Retention(store, ServerSettings())
    keeper.start()
    keeper.sweep()
    keeper.close()
    assert keeper._thread is None
    assert ids(store, "r") == ["s1"]
    store.close()


def test_retention_that_a_store_has_no_way_for_is_said_once_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    class Bare(MemoryStore):
        def sweep(self, after: int, *, older_than: datetime, limit: int) -> tuple[int | None, int]:
            raise UnsupportedError("this storage deletes nothing")

    retention = Retention(Bare(), ServerSettings(retain_days=1))
    retention.start()
    wait_for(lambda: "deletes nothing" in caplog.text)
    retention.close()
    assert len(caplog.records) == 1
