"""
Write a stage event by hand, in the words of RAG.

In:   what is known of a stage, a method at a time: a query, documents, an answer, a model, an error.
Out:  a valid `StageEvent` from `build()`.
Pure: for programs that have their own timing, or turn another system's records into stage events. Code
that is to be *measured* wants `StageTracer.stage()` instead.

The attribute names are those that EvalVault's metrics read::

    event = (
        StageEventBuilder("retrieval", run_id="rag-001")
        .query("보험 보장금액은?")
        .documents(["doc-1", "doc-7"], scores=[0.91, 0.72], top_k=5)
        .took(120.5)
        .build()
    )
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from evalvault_sdk.errors import describe_error
from evalvault_sdk.events import StageEvent, StagePayloadRef
from evalvault_sdk.ids import new_stage_id


class StageEventBuilder:
    """
    A fluent builder of one stage event; every method returns the builder.

    Methods may be called in any order; a later call wins over an earlier one for the same field.
    """

    def __init__(self, stage_type: str, *, run_id: str, stage_id: str | None = None) -> None:
        #: Known from the start, so that children can name this stage as their parent.
        self.stage_id = stage_id or new_stage_id()
        self._fields: dict[str, Any] = {"run_id": run_id, "stage_type": stage_type, "stage_id": self.stage_id}
        self._attributes: dict[str, Any] = {}
        self._metadata: dict[str, Any] = {}

    def named(self, stage_name: str) -> StageEventBuilder:
        """Name the component, for example `"hybrid_retriever"`."""
        self._fields["stage_name"] = stage_name
        return self

    def parent(self, parent_stage_id: str) -> StageEventBuilder:
        """Hang the stage below another one."""
        self._fields["parent_stage_id"] = parent_stage_id
        return self

    def trace(self, trace_id: str, span_id: str | None = None) -> StageEventBuilder:
        """Put the stage into a trace: 32 and 16 hex digits in W3C Trace Context, any text for EvalVault."""
        self._fields["trace_id"] = trace_id
        self._fields["span_id"] = span_id
        return self

    def attempt(self, number: int) -> StageEventBuilder:
        """Say which try this was, from 1."""
        self._fields["attempt"] = number
        return self

    def took(self, duration_ms: float) -> StageEventBuilder:
        """Say how long the stage took, in milliseconds."""
        self._fields["duration_ms"] = duration_ms
        return self

    def between(self, started_at: datetime | str, finished_at: datetime | str) -> StageEventBuilder:
        """Say when it began and ended; without an offset a time is taken as UTC."""
        self._fields["started_at"] = started_at
        self._fields["finished_at"] = finished_at
        return self

    def query(self, text: str, *, rewritten: str | None = None) -> StageEventBuilder:
        """Give the query of this stage, and what a rewriting stage made of it."""
        self._attributes["query"] = text
        if rewritten is not None:
            self._attributes["original"] = text
            self._attributes["rewritten"] = rewritten
        return self

    def documents(
        self, doc_ids: Iterable[str], *, scores: Iterable[float] | None = None, top_k: int | None = None
    ) -> StageEventBuilder:
        """Give the ids of the documents found, best first, with their scores and the number asked for."""
        self._attributes["doc_ids"] = list(doc_ids)
        if scores is not None:
            self._attributes["scores"] = list(scores)
        if top_k is not None:
            self._attributes["top_k"] = top_k
        return self

    def relevant(self, doc_ids: Iterable[str]) -> StageEventBuilder:
        """Give the ids that should have been found: with them precision and recall are computed."""
        self._attributes["relevant_doc_ids"] = list(doc_ids)
        return self

    def reranked(
        self, input_count: int, output_count: int, *, scores: Iterable[float] | None = None
    ) -> StageEventBuilder:
        """Say how many documents went into a reranker and how many it kept, with their new scores."""
        self._attributes["input_count"] = input_count
        self._attributes["output_count"] = output_count
        if scores is not None:
            self._attributes["scores"] = list(scores)
        return self

    def answer(
        self,
        text: str | None = None,
        *,
        citations: Iterable[str] | None = None,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
    ) -> StageEventBuilder:
        """Give the answer, the ids of the documents it cites, and the tokens it cost."""
        given = {
            "answer": text,
            "citations": None if citations is None else list(citations),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
        }
        self._attributes.update((key, value) for key, value in given.items() if value is not None)
        return self

    def model(self, name: str, **parameters: Any) -> StageEventBuilder:
        """Name the model and its parameters (`temperature=0.2`); they go into the metadata."""
        self._metadata["model"] = name
        self._metadata.update(parameters)
        return self

    def error(self, error: BaseException | str, *, kind: str | None = None) -> StageEventBuilder:
        """Mark the stage as failed; `kind` names the sort of error where `error` is only its message."""
        self._fields["status"] = "error"
        described = {"type": "Error", "message": error} if isinstance(error, str) else describe_error(error)
        self._attributes["error"] = {**described, "type": kind or described["type"]}
        return self

    def status(self, status: str) -> StageEventBuilder:
        """Set any status; `"success"` is the default."""
        self._fields["status"] = status
        return self

    def input_ref(self, store: str, id: str, type: str = "json") -> StageEventBuilder:
        """Say where the stage's input is kept, instead of carrying it along."""
        self._fields["input_ref"] = StagePayloadRef(store, id, type)
        return self

    def output_ref(self, store: str, id: str, type: str = "json") -> StageEventBuilder:
        """Say where the stage's output is kept, instead of carrying it along."""
        self._fields["output_ref"] = StagePayloadRef(store, id, type)
        return self

    def attributes(self, attributes: Mapping[str, Any] | None = None, **more: Any) -> StageEventBuilder:
        """Add attributes of your own; finite numbers among them become metrics of the stage type."""
        self._attributes.update(attributes or {}, **more)
        return self

    def metadata(self, metadata: Mapping[str, Any] | None = None, **more: Any) -> StageEventBuilder:
        """Add metadata: what the stage ran under."""
        self._metadata.update(metadata or {}, **more)
        return self

    def build(self) -> StageEvent:
        """Return the event. Raises `InvalidStageEventError`, which names the field at fault."""
        return StageEvent(**self._fields, attributes=self._attributes, metadata=self._metadata)
