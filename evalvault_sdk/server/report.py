"""
Say what is wrong with a run, and what to do about it.

In:   the run's totals, its summary, and its metrics.
Out:  the debug report object of the contract; the same as Markdown.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evalvault_sdk.server.metrics import StageMetric

#: Which component of a RAG program a metric speaks of, by the metric's prefix.
_COMPONENTS = {
    "retrieval": "retriever",
    "rerank": "reranker",
    "output": "generator",
    "system_prompt": "prompt",
}
_OTHER_COMPONENT = "query_processor"

#: From this relative distance to the threshold on, a failing metric is critical, or of high priority.
_CRITICAL, _HIGH = 0.3, 0.15

#: What to look at when a metric fails: a title, and a first step.
_ADVICE: Mapping[str, tuple[str, str]] = {
    "retrieval.recall_at_k": (
        "Relevant documents are not found",
        "rewrite or expand queries, raise top_k, or combine keyword and vector search",
    ),
    "retrieval.precision_at_k": (
        "Too many of the documents found are irrelevant",
        "rerank or filter the results, remove duplicates, lower top_k",
    ),
    "retrieval.result_count": (
        "Some queries find no document",
        "look at those queries, check filters and the index, add a fallback search",
    ),
    "retrieval.avg_score": (
        "Documents match their queries weakly",
        "check that index and queries use the same embedding or analyser, and how documents are cut",
    ),
    "retrieval.score_gap": (
        "The retriever hardly tells good documents from bad ones",
        "check that scores are comparable, and try a hybrid or stronger retriever",
    ),
    "rerank.keep_rate": (
        "The reranker drops nearly everything",
        "lower its score limit, or give it better candidates",
    ),
    "rerank.avg_score": (
        "Reranked documents still score low",
        "check the candidates it is given, and whether the model suits the language",
    ),
    "rerank.score_gap": (
        "The reranker hardly tells good documents from bad ones",
        "tune it on your own pairs, or try another model",
    ),
    "output.citation_count": (
        "Answers cite too little",
        "ask for citations in the prompt, and record them as attributes.citations",
    ),
}
_SLOW = ("Stages of this type are too slow", "look at the slowest ones; cache, batch, or shrink their input")
#: What to record, where a metric is 0 only because its attribute was not: that is no failure, and no success.
_UNRECORDED = {
    "retrieval.result_count": ("Retrieval stages do not say what they found", "record attributes.doc_ids, and scores"),
    "output.citation_count": ("Answers do not say what they cite", "record attributes.citations"),
}
_FALLBACK = (
    "A metric misses its threshold",
    "look at the stages where it fails, and whether the threshold suits them",
)


class FailureTally:
    """
    Remembers, of all metrics that pass by, what a recommendation needs: bounded by names, not by events.

    For each metric that fails, in how many of how many stages, and where it is furthest from its threshold.
    """

    def __init__(self) -> None:
        self._judged: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._worst: dict[str, StageMetric] = {}
        #: By metric, the stages that did not record what it is computed from.
        self._unrecorded: dict[str, int] = {}

    def add(self, metric: StageMetric) -> None:
        """Take one metric into account."""
        passed = metric.passed
        name = metric.metric_name
        if name in _UNRECORDED and metric.evidence and metric.evidence.get("missing"):
            self._unrecorded[name] = self._unrecorded.get(name, 0) + 1
            return
        if passed is None:
            return
        self._judged[name] = self._judged.get(name, 0) + 1
        if passed:
            return
        self._failed[name] = self._failed.get(name, 0) + 1
        worst = self._worst.get(name)
        if worst is None or metric.shortfall > worst.shortfall:
            self._worst[name] = metric

    def failing(self) -> list[dict[str, Any]]:
        """Return `{metric_name, failing, of, threshold, worst}` per failing metric, the most frequent first."""
        found = [
            {
                "metric_name": name,
                "failing": self._failed[name],
                "of": self._judged[name],
                "threshold": metric.threshold,
                "worst": metric.score,
            }
            for name, metric in self._worst.items()
        ]
        return sorted(found, key=lambda entry: -entry["failing"] / entry["of"])

    def recommendations(self) -> list[str]:
        """Return one `"[{priority}] {component}: {title} - {hint}"` per failing component, the worst first."""
        by_component: dict[str, StageMetric] = {}
        for name, metric in self._worst.items():
            component = _component(name)
            known = by_component.get(component)
            if known is None or metric.shortfall > known.shortfall:
                by_component[component] = metric
        ranked = sorted(by_component.items(), key=lambda item: -item[1].shortfall)
        advice = [self._recommendation(component, metric) for component, metric in ranked]
        for name, count in self._unrecorded.items():
            title, hint = _UNRECORDED[name]
            advice.append(f"[p2_medium] {_component(name)}: {title} - {hint} (in {count} stages)")
        return advice

    def _recommendation(self, component: str, metric: StageMetric) -> str:
        name = metric.metric_name
        slow = name.endswith(".latency_ms")
        title, hint = _ADVICE.get(name, _SLOW if slow else _FALLBACK)
        relation = "above" if metric.lower_is_better else "below"
        return (
            f"[{_priority(metric.shortfall)}] {component}: {title} - {hint} "
            f"({name} is {relation} {metric.threshold:g} in {self._failed[name]} of {self._judged[name]} stages, "
            f"at worst {figure(metric.score)})"
        )


def _component(metric_name: str) -> str:
    return _COMPONENTS.get(metric_name.partition(".")[0], _OTHER_COMPONENT)


def _priority(shortfall: float) -> str:
    if shortfall >= _CRITICAL:
        return "p0_critical"
    return "p1_high" if shortfall >= _HIGH else "p2_medium"


def bottlenecks(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the missing required stage types, then the three types that are slowest on average."""
    missing = [
        {"type": "missing_stage", "stage_type": kind, "detail": "required stage missing"}
        for kind in summary["missing_required_stage_types"]
    ]
    slowest = sorted(summary["stage_type_avg_durations"].items(), key=lambda item: -item[1])[:3]
    return missing + [
        {"type": "latency", "stage_type": kind, "avg_duration_ms": round(mean_ms, 3)} for kind, mean_ms in slowest
    ]


def debug_report(
    run_summary: Mapping[str, Any],
    summary: Mapping[str, Any],
    metrics: Iterable[StageMetric],
    *,
    max_metrics: int,
    stage_types: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """
    Return the debug report of a run: the object of the contract, `failing_metrics`, and `stage_types` as given.

    All `metrics` are judged; the first `max_metrics` are listed, and `run_summary.total_stage_metrics` says
    how many there are. Trace links are null: a live run has no tracker's metadata to take them from.
    """
    tally, listed, total = FailureTally(), [], 0
    for metric in metrics:
        tally.add(metric)
        total += 1
        if total <= max_metrics:
            listed.append(metric.to_dict())
    return {
        "run_summary": {**run_summary, "total_stage_metrics": total},
        "stage_summary": summary,
        "stage_metrics": listed,
        "failing_metrics": tally.failing(),
        "stage_types": stage_types or {},
        "bottlenecks": bottlenecks(summary),
        "recommendations": tally.recommendations(),
        "phoenix_trace_url": None,
        "langfuse_trace_url": None,
    }


def as_markdown(report: Mapping[str, Any]) -> str:
    """Return a debug report as Markdown, for a ticket or a chat."""
    run, summary = report["run_summary"], report["stage_summary"]
    lines = [f"# Debug report: {run['run_id']}", ""]
    lines += ["| Run | |", "| --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in run.items() if name != "run_id"]
    lines += ["", "## Stages", ""]
    lines += ["| Stage type | Events | Errors | Mean ms | p95 ms |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, count in summary["stage_type_counts"].items():
        detail = report["stage_types"].get(kind, {})
        errors = f"{detail['errors']} ({detail['error_rate']:.0%})" if detail.get("errors") else "0"
        mean_ms, p95_ms = summary["stage_type_avg_durations"].get(kind), detail.get("p95_ms")
        lines.append(f"| {_cell(kind)} | {count} | {errors} | {_ms(mean_ms)} | {_ms(p95_ms)} |")
    lines += ["", "## Bottlenecks", ""]
    lines += [f"- {_bottleneck(entry)}" for entry in report["bottlenecks"]] or ["None."]
    lines += ["", "## Recommendations", ""]
    lines += [f"- {text}" for text in report["recommendations"]] or ["None: every metric holds its threshold."]
    lines += ["", "## Failing metrics", ""]
    if report["failing_metrics"]:
        lines += ["| Metric | Failing | Of | Threshold | Worst |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {_cell(m['metric_name'])} | {m['failing']} | {m['of']} | {m['threshold']:g} | {figure(m['worst'])} |"
            for m in report["failing_metrics"]
        ]
    else:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _bottleneck(entry: Mapping[str, Any]) -> str:
    if entry["type"] == "missing_stage":
        return f"no `{entry['stage_type']}` stage was recorded"
    return f"`{entry['stage_type']}` takes {entry['avg_duration_ms']:g} ms on average"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(value: object) -> str:
    """Return a value as the text of a table cell, in which a bar would end it."""
    return "-" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def figure(score: float) -> str:
    """Return a number for people: four digits of it, and all that are before the point."""
    return f"{score:.0f}" if abs(score) >= 1_000 else f"{score:.4g}"
