from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.report import FailureTally, as_markdown, bottlenecks, debug_report
from evalvault_sdk.server.store.base import RunTotals, StageTypeTotals
from evalvault_sdk.server.summary import run_summary, stage_types, summarize


def totals(kind: str, events: int = 1, mean_ms: float | None = None, errors: int = 0) -> StageTypeTotals:
    return StageTypeTotals(
        stage_type=kind, events=events, errors=errors, mean_ms=mean_ms, p50_ms=mean_ms, p95_ms=mean_ms, p99_ms=mean_ms
    )


def metric(name: str, score: float, threshold: float | None, **evidence: Any) -> StageMetric:
    return StageMetric("r", "s", name, score, threshold, evidence)


def test_a_summary_counts_averages_and_names_what_is_missing() -> None:
    assert summarize("r", [totals("input", 3), totals("retrieval", 2, 10.0), totals("mine", 1, 5.0)]) == {
        "run_id": "r",
        "total_events": 6,
        "stage_type_counts": {"input": 3, "retrieval": 2, "mine": 1},
        "stage_type_avg_durations": {"retrieval": 10.0, "mine": 5.0},
        "missing_required_stage_types": ["system_prompt", "output"],
    }


def test_the_longer_summary_has_error_rates_and_percentiles() -> None:
    assert stage_types([totals("a", 4, 2.0, errors=1)])["a"] == {
        "count": 4,
        "errors": 1,
        "error_rate": 0.25,
        "mean_ms": 2.0,
        "p50_ms": 2.0,
        "p95_ms": 2.0,
        "p99_ms": 2.0,
    }


def test_a_live_runs_own_summary_is_made_from_its_events() -> None:
    start, end = datetime(2026, 1, 7, tzinfo=timezone.utc), datetime(2026, 1, 7, 0, 1, 30, tzinfo=timezone.utc)
    made = run_summary(
        "r", RunTotals(events=5, errors=1, traces=2, started_at=start, finished_at=end, slowest_trace_id="t")
    )
    assert made == {
        "run_id": "r",
        "started_at": "2026-01-07T00:00:00+00:00",
        "finished_at": "2026-01-07T00:01:30+00:00",
        "duration_seconds": 90.0,
        "total_events": 5,
        "total_traces": 2,
        "error_count": 1,
        "slowest_trace_id": "t",
    }
    unknown = run_summary(
        "r", RunTotals(events=1, errors=0, traces=0, started_at=None, finished_at=end, slowest_trace_id=None)
    )
    assert (unknown["started_at"], unknown["duration_seconds"]) == (None, None)


def test_bottlenecks_are_what_is_missing_and_the_three_slowest() -> None:
    summary = summarize(
        "r", [totals("input", 1, 1.0), totals("retrieval", 1, 30.12345), totals("a", 1, 20.0), totals("b", 1, 10.0)]
    )
    assert bottlenecks(summary) == [
        {"type": "missing_stage", "stage_type": "system_prompt", "detail": "required stage missing"},
        {"type": "missing_stage", "stage_type": "output", "detail": "required stage missing"},
        {"type": "latency", "stage_type": "retrieval", "avg_duration_ms": 30.123},
        {"type": "latency", "stage_type": "a", "avg_duration_ms": 20.0},
        {"type": "latency", "stage_type": "b", "avg_duration_ms": 10.0},
    ]


def recommend(*metrics: StageMetric) -> list[str]:
    tally = FailureTally()
    for one in metrics:
        tally.add(one)
    return tally.recommendations()


def test_a_recommendation_names_priority_component_what_and_how_bad() -> None:
    (text,) = recommend(
        metric("retrieval.recall_at_k", 0.7, 0.6),
        metric("retrieval.recall_at_k", 0.3, 0.6),
        metric("retrieval.recall_at_k", 0.5, 0.6),
    )
    assert text.startswith("[p0_critical] retriever: Relevant documents are not found - ")
    assert "retrieval.recall_at_k is below 0.6 in 2 of 3 stages, at worst 0.3" in text


def test_priority_is_by_relative_distance_so_milliseconds_and_shares_are_alike() -> None:
    def priority(one: StageMetric) -> str:
        return recommend(one)[0].partition("]")[0].lstrip("[")

    assert priority(metric("retrieval.latency_ms", 510, 500, comparison="max")) == "p2_medium"
    assert priority(metric("retrieval.latency_ms", 600, 500, comparison="max")) == "p1_high"
    assert priority(metric("retrieval.latency_ms", 700, 500, comparison="max")) == "p0_critical"
    assert priority(metric("retrieval.avg_score", 0.19, 0.2)) == "p2_medium"
    assert priority(metric("retrieval.avg_score", 0.1, 0.2)) == "p0_critical"


def test_there_is_one_recommendation_per_component_the_worst_first() -> None:
    found = recommend(
        metric("rerank.keep_rate", 0.2, 0.25),
        metric("retrieval.avg_score", 0.19, 0.2),
        metric("retrieval.result_count", 0, 1),
        metric("output.latency_ms", 6000, 3000, comparison="max"),
        metric("system_prompt.latency_ms", 110, 100, comparison="max"),
        metric("mine.rate", 0.99, 1.0),
    )
    assert [text.split("]")[1].split(":")[0].strip() for text in found] == [
        "retriever",
        "generator",
        "reranker",
        "prompt",
        "query_processor",
    ]
    assert "Some queries find no document" in found[0]


def test_what_passes_or_has_no_threshold_is_not_recommended() -> None:
    assert recommend(metric("retrieval.recall_at_k", 0.9, 0.6), metric("mine.x", 1, None)) == []


def test_what_was_not_recorded_is_asked_for_and_is_no_failure() -> None:
    tally = FailureTally()
    tally.add(metric("retrieval.result_count", 0, 1, count=0, missing=True))
    tally.add(metric("retrieval.result_count", 0, 1, count=0))
    tally.add(metric("output.citation_count", 0, 1, count=0, missing=True))
    assert [(entry["metric_name"], entry["of"]) for entry in tally.failing()] == [("retrieval.result_count", 1)]
    assert [text.partition(" - ")[0] for text in tally.recommendations()] == [
        "[p0_critical] retriever: Some queries find no document",
        "[p2_medium] retriever: Retrieval stages do not say what they found",
        "[p2_medium] generator: Answers do not say what they cite",
    ]


def make_report(metrics: list[StageMetric], max_metrics: int = 100) -> dict[str, Any]:
    summary = summarize("r|1", [totals("retrieval", 2, 10.0), totals("a|b", 1)])
    run = run_summary(
        "r|1", RunTotals(events=3, errors=0, traces=1, started_at=None, finished_at=None, slowest_trace_id=None)
    )
    return debug_report(run, summary, metrics, max_metrics=max_metrics)


def test_a_report_judges_all_metrics_and_lists_the_first() -> None:
    metrics = [metric("retrieval.recall_at_k", 0.1, 0.6)] * 5
    report = make_report(metrics, max_metrics=2)
    assert len(report["stage_metrics"]) == 2
    assert report["run_summary"]["total_stage_metrics"] == 5
    assert "in 5 of 5 stages" in report["recommendations"][0]
    assert report["failing_metrics"] == [
        {"metric_name": "retrieval.recall_at_k", "failing": 5, "of": 5, "threshold": 0.6, "worst": 0.1}
    ]
    assert "| retrieval.recall_at_k | 5 | 5 | 0.6 | 0.1 |" in as_markdown(report)
    assert set(report) == {
        "run_summary",
        "stage_summary",
        "stage_metrics",
        "failing_metrics",
        "stage_types",
        "bottlenecks",
        "recommendations",
        "phoenix_trace_url",
        "langfuse_trace_url",
    }


def test_a_report_reads_well_as_markdown() -> None:
    text = as_markdown(make_report([metric("retrieval.recall_at_k", 0.1, 0.6)]))
    assert text.startswith("# Debug report: r|1\n")
    assert "| retrieval | 2 | 0 | 10.0 | - |" in text
    assert "| a\\|b | 1 | 0 | - | - |" in text
    failing = {"retrieval": {"errors": 1, "error_rate": 0.5, "p95_ms": 12.34}}
    assert "| retrieval | 2 | 1 (50%) | 10.0 | 12.3 |" in as_markdown({**make_report([]), "stage_types": failing})
    assert "- no `output` stage was recorded" in text
    assert "- [p0_critical] retriever:" in text
    assert "| retrieval.recall_at_k | 1 | 1 | 0.6 | 0.1 |" in text
    assert "None: every metric holds its threshold." in as_markdown(make_report([]))
