"""The guide to tracing is true: its code runs, its metrics are computed from what it says, its twin says the same."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from evalvault_sdk.events import REQUIRED_STAGE_TYPES, StageEvent
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS, SPECIAL_METRICS, metrics_of
from tests.markdown import code_blocks, code_spans, headings, links, section, table_rows
from tests.support import ROOT, LiveServer, run_block

GUIDE = (ROOT / "docs/guides/RAG_TRACING_INTEGRATION.md").read_text(encoding="utf-8")
KOREAN = (ROOT / "docs/guides/RAG_TRACING_INTEGRATION.ko.md").read_text(encoding="utf-8")
METRICS = section(GUIDE, "What to record, so that metrics work")
BLOCKS = code_blocks("python", GUIDE)

#: What the guide's attributes may hold.
SAMPLES = {
    "doc_ids": ["doc-1", "doc-2"],
    "relevant_doc_ids": ["doc-2"],
    "scores": [0.9, 0.4],
    "top_k": 2,
    "input_count": 10,
    "output_count": 5,
    "tokens_in": 900,
    "tokens_out": 210,
    "citations": ["doc-1"],
    "query": "보험 보장금액은?",
    "predicted_label": "claim",
    "label": "claim",
    "confidence": 0.8,
    "violations": ["pii"],
    "violation_count": 1,
    "blocked": True,
    "passed": True,
}


def test_the_korean_twin_says_the_same() -> None:
    assert code_blocks("python", KOREAN) == BLOCKS
    commands = re.compile(r"^\$ [^#\n]*", flags=re.MULTILINE)
    assert commands.findall(KOREAN) == commands.findall(GUIDE)
    assert [level for level, _ in headings(KOREAN)] == [level for level, _ in headings(GUIDE)]
    assert [row[0] for row in table_rows(KOREAN)] == [row[0] for row in table_rows(GUIDE)]
    assert [list(code_spans(row[1])) for row in table_rows(KOREAN)] == [
        list(code_spans(row[1])) for row in table_rows(GUIDE)
    ]
    numbers = re.compile(r"\d+(?:\.\d+)?")
    for row, twin in zip(table_rows(GUIDE), table_rows(KOREAN), strict=True):
        assert numbers.findall(row[-1]) == numbers.findall(twin[-1])

    def pages(text: str) -> list[str]:
        """Where links lead: not to which heading, whose anchor is in the page's own language."""
        paths = [link.partition("#")[0].replace(".ko.md", ".md") for link in links(text)]
        return sorted(path for path in paths if path)

    assert pages(KOREAN) == pages(GUIDE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_code_runs(server: LiveServer, tmp_path: Path, number: int) -> None:
    for module in re.findall(r"from (evalvault_sdk\.integrations\.\w+) import", BLOCKS[number]):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not there yet")
    done = run_block(BLOCKS[number], tmp_path, server.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    if "evalvault_stages" in BLOCKS[number]:
        assert "1 passed" in done.stdout
    if "print(evalvault_sdk.flush())" in BLOCKS[number]:
        assert done.stdout == "recorded 7 = delivered 7\n"
        assert server.get("summary/rag-001")["missing_required_stage_types"] == []


def test_it_names_the_stages_that_a_run_must_have() -> None:
    (said,) = re.findall(r"missing where a run has none: (.*)\.", METRICS)
    assert tuple(code_spans(said)) == REQUIRED_STAGE_TYPES


def metrics_with(stage_type: str, attributes: list[str]) -> dict[str, str]:
    """Return the metrics of a stage with these attributes, and what their thresholds are called."""
    event = StageEvent(
        run_id="run",
        stage_type=stage_type,
        duration_ms=1.0,
        attributes={name: SAMPLES[name] for name in attributes},
    )
    return {
        metric.metric_name: ""
        if metric.threshold is None
        else f"{'at most' if metric.lower_is_better else 'at least'} {metric.threshold:g}"
        for metric in metrics_of(event)
        if not (metric.evidence or {}).get("missing")
    }


ROWS = [row for row in table_rows(METRICS) if "." in row[0]]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("`") for row in ROWS])
def test_a_metric_is_computed_from_the_attributes_that_are_named_and_from_no_fewer(row: list[str]) -> None:
    (name,) = code_spans(row[0])
    stage_type = name.split(".")[0]
    attributes = list(code_spans(row[1]))
    assert metrics_with(stage_type, attributes)[name] == row[2]
    if attributes:
        assert name not in metrics_with(stage_type, [])
    if " or " not in row[1]:
        for left_out in set(attributes) - {"top_k"}:  # without it, all documents count
            assert name not in metrics_with(stage_type, [other for other in attributes if other != left_out])


def test_every_metric_of_a_known_stage_type_is_named_and_every_threshold() -> None:
    named = {next(code_spans(row[0])) for row in ROWS}
    of_types = {f"{kind}.{what}" for kind, names in SPECIAL_METRICS.items() if kind != "*" for what in names}
    assert named == of_types | set(DEFAULT_THRESHOLDS)


def test_the_page_of_the_examples_names_each() -> None:
    folder = ROOT / "examples/rag_tracing"
    named = {next(code_spans(row[0])) for row in table_rows((folder / "README.md").read_text(encoding="utf-8"))}
    assert {path.name for path in folder.glob("*.py")} <= named
