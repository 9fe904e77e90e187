"""Our endpoints inside EvalVault's own API: one process, one database, one token check."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from evalvault_sdk import StageEvent, StageTracer
from tests.interop.api import WAYS
from tests.interop.real import TOKEN, EvaluationRun, EvalVaultApi, SQLiteStorageAdapter
from tests.support import DATA

BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module", params=WAYS)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvalVaultApi]:
    running = EvalVaultApi(tmp_path_factory.mktemp("api") / "evalvault.db", request.param)
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def run_id() -> str:
    return str(uuid.uuid4())


def get(api: EvalVaultApi, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{api.url}{path}", headers=headers or BEARER, timeout=30)


def record(api: EvalVaultApi, run_id: str) -> None:
    with StageTracer(run_id, api.url, token=TOKEN) as tracer:
        with tracer.stage("request") as request:
            request.set(query="보험 보장금액은?")
            tracer.record_stage("retrieval", attributes={"doc_ids": ["약관-1"], "scores": [0.91]}, duration_ms=750)
        assert tracer.shutdown(10).complete, tracer.stats()


def test_evalvaults_own_routes_answer_as_before(api: EvalVaultApi) -> None:
    assert get(api, "/health").json() == {"status": "ok"}
    assert get(api, "/api/v1/runs/").json() == []
    missing = get(api, "/api/v1/runs/nobody/stage-events")
    assert (missing.status_code, missing.json()) == (404, {"detail": "Run not found"})
    paths = get(api, "/openapi.json").json()["paths"]
    assert {"/api/v1/runs/{run_id}/stage-events", "/api/stage/events", "/health"} <= set(paths)


@pytest.mark.parametrize("authorization", ["Bearer wrong", "Basic abc", ""])
def test_evalvaults_token_check_guards_our_endpoints(api: EvalVaultApi, authorization: str) -> None:
    for path in ("events/r", "metrics/r", "summary/r", "debug/r"):
        answer = get(api, f"/api/stage/{path}", Authorization=authorization)
        assert answer.status_code == 401
        assert answer.json() == {"error": "Unauthorized", "details": "Invalid or missing API token"}
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    refused = api.post({"run_id": "refused", "stage_type": "input"}, headers={"Authorization": authorization})
    assert refused.status_code == 401
    assert get(api, "/api/stage/events/refused").status_code == 404, "nothing was stored"
    assert get(api, "/api/v1/runs/", Authorization=authorization).status_code == 401, "as its own"


def test_a_client_with_evalvaults_token_delivers_and_reads_back(api: EvalVaultApi, run_id: str) -> None:
    record(api, run_id)
    summary = get(api, f"/api/stage/summary/{run_id}").json()
    assert summary["stage_type_counts"] == {"retrieval": 1, "request": 1}
    metrics = get(api, f"/api/stage/metrics/{run_id}?metric_name=retrieval.latency_ms").json()["metrics"]
    assert [(metric["score"], metric["passed"]) for metric in metrics] == [(750, False)]
    assert get(api, f"/api/stage/debug/{run_id}?format=markdown").text.startswith(f"# Debug report: {run_id}")
    assert [event.run_id for event in SQLiteStorageAdapter(api.db).list_stage_events(run_id)] == [run_id, run_id]


def test_evalvaults_own_routes_give_our_events_once_the_run_is_one_of_its(api: EvalVaultApi, run_id: str) -> None:
    record(api, run_id)
    assert get(api, f"/api/v1/runs/{run_id}/stage-events").status_code == 404
    run = EvaluationRun(run_id=run_id, dataset_name="보험", model_name="exaone")
    SQLiteStorageAdapter(api.db).save_run(run)

    ours: dict[str, Any] = get(api, f"/api/stage/events/{run_id}").json()
    theirs = get(api, f"/api/v1/runs/{run_id}/stage-events").json()
    assert len(theirs) == 2
    assert [StageEvent.from_dict(event) for event in theirs] == [StageEvent.from_dict(e) for e in ours["events"]]

    names = {metric["metric_name"] for metric in get(api, f"/api/v1/runs/{run_id}/stage-metrics").json()}
    assert names == {metric["metric_name"] for metric in get(api, f"/api/stage/metrics/{run_id}").json()["metrics"]}
    report = get(api, f"/api/v1/runs/{run_id}/debug-report").json()
    assert report["bottlenecks"] == get(api, f"/api/stage/debug/{run_id}").json()["bottlenecks"]


def test_bad_events_are_refused_in_our_form_one_by_one(api: EvalVaultApi, run_id: str) -> None:
    events = [{"run_id": run_id, "stage_type": "input"}, {"run_id": run_id}, {"run_id": run_id, "stage_type": "output"}]
    answer = api.post({"events": events}, headers=BEARER)
    assert answer.status_code == 207
    (refused,) = answer.json()["rejected"]
    assert (refused["index"], refused["details"]) == (1, "stage_type is required")
    assert get(api, f"/api/stage/summary/{run_id}").json()["total_events"] == 2


def test_evalvaults_rate_limit_delays_our_events_and_loses_none(tmp_path: Path, run_id: str) -> None:
    limited = EvalVaultApi(
        tmp_path / "evalvault.db",
        next(iter(WAYS)),
        RATE_LIMIT_ENABLED="true",
        RATE_LIMIT_REQUESTS="2",
        RATE_LIMIT_WINDOW_SECONDS="2",
    )
    try:
        with StageTracer(run_id, limited.url, token=TOKEN, batch_events=10, max_batch_events=10) as tracer:
            for number in range(60):
                tracer.record_stage("input", attributes={"number": number})
            assert tracer.flush(60).complete, tracer.stats()
        assert '" 429 ' in limited.db.with_suffix(".log").read_text(), "the limit was met"
        stored = SQLiteStorageAdapter(limited.db).list_stage_events(run_id)
        assert sorted(event.attributes["number"] for event in stored) == list(range(60))
    finally:
        limited.stop()


def test_evalvaults_files_go_in_whole(api: EvalVaultApi) -> None:
    for path in DATA.glob("*.jsonl"):
        body = b'{"events":[' + b",".join(path.read_bytes().splitlines()) + b"]}"
        assert api.post(body, headers=BEARER).status_code == 200
    assert get(api, "/api/stage/summary/run_20260103_001").json()["missing_required_stage_types"] == []
