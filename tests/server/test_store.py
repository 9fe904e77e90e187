"""One suite over every store: what the server relies on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import attrs
import pytest

from evalvault_sdk import StageEvent, StagePayloadRef
from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.store import EventFilter, MemoryStore, Store, StoredEvent, open_store
from tests.server.stores import NOON, event, now

KINDS = ("memory", "sqlite", "postgres")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store
    if request.param == "memory":
        opened = MemoryStore()
    elif request.param == "sqlite":
        opened = open_store(str(tmp_path / "events.db"))
    else:
        opened = open_store(request.getfixturevalue("postgres").new_database())
    yield opened
    opened.close()


def events_of(store: Store, run_id: str = "r", **which: object) -> list[StageEvent]:
    return [stored.event for stored in now(store).events(run_id, EventFilter(**which))]  # type: ignore[arg-type]


def ids_of(stored: list[StoredEvent]) -> list[str]:
    return [entry.event.stage_id for entry in stored]


def same(found: StageEvent, sent: StageEvent) -> bool:
    """Equal, times as instants: PostgreSQL does not keep an offset."""
    return found == sent and (found.started_at, found.finished_at) == (sent.started_at, sent.finished_at)


def test_what_is_stored_comes_back_field_by_field(store: Store) -> None:
    full = event(
        stage_name="이름",
        parent_stage_id="p",
        status="error",
        attempt=3,
        started_at=datetime(2026, 1, 7, 9, 0, 0, 1, tzinfo=timezone(timedelta(hours=9))),
        finished_at=NOON,
        duration_ms=0.1 + 0.2,
        input_ref=StagePayloadRef("s3", "k"),
        output_ref=StagePayloadRef("s3", "k2", "text"),
        attributes={"query": "보험 보장금액은?", "n": [1, 2.5, None, {"x": True}]},
        metadata={"m": "ü"},
        trace_id="t",
        span_id="sp",
    )
    minimal = event(1)
    store.save([full, minimal])
    assert events_of(store) == [full, minimal]


def test_an_event_is_stored_the_same_prepared_or_not(store: Store) -> None:
    seoul = timezone(timedelta(hours=9))
    events = [
        event(n, trace_id="t", started_at=NOON.astimezone(seoul), finished_at=NOON, attributes={"한": [n]})
        for n in range(2)
    ]
    prepared = store.prepared(events[0])
    assert [prepared.run_id, prepared.stage_id, prepared.trace_id] == ["r", "s0", "t"]
    assert store.save([prepared, events[1]]) == {}
    assert [stored.event for stored in now(store).events("r")] == events


def test_storing_again_replaces_and_keeps_the_place(store: Store) -> None:
    store.save([event(1), event(2)])
    store.save([event(1, attributes={"new": 1})])
    assert [(e.stage_id, e.attributes) for e in events_of(store)] == [("s1", {"new": 1}), ("s2", {})]


def test_the_same_stage_id_in_two_runs_is_two_events(store: Store) -> None:
    store.save([event(1), event(1, run_id="other")])
    assert (now(store).count("r"), now(store).count("other")) == (1, 1)


def test_the_last_of_equal_ids_in_one_batch_wins(store: Store) -> None:
    store.save([event(1, status="first"), event(1, status="second")])
    assert [e.status for e in events_of(store)] == ["second"]


def test_events_are_found_by_type_and_trace_and_limited(store: Store) -> None:
    store.save([event(n, stage_type="ab"[n % 2], trace_id=f"t{n % 3}") for n in range(12)])
    assert [e.stage_id for e in events_of(store, stage_type="a")] == ["s0", "s2", "s4", "s6", "s8", "s10"]
    assert [e.stage_id for e in events_of(store, stage_type="a", trace_id="t0")] == ["s0", "s6"]
    assert ids_of(now(store).events("r", limit=2)) == ["s0", "s1"]
    assert now(store).count("r") == 12
    assert now(store).count("r", EventFilter(stage_type="b", trace_id="t1")) == 2
    assert list(now(store).events("nobody")) == []


def test_totals_are_those_worked_out_by_hand(store: Store) -> None:
    durations = [float(ms) for ms in range(1, 101)]
    store.save([event(n, stage_type="timed", duration_ms=ms) for n, ms in enumerate(reversed(durations))])
    store.save([event(1000 + n, stage_type="untimed", status="error" if n else "success") for n in range(3)])
    timed, untimed = now(store).stage_type_totals("r")
    assert (timed.stage_type, timed.events, timed.errors, timed.mean_ms) == ("timed", 100, 0, 50.5)
    assert (timed.p50_ms, timed.p95_ms, timed.p99_ms) == (50, 95, 99)
    assert (untimed.stage_type, untimed.events, untimed.errors, untimed.mean_ms, untimed.p95_ms) == (
        "untimed",
        3,
        2,
        None,
        None,
    )
    assert now(store).stage_type_totals("nobody") == []
    for whole, short in zip(
        now(store).stage_type_totals("r"), now(store).stage_type_totals("r", percentiles=False), strict=True
    ):
        assert short == attrs.evolve(whole, p50_ms=None, p95_ms=None, p99_ms=None)


def test_metrics_are_computed_from_the_same_as_the_whole_event_has(store: Store) -> None:
    store.save(
        [
            event(
                1, stage_type="retrieval", duration_ms=5, attributes={"doc_ids": ["a"]}, metadata={"test_case_id": "t"}
            ),
            event(2, started_at=NOON, finished_at=NOON + timedelta(seconds=1), status="error"),
            event(3, attributes={"한": [1, {"b": None}]}),
        ]
    )
    names = ("run_id", "stage_id", "stage_type", "duration_ms", "attributes", "metadata")
    whole = [[getattr(stored.event, name) for name in names] for stored in now(store).events("r")]
    assert [[getattr(stage, name) for name in names] for stage in now(store).measured("r")] == whole
    assert [stage.stage_id for stage in now(store).measured("r", stage_id="s2")] == ["s2"]


def test_a_percentile_of_one_is_that_one(store: Store) -> None:
    store.save([event(duration_ms=7)])
    (only,) = now(store).stage_type_totals("r")
    assert (only.p50_ms, only.p95_ms, only.p99_ms) == (7, 7, 7)


def test_the_run_spans_first_start_to_last_finish_whatever_the_offsets(store: Store) -> None:
    seoul = timezone(timedelta(hours=9))
    store.save(
        [
            event(1, trace_id="a", started_at=NOON.astimezone(seoul), finished_at=NOON + timedelta(seconds=1)),
            event(2, trace_id="a", started_at=NOON - timedelta(seconds=1), status="error"),
            event(3, trace_id="b", finished_at=(NOON + timedelta(seconds=2)).astimezone(seoul), duration_ms=7000),
            event(4, duration_ms=9000),
        ]
    )
    totals = now(store).run_totals("r")
    assert (totals.events, totals.errors, totals.traces) == (4, 1, 2)
    assert totals.slowest_trace_id == "b"
    assert totals.started_at == NOON - timedelta(seconds=1)
    assert totals.finished_at == NOON + timedelta(seconds=2)
    nobody = now(store).run_totals("nobody")
    assert (nobody.events, nobody.errors, nobody.traces, nobody.started_at) == (0, 0, 0, None)
    assert nobody.slowest_trace_id is None


def test_threads_may_save_and_read_at_once(store: Store) -> None:
    faults: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                store.save([event(number * 1000 + step * 10 + n) for n in range(10)])
                list(now(store).events("r", limit=5))
                now(store).stage_type_totals("r")
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert now(store).count("r") == 4 * 20 * 10


def test_a_snapshot_does_not_change_while_it_is_read(store: Store) -> None:
    store.save([event(1)])
    with store.snapshot() as view:
        assert view.count("r") == 1
        store.save([event(2)])
        assert view.count("r") == 1
        assert len(list(view.events("r"))) == 1
    assert now(store).count("r") == 2


def test_one_stage_is_found_by_its_id(store: Store) -> None:
    store.save([event(1), event(2)])
    assert [e.stage_id for e in events_of(store, stage_id="s2")] == ["s2"]


def test_pages_go_on_from_a_place(store: Store) -> None:
    store.save([event(n, status="error" if n % 3 == 0 else "success") for n in range(10)])
    first = now(store).events("r", limit=4)
    store.save([event(1, attributes={"again": True}), event(10)])
    second = now(store).events("r", after=first[-1].place, limit=4)
    third = now(store).events("r", after=second[-1].place, limit=4)
    assert ids_of(first + second + third) == [f"s{n}" for n in range(11)]
    assert [e.stage_id for e in events_of(store, status="error")] == ["s0", "s3", "s6", "s9"]


def test_since_compares_instants_whatever_the_offsets(store: Store) -> None:
    seoul = timezone(timedelta(hours=9))
    store.save(
        [
            event(1, started_at=(NOON - timedelta(milliseconds=1)).astimezone(seoul)),
            event(2, started_at=NOON),
            event(3, finished_at=(NOON + timedelta(seconds=1)).astimezone(seoul)),
            event(4),
        ]
    )
    assert [e.stage_id for e in events_of(store, since=NOON.astimezone(seoul))] == ["s2", "s3"]


def test_runs_are_listed_the_newest_first_in_pages_and_by_prefix(store: Store) -> None:
    for number, run_id in enumerate(["prod-a", "dev-b", "prod-c", "prod-d"]):
        store.save(
            [
                event(1, run_id=run_id, started_at=NOON, status="error"),
                event(2, run_id=run_id, started_at=NOON, finished_at=NOON + timedelta(seconds=number)),
            ]
        )
    store.save([event(3, run_id="prod-a", status="error")])
    first = now(store).runs(prefixes=[""], before=None, limit=3)
    assert [entry.run_id for entry in first] == ["prod-a", "prod-d", "prod-c"]
    assert (first[0].events, first[0].errors, first[0].last_event_at) == (3, 2, None)
    assert (first[1].events, first[1].errors) == (2, 1)
    assert (first[1].first_event_at, first[1].last_event_at) == (NOON, NOON + timedelta(seconds=3))
    rest = now(store).runs(prefixes=[""], before=first[-1].last_place, limit=3)
    assert [entry.run_id for entry in rest] == ["dev-b"]
    ours = now(store).runs(prefixes=["prod-", "x"], before=None, limit=10)
    assert [entry.run_id for entry in ours] == ["prod-a", "prod-d", "prod-c"]
    assert now(store).runs(prefixes=["x"], before=None, limit=10) == []


def test_traces_are_listed_the_newest_first_each_once(store: Store) -> None:
    store.save([event(n, trace_id=f"t{n % 4}", status="error" if n % 4 == 1 else "success") for n in range(20)])
    store.save([event(20, trace_id="t0"), event(21), event(22, run_id="other", trace_id="t1")])
    found = now(store).traces("r", status=None, before=None, limit=3)
    assert [trace for _, trace in found] == ["t0", "t3", "t2"]
    rest = now(store).traces("r", status=None, before=found[-1][0], limit=3)
    assert [trace for _, trace in rest] == ["t1"]
    assert [trace for _, trace in now(store).traces("r", status="error", before=None, limit=3)] == ["t1"]


def test_the_tail_yields_what_is_stored_after_a_place_once(store: Store) -> None:
    nothing, start = store.tail(None, run_id=None, limit=10)
    assert nothing == []
    store.save([event(1), event(2, run_id="other"), event(3)])
    store.save([event(1, status="again")])
    page, place = store.tail(start, run_id=None, limit=2)
    assert ids_of(page) == ["s1", "s2"]
    rest, end = store.tail(place, run_id=None, limit=2)
    assert ids_of(rest) == ["s3"]
    assert store.tail(end, run_id=None, limit=2) == ([], end)
    assert ids_of(store.tail(start, run_id="other", limit=5)[0]) == ["s2"]
    store.save([event(4)])
    assert ids_of(store.tail(end, run_id="r", limit=5)[0]) == ["s4"]


def test_a_deleted_run_is_gone_with_its_metrics_and_nothing_else_is(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.sql_store._STEP", 4)
    store.save([event(n) for n in range(10)] + [event(1, run_id="other")])
    store.save_metrics([StageMetric("r", "s1", "x.n", 1.0), StageMetric("other", "s1", "x.n", 2.0)])
    assert store.delete_run("r") == 10
    assert (now(store).count("r"), now(store).count("other")) == (0, 1)
    assert (now(store).metrics("r"), len(now(store).metrics("other"))) == ([], 1)
    assert store.delete_run("r") == 0


def test_a_run_is_trimmed_to_its_newest_events(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.sql_store._STEP", 4)
    store.save([event(n) for n in range(10)])
    store.save_metrics([StageMetric("r", "s1", "x.n", 1.0), StageMetric("r", "s9", "x.n", 1.0)])
    assert store.trim_run("r", 3) == 7
    assert [e.stage_id for e in events_of(store)] == ["s7", "s8", "s9"]
    assert [metric.stage_id for metric in now(store).metrics("r")] == ["s9"]
    assert store.trim_run("r", 3) == 0


def test_a_sweep_deletes_what_is_old_page_by_page(store: Store) -> None:
    old, new = NOON - timedelta(days=1), NOON + timedelta(days=1)
    store.save(
        [
            event(0),  # without a time: goes with the old one behind it
            event(1, finished_at=old),
            event(2, started_at=new),
            event(3, started_at=old, finished_at=new),
            event(4, started_at=old),
            event(5),  # nothing old behind it
        ]
    )
    place: int | None = 0
    deleted = []
    while place is not None:
        place, count = store.sweep(place, older_than=NOON, limit=3)
        deleted.append(count)
    assert sum(deleted) == 3
    assert [e.stage_id for e in events_of(store)] == ["s2", "s3", "s5"]


def test_stored_metrics_replace_their_like(store: Store) -> None:
    first = StageMetric("r", "s1", "retrieval.recall_at_k", 0.5, 0.6, {"k": 3})
    store.save_metrics([first, StageMetric("r", "s2", "x.n", 1e300)])
    store.save_metrics([StageMetric("r", "s1", "retrieval.recall_at_k", 0.75, None, None)])
    assert now(store).metrics("r", stage_id="s1") == [StageMetric("r", "s1", "retrieval.recall_at_k", 0.75)]
    assert now(store).metrics("r", metric_name="x.n") == [StageMetric("r", "s2", "x.n", 1e300)]
    assert len(now(store).metrics("r")) == 2


def test_odd_but_valid_values_come_back_as_they_were(store: Store) -> None:
    odd = event(
        1,
        run_id="실행 1/2:x",
        stage_type="a.b",
        attributes={
            "": "",
            "nul": "a\x00b",
            "huge": 1e300,
            "tiny": 5e-324,
            "whole": 1e22,
            "n": -0.0,
            "i": 2**63,
            "z": {"b": 1, "a": 2},
            "lines": "a\tb\nc\\N\\.",
        },
        started_at=datetime(1, 1, 2, tzinfo=timezone.utc),
        finished_at=datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=timezone.utc),
        duration_ms=1.7e308,
    )
    assert store.save([odd]) == {}
    (found,) = events_of(store, "실행 1/2:x")
    assert found == odd
    assert str(found.attributes) == str(odd.attributes), "types and order too"


def test_a_check_passes_while_the_store_can_be_reached(store: Store) -> None:
    store.check()
