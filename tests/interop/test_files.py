"""One SQLite file, and one JSONL file, in our hands and in EvalVault's: each reads what the other wrote."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs
import pytest

from evalvault_sdk import StageEvent, StageEventBuilder, StageTracer
from tests.interop.real import SQLiteStorageAdapter, TheirEvent, evalvault, tables
from tests.support import DATA, LiveServer, free_port, live_server

FILES = sorted(DATA.glob("*.jsonl"))
RUN = "보험-상담-2026"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_a_run(tracer: StageTracer) -> None:
    """Five questions: one fails, all are retrieved for and reranked, and none has a system prompt."""
    for number in range(5):
        with tracer.trace(test_case_id=f"tc-{number}"), tracer.stage("request", attributes={"number": number}):
            tracer.record_stage("input", attributes={"query": f"보험금은 언제 지급되나요? {number}"}, duration_ms=1.5)
            with tracer.stage("retrieval", stage_name="하이브리드 검색") as stage:
                stage.set(doc_ids=["약관-1", "약관-7"], scores=[0.2, 0.05 * number])
                stage.set(relevant_doc_ids=["약관-1"], top_k=2)
            counts = {"input_count": 8, "output_count": number}
            tracer.record_stage("rerank", attributes=counts, duration_ms=900 + number)
            try:
                with tracer.stage("output", attempt=number + 1) as stage:
                    stage.set(tokens_in=900, tokens_out=210, citations=["약관-1"])
                    if number == 4:
                        raise TimeoutError("모델이 응답하지 않음")
            except TimeoutError:
                pass


@attrs.frozen
class Recorded:
    """A run that our client recorded into our server, which still has the file open."""

    server: LiveServer
    events: list[dict[str, Any]]

    def say(self, command: str) -> str:
        """Return what `evalvault stage ...` says of the run."""
        return evalvault("stage", command, RUN, "--db", self.server.db, cwd=self.server.db.parent)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with live_server(tmp_path_factory.mktemp("ours") / "events.db") as server:
        with StageTracer(RUN, server.url, spool_dir=str(server.db.parent)) as tracer:
            record_a_run(tracer)
            assert tracer.shutdown(10).complete
        yield Recorded(server, server.get(f"events/{RUN}")["events"])


def test_evalvault_lists_every_event_that_our_server_holds(recorded: Recorded) -> None:
    (rows,) = tables(recorded.say("list"))
    assert len(recorded.events) == 25
    assert rows == [
        {
            "Stage ID": f"{event['stage_id'][:12]}...",
            "Type": event["stage_type"],
            "Status": event["status"],
            "Duration(ms)": f"{event['duration_ms']:.1f}",
            "Started At": event["started_at"],
            "Name": event["stage_name"] or "-",
        }
        for event in recorded.events
    ]
    assert {row["Status"] for row in rows} == {"success", "error"}


def test_evalvault_sums_up_a_run_as_our_server_does(recorded: Recorded) -> None:
    output = recorded.say("summary")
    summary = recorded.server.get(f"summary/{RUN}")
    assert tables(output)[0] == [
        {"Stage Type": kind, "Count": str(count), "Avg Duration(ms)": f"{mean_ms:.1f}"}
        for kind, count in sorted(summary["stage_type_counts"].items())
        for mean_ms in [summary["stage_type_avg_durations"][kind]]
    ]
    assert summary["stage_type_counts"] == {"input": 5, "retrieval": 5, "rerank": 5, "output": 5, "request": 5}
    assert "Missing required stages: system_prompt\n" in output
    assert summary["missing_required_stage_types"] == ["system_prompt"]


def test_evalvault_reports_our_metrics_and_what_it_stores_changes_no_answer_of_ours(recorded: Recorded) -> None:
    before = recorded.server.get(f"metrics/{RUN}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for metric in before["metrics"]:
        by_name.setdefault(metric["metric_name"], []).append(metric)
    assert len(by_name.pop("request.number")) == 5, "of a type that EvalVault has no metrics for"

    stages, metrics, advice = tables(recorded.say("report"))
    assert len(stages) == 5
    assert metrics == [expected_row(name, by_name[name]) for name in sorted(by_name)]
    assert {"retrieval.recall_at_k", "rerank.keep_rate", "output.token_ratio", "rerank.latency_ms"} <= set(by_name)
    ours = [text.split()[1].rstrip(":") for text in recorded.server.get(f"debug/{RUN}")["recommendations"]]
    assert {row["Component"] for row in advice} == set(ours) == {"retriever", "reranker"}

    assert recorded.server.get(f"metrics/{RUN}") == before


def expected_row(name: str, metrics: list[dict[str, Any]]) -> dict[str, str]:
    scores = [metric["score"] for metric in metrics]
    judged = [metric["passed"] for metric in metrics if metric["passed"] is not None]
    return {
        "Metric": name,
        "Count": str(len(scores)),
        "Avg": f"{fmean(scores):.4f}",
        "Min": f"{min(scores):.4f}",
        "Max": f"{max(scores):.4f}",
        "Pass Rate": f"{fmean(judged):.2%}" if judged else "-",
    }


# -- what EvalVault wrote ----------------------------------------------------------------------------


def odd_events() -> list[StageEvent]:
    """Events of every kind that EvalVault takes, beyond those of its own files."""
    run_id = str(uuid.uuid4())
    return [
        StageEvent(run_id=run_id, stage_type="bare"),
        StageEvent(run_id=run_id, stage_type="retrieval", started_at="2026-01-07T10:00:00+09:00"),  # type: ignore[arg-type]
        StageEventBuilder("output", run_id=run_id)
        .between("2026-01-07T10:00:00.000001+09:00", "2026-01-07T01:00:02Z")
        .answer("면책 기간이 지나면 지급됩니다 🙂\n\t\"끝\"", citations=["약관-1"], tokens_in=9, tokens_out=2)
        .error("느림", kind="TimeoutError")
        .attempt(3)
        .parent("한글-부모")
        .trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
        .input_ref("s3", "입력/1.json")
        .output_ref("minio", "out/1", "parquet")
        .metadata(test_case_id="tc-1", nested={"목록": [1, 2.5, None, True, {"깊이": []}]})
        .build(),
    ]  # fmt: skip


def by_command(db: Path, events: list[dict[str, Any]]) -> None:
    path = db.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events), encoding="utf-8")
    assert f"Stored {len(events)} stage event(s)." in evalvault("stage", "ingest", path, "--db", db, cwd=db.parent)


def by_adapter(db: Path, events: list[dict[str, Any]]) -> None:
    assert SQLiteStorageAdapter(db).save_stage_events([TheirEvent.from_dict(event) for event in events]) == len(events)


#: Every way in which EvalVault writes events to a database.
WAYS_TO_WRITE: list[Callable[[Path, list[dict[str, Any]]], None]] = [by_command, by_adapter]


@pytest.mark.parametrize("write", WAYS_TO_WRITE, ids=lambda way: way.__name__)
def test_our_server_serves_a_file_that_evalvault_wrote_event_by_event(
    write: Callable[[Path, list[dict[str, Any]]], None], tmp_path: Path
) -> None:
    db = tmp_path / "theirs.db"
    runs = [*map(lines_of, FILES), [event.to_dict() for event in odd_events()]]
    write(db, [event for events in runs for event in events])
    with live_server(db) as server:
        for events in runs:
            run_id = events[0]["run_id"]
            page = server.get(f"events/{run_id}")
            assert page["total"] == page["returned"] == len(events)
            assert [StageEvent.from_dict(event) for event in page["events"]] == [
                StageEvent.from_dict(event) for event in events
            ]
            assert server.get(f"summary/{run_id}")["total_events"] == len(events)
            assert server.get(f"debug/{run_id}")["stage_metrics"]


def test_our_server_and_evalvault_write_one_file_at_once_and_lose_nothing(tmp_path: Path) -> None:
    with live_server(tmp_path / "shared.db") as server:
        failures: list[BaseException] = []

        def theirs() -> None:
            try:
                adapter = SQLiteStorageAdapter(server.db)  # which runs its whole schema on our open file
                for number in range(50):
                    adapter.save_stage_events(
                        [TheirEvent(run_id="shared", stage_type="theirs", stage_id=f"t{number}-{i}") for i in range(20)]
                    )
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=theirs)
        thread.start()
        for number in range(50):
            events = [{"run_id": "shared", "stage_type": "ours", "stage_id": f"o{number}-{i}"} for i in range(20)]
            assert server.post({"events": events}).status_code == 200
        thread.join()
        assert failures == []
        assert server.get("summary/shared")["stage_type_counts"] == {"ours": 1000, "theirs": 1000}
        assert len(SQLiteStorageAdapter(server.db).list_stage_events("shared")) == 2000


def test_an_event_sent_again_through_the_other_side_is_stored_once(tmp_path: Path) -> None:
    with live_server(tmp_path / "again.db") as server:
        adapter = SQLiteStorageAdapter(server.db)
        for stage_id in ("s1", "s2"):
            assert server.post({"run_id": "again", "stage_type": "input", "stage_id": stage_id}).ok
        adapter.save_stage_events([TheirEvent(run_id="again", stage_type="input", stage_id="s1", attempt=2)])
        assert server.post({"run_id": "again", "stage_type": "input", "stage_id": "s2", "attempt": 3}).ok
        for events in (
            server.get("events/again")["events"],
            [event.to_dict() for event in adapter.list_stage_events("again")],
        ):
            assert {event["stage_id"]: event["attempt"] for event in events} == {"s1": 2, "s2": 3}


# -- without a server of ours ------------------------------------------------------------------------


def test_what_was_spooled_in_an_outage_goes_in_through_evalvaults_own_ingest(tmp_path: Path) -> None:
    run_id = f"outage-{uuid.uuid4()}"
    nobody = f"http://127.0.0.1:{free_port()}"
    tracer = StageTracer(run_id, nobody, shutdown_timeout_s=0.5)
    with tracer:
        record_a_run(tracer)
    assert tracer.stats().spooled == 25
    assert_ingested_whole(run_id, sorted(Path(os.environ["EVALVAULT_SPOOL_DIR"]).glob("*/*-*-*.jsonl")), tmp_path)


def test_a_file_to_be_carried_by_hand_goes_in_through_evalvaults_own_ingest(tmp_path: Path) -> None:
    run_id = f"carried-{uuid.uuid4()}"
    path = tmp_path / "to carry.jsonl"
    with StageTracer(run_id, file=str(path)) as tracer:
        record_a_run(tracer)
        assert tracer.shutdown(10).complete
    assert_ingested_whole(run_id, [path], tmp_path)


def assert_ingested_whole(run_id: str, paths: list[Path], folder: Path) -> None:
    db = folder / "carried.db"
    for path in paths:
        output = evalvault("stage", "ingest", path, "--db", db, cwd=folder)
        assert f"Stored {len(lines_of(path))} stage event(s)." in output
        assert f"Run {run_id} | Events: {len(lines_of(path))}" in output
    recorded = [event for path in paths for event in lines_of(path)]
    assert len(recorded) == 25
    stored = SQLiteStorageAdapter(db).list_stage_events(run_id)
    assert [StageEvent.from_dict(event.to_dict()) for event in stored] == [StageEvent.from_dict(e) for e in recorded]


def test_a_client_writes_straight_into_evalvaults_own_file(tmp_path: Path) -> None:
    adapter = SQLiteStorageAdapter(tmp_path / "evalvault.db")
    adapter.save_stage_events([TheirEvent(run_id="own", stage_type="theirs", stage_id="t")])
    with StageTracer("own", db_path=str(adapter.db_path)) as tracer:
        record_a_run(tracer)
        assert tracer.shutdown(10).complete
    stored = adapter.list_stage_events("own")
    assert len(stored) == 26
    assert [event.stage_type for event in stored][:4] == ["theirs", "input", "retrieval", "rerank"]
