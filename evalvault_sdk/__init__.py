"""
Live stage tracing of RAG services for EvalVault.

    from evalvault_sdk import StageTracer

    tracer = StageTracer(run_id="rag-001", api_url="http://localhost:8000")

    with tracer.stage("retrieval") as stage:
        stage.set(doc_ids=["doc-1"], scores=[0.91], top_k=5)
"""

from evalvault_sdk.builder import StageEventBuilder
from evalvault_sdk.capture.stage import StageContext, current_stage
from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import FlushReport, Stats
from evalvault_sdk.errors import (
    ConfigurationError,
    EvalVaultError,
    InvalidStageEventError,
    MissingDependencyError,
)
from evalvault_sdk.events import StageEvent, StagePayloadRef
from evalvault_sdk.tracer import StageTracer

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "EvalVaultError",
    "FlushReport",
    "InvalidStageEventError",
    "MissingDependencyError",
    "Settings",
    "StageContext",
    "StageEvent",
    "StageEventBuilder",
    "StagePayloadRef",
    "StageTracer",
    "Stats",
    "__version__",
    "current_stage",
]
