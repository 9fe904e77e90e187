"""The rows of the contract's table "Stage metrics", each worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
import pytest

from evalvault_sdk import StageEvent
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS, StageMetric, metrics_of
from tests.support import DATA


def scores_of(stage_type: str, attributes: dict[str, Any], **fields: Any) -> dict[str, float]:
    event = StageEvent(run_id="r", stage_type=stage_type, attributes=attributes, **fields)
    return {metric.metric_name: metric.score for metric in metrics_of(event)}


def evidence_of(stage_type: str, name: str, attributes: dict[str, Any]) -> Any:
    event = StageEvent(run_id="r", stage_type=stage_type, attributes=attributes)
    return {metric.metric_name: metric.evidence for metric in metrics_of(event)}[name]


@pytest.mark.parametrize("stage_type", ["retrieval", "output", "input", "system_prompt", "my_own_type"])
def test_every_type_with_a_duration_has_a_latency(stage_type: str) -> None:
    event = StageEvent(run_id="r", stage_type=stage_type, duration_ms=12.5)
    latency = next(metric for metric in metrics_of(event) if metric.metric_name == f"{stage_type}.latency_ms")
    assert latency.score == 12.5
    assert latency.evidence == {"duration_ms": 12.5, "comparison": "max"}


RETRIEVAL = {"doc_ids": ["a", "b", "c", "d"], "scores": [0.75, 0.5, 0.25, 0.5], "top_k": 2}


@pytest.mark.parametrize(
    ("stage_type", "attributes", "scores"),
    [
        ("retrieval", {}, {"result_count": 0}),
        ("retrieval", {"doc_ids": "only"}, {"result_count": 1}),
        ("retrieval", {"scores": [0.5]}, {"result_count": 0, "avg_score": 0.5}),
        ("retrieval", RETRIEVAL, {"result_count": 4, "avg_score": 0.5, "score_gap": 0.5}),
        (
            "retrieval",
            {**RETRIEVAL, "relevant_doc_ids": ["a", "c", "x", "y"]},
            {"result_count": 4, "avg_score": 0.5, "score_gap": 0.5, "precision_at_k": 0.5, "recall_at_k": 0.25},
        ),
        (
            "retrieval",
            {"doc_ids": ["a", "b"], "top_k": 10, "relevant_doc_ids": ["b"]},
            {"result_count": 2, "precision_at_k": 0.5, "recall_at_k": 1},
        ),
        (
            "retrieval",
            {"doc_ids": ["a", "b"], "top_k": 0, "relevant_doc_ids": ["b"]},
            {"result_count": 2, "precision_at_k": 0.5, "recall_at_k": 1},
        ),
        (
            "retrieval",
            {"doc_ids": ["a", "b"], "relevant_doc_ids": ["z"]},
            {"result_count": 2, "precision_at_k": 0, "recall_at_k": 0},
        ),
        ("rerank", {"input_count": 10, "output_count": 4}, {"keep_rate": 0.4}),
        ("rerank", {"input_count": 0, "output_count": 0}, {}),
        ("rerank", {"scores": [1, 3]}, {"avg_score": 2, "score_gap": 2}),
        ("output", {"tokens_in": 900, "tokens_out": 180}, {"token_ratio": 0.2, "citation_count": 0}),
        ("output", {"tokens_in": 0, "tokens_out": 5}, {"citation_count": 0}),
        ("output", {"citations": ["a", "b"]}, {"citation_count": 2}),
        ("output", {"citations": {"doc_ids": ["a", "b", "c"]}}, {"citation_count": 3}),
        ("output", {"citations": {"count": 5}}, {"citation_count": 5}),
        ("output", {"citations": "one"}, {"citation_count": 1}),
        ("input", {"query": "보험금"}, {"query_length": 3}),
        ("input", {"query_length": 12}, {"query_length": 12}),
        ("input", {"query": 7}, {}),
        (
            "language_detection",
            {"predicted_label": "ko", "label": "ko", "confidence": 0.9},
            {"accuracy": 1, "confidence": 0.9},
        ),
        ("intent", {"predicted_label": "ko", "label": "en"}, {"accuracy": 0}),
        ("safety_check", {"violations": []}, {"violation_rate": 0}),
        ("safety_check", {"violations": ["x"], "blocked": True}, {"violation_rate": 1, "block_rate": 1}),
        ("safety_check", {"violation_count": 3, "blocked": False}, {"violation_rate": 1, "block_rate": 0}),
        ("answer_validation", {"passed": True}, {"pass_rate": 1}),
        ("answer_validation", {"passed": False}, {"pass_rate": 0}),
        ("custom_module", {"throughput": 100, "error_rate": 0.05}, {"throughput": 100, "error_rate": 0.05}),
        ("query_rewrite", {"original": "a", "term_count": 2}, {"term_count": 2}),
    ],
)
def test_a_row_of_the_contracts_table(stage_type: str, attributes: dict[str, Any], scores: dict[str, float]) -> None:
    expected = {f"{stage_type}.{what}": score for what, score in scores.items()}
    assert scores_of(stage_type, attributes) == expected


def test_an_unknown_type_gets_every_finite_number_and_nothing_else() -> None:
    attributes = {
        "count": 3,
        "ratio": 0.5,
        "flag": True,
        "text": "7",
        "list": [1],
        "nested": {"deep": 1},
        "nothing": None,
        "huge": 10**400,
        "infinite": float("inf"),
    }
    assert scores_of("anything", attributes) == {"anything.count": 3, "anything.ratio": 0.5}


def test_a_generic_metric_does_not_clash_with_the_latency() -> None:
    event = StageEvent(run_id="r", stage_type="mine", duration_ms=5, attributes={"latency_ms": 99})
    assert [(m.metric_name, m.score) for m in metrics_of(event)] == [("mine.latency_ms", 5.0)]
    assert scores_of("mine", {"latency_ms": 99}) == {"mine.latency_ms": 99}


def test_what_is_no_number_among_the_scores_is_skipped_and_said() -> None:
    attributes = {"scores": [0.5, "high", None, True, float("nan"), 1.0]}
    assert scores_of("retrieval", attributes)["retrieval.avg_score"] == 0.75
    assert evidence_of("retrieval", "retrieval.avg_score", attributes) == {"count": 2, "skipped": 4}
    assert scores_of("retrieval", {"scores": ["high"]}) == {"retrieval.result_count": 0}


@pytest.mark.parametrize(
    ("stage_type", "attributes"),
    [
        ("retrieval", {"doc_ids": {"a": 1}, "scores": {"x": 1}, "top_k": "many", "relevant_doc_ids": 7}),
        ("rerank", {"input_count": "ten", "output_count": [], "scores": "high"}),
        ("output", {"tokens_in": {}, "tokens_out": "x", "citations": 5}),
        ("intent", {"predicted_label": 1, "label": None, "confidence": "sure"}),
        ("safety_check", {"violations": 7, "violation_count": "some", "blocked": "no"}),
    ],
)
def test_no_attribute_however_odd_raises(stage_type: str, attributes: dict[str, Any]) -> None:
    list(metrics_of(StageEvent(run_id="r", stage_type=stage_type, attributes=attributes)))


@pytest.mark.parametrize(
    ("stage_type", "attributes"),
    [
        ("retrieval", {"scores": [1e308, 1e308]}),
        ("retrieval", {"scores": [1e308, -1e308]}),
        ("rerank", {"input_count": 1e300, "output_count": 1}),
        ("output", {"tokens_in": 1, "tokens_out": 1e25, "citations": {"count": 1e30}}),
        ("safety_check", {"violation_count": 1e30}),
        ("mine", {"huge": 1e308, "int": 10**300}),
    ],
)
def test_huge_numbers_give_finite_scores_and_evidence_that_is_json(stage_type: str, attributes: dict[str, Any]) -> None:
    for metric in metrics_of(StageEvent(run_id="r", stage_type=stage_type, attributes=attributes)):
        assert math.isfinite(metric.score)
        orjson.dumps(metric.to_dict())


def test_a_missing_citation_list_says_so() -> None:
    assert evidence_of("output", "output.citation_count", {}) == {"count": 0, "missing": True}
    assert evidence_of("output", "output.citation_count", {"citations": []}) == {"count": 0}


def test_relevant_documents_come_from_the_event_its_metadata_or_the_test_case() -> None:
    def recall(**fields: Any) -> float | None:
        attributes = {"doc_ids": ["a"], **fields.pop("attributes", {})}
        event = StageEvent(run_id="r", stage_type="retrieval", attributes=attributes, **fields)
        scores = {m.metric_name: m.score for m in metrics_of(event, relevance={"t1": ["a", "b"]})}
        return scores.get("retrieval.recall_at_k")

    assert recall(metadata={"test_case_id": "t1"}) == 0.5
    assert recall(metadata={"test_case_id": "t1", "relevant_doc_ids": ["a"]}) == 1
    assert recall(metadata={"test_case_id": "t1"}, attributes={"relevant_doc_ids": ["x"]}) == 0
    assert recall(metadata={"test_case_id": "other"}) is None


@pytest.mark.parametrize(
    ("score", "threshold", "comparison", "passed"),
    [
        (5, None, None, None),
        (5, 5, None, True),
        (4, 5, None, False),
        (5, 5, "max", True),
        (6, 5, "max", False),
        (6, 5, "<=", False),
        (6, 5, "LE", False),
        (6, 5, "min", True),
    ],
)
def test_whether_a_metric_passes(
    score: float, threshold: float | None, comparison: str | None, passed: bool | None
) -> None:
    evidence = {"comparison": comparison} if comparison else None
    assert StageMetric("r", "s", "x.y", score, threshold, evidence).passed is passed


def test_the_distance_to_the_threshold_is_relative() -> None:
    slow = StageMetric("r", "s", "x.latency_ms", 750, 500, {"comparison": "max"})
    low = StageMetric("r", "s", "x.score", 0.15, 0.2)
    assert slow.shortfall == 0.5
    assert low.shortfall == pytest.approx(0.25)
    assert StageMetric("r", "s", "x.score", 0.3, 0.2).shortfall == 0
    assert StageMetric("r", "s", "x.rate", 1, 0, {"comparison": "max"}).shortfall == 1


def test_the_default_thresholds_are_those_of_evalvault() -> None:
    assert json.loads((DATA / "stage_metric_thresholds.json").read_text())["default"] == DEFAULT_THRESHOLDS
