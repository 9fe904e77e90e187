"""
Say of a stage in the words of OpenInference and of OpenTelemetry's conventions what it says in EvalVault's.

In:   a stage event.
Out:  attributes that Phoenix, and whatever else shows spans of LLM programs, knows how to show.
Pure. The other direction is `otel.vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from evalvault_sdk.events import StageEvent

_KINDS: Mapping[str, str] = {
    "output": "LLM",
    "retrieval": "RETRIEVER",
    "rerank": "RERANKER",
    "embedding": "EMBEDDING",
    "tool": "TOOL",
    "agent": "AGENT",
    "system_prompt": "PROMPT",
    "safety_check": "GUARDRAIL",
    "answer_validation": "EVALUATOR",
    "eval": "EVALUATOR",
}
#: Any other stage.
_OTHER_KIND = "CHAIN"
_OPERATIONS: Mapping[str, str] = {
    "output": "chat",
    "embedding": "embeddings",
    "tool": "execute_tool",
    "agent": "invoke_agent",
}
#: Of scalars: what they are called there.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "tokens_in": ("gen_ai.usage.input_tokens", "llm.token_count.prompt"),
    "tokens_out": ("gen_ai.usage.output_tokens", "llm.token_count.completion"),
    "tokens_total": ("llm.token_count.total",),
    "temperature": ("gen_ai.request.temperature",),
    "tool_name": ("gen_ai.tool.name", "tool.name"),
    "agent_name": ("gen_ai.agent.name", "agent.name"),
}
#: Of a `request`, as `integrations.asgi` records it: OpenTelemetry's conventions for HTTP.
_HTTP_NAMES: Mapping[str, tuple[str, ...]] = {
    "method": ("http.request.method",),
    "route": ("http.route",),
    "path": ("url.path",),
    "status_code": ("http.response.status_code",),
}
_MODELS: Mapping[str, tuple[str, ...]] = {
    "output": ("gen_ai.request.model", "llm.model_name"),
    "embedding": ("gen_ai.request.model", "embedding.model_name"),
    "rerank": ("reranker.model_name",),
}
_DOCUMENTS: Mapping[str, str] = {"retrieval": "retrieval.documents", "rerank": "reranker.output_documents"}
#: Each is two attributes, and many receivers take 128.
_MAX_DOCUMENTS = 50
_INPUTS = ("query", "original", "input", "question", "prompt")
_OUTPUTS = ("answer", "output", "rewritten", "result")
_METADATA: Mapping[str, str] = {"session_id": "session.id", "user_id": "user.id"}


def standard_attributes(event: StageEvent) -> dict[str, Any]:
    """Return scalars by their standard names; of documents each id and score is one."""
    stage_type, said = event.stage_type, event.attributes
    found: dict[str, Any] = {"openinference.span.kind": _KINDS.get(stage_type, _OTHER_KIND)}
    if stage_type in _OPERATIONS:
        found["gen_ai.operation.name"] = _OPERATIONS[stage_type]
    for name, names in (_HTTP_NAMES if stage_type == "request" else _NAMES).items():
        if _is_scalar(said.get(name)):
            found.update(dict.fromkeys(names, said[name]))
    model = said.get("model") or event.metadata.get("model")
    if isinstance(model, str):
        found.update(dict.fromkeys(_MODELS.get(stage_type, ()), model))
    for names, standard in ((_INPUTS, "input.value"), (_OUTPUTS, "output.value")):
        text = next((text for name in names if isinstance(text := said.get(name), str)), None)
        if text is not None:
            found[standard] = text
    for name, standard in _METADATA.items():
        if isinstance(value := event.metadata.get(name), str):
            found[standard] = value
    error = said.get("error")
    if event.status == "error" and isinstance(error, Mapping) and isinstance(kind := error.get("type"), str):
        found["error.type"] = kind
    if stage_type in _DOCUMENTS:
        found.update(_documents(_DOCUMENTS[stage_type], said))
    return found


def _documents(root: str, said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    ids, scores = (value if isinstance(value := said.get(name), list) else [] for name in ("doc_ids", "scores"))
    for place, identity in enumerate(ids[:_MAX_DOCUMENTS]):
        if isinstance(identity, str):
            yield f"{root}.{place}.document.id", identity
            if place < len(scores) and _is_scalar(scores[place]):
                yield f"{root}.{place}.document.score", scores[place]


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float)
