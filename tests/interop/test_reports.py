"""Metrics, summary and debug report: ours are EvalVault's, event by event, also for attributes that are odd."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import StageEvent
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS, metrics_of
from tests.interop.real import (
    DebugReportService,
    EvaluationRun,
    SQLiteStorageAdapter,
    StageMetricService,
    StageSummaryService,
    TheirEvent,
    load_thresholds,
)
from tests.support import DATA, LiveServer, live_server

SEED = 20260107
EVENTS = 1500
THRESHOLDS = DATA / "stage_metric_thresholds.json"
#: Relevant documents by test case, one of them in another form than a list.
RELEVANCE: dict[str, Any] = {"tc-1": ["d1", "d3"], "tc-2": [], "tc-3": "d5", "tc-4": [3, "d2"]}


def maybe(rng: random.Random, attributes: dict[str, list[Any]]) -> dict[str, Any]:
    """Return some of `attributes`, each with one of the values that are given for it."""
    return {name: rng.choice(values) for name, values in attributes.items() if rng.random() < 0.8}


def random_attributes(rng: random.Random, stage_type: str) -> dict[str, Any]:
    """Return attributes as programs give them, and odder ones, of those that EvalVault does not fail on."""
    count = rng.randrange(7)
    ids = [f"d{rng.randrange(6)}" for _ in range(count)]
    scores = [round(rng.uniform(-0.2, 1.1), rng.randrange(1, 17)) for _ in range(rng.choice([count, count + 1, 1]))]
    counts = [None, -1, 0, 1, 3, 8, 250, "5", 2.7, 2**40]
    labels = [None, "ko", "en", 1, ""]
    classification: dict[str, list[Any]] = {
        "predicted_label": labels,
        "label": labels,
        "confidence": [None, 0, 0.5, 1, "0.75", "high", [0.5], {}, -3.5],
    }
    values_by_type: dict[str, dict[str, list[Any]]] = {
        "system_prompt": {"text": ["너는 보험 상담원이다", ""]},
        "input": {"query": ["보험 보장금액은?", "", "🙂", "a" * 1000, None, 7, ["질문"]]},
        "query_rewrite": {"rewritten": ["보장금액 한도", None]},
        "retrieval": {
            "doc_ids": [ids, ids, ids, [], None, "d1", 7, {"d1": 1}, [1, "1", None, 2.5], ids * 2],
            "scores": [scores, scores, scores, [], None, 0.25, "0.5", ["0.5", "1e-3", 2], [10**12, 0, 3]],
            "top_k": [*counts, 5, 5],
            "relevant_doc_ids": [None, [], ["d1", "d2"], "d3", {"d1": 1}, ["d1", "d1"], [1, None]],
        },
        "rerank": {
            "input_count": counts,
            "output_count": counts,
            "scores": [scores, scores, [], None, 0.5, ["1", 0.5]],
        },
        "output": {
            "tokens_in": counts,
            "tokens_out": counts,
            "citations": [
                *(None, [], ids, "약관-1", "", 0, 7, True, False, [[1], {}], {}, {"a": 1, "b": 2}),
                *({"doc_ids": ids}, {"ids": "d1"}, {"sources": [], "citations": ids}, {"count": 3}),
                *({"count": "4"}, {"count": "many"}, {"count": None}, {"doc_ids": None, "count": 2.9}),
            ],
        },
        "language_detection": classification,
        "intent": classification,
        "safety_check": {
            "violations": [None, [], ["욕설"], ["a", "b"], {"a": 1}, "욕설", 3],
            "violation_count": [None, 0, 1, 2.7, -1, "2", "none", [1]],
            "blocked": [None, True, False, 0, 1, "", "false", []],
        },
        "answer_validation": {"passed": [None, True, False, 0, 1, "", "no", 0.0]},
    }
    return maybe(rng, values_by_type[stage_type])


KNOWN_TYPES = (
    *("system_prompt", "input", "query_rewrite", "retrieval", "rerank", "output"),
    *("language_detection", "intent", "safety_check", "answer_validation"),
)


def random_events(run_id: str = "random") -> Iterator[dict[str, Any]]:
    rng = random.Random(SEED)
    for number in range(EVENTS):
        stage_type = rng.choice(KNOWN_TYPES)
        yield {
            "run_id": run_id,
            "stage_id": f"s{number}",
            "stage_type": stage_type,
            "duration_ms": rng.choice([None, 0, 500, 500.1, 799.9, rng.uniform(0, 5000)]),
            "attributes": random_attributes(rng, stage_type),
            "metadata": maybe(rng, {"test_case_id": [*RELEVANCE, "tc-9", None, 1], "relevant_doc_ids": [None, ["d4"]]}),
        }


def judged(metric: Any) -> tuple[Any, ...]:
    evidence = shared_evidence(metric.metric_name, metric.evidence)
    return (metric.stage_id, metric.metric_name, metric.score, metric.threshold, metric.passed, evidence)


def shared_evidence(metric_name: str, evidence: Any) -> Any:
    """Return the evidence without what only we say: that no document ids were recorded, rather than none found."""
    if metric_name == "retrieval.result_count":
        return {name: value for name, value in evidence.items() if name != "missing"}
    return evidence


def thresholds_of(profile: str | None) -> dict[str, float]:
    thresholds: dict[str, float] = load_thresholds(THRESHOLDS, profile=profile)
    return thresholds


def ours(event: dict[str, Any], thresholds: Mapping[str, float] = DEFAULT_THRESHOLDS, **options: Any) -> list[Any]:
    return [judged(metric) for metric in metrics_of(StageEvent.from_dict(event), thresholds=thresholds, **options)]


def theirs(event: dict[str, Any], thresholds: Mapping[str, float] | None = None, **options: Any) -> list[Any]:
    service = StageMetricService()
    metrics = service.build_metrics(
        [TheirEvent.from_dict(event)], thresholds=thresholds, relevance_map=options.get("relevance")
    )
    return [judged(metric) for metric in metrics]


@pytest.mark.parametrize("profile", [None, "dev", "prod"])
@pytest.mark.parametrize("relevance", [None, RELEVANCE], ids=["alone", "with relevance"])
def test_metrics_are_evalvaults_in_name_score_threshold_verdict_and_evidence(
    profile: str | None, relevance: dict[str, Any] | None
) -> None:
    thresholds = thresholds_of(profile)
    names: set[str] = set()
    for event in random_events():
        expected = theirs(event, thresholds, relevance=relevance)
        assert ours(event, thresholds, relevance=relevance) == expected, event
        names.update(name for _, name, *_ in expected)
    assert len(names) == len(KNOWN_TYPES) + 18, "every metric there is was met"


def test_default_thresholds_are_evalvaults() -> None:
    for event in random_events():
        assert ours(event) == theirs(event)


def test_a_type_that_evalvault_has_no_metrics_for_has_its_latency_and_more() -> None:
    event = {"run_id": "r", "stage_type": "chunking", "stage_id": "s", "duration_ms": 5, "attributes": {"chunks": 3}}
    assert [name for _, name, *_ in theirs(event)] == ["chunking.latency_ms"]
    assert [name for _, name, *_ in ours(event)] == ["chunking.latency_ms", "chunking.chunks"]


@pytest.mark.parametrize(
    ("stage_type", "attributes", "in_evalvault", "with_us"),
    [
        # EvalVault takes true and false for 1 and 0 where a number belongs; to us they are none.
        ("retrieval", {"scores": [True, False]}, {"retrieval.avg_score": 0.5, "retrieval.score_gap": 1}, {}),
        ("intent", {"confidence": True}, {"intent.confidence": 1}, {}),
        ("output", {"tokens_in": True, "tokens_out": 4}, {"output.token_ratio": 4}, {}),
        ("safety_check", {"violation_count": True}, {"safety_check.violation_rate": 1}, {}),
        # It takes text that says infinity for a number: that is no score, and no JSON.
        ("intent", {"confidence": "inf"}, {"intent.confidence": float("inf")}, {}),
        # It reads no fraction out of text where it wants a whole number.
        ("safety_check", {"violation_count": "2.7"}, {}, {"safety_check.violation_rate": 1}),
        # Numbers instead of contents, as our client sends them with content="none".
        ("input", {"query_length": 7}, {}, {"input.query_length": 7}),
        ("safety_check", {"violations_count": 1}, {}, {"safety_check.violation_rate": 1}),
        # Generic metrics, for every type without metrics of its own.
        ("system_prompt", {"tokens": 120}, {}, {"system_prompt.tokens": 120}),
        ("query_rewrite", {"edits": 2}, {}, {"query_rewrite.edits": 2}),
    ],
)
def test_these_are_scored_differently_and_meant_to_be(
    stage_type: str, attributes: dict[str, Any], in_evalvault: dict[str, float], with_us: dict[str, float]
) -> None:
    event = {"run_id": "r", "stage_type": stage_type, "stage_id": "s", "attributes": attributes}
    always = ("retrieval.result_count", "output.citation_count")
    assert {name: score for _, name, score, *_ in theirs(event) if name not in always} == in_evalvault
    assert {name: score for _, name, score, *_ in ours(event) if name not in always} == with_us


@pytest.mark.parametrize(
    ("stage_type", "attributes"),
    [
        ("retrieval", {"scores": ["high", 0.5]}),
        ("retrieval", {"scores": [None, 0.5]}),
        ("retrieval", {"scores": {"d1": 0.5}}),
        ("retrieval", {"doc_ids": ["d1"], "relevant_doc_ids": ["d1"], "top_k": "all"}),
        ("rerank", {"input_count": "many", "output_count": 2}),
        ("output", {"tokens_in": [1], "tokens_out": "2.5"}),
    ],
)
def test_what_evalvault_fails_on_costs_us_its_own_metric_only(stage_type: str, attributes: dict[str, Any]) -> None:
    event = {"run_id": "r", "stage_type": stage_type, "stage_id": "s", "duration_ms": 5, "attributes": attributes}
    with pytest.raises((TypeError, ValueError)):
        theirs(event)
    assert f"{stage_type}.latency_ms" in [name for _, name, *_ in ours(event)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, SQLiteStorageAdapter]]:
    """A server, and EvalVault's adapter, over one file with the random events and those of EvalVault's files."""
    with live_server(tmp_path_factory.mktemp("reports") / "events.db") as server:
        assert server.post({"events": list(random_events())}).status_code == 200
        for path in DATA.glob("*.jsonl"):
            assert server.post(b'{"events":[' + b",".join(path.read_bytes().splitlines()) + b"]}").status_code == 200
        yield server, SQLiteStorageAdapter(server.db)


RUNS = ["random", "run_20260103_001", "fd810155-d69f-4c2c-944a-be960a32aa62"]


@pytest.mark.parametrize("run_id", RUNS)
def test_the_summary_is_evalvaults(run_id: str, served: tuple[LiveServer, SQLiteStorageAdapter]) -> None:
    server, adapter = served
    expected = StageSummaryService().summarize(adapter.list_stage_events(run_id))
    summary = server.get(f"summary/{run_id}")
    assert summary == {
        "run_id": run_id,
        "total_events": expected.total_events,
        "stage_type_counts": expected.stage_type_counts,
        "stage_type_avg_durations": pytest.approx(expected.stage_type_avg_durations, rel=1e-12),
        "missing_required_stage_types": expected.missing_required_stage_types,
    }
    assert list(summary["stage_type_counts"]) == list(expected.stage_type_counts), "in the order of their appearance"


@pytest.mark.parametrize("run_id", RUNS)
def test_the_debug_report_is_evalvaults_but_for_its_words(
    run_id: str, served: tuple[LiveServer, SQLiteStorageAdapter], tmp_path: Path
) -> None:
    server, adapter = served
    report = server.get(f"debug/{run_id}")
    # EvalVault reports on runs of its own only, so this one becomes one.
    adapter.save_run(EvaluationRun(run_id=run_id, dataset_name="보험", model_name="exaone"))
    expected = DebugReportService().build_report(run_id, adapter, adapter).to_dict()

    assert report["stage_summary"] == {
        **expected["stage_summary"],
        "stage_type_avg_durations": pytest.approx(expected["stage_summary"]["stage_type_avg_durations"], rel=1e-12),
    }
    assert report["bottlenecks"] == expected["bottlenecks"]
    assert len(report["stage_metrics"]) == len(expected["stage_metrics"])
    for metric, same in zip(report["stage_metrics"], expected["stage_metrics"], strict=True):
        metric["evidence"] = shared_evidence(metric["metric_name"], metric["evidence"])
        assert {name: metric[name] for name in same} == same
    assert {component(text) for text in report["recommendations"]} == {
        component(text) for text in expected["recommendations"]
    }
    assert set(expected) <= set(report)


def component(recommendation: str) -> str:
    """Return what `"[{priority}] {component}: ..."` is about; priorities are reckoned differently."""
    return recommendation.partition("] ")[2].partition(":")[0]
