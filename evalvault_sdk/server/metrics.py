"""
Compute the metrics of a stage from its event.

In:   one `StageEvent`; thresholds by metric name; optionally the relevant documents of each test case, and
      rules for metrics of the user's own.
Out:  its `StageMetric`s, as the contract's table "Stage metrics" has them.
Pure. What an attribute lacks or gets wrong costs its own metric only: text among numbers is skipped, and
the evidence says how much was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import attrs

#: EvalVault's own defaults. Latencies are ceilings in milliseconds, everything else is a floor.
DEFAULT_THRESHOLDS: Mapping[str, float] = {
    "retrieval.precision_at_k": 0.2,
    "retrieval.recall_at_k": 0.6,
    "retrieval.result_count": 1.0,
    "retrieval.avg_score": 0.2,
    "retrieval.score_gap": 0.1,
    "retrieval.latency_ms": 500.0,
    "rerank.keep_rate": 0.25,
    "rerank.avg_score": 0.2,
    "rerank.score_gap": 0.1,
    "rerank.latency_ms": 800.0,
    "output.latency_ms": 3000.0,
    "output.citation_count": 1.0,
}


class StageMetric(NamedTuple):
    """One number about one stage, and how it was come by."""

    run_id: str
    stage_id: str
    #: `"{stage_type}.{what}"`.
    metric_name: str
    score: float
    threshold: float | None = None
    evidence: Mapping[str, Any] | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether the threshold is a ceiling: `evidence.comparison` says `max`, `<=` or `le`."""
        comparison = (self.evidence or {}).get("comparison")
        return isinstance(comparison, str) and comparison.lower() in ("max", "<=", "le")

    @property
    def passed(self) -> bool | None:
        """Whether the score holds its threshold; None without one."""
        if self.threshold is None:
            return None
        return self.score <= self.threshold if self.lower_is_better else self.score >= self.threshold

    @property
    def shortfall(self) -> float:
        """How far the score misses its threshold, relative to the threshold; 0 where it holds it."""
        if self.threshold is None or self.passed:
            return 0.0
        distance = abs(self.score - self.threshold)
        return distance / abs(self.threshold) if self.threshold else distance

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the contract, with `passed`."""
        return {
            "run_id": self.run_id,
            "stage_id": self.stage_id,
            "metric_name": self.metric_name,
            "score": self.score,
            "threshold": self.threshold,
            "passed": self.passed,
            "evidence": self.evidence,
        }


class Measured(Protocol):
    """What metrics are computed from: a `StageEvent`, or as much of one as they need."""

    @property
    def run_id(self) -> str: ...  # noqa: D102
    @property
    def stage_id(self) -> str: ...  # noqa: D102
    @property
    def stage_type(self) -> str: ...  # noqa: D102
    @property
    def duration_ms(self) -> float | None: ...  # noqa: D102
    @property
    def attributes(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def metadata(self) -> Mapping[str, Any]: ...  # noqa: D102


class MeasuredStage(NamedTuple):
    """As much of a `StageEvent` as its metrics are computed from, at a fraction of its cost."""

    run_id: str
    stage_id: str
    stage_type: str
    duration_ms: float | None
    attributes: Mapping[str, Any]
    metadata: Mapping[str, Any]


#: What is larger is no count of anything, and beyond it a float skips integers.
_LARGEST_COUNT = 2**53

#: A metric before it has its stage, its prefix and its threshold: what, score, evidence.
_Finding = tuple[str, float, dict[str, Any]]


@attrs.frozen(kw_only=True)
class MetricRule:
    """A metric of the user's own: a number somewhere in the attributes of a type of stage."""

    #: Stages of this type; `"*"` is all.
    stage_type: str
    #: Where the number is: names joined by dots, from the attributes down. Numbers pick from lists.
    attribute: str
    #: The metric is `"{stage_type}.{name}"`.
    name: str
    #: None: the metric is only shown. A threshold that is given for the metric's name elsewhere wins.
    threshold: float | None = None
    #: `"max"`: the threshold is a ceiling; `"min"`: a floor.
    direction: Literal["min", "max"] = "min"

    def find(self, event: Measured) -> float | None:
        """Return the number in an event; None where there is none. True counts as 1, False as 0."""
        if self.stage_type not in ("*", event.stage_type):
            return None
        value = _at(event.attributes, self.attribute)
        return float(value) if isinstance(value, bool) else _number(value)


def _at(value: Any, path: str) -> Any:
    """Return what is at a path; a name that has dots itself is found too."""
    if isinstance(value, Mapping):
        if path in value:
            return value[path]
        head, dot, rest = path.partition(".")
        while dot:
            if head in value:
                return _at(value[head], rest)
            further, dot, rest = rest.partition(".")
            head = f"{head}.{further}"
        return None
    if isinstance(value, list):
        index, dot, rest = path.partition(".")
        if not index.isdecimal() or len(index) > 6 or int(index) >= len(value):
            return None
        return _at(value[int(index)], rest) if dot else value[int(index)]
    return None


def metrics_of(
    event: Measured,
    *,
    thresholds: Mapping[str, float] = DEFAULT_THRESHOLDS,
    relevance: Mapping[str, Collection[str]] | None = None,
    rules: Sequence[MetricRule] = (),
) -> Iterator[StageMetric]:
    """
    Yield the metrics of one event.

    `relevance` maps `metadata.test_case_id` to the ids of its relevant documents; what an event says of
    them itself wins. Types with metrics of their own get those, any other type one metric for every finite
    number among its attributes; `rules` add to both, and one of a generic metric's name stands in its place.
    """
    seen = set()
    run_id, stage_id, prefix = event.run_id, event.stage_id, f"{event.stage_type}."
    for rule in rules:
        if (score := rule.find(event)) is not None:
            name = prefix + rule.name
            seen.add(name)
            evidence = {"attribute": rule.attribute, "comparison": rule.direction}
            threshold = thresholds.get(name, rule.threshold)
            yield StageMetric(run_id, stage_id, name, score, threshold, evidence)
    for what, score, evidence in _findings(event, relevance or {}):
        name = prefix + what
        if name in seen or not math.isfinite(score):  # an unknown type's own latency_ms; a sum beyond all floats
            continue
        seen.add(name)
        yield StageMetric(run_id, stage_id, name, score, thresholds.get(name), evidence)


def _findings(event: Measured, relevance: Mapping[str, Collection[str]]) -> Iterator[_Finding]:
    if event.duration_ms is not None:
        yield "latency_ms", event.duration_ms, {"duration_ms": event.duration_ms, "comparison": "max"}
    if event.stage_type == "retrieval":
        yield from _retrieval(event, relevance)
    else:
        yield from _BY_TYPE.get(event.stage_type, _generic)(event.attributes)


def _retrieval(event: Measured, relevance: Mapping[str, Collection[str]]) -> Iterator[_Finding]:
    doc_ids = _texts(event.attributes.get("doc_ids"))
    missing = {} if "doc_ids" in event.attributes else {"missing": True}
    yield "result_count", float(len(doc_ids)), {"count": len(doc_ids), **missing}
    yield from _scores(event.attributes)
    relevant = _relevant(event, relevance)
    if not doc_ids or not relevant:
        return
    top_k = _integer(event.attributes.get("top_k"))
    k = len(doc_ids) if top_k is None or top_k <= 0 else min(top_k, len(doc_ids))
    hits = len(set(doc_ids[:k]) & relevant)
    yield "precision_at_k", hits / k, {"k": k, "relevant_found": hits, "retrieved_count": k}
    yield (
        "recall_at_k",
        hits / len(relevant),
        {"k": k, "relevant_found": hits, "relevant_total": len(relevant)},
    )


def _relevant(event: Measured, relevance: Mapping[str, Collection[str]]) -> set[str]:
    own = event.attributes.get("relevant_doc_ids") or event.metadata.get("relevant_doc_ids")
    if own:
        return set(_texts(own))
    test_case = event.metadata.get("test_case_id")
    return set(_texts(relevance.get(test_case))) if isinstance(test_case, str) else set()


def _scores(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    raw = attributes.get("scores")
    values = raw if isinstance(raw, list | tuple) else [] if raw is None else [raw]
    scores = [score for score in map(_number, values) if score is not None]
    skipped = {"skipped": len(values) - len(scores)} if len(scores) < len(values) else {}
    if not scores:
        return
    try:
        mean = math.fsum(scores) / len(scores)
    except OverflowError:  # the sum of huge scores is no float, their mean is
        mean = math.fsum(score / len(scores) for score in scores)
    yield "avg_score", mean, {"count": len(scores), **skipped}
    if len(scores) > 1:
        yield "score_gap", max(scores) - min(scores), {"max": max(scores), "min": min(scores), **skipped}


def _rerank(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    before, after = _integer(attributes.get("input_count")), _integer(attributes.get("output_count"))
    if before is not None and before > 0 and after is not None:
        yield "keep_rate", after / before, {"input_count": before, "output_count": after}
    yield from _scores(attributes)


def _output(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    tokens_in, tokens_out = _integer(attributes.get("tokens_in")), _integer(attributes.get("tokens_out"))
    if tokens_in is not None and tokens_in > 0 and tokens_out is not None:
        yield "token_ratio", tokens_out / tokens_in, {"tokens_in": tokens_in, "tokens_out": tokens_out}
    citations = _citation_count(attributes.get("citations"))
    if citations is None:
        yield "citation_count", 0.0, {"count": 0, "missing": True}
    else:
        yield "citation_count", float(citations), {"count": citations}


def _citation_count(citations: Any) -> int | None:
    if isinstance(citations, list | tuple):
        return len(citations)
    if isinstance(citations, Mapping):
        for key in ("doc_ids", "ids", "sources", "citations"):
            if isinstance(citations.get(key), list | tuple):
                return len(citations[key])
        return _integer(citations["count"]) if "count" in citations else len(citations)
    return None if citations is None else 1


def _input(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    query = attributes.get("query")
    if isinstance(query, str):
        yield "query_length", float(len(query)), {"length": len(query)}
    elif (length := _number(attributes.get("query_length"))) is not None:  # from a client with content="none"
        yield "query_length", length, {"length": length}


def _classification(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    predicted, label = attributes.get("predicted_label"), attributes.get("label")
    if isinstance(predicted, str) and isinstance(label, str):
        yield "accuracy", float(predicted == label), {"predicted": predicted, "label": label}
    confidence = _number(attributes.get("confidence"))
    if confidence is not None:
        yield "confidence", confidence, {"confidence": confidence}


def _safety(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    violations = attributes.get("violations")
    given = attributes.get("violation_count", attributes.get("violations_count"))  # the latter with content="none"
    count = len(violations) if isinstance(violations, list | tuple) else _integer(given)
    if count is not None:
        yield "violation_rate", float(count > 0), {"violations": count, "comparison": "max"}
    blocked = attributes.get("blocked")
    if blocked is not None:
        yield "block_rate", float(bool(blocked)), {"blocked": bool(blocked), "comparison": "max"}


def _validation(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    passed = attributes.get("passed")
    if passed is not None:
        yield "pass_rate", float(bool(passed)), {"passed": bool(passed)}


def _generic(attributes: Mapping[str, Any]) -> Iterator[_Finding]:
    """Every finite number among the attributes of a type we know nothing of (the plan's phase 3)."""
    for key, value in attributes.items():
        if isinstance(value, int | float) and (score := _number(value)) is not None:
            yield key, score, {"attribute": key}


#: What the metrics of known types are called: rules must not be called the same.
SPECIAL_METRICS: Mapping[str, frozenset[str]] = {
    kind: frozenset(names.split())
    for kind, names in {
        "*": "latency_ms",
        "retrieval": "result_count avg_score score_gap precision_at_k recall_at_k",
        "rerank": "keep_rate avg_score score_gap",
        "output": "token_ratio citation_count",
        "input": "query_length",
        "language_detection": "accuracy confidence",
        "intent": "accuracy confidence",
        "safety_check": "violation_rate block_rate",
        "answer_validation": "pass_rate",
    }.items()
}

_BY_TYPE: Mapping[str, Callable[[Mapping[str, Any]], Iterator[_Finding]]] = {
    "rerank": _rerank,
    "output": _output,
    "input": _input,
    "language_detection": _classification,
    "intent": _classification,
    "safety_check": _safety,
    "answer_validation": _validation,
}


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(item) for item in value] if isinstance(value, list | tuple | set | frozenset) else [str(value)]


def _number(value: Any) -> float | None:
    """Return `value` as a finite float; None for what is no number. True and False are none."""
    if type(value) is float:  # as nearly all are
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or abs(number) > _LARGEST_COUNT else int(number)
