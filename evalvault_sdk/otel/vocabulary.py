"""
Translate the attributes of the conventions for RAG and LLM programs into the names of EvalVault.

In:   the attributes of a span, in the words of Open RAG Trace, OpenInference, OpenTelemetry's semantic conventions
      for generative AI, or OpenLLMetry; and its stage type.
Out:  the attributes of a stage: `query`, `doc_ids`, `scores`, `tokens_in` ... as metrics are computed from them.
Pure. What was translated is not repeated; everything else keeps its name. An attribute that has EvalVault's name
already is left alone, and nothing is translated into it.

The conventions: Open RAG Trace Spec, draft 0.1 (EvalVault's docs/architecture); OpenInference, "Semantic
Conventions"; OpenTelemetry, "Semantic conventions for generative AI systems"; the span attributes of OpenLLMetry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evalvault_sdk.otel import documents
from evalvault_sdk.otel.indexed import gather
from evalvault_sdk.otel.plain import parsed

#: What says of which type a stage is, in order; and how its values are called here. Others are taken as they are.
_TYPES: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("evalvault.stage_type", {}),
    (
        "rag.module",
        {"embed": "embedding", "retrieve": "retrieval", "prompt": "system_prompt", "llm": "output"},
    ),
    (
        "openinference.span.kind",
        {
            "llm": "output",
            "retriever": "retrieval",
            "reranker": "rerank",
            "prompt": "system_prompt",
            "guardrail": "safety_check",
            "evaluator": "eval",
            "unknown": "",
        },
    ),
    (
        "gen_ai.operation.name",
        {
            "chat": "output",
            "text_completion": "output",
            "generate_content": "output",
            "embeddings": "embedding",
            "vector_db_retrieve": "retrieval",  # OpenLLMetry's, as is execute_task
            "execute_tool": "tool",
            "execute_task": "chain",
            "invoke_workflow": "chain",
            "invoke_agent": "agent",
            "create_agent": "agent",
        },
    ),
    ("llm.request.type", {"chat": "output", "completion": "output"}),
    ("traceloop.span.kind", {"workflow": "chain", "task": "chain"}),
)
#: One type stands for several operations: which it was is worth keeping.
_KEPT = "gen_ai.operation.name"
_CUSTOM = "custom."

#: Each name of EvalVault's, and what it is called elsewhere: the first that is there is taken.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "model": (
        *("llm.model_name", "embedding.model_name", "reranker.model_name", "rerank.model_name"),
        *("gen_ai.response.model", "gen_ai.request.model", "llm.response.model_name", "llm.request.model_name"),
    ),
    "temperature": ("llm.temperature", "gen_ai.request.temperature"),
    "tokens_in": (
        *("llm.token_count.prompt", "gen_ai.usage.input_tokens"),
        *("gen_ai.usage.prompt_tokens", "llm.usage.prompt_tokens"),
    ),
    "tokens_out": (
        *("llm.token_count.completion", "gen_ai.usage.output_tokens"),
        *("gen_ai.usage.completion_tokens", "llm.usage.completion_tokens"),
    ),
    "tokens_total": ("llm.token_count.total", "gen_ai.usage.total_tokens", "llm.usage.total_tokens"),
    "finish_reason": ("llm.finish_reason", "gen_ai.response.finish_reasons", "gen_ai.response.finish_reason"),
    "tool_name": ("tool.name", "gen_ai.tool.name"),
    "agent_name": ("agent.name", "gen_ai.agent.name"),
    "top_k": ("retrieval.top_k", "rerank.top_k", "reranker.top_k"),
    "doc_ids": ("retrieval.doc_ids", "retrieval.document_ids"),
    "relevant_doc_ids": ("retrieval.relevant_doc_ids",),
    "scores": ("rerank.scores", "reranker.scores", "retrieval.scores"),
    "input_count": ("rerank.input_count", "reranker.input_count"),
    "output_count": ("rerank.output_count", "reranker.output_count"),
    "citations": ("rag.citations", "output.citations", "llm.citations"),
    "metric_name": ("eval.metric_name", "gen_ai.evaluation.name"),
    "score": ("eval.score", "gen_ai.evaluation.score.value"),
    "label": ("gen_ai.evaluation.score.label",),
    "passed": ("eval.passed",),
    "reference": ("eval.reference",),
}
_NAMED_HERE = {called: name for name, names in _NAMES.items() for called in names}
#: Only for some types do the same words mean something else.
_NAMES_OF_RETRIEVAL: Mapping[str, tuple[str, ...]] = {"top_k": ("gen_ai.request.top_k",)}

_QUERIES = ("retrieval.query", "reranker.query", "rerank.query", "gen_ai.retrieval.query.text")
_INPUTS = ("input.value", "traceloop.entity.input", "gen_ai.task.input", "gen_ai.tool.call.arguments")
_OUTPUTS = ("output.value", "traceloop.entity.output", "gen_ai.task.output", "gen_ai.tool.call.result")
#: Types whose input is a query.
_ASKING = ("retrieval", "rerank", "input", "query_rewrite")

#: Lists that come as one attribute for each leaf, or as JSON; and what they are called here.
_LISTS: Mapping[str, tuple[str, ...]] = {
    "input_messages": ("llm.input_messages", "gen_ai.input.messages", "gen_ai.prompt"),
    "output_messages": ("llm.output_messages", "gen_ai.output.messages", "gen_ai.completion"),
    "tools": ("llm.tools",),
    "prompts": ("llm.prompts",),
    "choices": ("llm.choices",),
    "embeddings": ("embedding.embeddings",),
    "input_documents": ("reranker.input_documents", "input.documents"),
    "documents": (
        *("reranker.output_documents", "retrieval.documents", "output.documents"),
        *("retrieval.documents_json", "gen_ai.retrieval.documents"),
    ),
}
_DOCUMENTS = ("input_documents", "documents")
_ROOTS = frozenset(name for names in _LISTS.values() for name in names)


class Words:
    """The attributes of one span, and what was said with them so far."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.left = dict(attributes)
        self.said: dict[str, Any] = {}

    def take(self, *names: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
        """
        Remove the first of `names` that has a value, and return it as `read` reads it.

        Others of them that have the same value go with it: some senders write a value under two names.
        """
        for place, name in enumerate(names):
            given = self.left.get(name)
            if given is None or given == "" or (value := read(given)) is None:
                continue
            del self.left[name]
            for other in names[place + 1 :]:
                if self.left.get(other) == given:
                    del self.left[other]
            return value
        return None

    def say(self, name: str, value: Any) -> None:
        """Set an attribute of the stage, unless the sender set it."""
        if value is not None and name not in self.left:
            self.said.setdefault(name, value)

    def translate(self, name: str, *names: str, read: Callable[[Any], Any] = lambda value: value) -> None:
        """Call the first of `names` that has a value `name`, unless there is something of that name."""
        if not self.knows(name):
            self.say(name, self.take(*names, read=read))

    def knows(self, name: str) -> bool:
        """Return whether the stage has an attribute of this name."""
        return name in self.left or name in self.said

    def heard(self, name: str) -> Any:
        """Return an attribute of the stage, whoever set it."""
        return self.said[name] if name in self.said else self.left.get(name)


def take_stage_type(words: Words) -> str | None:
    """Return what the attributes say of a stage's type, or None if they say nothing."""
    for name, called_here in _TYPES:
        given = words.left.get(name)
        if not isinstance(given, str):
            continue
        stage_type = given.strip().lower().removeprefix(_CUSTOM)
        stage_type = called_here.get(stage_type, stage_type).strip()
        if stage_type:
            if name != _KEPT:
                del words.left[name]
            return stage_type
    return None


def attributes_of(words: Words, stage_type: str) -> dict[str, Any]:
    """Return the attributes of a stage of this type."""
    lists, used = gather(words.left, _ROOTS)
    for name in used:
        del words.left[name]
    if lists or not _ROOTS.isdisjoint(words.left):
        _lists(words, lists)
    # Most spans have few of these names: to ask for each that there is would take most of the time.
    for name in dict.fromkeys(_NAMED_HERE[called] for called in words.left if called in _NAMED_HERE):
        words.translate(name, *_NAMES[name], read=_READERS.get(name, _as_it_is))
    if stage_type == "retrieval":
        for name, names in _NAMES_OF_RETRIEVAL.items():
            words.translate(name, *names)
    parameters = parsed(words.left.get("llm.invocation_parameters"))
    if isinstance(parameters, dict):
        words.say("temperature", parameters.get("temperature"))
        words.say("model", parameters.get("model") or parameters.get("model_name"))
    _documents(words, stage_type)
    _texts(words, stage_type)
    return {**words.said, **words.left}


def _lists(words: Words, lists: Mapping[str, list[Any]]) -> None:
    for name, names in _LISTS.items():
        for called in names:
            if called in lists:
                # A second list of the same kind keeps its own name, or gets one.
                names_for_it = (name, called, f"{called}.list")
                words.say(next(free for free in names_for_it if not words.knows(free)), lists[called])
            else:
                words.translate(name, called, read=documents.listed if name in _DOCUMENTS else _list)


def _as_it_is(value: Any) -> Any:
    return value


def _list(value: Any) -> list[Any] | None:
    value = parsed(value)
    return value if isinstance(value, list) else None


def _one(value: Any) -> Any:
    """Return the reason for which an answer ended, of the list with one for each choice."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value or None


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "finish_reason": _one,
    "citations": parsed,
    "doc_ids": parsed,
    "scores": parsed,
    "relevant_doc_ids": parsed,
}


def _documents(words: Words, stage_type: str) -> None:
    before, after = (_tidied(words, name) for name in _DOCUMENTS)
    if before is not None and stage_type == "rerank":
        words.say("input_count", len(before))
    if stage_type in ("retrieval", "rerank"):
        told = next((found for name in _OUTPUTS if (found := documents.listed(words.left.get(name))) is not None), None)
        after = told if after is None else documents.completed(after, told)
    if after is None:
        return
    first = after[: documents.MAX_DOCUMENTS]
    words.say("doc_ids", documents.ids_of(first))
    words.say("scores", documents.scores_of(first))
    if len(after) > len(first):
        words.say("doc_count", len(after))
    if stage_type == "rerank":
        words.say("output_count", len(after))


def _tidied(words: Words, name: str) -> list[Any] | None:
    """Return a list of documents that is known by this name, and keep it in the form in which it was read."""
    found = documents.listed(words.heard(name))
    if found is not None:
        words.left.pop(name, None)
        words.said[name] = found
    return found


def _texts(words: Words, stage_type: str) -> None:
    words.translate("query", *_QUERIES)
    if stage_type in _ASKING:
        for name in _INPUTS:
            words.say("query", _query(words.left.get(name)))
        query = words.heard("query")
        for name in _INPUTS:  # a retriever's input is its query: it need not be said twice
            if query is not None and words.left.get(name) == query:
                del words.left[name]
    words.translate("input", *_INPUTS)
    words.translate("output", *_OUTPUTS)


def _query(value: Any) -> Any:
    """Return the query in a text, or in the JSON of a call's arguments."""
    whole = parsed(value)
    if isinstance(whole, dict):
        return next((text for name in ("query", "question", "input") if isinstance(text := whole.get(name), str)), None)
    return value or None
