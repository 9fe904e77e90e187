"""The example of LangChain, as a user runs it: a real program, a real server, and what the server says of it."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT, LiveServer, clean_environment


def test_the_example_is_traced_all_the_way(server: LiveServer) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "rag_tracing" / "langchain_example.py")],
        env={**clean_environment(), "EVALVAULT_API_URL": server.url, "EVALVAULT_RUN_ID": "langchain"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "recorded 80 = delivered 80" in done.stdout

    events = server.get("events/langchain", limit=1000)["events"]
    roots = [event for event in events if event["parent_stage_id"] is None]
    assert len(roots) == 10
    for root in roots:
        below = [event for event in events if event["parent_stage_id"] == root["stage_id"]]
        below.sort(key=lambda event: event["started_at"])
        assert [event["stage_type"] for event in below] == [
            *("input", "query_rewrite", "retrieval", "chain", "system_prompt", "output", "parser")
        ]
        assert {event["trace_id"] for event in below} == {root["trace_id"]}
    korean = [event for event in events if event["attributes"].get("original") == "임시 파일은 어떻게 만드나요?"]
    assert [event["attributes"]["rewritten"] for event in korean] == ["temporary file"]

    report = server.get("debug/langchain")
    assert report["stage_summary"]["missing_required_stage_types"] == []
    assert report["run_summary"]["total_traces"] == 10
    assert not [entry for entry in report["bottlenecks"] if entry["type"] == "missing_stage"]
    assert any("retriever" in recommendation for recommendation in report["recommendations"])
    metrics = server.get("metrics/langchain", limit=1000)["metrics"]
    scores: dict[str, list[float]] = {}
    for metric in metrics:
        scores.setdefault(metric["metric_name"], []).append(metric["score"])
    for name in ("retrieval.recall_at_k", "retrieval.avg_score", "output.token_ratio", "output.citation_count"):
        assert len(scores[name]) == 10
    assert sum(scores["retrieval.recall_at_k"]) >= 5
