"""The whole way of a program on LlamaIndex: the example, a real server, and what that says of it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.support import ROOT, LiveServer, clean_environment

pytest.importorskip("llama_index.core")
pytest.importorskip("bm25s")

EXAMPLE = ROOT / "examples" / "rag_tracing" / "llamaindex_example.py"
RUN = "llamaindex-example"


def tree(events: list[dict[str, Any]], root: dict[str, Any]) -> Any:
    """Return the stage types of a request, nested, in the order in which they began."""
    children = [event for event in events if event["parent_stage_id"] == root["stage_id"]]
    children.sort(key=lambda event: (event["started_at"], event["stage_id"]))
    return root["stage_type"], [tree(events, child) for child in children]


def test_the_server_says_something_useful_of_the_example(server: LiveServer) -> None:
    done = subprocess.run(
        # LlamaIndex itself uses what newer Pythons will not have for ever.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(EXAMPLE)],
        env={**clean_environment(), "EVALVAULT_API_URL": server.url, "EVALVAULT_RUN_ID": RUN},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "Recursively copy a directory tree" in done.stdout

    summary = server.get(f"summary/{RUN}", detail=True)
    assert f"recorded {summary['total_events']} = delivered {summary['total_events']}" in done.stdout
    assert summary["missing_required_stage_types"] == []
    counts = summary["stage_type_counts"]
    assert (counts["input"], counts["system_prompt"], counts["output"], counts["retrieval"]) == (12, 12, 12, 12)
    assert (counts["rerank"], counts["query_rewrite"]) == (10, 11)
    assert summary["stage_types"]["output"]["errors"] == 0

    events = server.get(f"events/{RUN}", limit=1_000)["events"]
    roots = sorted(
        (event for event in events if event["parent_stage_id"] is None), key=lambda event: event["started_at"]
    )
    assert [root["stage_name"] for root in roots] == (
        ["TransformQueryEngine"] * 10 + ["CondensePlusContextChatEngine"] * 2
    )
    answered: Any = ("chain", [("system_prompt", []), ("output", [])])
    queried = ("chain", [("retrieval", []), ("rerank", []), answered])
    assert all(tree(events, root) == ("chain", [("input", []), ("query_rewrite", []), queried]) for root in roots[:10])
    last = Counter(event["stage_type"] for event in events if event["trace_id"] == roots[-1]["trace_id"])
    assert last["query_rewrite"] == 1, "only the second question of a chat needs the first"
    assert len({root["trace_id"] for root in roots}) == 12, "each request is a trace"
    assert [root["metadata"].get("session_id") for root in roots] == [None] * 10 + ["session-1"] * 2
    korean = next(event for event in events if event["attributes"].get("query") == "임시 파일은 어떻게 만드나요?")
    assert korean["stage_type"] in ("chain", "input")
    streamed = [event["attributes"] for event in events if "time_to_first_token_ms" in event["attributes"]]
    assert len(streamed) == 2
    assert all(output["citations"] and output["tokens_out"] for output in streamed)

    metrics: dict[str, list[float]] = {}
    for metric in server.get(f"metrics/{RUN}", limit=10_000)["metrics"]:
        metrics.setdefault(metric["metric_name"], []).append(metric["score"])
    assert len(metrics["output.latency_ms"]) == len(metrics["output.citation_count"]) == 12
    assert len(metrics["retrieval.recall_at_k"]) == 10
    assert sum(metrics["retrieval.recall_at_k"]) >= 8, "most of what should be found is found"
    assert max(metrics["rerank.keep_rate"]) < 1
    assert all(0 < ratio < 2 for ratio in metrics["output.token_ratio"])

    report = server.get(f"debug/{RUN}")
    assert [found["type"] for found in report["bottlenecks"]] == ["latency"] * 3
    assert any("retriever" in advice for advice in report["recommendations"])
