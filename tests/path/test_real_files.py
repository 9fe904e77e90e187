"""Three real files of EvalVault's go in by every way there is, and come back the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import StageEvent
from tests.support import DATA, LiveServer, clean_environment, live_server

FILES = sorted(DATA.glob("*.jsonl"))


def events_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_batch(server: LiveServer, path: Path) -> None:
    assert server.post({"events": events_of(path)}).status_code == 200


def one_by_one(server: LiveServer, path: Path) -> None:
    for event in events_of(path):
        assert server.post(event).status_code == 200


def by_command(server: LiveServer, path: Path) -> None:
    command = [sys.executable, "-m", "evalvault_sdk.cli", "ingest", str(path), "--url", server.url]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), check=True)
    assert f"{len(events_of(path))} events stored, 0 refused" in done.stdout


@pytest.fixture(scope="module", params=[one_batch, one_by_one, by_command], ids=lambda way: way.__name__)
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with live_server(tmp_path_factory.mktemp("files") / "x.db") as server:
        for path in FILES:
            request.param(server, path)
        yield server


def test_there_are_three_files() -> None:
    assert len(FILES) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_field_comes_back_equal(filled: LiveServer, path: Path) -> None:
    sent = events_of(path)
    page = filled.get(f"events/{sent[0]['run_id']}")
    assert page["total"] == page["returned"] == len(sent)
    assert [StageEvent.from_dict(event) for event in page["events"]] == [StageEvent.from_dict(e) for e in sent]
    for came, line in zip(page["events"], sent, strict=True):
        went = dict(line)
        trace = went.pop("trace", None) or {}
        went = {**went, **trace}
        times = {"started_at", "finished_at"}
        assert {name: came[name] for name in went if name not in times} == {
            name: value for name, value in went.items() if name not in times
        }
        for name in times & set(went):
            assert came[name] == (went[name] and f"{went[name]}+00:00"), "naive times are UTC"


def test_summaries_are_those_worked_out_by_hand(filled: LiveServer) -> None:
    assert filled.get("summary/fd810155-d69f-4c2c-944a-be960a32aa62") == {
        "run_id": "fd810155-d69f-4c2c-944a-be960a32aa62",
        "total_events": 3,
        "stage_type_counts": {"input": 1, "retrieval": 1, "output": 1},
        "stage_type_avg_durations": {"retrieval": 1474.4563749991357, "output": 33046.0},
        "missing_required_stage_types": ["system_prompt"],
    }
    assert filled.get("summary/run_20260103_001") == {
        "run_id": "run_20260103_001",
        "total_events": 5,
        "stage_type_counts": {"system_prompt": 1, "input": 1, "retrieval": 1, "rerank": 1, "output": 1},
        "stage_type_avg_durations": {
            "system_prompt": 18.0,
            "input": 6.0,
            "retrieval": 120.0,
            "rerank": 220.0,
            "output": 1400.0,
        },
        "missing_required_stage_types": [],
    }


def test_metrics_are_those_worked_out_by_hand(filled: LiveServer) -> None:
    found = filled.get("metrics/run_20260103_001")["metrics"]
    scores: Any = {metric["metric_name"]: (pytest.approx(metric["score"]), metric["passed"]) for metric in found}
    assert scores == {
        "system_prompt.latency_ms": (18, None),
        "input.latency_ms": (6, None),
        "input.query_length": (32, None),
        "retrieval.latency_ms": (120, True),
        "retrieval.result_count": (3, True),
        "retrieval.avg_score": ((0.91 + 0.72 + 0.45) / 3, True),
        "retrieval.score_gap": (0.91 - 0.45, True),
        "rerank.latency_ms": (220, True),
        "rerank.keep_rate": (2 / 3, True),
        "rerank.avg_score": (0.75, True),
        "rerank.score_gap": (0.26, True),
        "output.latency_ms": (1400, True),
        "output.token_ratio": (210 / 900, None),
        "output.citation_count": (2, True),
    }


def test_the_report_of_the_slow_run_says_what_is_wrong(filled: LiveServer) -> None:
    report = filled.get("debug/fd810155-d69f-4c2c-944a-be960a32aa62")
    assert report["bottlenecks"] == [
        {"type": "missing_stage", "stage_type": "system_prompt", "detail": "required stage missing"},
        {"type": "latency", "stage_type": "output", "avg_duration_ms": 33046.0},
        {"type": "latency", "stage_type": "retrieval", "avg_duration_ms": 1474.456},
    ]
    failing = {metric["metric_name"] for metric in report["stage_metrics"] if metric["passed"] is False}
    assert failing == {"retrieval.latency_ms", "retrieval.avg_score", "retrieval.score_gap", "output.latency_ms"}
    assert len(report["recommendations"]) == 2
