"""A run as a file, and lists page by page: everything once, whoever writes meanwhile."""

from __future__ import annotations

import csv
import io
import json
import uuid
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.support import LiveServer

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1")


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


def stage(run: str, number: int, **fields: Any) -> dict[str, Any]:
    return {"run_id": run, "stage_type": "ab"[number % 2], "stage_id": f"s{number}", **fields}


def export(server: LiveServer, run: str, **query: str) -> requests.Response:
    return requests.get(f"{server.url}/api/stage/export/{quote(run, safe='')}", params=query, timeout=30)


def pages(server: LiveServer, path: str, what: str, **query: Any) -> list[Any]:
    """Return all entries of a list, page by page."""
    found: list[Any] = []
    cursor: dict[str, Any] = {}
    while True:
        page = server.get(path, **query, **cursor)
        found += page[what]
        assert page["returned"] == len(page[what])
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}


def test_an_exported_run_can_be_posted_as_it_is_and_is_the_same_run(server: LiveServer, run: str) -> None:
    full = {
        "attributes": {"질문": "보험\n금액", "n": [1, 2.5, None]},
        "input_ref": {"store": "s3", "id": "k"},
        "started_at": "2026-01-07T10:00:00+09:00",
        "trace_id": "t",
    }
    server.post({"events": [stage(run, number, **full) for number in range(2500)]})
    answer = export(server, run)
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    before = server.get(f"events/{run}", limit=10_000)["events"]
    assert [json.loads(line) for line in answer.text.splitlines()] == before
    requests.delete(f"{server.url}/api/stage/runs/{run}", timeout=10).raise_for_status()
    again = server.post(answer.content, headers={"Content-Type": "application/x-ndjson"})
    assert again.json()["stored"] == 2500
    assert server.get(f"events/{run}", limit=10_000)["events"] == before


def test_a_table_shows_korean_in_excel_and_holds_no_formula(server: LiveServer, run: str) -> None:
    names = [*FORMULAS, 'quote " comma , line \n', "보험"]
    events = [stage(run, number, stage_name=name, attributes={"=": 1}) for number, name in enumerate(names)]
    assert server.post({"events": events}).status_code == 200
    answer = export(server, run, format="csv")
    assert (answer.headers["Content-Type"], answer.content[:3]) == ("text/csv; charset=utf-8", b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(answer.content.decode("utf-8-sig"), newline="")))
    assert [row["stage_name"] for row in rows] == [*(f"'{formula}" for formula in FORMULAS), *names[6:]]
    assert json.loads(rows[0]["attributes"]) == {"=": 1}


def test_an_export_is_filtered_as_a_list_is_and_named_after_its_run(server: LiveServer) -> None:
    run = f'실행 "{uuid.uuid4()}"/a;b'
    server.post({"events": [stage(run, number, status="error" if number < 2 else "success") for number in range(6)]})
    assert len(export(server, run, stage_type="A").text.splitlines()) == 3
    assert len(export(server, run, stage_type="a", status="error").text.splitlines()) == 1
    assert export(server, run, stage_type="none").text == ""
    name = export(server, run).headers["Content-Disposition"].partition("filename*=UTF-8''")[2]
    assert name == quote(f"{run}.jsonl", safe="")
    assert export(server, "nobody").status_code == 404
    assert export(server, run, format="xml").status_code == 422


@pytest.mark.parametrize("limit", [1, 7, 10, 11])
def test_pages_of_a_run_hold_every_event_once_whatever_their_size(server: LiveServer, run: str, limit: int) -> None:
    server.post({"events": [stage(run, number) for number in range(10)]})
    found = pages(server, f"events/{run}", "events", limit=limit)
    assert [event["stage_id"] for event in found] == [f"s{number}" for number in range(10)]
    found = pages(server, f"events/{run}", "events", limit=limit, stage_type="a")
    assert [event["stage_id"] for event in found] == [f"s{number}" for number in range(0, 10, 2)]


def test_what_is_stored_between_two_pages_is_on_a_later_one(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, number) for number in range(4)]})
    first = server.get(f"events/{run}", limit=2)
    assert (first["total"], [event["stage_id"] for event in first["events"]]) == (4, ["s0", "s1"])
    server.post({"events": [stage(run, number, status="error") for number in (0, 3, 4)]})
    rest = server.get(f"events/{run}", limit=10, cursor=first["next_cursor"])
    assert (rest["total"], rest["next_cursor"]) == (None, None)
    assert [(event["stage_id"], event["status"]) for event in rest["events"]] == [
        ("s2", "success"),
        ("s3", "error"),
        ("s4", "error"),
    ]


def test_traces_come_newest_first_page_by_page_with_their_stages(server: LiveServer, run: str) -> None:
    events = [stage(run, number, trace_id=f"t{number % 5}", duration_ms=number) for number in range(15)]
    events[3]["status"] = "error"
    server.post({"events": [*events, stage(run, 99)]})
    found = pages(server, f"traces/{run}", "traces", limit=2)
    assert [trace["trace_id"] for trace in found] == ["t4", "t3", "t2", "t1", "t0"]
    assert {trace["stage_count"] for trace in found} == {3}
    failed = pages(server, f"traces/{run}", "traces", status="error")
    assert [(trace["trace_id"], trace["status"], trace["error_count"]) for trace in failed] == [("t3", "error", 1)]


def test_runs_come_newest_first_page_by_page(server: LiveServer, run: str) -> None:
    for number in range(5):
        server.post(stage(f"{run}-{number}", 0, started_at="2026-01-07T10:00:00Z"))
    server.post(stage(f"{run}-1", 1, status="error", finished_at="2026-01-07T10:00:05Z"))
    mine = [found for found in pages(server, "runs", "runs", limit=3) if found["run_id"].startswith(run)]
    assert [found["run_id"].rpartition("-")[2] for found in mine] == ["1", "4", "3", "2", "0"]
    assert {key: mine[0][key] for key in ("total_events", "error_count", "first_event_at", "last_event_at")} == {
        "total_events": 2,
        "error_count": 1,
        "first_event_at": "2026-01-07T10:00:00+00:00",
        "last_event_at": "2026-01-07T10:00:05+00:00",
    }


def test_since_is_an_instant_whatever_its_offset(server: LiveServer, run: str) -> None:
    times = ["2026-01-07T10:00:00+09:00", "2026-01-07T01:00:01Z", "2026-01-06T23:00:02-02:00"]
    server.post({"events": [stage(run, number, started_at=time) for number, time in enumerate(times)]})
    server.post(stage(run, 3))
    for since, found in (
        ("2026-01-07T01:00:01Z", ["s1", "s2"]),
        ("2026-01-07T10:00:01+09:00", ["s1", "s2"]),
        ("2026-01-07T01:00:01", ["s1", "s2"]),
        ("0001-01-01T00:00:00+14:00", ["s0", "s1", "s2"]),
        ("9999-12-31T23:59:59-14:00", []),
    ):
        assert [event["stage_id"] for event in server.get(f"events/{run}", since=since)["events"]] == found, since


@pytest.mark.parametrize(
    ("path", "query", "field"),
    [
        ("events", "cursor=-1", "cursor"),
        ("events", f"cursor={2**63}", "cursor"),
        ("events", "cursor=abc", "cursor"),
        ("events", "since=yesterday", "since"),
        ("events", "since=", "since"),
        ("events", "trace_id=%00", "trace_id"),
        ("events", "limit=1e3", "limit"),
        ("traces", "limit=201", "limit"),
        ("metrics", "stored=perhaps", "stored"),
        ("debug", "format=pdf", "format"),
        ("runs", "limit=0", "limit"),
    ],
)
def test_a_question_that_cannot_be_is_refused_with_its_field(
    server: LiveServer, run: str, path: str, query: str, field: str
) -> None:
    server.post(stage(run, 0))
    place = path if path == "runs" else f"{path}/{run}"
    answer = requests.get(f"{server.url}/api/stage/{place}?{query}", timeout=10)
    assert answer.status_code == 422
    assert answer.json()["details"].startswith(field)


def test_beyond_the_last_page_there_is_an_empty_one(server: LiveServer, run: str) -> None:
    server.post(stage(run, 0, trace_id="t"))
    page = server.get(f"events/{run}", cursor=2**63 - 1)
    assert (page["events"], page["next_cursor"]) == ([], None)
    assert server.get(f"traces/{run}", cursor=0)["traces"] == []


def test_a_deleted_run_is_gone_with_its_metrics_and_may_come_again(server: LiveServer, run: str) -> None:
    server.post({"events": [stage(run, number, duration_ms=1) for number in range(12)]})
    address = f"{server.url}/api/stage"
    assert requests.post(f"{address}/metrics/{run}", timeout=10).json() == {"run_id": run, "stored": 12}
    assert server.get(f"metrics/{run}", stored=True)["total"] == 12
    assert requests.delete(f"{address}/runs/{run}", timeout=10).json() == {"run_id": run, "deleted": 12}
    assert requests.delete(f"{address}/runs/{run}", timeout=10).status_code == 404
    assert run not in {found["run_id"] for found in server.get("runs", limit=1000)["runs"]}
    server.post(stage(run, 0))
    assert server.get(f"metrics/{run}", stored=True)["total"] == 0
