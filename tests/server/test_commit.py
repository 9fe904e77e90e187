"""Group commit: many requests in few transactions, each with its own verdict; bounded, fair, and closed in order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import StageEvent
from evalvault_sdk.errors import StoreError
from evalvault_sdk.server import commit, create_app, ingest
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.commit import GroupCommit
from evalvault_sdk.server.store import MemoryStore, SQLiteStore
from tests.server.stores import event, now
from tests.server.test_routes import ask_app, stage
from tests.support import new_threads, wait_for


class Gate(MemoryStore):
    """A store that waits to be let on, and remembers its transactions."""

    def __init__(self, writers: int = 1) -> None:
        super().__init__()
        self.writers = writers
        self.open = threading.Event()
        self.groups: list[list[str]] = []
        self.waiting = 0

    def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
        self.waiting += 1
        assert self.open.wait(20)
        self.groups.append([event.stage_id for event in events])
        return super().save(events)


def occupied(store: Gate) -> GroupCommit:
    """Return a group commit whose first transaction is under way."""
    group = GroupCommit(store)
    group.submit([event(stage_id="first")])
    wait_for(lambda: store.waiting == 1)
    return group


def commit_threads() -> int:
    return sum(thread.name.startswith("evalvault-commit") for thread in threading.enumerate())


def test_what_comes_while_one_commit_waits_is_the_next_one_in_its_order() -> None:
    store = Gate()
    group = occupied(store)
    done = [group.submit([event(stage_id=f"{n}a"), event(stage_id=f"{n}b")]) for n in range(50)]
    store.open.set()
    assert [future.result(10) for future in done] == [{}] * 50
    assert store.groups == [["first"], [f"{n}{x}" for n in range(50) for x in "ab"]]
    group.close()


def test_one_transaction_has_a_bounded_number_of_events_and_none_is_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_GROUP_EVENTS", 10)
    store = Gate()
    group = occupied(store)
    sizes = [4, 4, 4, 25, 1, 9, 1]
    done = [group.submit([event(stage_id=f"{n}-{index}") for index in range(size)]) for n, size in enumerate(sizes)]
    store.open.set()
    for future in done:
        future.result(10)
    assert [len(ids) for ids in store.groups] == [1, 8, 4, 25, 10, 1]
    stored = [stored.event.stage_id for stored in now(store).events("r")]
    assert stored == ["first", *(f"{n}-{index}" for n, size in enumerate(sizes) for index in range(size))]
    group.close()


def test_a_large_sender_does_not_keep_small_ones_from_the_next_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_GROUP_EVENTS", 100)
    store = Gate()
    group = occupied(store)
    for sender in range(5):
        group.submit([event(stage_id=f"large-{sender}-{n}") for n in range(100)])
    small = group.submit([event(stage_id="small")])
    later = group.submit([event(stage_id=f"later-{n}") for n in range(100)])
    store.open.set()
    small.result(10)
    later.result(10)
    assert store.groups[6] == ["small"]
    group.close()


def test_what_may_wait_is_bounded_and_room_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_MAX_WAITING_EVENTS", 10)
    store = Gate()
    group = occupied(store)
    taken = group.submit([event(n) for n in range(9)])
    with pytest.raises(ApiError) as refused:
        group.submit([event(99)])
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "2")
    store.open.set()
    taken.result(10)
    wait_for(lambda: group.waiting_events == 0)
    assert group.submit([event(n) for n in range(50)]).result(10) == {}, "one that is larger than all room goes alone"
    group.close()


@pytest.mark.parametrize("writers", [1, 4])
def test_closing_stores_what_was_accepted_and_refuses_what_comes_later(writers: int) -> None:
    before = commit_threads()
    store = Gate(writers)
    group = occupied(store)
    done = [group.submit([event(n)]) for n in range(200)]
    closing = threading.Thread(target=group.close)
    closing.start()
    wait_for(lambda: group._closed)
    with pytest.raises(ApiError, match="Overloaded"):
        group.submit([event(999)])
    store.open.set()
    closing.join(10)
    assert not closing.is_alive()
    assert [future.result(0) for future in done] == [{}] * 200
    assert now(store).count("r") == 201
    assert commit_threads() == before


def test_closing_what_never_began_is_nothing() -> None:
    before = set(threading.enumerate())
    GroupCommit(MemoryStore()).close()
    assert new_threads(before) == 0


def test_each_request_is_told_of_its_own_refusals_only() -> None:
    class Choosy(Gate):
        def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
            super().save(events)
            return {index: event.stage_id for index, event in enumerate(events) if event.status == "bad"}

    store = Choosy()
    group = occupied(store)
    done: list[tuple[int, Future[Mapping[int, str]]]] = []
    for n in range(30):
        events = [event(stage_id=f"{n}-{i}", status="bad" if i == n % 7 else "good") for i in range(5)]
        done.append((n, group.submit(events)))
    store.open.set()
    for n, future in done:
        assert future.result(10) == ({n % 7: f"{n}-{n % 7}"} if n % 7 < 5 else {})
    assert len(store.groups) == 2
    group.close()


def test_a_store_that_fails_fails_all_of_the_group_and_the_next_one_is_stored() -> None:
    class Failing(Gate):
        def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
            if len(self.groups) == 1:
                self.groups.append([])
                raise StoreError("locked")
            return super().save(events)

    store = Failing()
    group = occupied(store)
    done = [group.submit([event(n)]) for n in range(5)]
    store.open.set()
    for future in done:
        with pytest.raises(StoreError, match="locked"):
            future.result(10)
    assert group.submit([event(1)]).result(10) == {}
    wait_for(lambda: group.waiting_events == 0)
    group.close()


@pytest.mark.parametrize("fault", [ValueError, KeyError, MemoryError, RecursionError, AssertionError, OSError])
def test_a_fault_costs_the_request_that_brings_it_about_and_not_its_neighbours(fault: type[Exception]) -> None:
    class Faulty(Gate):
        def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
            if any(event.stage_id == "s3" for event in events):
                raise fault("of ours")
            return super().save(events)

    store = Faulty()
    group = occupied(store)
    done = [group.submit([event(n)]) for n in range(6)]
    store.open.set()
    for n, future in enumerate(done):
        if n == 3:
            with pytest.raises(fault):
                future.result(10)
        else:
            assert future.result(10) == {}
    assert now(store).count("r") == 6
    group.close()


def test_a_fault_of_the_store_is_a_500_that_says_nothing_of_it() -> None:
    class Faulty(MemoryStore):
        def save(self, events: Any) -> Any:
            raise LookupError("my secret")

    app = create_app(store=Faulty())
    status, answer = asyncio.run(ask_app(app, stage("r")))
    app.state.evalvault.close()
    assert (status, answer["error"]) == (500, "Internal error")
    assert "secret" not in str(answer)


def test_a_sender_that_leaves_does_not_undo_what_it_sent(tmp_path: Path) -> None:
    store = Gate()
    app = create_app(store=store)

    async def leave() -> None:
        asking = asyncio.create_task(ask_app(app, stage("r", 1)))
        while store.waiting == 0:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        store.open.set()
        assert (await ask_app(app, stage("r", 2)))[0] == 200

    asyncio.run(leave())
    app.state.evalvault.close()
    assert [stored.event.stage_id for stored in now(store).events("r")] == ["s1", "s2"]


def test_a_store_that_takes_too_long_is_503_with_a_time_to_come_again_and_stores_it_later() -> None:
    store = Gate()
    app = create_app(store=store, store_timeout_s=0.2)
    started = time.monotonic()
    status, answer = asyncio.run(ask_app(app, stage("r", 1)))
    assert (status, answer["error"]) == (503, "Database slow")
    assert time.monotonic() - started < 2
    store.open.set()
    app.state.evalvault.close()
    assert now(store).count("r") == 1


@pytest.mark.parametrize("writers", [1, 4])
def test_a_large_body_is_stored_in_parts_and_answered_as_one(monkeypatch: pytest.MonkeyPatch, writers: int) -> None:
    monkeypatch.setattr(ingest, "_PART", 10)
    store = Gate(writers)
    store.open.set()
    app = create_app(store=store)
    events = [stage("r", n) for n in range(35)]
    events[3] = events[17] = {"run_id": "r"}
    events[34] = stage("r", 0, status="last")
    status, answer = asyncio.run(ask_app(app, {"events": events}))
    app.state.evalvault.close()
    assert (status, answer["stored"]) == (207, 33)
    good = [n for n in range(34) if n not in (3, 17)]
    assert answer["stage_ids"] == [*(f"s{n}" for n in good), "s0"]
    assert [entry["index"] for entry in answer["rejected"]] == [3, 17]
    stored = [stored.event for stored in now(store).events("r")]
    assert [event.stage_id for event in stored] == [f"s{n}" for n in good]
    assert stored[0].status == "last", "a part overtook the one before it"


def test_a_body_of_which_a_part_cannot_be_stored_is_to_come_again_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Gate):
        def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
            if events[0].stage_id == "s10" and not self.groups[1:]:
                self.groups.append([])
                raise StoreError("locked")
            return super().save(events)

    monkeypatch.setattr(ingest, "_PART", 10)
    monkeypatch.setattr(commit, "_GROUP_EVENTS", 10)
    store = Failing()
    store.open.set()
    app = create_app(store=store)
    body = {"events": [stage("r", n) for n in range(35)]}
    assert asyncio.run(ask_app(app, body))[0] == 503
    assert asyncio.run(ask_app(app, body))[0] == 200
    app.state.evalvault.close()
    assert now(store).count("r") == 35


def test_a_body_that_was_begun_finds_room_to_its_end_and_the_next_one_is_put_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingest, "_PART", 10)
    monkeypatch.setattr(commit, "_MAX_WAITING_EVENTS", 25)
    store = Gate()
    app = create_app(store=store)
    group = app.state.evalvault.commit

    async def send() -> None:
        sending = asyncio.create_task(ask_app(app, {"events": [stage("r", n) for n in range(35)]}))
        while group.waiting_events < 35:
            await asyncio.sleep(0.01)
        status, answer = await ask_app(app, stage("r", 99))
        assert (status, answer["error"]) == (503, "Overloaded")
        store.open.set()
        assert (await sending)[0] == 200

    asyncio.run(send())
    app.state.evalvault.close()
    assert now(store).count("r") == 35


def test_no_thread_is_left_of_many_apps(tmp_path: Path) -> None:
    before = commit_threads()
    for number in range(5):
        app = create_app(str(tmp_path / f"{number}.db"))

        async def serve(app: Any = app) -> None:
            async with app.router.lifespan_context(app):
                assert (await ask_app(app, stage("r")))[0] == 200

        asyncio.run(serve())
    assert commit_threads() == before


def test_the_event_loop_goes_on_under_load(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "x.db")
    app = create_app(store=store)
    late_ms: list[float] = []

    async def watch(ended: asyncio.Event) -> None:
        while not ended.is_set():
            started = time.perf_counter()
            await asyncio.sleep(0.005)
            late_ms.append((time.perf_counter() - started) * 1000 - 5)

    async def send(sender: int) -> None:
        for step in range(10):
            events = [stage("r", attributes={"n": n}) | {"stage_id": f"{sender}-{step}-{n}"} for n in range(100)]
            assert (await ask_app(app, {"events": events}))[0] == 200

    async def load() -> None:
        ended = asyncio.Event()
        watching = asyncio.create_task(watch(ended))
        await asyncio.gather(*(send(sender) for sender in range(16)))
        ended.set()
        await watching

    asyncio.run(load())
    app.state.evalvault.close()
    assert now(store).count("r") == 16_000
    store.close()
    assert sorted(late_ms)[len(late_ms) // 2] < 50
    assert max(late_ms) < 1000


def test_many_threads_that_submit_and_one_that_closes_lose_nothing_that_was_accepted() -> None:
    store = MemoryStore()
    group = GroupCommit(store)
    accepted: list[tuple[str, Future[Mapping[int, str]]]] = []
    begun = threading.Barrier(9)

    def submit(sender: int) -> None:
        begun.wait()
        for n in range(2000):
            try:
                accepted.append((f"{sender}-{n}", group.submit([event(stage_id=f"{sender}-{n}")])))
            except ApiError:
                return

    with ThreadPoolExecutor(8) as threads:
        for sender in range(8):
            threads.submit(submit, sender)
        begun.wait()
        time.sleep(0.02)
        group.close()
    assert all(future.done() and future.result() == {} for _, future in accepted)
    assert {stored.event.stage_id for stored in now(store).events("r")} == {name for name, _ in accepted}


def test_an_app_over_a_kept_store_can_begin_again() -> None:
    from starlette.testclient import TestClient

    app = create_app(store=MemoryStore())
    for number in range(2):
        with TestClient(app, base_url="http://localhost") as client:
            assert client.post("/api/stage/events", json=stage("r", number)).status_code == 200
