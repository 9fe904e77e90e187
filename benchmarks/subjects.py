"""
The SDKs that are measured: how a program records a stage with each, and what of each is not left at its default.

In:   the sink's port.
Out:  the ways to record that an SDK has: with-blocks, decorators, ready-made stages; and a flush that is awaited.

Peers get queues that lose nothing (`QUEUES`, and what their constructors want), and nothing else that they would not
have in a program. They are imported only when they are made: each runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from benchmarks.workload import Attributes

_QUEUE = 10**6
#: What flushes may take that can be told so; what has not arrived then does not count.
_FLUSH_TIMEOUT_S = 10
#: The environment of every process that is measured: where a constructor has no argument for it.
QUEUES = {
    "OTEL_BSP_MAX_QUEUE_SIZE": str(_QUEUE),  # OpenTelemetry, Langfuse, Logfire
    "LANGSMITH_TRACING_QUEUE_MAX_SIZE": str(_QUEUE),
}


class Subject:
    """An SDK, set up to deliver to the sink."""

    name: ClassVar[str]
    #: What a program that records with it imports, as a statement, and what it installs.
    imports: ClassVar[str] = ""
    distributions: ClassVar[tuple[str, ...]] = ()
    #: What is not default, for the reader of the table.
    configured: ClassVar[str] = ""
    #: Given a name: a context manager that measures a block, at the root and below it.
    root: Callable[[str], Any]
    span: Callable[[str], Any]
    #: Put attributes on what the context manager gave.
    fill: Callable[[Any, Attributes], object]
    #: Given a name: a decorator; and put attributes on the stage that the code runs in. None: it has none.
    decorate: Callable[[str], Callable[[Callable[[], object]], Callable[[], object]]] | None = None
    fill_current: Callable[[Attributes], object] | None = None
    #: Given name, attributes and what the parent's gave: record what was measured elsewhere. None: it has no way.
    record: Callable[[str, Attributes, Any], Any] | None = None

    def __init__(self, port: int) -> None:
        raise NotImplementedError

    def instrument(self, framework: Literal["langchain", "llama_index"]) -> list[Any]:
        """Have a framework recorded; return the callbacks that it is to be called with, if that is how."""
        return []

    def flush(self) -> None:
        """Deliver all that was recorded, and wait for it."""


class Nothing(Subject):
    """The same loop with nothing recorded: what the loop itself costs."""

    name = "nothing"

    def __init__(self, port: int) -> None:
        block = contextlib.nullcontext()
        self.root = self.span = lambda name: block
        self.fill = lambda span, attributes: None
        self.decorate = lambda name: lambda function: function
        self.fill_current = lambda attributes: None
        self.record = lambda name, attributes, parent: None


class EvalVault(Subject):
    """Our own, in one of its three durabilities."""

    name = "evalvault-sdk"
    imports = "from evalvault_sdk import StageTracer"
    distributions = ("evalvault-sdk",)
    configured = "max_queue_events, max_queue_bytes, spool_max_bytes; durability where named"
    durability: ClassVar[Literal["memory", "spool", "journal"]] = "spool"
    compression: ClassVar[Literal["gzip", "zstd"]] = "gzip"

    def __init__(self, port: int) -> None:
        from evalvault_sdk import StageTracer, current_stage

        tracer = self._tracer = StageTracer(
            "bench",
            f"http://127.0.0.1:{port}",
            durability=self.durability,
            compression=self.compression,
            max_queue_events=_QUEUE,
            max_queue_bytes=1 << 32,
            spool_max_bytes=1 << 32,
        )
        self.root = self.span = tracer.stage
        self.fill = lambda stage, attributes: stage.set(**attributes)
        self.decorate = tracer.stage
        self.fill_current = lambda attributes: current_stage().set(**attributes)
        self.record = lambda name, attributes, parent: tracer.record_stage(
            name, attributes=attributes, parent_stage_id=parent, duration_ms=1.0
        )

    def instrument(self, framework: Literal["langchain", "llama_index"]) -> list[Any]:
        """Instrument it with one call."""
        from evalvault_sdk import instrument

        done = instrument(framework, tracer=self._tracer)
        assert done.instrumented == (framework,), str(done)
        return []

    def flush(self) -> None:
        """Flush, and see to it that the account says what the sink will."""
        report = self._tracer.flush(_FLUSH_TIMEOUT_S)
        assert report.complete, str(report)


class EvalVaultInMemory(EvalVault):
    """The same, with nothing on disk ever."""

    name = "evalvault-sdk, memory"
    durability = "memory"


class EvalVaultWithZstd(EvalVault):
    """The same, with bodies packed by zstd instead of gzip."""

    name = "evalvault-sdk, zstd"
    compression = "zstd"


class EvalVaultWithJournal(EvalVault):
    """The same, with every event on disk as it is recorded."""

    name = "evalvault-sdk, journal"
    durability = "journal"


class OpenTelemetry(Subject):
    """The OpenTelemetry SDK: batches, OTLP over HTTP, gzip."""

    name = "opentelemetry"
    imports = (
        "from opentelemetry.sdk.trace import TracerProvider; "
        "from opentelemetry.sdk.trace.export import BatchSpanProcessor; "
        "from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter"
    )
    distributions = ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")
    configured = "OTEL_BSP_MAX_QUEUE_SIZE; gzip"

    def __init__(self, port: int) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http import Compression
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = OTLPSpanExporter(f"http://127.0.0.1:{port}/v1/traces", compression=Compression.Gzip)
        self._provider = TracerProvider()
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        tracer = self._provider.get_tracer("bench")

        def record(name: str, attributes: Attributes, parent: Any) -> Any:
            context = None if parent is None else trace.set_span_in_context(parent)
            span = tracer.start_span(name, context, attributes=attributes)
            span.end()
            return span

        self.root = self.span = self.decorate = tracer.start_as_current_span
        self.fill = lambda span, attributes: span.set_attributes(attributes)
        self.fill_current = lambda attributes: trace.get_current_span().set_attributes(attributes)
        self.record = record

    def flush(self) -> None:
        """Flush."""
        self._provider.force_flush(_FLUSH_TIMEOUT_S * 1000)


class OpenInference(OpenTelemetry):
    """OpenInference's instrumentation of frameworks, with the OpenTelemetry SDK."""

    name = "openinference"

    def instrument(self, framework: Literal["langchain", "llama_index"]) -> list[Any]:
        """Instrument it."""
        if framework == "langchain":
            from openinference.instrumentation.langchain import LangChainInstrumentor as Instrumentor
        else:
            from openinference.instrumentation.llama_index import LlamaIndexInstrumentor as Instrumentor
        Instrumentor().instrument(tracer_provider=self._provider)
        return []


class Langfuse(Subject):
    """Langfuse's SDK: attributes as metadata of observations."""

    name = "langfuse"
    imports = "from langfuse import Langfuse, observe"
    distributions = ("langfuse",)
    configured = "OTEL_BSP_MAX_QUEUE_SIZE"

    def __init__(self, port: int) -> None:
        from langfuse import Langfuse, observe

        client = self._client = Langfuse(
            public_key="pk-lf-bench", secret_key="sk-lf-bench", base_url=f"http://127.0.0.1:{port}"
        )

        def record(name: str, attributes: Attributes, parent: Any) -> Any:
            return (parent or client).start_observation(name=name, as_type="span", metadata=attributes).end()

        self.root = self.span = lambda name: client.start_as_current_observation(name=name, as_type="span")
        self.fill = lambda span, attributes: span.update(metadata=attributes)
        self.decorate = lambda name: observe(name=name)
        self.fill_current = lambda attributes: client.update_current_span(metadata=attributes)
        self.record = record

    def flush(self) -> None:
        """Flush."""
        self._client.flush()


class LangSmith(Subject):
    """LangSmith's SDK: attributes as metadata of runs; zstd, as its cloud tells it to."""

    name = "langsmith"
    imports = "from langsmith import Client, trace, traceable"
    distributions = ("langsmith",)
    configured = "LANGSMITH_TRACING_QUEUE_MAX_SIZE; the sink's /info answers as its cloud: zstd, 100 runs a body"

    def __init__(self, port: int) -> None:
        import langsmith
        from langsmith.run_helpers import get_current_run_tree
        from langsmith.run_trees import RunTree

        client = self._client = langsmith.Client(f"http://127.0.0.1:{port}", api_key="bench")

        def fill_current(attributes: Attributes) -> None:
            run = get_current_run_tree()
            assert run is not None
            run.add_metadata(attributes)

        def record(name: str, attributes: Attributes, parent: Any) -> Any:
            extra = {"metadata": attributes}
            run = (
                parent.create_child(name, extra=extra) if parent else RunTree(name=name, extra=extra, ls_client=client)
            )
            run.end()
            run.post()
            return run

        self.root = self.span = lambda name: langsmith.trace(name, client=client)
        self.fill = lambda run, attributes: run.add_metadata(attributes)
        self.decorate = lambda name: langsmith.traceable(name=name, client=client)
        self.fill_current = fill_current
        self.record = record
        langsmith.configure(enabled=True)

    def instrument(self, framework: Literal["langchain", "llama_index"]) -> list[Any]:
        """Return LangChain's own handler for it."""
        from langchain_core.tracers import LangChainTracer

        return [LangChainTracer(client=self._client)]

    def flush(self) -> None:
        """Flush."""
        self._client.flush()


class Logfire(Subject):
    """Logfire's SDK."""

    name = "logfire"
    imports = "import logfire"
    distributions = ("logfire",)
    configured = "OTEL_BSP_MAX_QUEUE_SIZE; console=False, metrics=False"

    def __init__(self, port: int) -> None:
        import logfire
        from opentelemetry import trace

        logfire.configure(
            token="pylf_v1_local_bench",
            service_name="bench",
            console=False,
            metrics=False,
            advanced=logfire.AdvancedOptions(base_url=f"http://127.0.0.1:{port}"),
        )
        self._flush = logfire.force_flush
        self.root = self.span = logfire.span
        self.fill = lambda span, attributes: span.set_attributes(attributes)
        self.decorate = logfire.instrument
        self.fill_current = lambda attributes: trace.get_current_span().set_attributes(attributes)

    def flush(self) -> None:
        """Flush."""
        self._flush(_FLUSH_TIMEOUT_S * 1000)


class Sentry(Subject):
    """Sentry's SDK: a transaction with spans."""

    name = "sentry"
    imports = "import sentry_sdk"
    distributions = ("sentry-sdk",)
    configured = "transport_queue_size, traces_sample_rate=1, auto_enabling_integrations=False"

    def __init__(self, port: int) -> None:
        import sentry_sdk

        sentry_sdk.init(
            f"http://bench@127.0.0.1:{port}/1",
            traces_sample_rate=1.0,
            transport_queue_size=_QUEUE,
            auto_enabling_integrations=False,  # the peers beside it are not what its users have
        )

        def fill(span: Any, attributes: Attributes) -> None:
            for key, value in attributes.items():
                span.set_data(key, value)

        def decorate(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
            def decorator(function: Callable[[], object]) -> Callable[[], object]:
                traced: Callable[[], object] = sentry_sdk.trace(name=name)(function)
                if name != "request":
                    return traced

                def root() -> object:
                    with sentry_sdk.start_transaction(name=name):  # it has no decorator for a root
                        return function()

                return root

            return decorator

        self._flush = sentry_sdk.flush
        self.root = lambda name: sentry_sdk.start_transaction(name=name)
        self.span = lambda name: sentry_sdk.start_span(name=name)
        self.fill = fill
        self.decorate = decorate
        self.fill_current = lambda attributes: fill(sentry_sdk.get_current_span(), attributes)

    def flush(self) -> None:
        """Flush."""
        self._flush(timeout=_FLUSH_TIMEOUT_S)


class PostHog(Subject):
    """PostHog's SDK: it has no spans, the program measures and captures `$ai_span` events."""

    name = "posthog"
    imports = "from posthog import Posthog"
    distributions = ("posthog",)
    configured = "max_queue_size; no spans of its own, blocks are timed and ids made by the program"

    def __init__(self, port: int) -> None:
        from posthog import Posthog

        client = self._client = Posthog("phc_bench", host=f"http://127.0.0.1:{port}", max_queue_size=_QUEUE)
        around: list[str] = []

        class Block:
            def __init__(self, name: str) -> None:
                self.properties: Attributes = {"$ai_span_name": name, "$ai_span_id": str(uuid.uuid4())}

            def __enter__(self) -> Block:
                self.properties["$ai_parent_id"] = around[-1] if around else None
                around.append(self.properties["$ai_span_id"])
                self.started = time.perf_counter()
                return self

            def __exit__(self, *_: object) -> None:
                self.properties["$ai_latency"] = time.perf_counter() - self.started
                self.properties["$ai_trace_id"] = around[0]
                around.pop()
                client.capture("$ai_span", distinct_id="u-1029", properties=self.properties)

        def record(name: str, attributes: Attributes, parent: Any) -> Any:
            span_id = str(uuid.uuid4())
            known = {"$ai_span_name": name, "$ai_span_id": span_id, "$ai_trace_id": parent or span_id}
            client.capture("$ai_span", distinct_id="u-1029", properties={**attributes, **known})
            return span_id

        self.root = self.span = Block
        self.fill = lambda block, attributes: block.properties.update(attributes)
        self.record = record

    def flush(self) -> None:
        """Flush."""
        self._client.flush()


class Prototype(Subject):
    """The least that a program could do by itself: `benchmarks.prototype`."""

    name = "prototype"
    imports = "import orjson, requests"
    distributions = ("orjson", "requests")
    configured = "no bounds, no retries, no disk, one thread only"

    def __init__(self, port: int) -> None:
        from benchmarks.prototype import Block, Sender

        sender = self._sender = Sender(port)
        self.root = self.span = lambda name: Block(name, sender)
        self.fill = lambda block, attributes: block.attributes.update(attributes)

    def flush(self) -> None:
        """Wait until all is sent."""
        self._sender.flush()


SUBJECTS: dict[str, type[Subject]] = {
    subject.name: subject
    for subject in (
        EvalVault,
        EvalVaultInMemory,
        EvalVaultWithJournal,
        EvalVaultWithZstd,
        OpenTelemetry,
        OpenInference,
        Langfuse,
        LangSmith,
        Logfire,
        Sentry,
        PostHog,
        Prototype,
        Nothing,
    )
}
