"""
Live stage tracing of RAG services for EvalVault.

    from evalvault_sdk import StageTracer

    tracer = StageTracer(run_id="rag-001", api_url="http://localhost:8000")

    with tracer.stage("retrieval") as stage:
        stage.set(doc_ids=["doc-1"], scores=[0.91], top_k=5)

A program that carries no tracer around calls `evalvault_sdk.configure(run_id="rag-001")` once, and
`evalvault_sdk.stage(...)` wherever it likes.
"""

from typing import TYPE_CHECKING

from evalvault_sdk.capture.bind import bind
from evalvault_sdk.capture.call import Call
from evalvault_sdk.capture.documents import documents
from evalvault_sdk.capture.nostage import current_stage
from evalvault_sdk.capture.propagate import trace_headers
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.trace import TraceContext
from evalvault_sdk.default import default as _default
from evalvault_sdk.errors import (
    ConfigurationError,
    EvalVaultError,
    InvalidStageEventError,
    MissingDependencyError,
)
from evalvault_sdk.tracer import StageTracer

if TYPE_CHECKING:
    from evalvault_sdk.builder import StageEventBuilder
    from evalvault_sdk.capture.executor import ContextThreadPoolExecutor
    from evalvault_sdk.config import Settings
    from evalvault_sdk.delivery.account import FlushReport, Stats
    from evalvault_sdk.events import StageEvent, StagePayloadRef
    from evalvault_sdk.integrations.automatic import Instrumentation, instrument
    from evalvault_sdk.payload import FolderPayloadStore, PayloadStore
else:
    from importlib import import_module as _import_module

    from evalvault_sdk.late import load as _load

    #: The same for the interpreter, which imports them when they are first asked for: not every program does.
    _LATE = {
        "ContextThreadPoolExecutor": "evalvault_sdk.capture.executor",
        "FlushReport": "evalvault_sdk.delivery.account",
        "FolderPayloadStore": "evalvault_sdk.payload",
        "Instrumentation": "evalvault_sdk.integrations.automatic",
        "PayloadStore": "evalvault_sdk.payload",
        "Settings": "evalvault_sdk.config",
        "StageEvent": "evalvault_sdk.events",
        "StageEventBuilder": "evalvault_sdk.builder",
        "StagePayloadRef": "evalvault_sdk.events",
        "Stats": "evalvault_sdk.delivery.account",
        "instrument": "evalvault_sdk.integrations.automatic",
    }

    def __getattr__(name: str) -> object:
        module = _LATE.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        _load(module)
        found = globals()[name] = getattr(_import_module(module), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATE})


__version__ = "0.1.0"

configure = _default.configure
stage = _default.stage
trace = _default.trace
record_stage = _default.record_stage
record_batch = _default.record_batch
flush = _default.flush
shutdown = _default.shutdown
stats = _default.stats

__all__ = [
    "Call",
    "ConfigurationError",
    "ContextThreadPoolExecutor",
    "EvalVaultError",
    "FlushReport",
    "FolderPayloadStore",
    "Instrumentation",
    "InvalidStageEventError",
    "MissingDependencyError",
    "PayloadStore",
    "Settings",
    "StageContext",
    "StageEvent",
    "StageEventBuilder",
    "StagePayloadRef",
    "StageTracer",
    "Stats",
    "TraceContext",
    "__version__",
    "bind",
    "configure",
    "current_stage",
    "documents",
    "flush",
    "instrument",
    "record_batch",
    "record_stage",
    "shutdown",
    "stage",
    "stats",
    "trace",
    "trace_headers",
]
