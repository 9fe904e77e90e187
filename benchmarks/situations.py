"""
The situations that SDKs are measured in, and what is measured there.

In:   nothing.
Out:  a row of settings for each situation; a sentence for each measure.
"""

from __future__ import annotations

import attrs

#: What is measured, and its unit.
MEASURES = {
    "caller_p50_us": "caller, µs per stage, median",
    "caller_p99_us": "caller, µs per stage, p99",
    "slowest_ms": "slowest request, ms",
    "cpu_us": "CPU of the process, µs per stage",
    "delivered_per_s": "delivered stages per second",
    "wire_bytes": "bytes on the wire per stage",
    "peak_mib": "peak memory, MiB",
    "queued_bytes": "memory per waiting stage, bytes",
    "exit_s": "exit, s",
    "import_ms": "import, ms",
    "packages": "packages installed",
}
#: Of these the higher is the better.
HIGHER_IS_BETTER = {"delivered_per_s"}

#: Forms of a request of which a framework makes the stages, as many as its handler likes.
FRAMEWORKS = {"langchain", "llama_index"}

PEERS = ("opentelemetry", "langfuse", "langsmith", "logfire", "sentry", "posthog")
ALL = ("evalvault-sdk", *PEERS)
_CALLER = ("caller_p50_us", "caller_p99_us", "slowest_ms", "cpu_us")


@attrs.frozen(kw_only=True)
class Situation:
    """What SDKs have to do, and how the world around them is."""

    name: str
    title: str
    measures: tuple[str, ...]
    #: What a request is: one of `benchmarks.run.FORMS`.
    form: str = "blocks"
    #: `answers` after `latency_ms`; `stalls`: takes requests and never answers; `refuses` connections.
    server: str = "answers"
    latency_ms: float = 0
    #: Requests that one process records, in so many threads.
    requests: int = 2000
    threads: int = 1
    #: Bytes of text that each stage carries besides.
    text_bytes: int = 0
    subjects: tuple[str, ...] = ALL
    #: How a process ends: `flush` awaits what was recorded; `leave` lets the SDK see to it; `abort` does not care.
    end: str = "flush"


SITUATIONS = {
    situation.name: situation
    for situation in (
        Situation(
            name="healthy",
            title="with-blocks, a server that answers at once",
            measures=(*_CALLER, "delivered_per_s", "wire_bytes", "peak_mib"),
            requests=5000,
        ),
        Situation(
            name="durability",
            title="the same in this package's three durabilities",
            measures=(*_CALLER, "delivered_per_s", "peak_mib"),
            requests=10_000,
            subjects=("evalvault-sdk", "evalvault-sdk, memory", "evalvault-sdk, journal"),
        ),
        Situation(
            name="loopback",
            title="as many as go, beside the least that a program could do by itself",
            measures=("caller_p50_us", "cpu_us", "delivered_per_s", "wire_bytes"),
            requests=20_000,
            subjects=("evalvault-sdk", "prototype", "evalvault-sdk, zstd"),
        ),
        Situation(
            name="latency-100",
            title="the same with 100 ms to the server",
            measures=("caller_p50_us", "cpu_us", "delivered_per_s"),
            latency_ms=100,
            requests=20_000,
            subjects=("evalvault-sdk", "prototype"),
        ),
        Situation(
            name="latency-50",
            title="50 ms to the server",
            measures=("caller_p50_us", "caller_p99_us", "delivered_per_s"),
            latency_ms=50,
            requests=1000,
        ),
        Situation(
            name="latency-200",
            title="200 ms to the server",
            measures=("caller_p50_us", "caller_p99_us", "delivered_per_s"),
            latency_ms=200,
            requests=1000,
        ),
        Situation(
            name="outage", title="a server that refuses connections", measures=_CALLER, server="refuses", end="abort"
        ),
        Situation(
            name="queued",
            title="a server that never answers",
            measures=("queued_bytes",),
            server="stalls",
            requests=2000,
            end="abort",
        ),
        Situation(
            name="10KB",
            title="10 KB of text in each stage",
            measures=("caller_p50_us", "cpu_us", "wire_bytes"),
            text_bytes=10_000,
            requests=200,
        ),
        Situation(
            name="100KB",
            title="100 KB of text in each stage",
            measures=("caller_p50_us", "cpu_us", "wire_bytes"),
            text_bytes=100_000,
            requests=40,
        ),
        Situation(
            name="decorators",
            title="decorated functions",
            measures=_CALLER,
            form="decorators",
            subjects=tuple(name for name in ALL if name != "posthog"),
            requests=1000,
        ),
        Situation(
            name="records",
            title="stages that were measured elsewhere",
            measures=_CALLER,
            form="records",
            subjects=tuple(name for name in ALL if name not in ("logfire", "sentry")),
            requests=1000,
        ),
        Situation(
            name="tasks",
            title="with-blocks in 16 tasks of asyncio that take turns",
            measures=("cpu_us", "delivered_per_s"),
            form="tasks",
            subjects=tuple(name for name in ALL if name != "posthog"),
            requests=512,
        ),
        Situation(
            name="threads",
            title="with-blocks in 16 threads",
            measures=("cpu_us", "delivered_per_s"),
            threads=16,
            subjects=tuple(name for name in ALL if name != "posthog"),
            requests=512,
        ),
        Situation(
            name="exit",
            title="2,000 stages and the end of the program, without a flush",
            measures=("exit_s",),
            requests=400,
            end="leave",
        ),
        Situation(
            name="langchain",
            title="a chain of LangChain with each SDK's handler",
            measures=("caller_p50_us", "cpu_us", "wire_bytes"),
            form="langchain",
            requests=300,
            subjects=("evalvault-sdk", "openinference", "langsmith"),
        ),
        Situation(
            name="llama-index",
            title="a query engine of LlamaIndex with each SDK's instrumentation",
            measures=("caller_p50_us", "cpu_us", "wire_bytes"),
            form="llama_index",
            requests=200,
            subjects=("evalvault-sdk", "openinference"),
        ),
        Situation(name="start", title="import and install", measures=("import_ms", "packages")),
    )
}
