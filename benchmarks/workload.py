"""
One RAG request, recorded with one SDK, many times; what it cost as one line of JSON.

In:   the SDK's name, the sink's port, the number of requests.
Out:  nanoseconds of every request on the caller's side, CPU seconds of the whole process until all was
      delivered, and the CPU seconds of the same loop with nothing recorded.

A request is a root and four stages with realistic attributes: about 450 bytes a stage as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

STAGES_PER_REQUEST = 5
QUERY = "이 보험의 사망보험금은 얼마이고, 언제 지급되나요? What does the policy pay, and when?"
DOC_IDS = [f"policy-2026-{number:04d}" for number in range(10)]
SCORES = [0.91, 0.88, 0.83, 0.79, 0.71, 0.64, 0.55, 0.48, 0.41, 0.33]

Request = Callable[[], None]


def with_us(port: int) -> tuple[Request, Callable[[], None]]:
    """Return one request recorded with evalvault-sdk, and its shutdown."""
    from evalvault_sdk import StageTracer

    tracer = StageTracer("bench", f"http://127.0.0.1:{port}", max_queue_events=10**6, max_queue_bytes=1 << 30)

    def request() -> None:
        with tracer.stage("request") as root:
            root.set(query=QUERY, user="u-1029", session="s-88121", channel="web")
            with tracer.stage("query_rewrite") as stage:
                stage.set(original=QUERY, rewritten=QUERY.lower(), language="ko", rewriter="glossary-1")
            with tracer.stage("retrieval") as stage:
                stage.set(doc_ids=DOC_IDS, scores=SCORES, top_k=10)
            with tracer.stage("rerank") as stage:
                stage.set(doc_ids=DOC_IDS[:5], scores=SCORES[:5], input_count=10, output_count=5)
            with tracer.stage("output") as stage:
                stage.set(answer=QUERY * 2, citations=DOC_IDS[:3], tokens_in=912, tokens_out=208, model="gpt-4")

    def end() -> None:
        stats = tracer.shutdown(120)
        assert stats.complete, str(stats)

    return request, end


def with_opentelemetry(port: int) -> tuple[Request, Callable[[], None]]:
    """Return one request recorded with the OpenTelemetry SDK (batches, OTLP over HTTP, gzip), and its shutdown."""
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    exporter = OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", compression=Compression.Gzip)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=10**6))
    tracer = provider.get_tracer("bench")

    def request() -> None:
        with tracer.start_as_current_span("request") as root:
            root.set_attributes({"query": QUERY, "user": "u-1029", "session": "s-88121", "channel": "web"})
            with tracer.start_as_current_span("query_rewrite") as span:
                span.set_attributes(
                    {"original": QUERY, "rewritten": QUERY.lower(), "language": "ko", "rewriter": "glossary-1"}
                )
            with tracer.start_as_current_span("retrieval") as span:
                span.set_attributes({"doc_ids": DOC_IDS, "scores": SCORES, "top_k": 10})
            with tracer.start_as_current_span("rerank") as span:
                span.set_attributes(
                    {"doc_ids": DOC_IDS[:5], "scores": SCORES[:5], "input_count": 10, "output_count": 5}
                )
            with tracer.start_as_current_span("output") as span:
                span.set_attributes(
                    {
                        "answer": QUERY * 2,
                        "citations": DOC_IDS[:3],
                        "tokens_in": 912,
                        "tokens_out": 208,
                        "model": "gpt-4",
                    }
                )

    return request, provider.shutdown


WORKLOADS = {"evalvault-sdk": with_us, "opentelemetry-sdk": with_opentelemetry}


def main() -> None:
    """Run one workload and print what it cost."""
    name, port, requests = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    request, end = WORKLOADS[name](port)
    for _ in range(100):
        request()  # imports, caches, the first connection
    cpu = time.process_time()
    took: list[int] = []
    for _ in range(requests):
        started = time.perf_counter_ns()
        request()
        took.append(time.perf_counter_ns() - started)
    end()
    print(json.dumps({"request_ns": took, "cpu_s": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
