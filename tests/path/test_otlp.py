"""Programs that know nothing of our SDK: OpenTelemetry's own, posting to a real server."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from tests.support import LiveServer, clean_environment

PROGRAM = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
tracer = provider.get_tracer("rag")
documents = '[{"doc_id": "policy-1", "score": 0.91}, {"doc_id": "policy-7", "score": 0.72}]'
with tracer.start_as_current_span("ask", attributes={"openinference.span.kind": "CHAIN"}):
    with tracer.start_as_current_span(
        "retrieve", attributes={"rag.module": "retrieve", "retrieval.documents_json": documents}
    ):
        pass
    try:
        with tracer.start_as_current_span("chat", attributes={"gen_ai.operation.name": "chat"}) as span:
            span.set_attribute("gen_ai.usage.input_tokens", 10)
            raise TimeoutError("the model did not answer")
    except TimeoutError:
        pass
provider.shutdown()
"""


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_an_unmodified_opentelemetry_program_arrives_as_a_tree_of_stages(server: LiveServer, compression: str) -> None:
    run = f"otel-{uuid.uuid4()}"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **clean_environment(),
            "OTEL_EXPORTER_OTLP_ENDPOINT": server.url,
            "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
            "OTEL_RESOURCE_ATTRIBUTES": f"service.name=rag,evalvault.run_id={run}",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (trace,) = server.get(f"traces/{run}")["traces"]
    assert (trace["name"], trace["status"], trace["stage_count"], trace["error_count"]) == ("ask", "error", 3, 1)
    events = {event["stage_name"]: event for event in server.get(f"events/{run}")["events"]}
    root, retrieval, answer = events["ask"], events["retrieve"], events["chat"]
    assert (root["stage_type"], retrieval["stage_type"], answer["stage_type"]) == ("chain", "retrieval", "output")
    assert retrieval["parent_stage_id"] == answer["parent_stage_id"] == root["stage_id"]
    assert retrieval["attributes"]["doc_ids"] == ["policy-1", "policy-7"]
    assert answer["attributes"]["tokens_in"] == 10
    error = answer["attributes"]["error"]
    assert (error["type"], error["message"]) == ("TimeoutError", "the model did not answer")
    metrics = {metric["metric_name"]: metric["score"] for metric in server.get(f"metrics/{run}")["metrics"]}
    assert metrics["retrieval.result_count"] == 2
