"""
Read what LlamaIndex's objects say: queries, nodes, prompts, and the answers of models.

In:   arguments and results of spans, events of model calls.
Out:  attributes of stages, in EvalVault's names.
Pure: looks at names only, calls no model and consumes no stream. What it does not find it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

#: So many nodes of a list are read.
_MAX_NODES = 1_000
#: Arguments that hold a query, and fields of the event that a workflow starts with.
_QUERIES = ("str_or_query_bundle", "query_bundle", "query", "message", "user_msg", "start_event", "input", "kwargs")
_FIELDS = ("query", "question", "user_msg", "message", "input", "q", "text", "topic")
_TOP_K = ("similarity_top_k", "_similarity_top_k", "top_k", "_top_k")
_MODELS = ("model", "model_name", "model_id")
#: What providers call their counts of tokens: OpenAI's, Anthropic's, Gemini's, Ollama's.
_TOKENS_IN = ("prompt_tokens", "input_tokens", "prompt_token_count", "prompt_eval_count")
_TOKENS_OUT = ("completion_tokens", "output_tokens", "candidates_token_count", "eval_count")
_FINISH_REASONS = ("finish_reason", "stop_reason", "done_reason")


def query_of(arguments: Mapping[str, Any]) -> str | None:
    """Return the question among the arguments of a query, a chat, a retrieval, or the run of a workflow."""
    return _first(text for name in _QUERIES if (text := _question(arguments.get(name))))


def _question(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    for name in ("query_str", "content"):  # of a QueryBundle, of a ChatMessage
        if isinstance(text := _get(value, name), str):
            return text
    fields = value if isinstance(value, Mapping) else _get(value, "_data")
    for name in _FIELDS:
        held = _get(value, name)
        if held is None and isinstance(fields, Mapping):
            held = fields.get(name)
        if isinstance(held, str):
            return held
        if isinstance(content := _get(held, "content"), str):
            return content
    return None


def retriever(instance: Any) -> dict[str, Any]:
    """Return how many nodes a retriever is to find."""
    top_k = _first(held for name in _TOP_K if isinstance(held := _get(instance, name), int))
    return {} if top_k is None else {"top_k": top_k}


def named_model(instance: Any) -> dict[str, Any]:
    """Return the name of the model that a component has, or is."""
    fields = getattr(instance, "__dict__", {})
    model = _first(held for name in _MODELS if isinstance(held := fields.get(name), str))
    return {} if model is None else {"model": model}


def found(nodes: Any) -> dict[str, Any]:
    """Return `doc_ids`, and `scores` if any node has one, of a list of nodes."""
    if not isinstance(nodes, (list, tuple)):
        return {}
    first = nodes[:_MAX_NODES]
    attributes: dict[str, Any] = {"doc_ids": [_id_of(node) for node in first]}
    scores = [_get(node, "score") for node in first]
    if any(score is not None for score in scores):
        attributes["scores"] = scores
    if len(nodes) > len(first):
        attributes["doc_count"] = len(nodes)
    return attributes


def ids_of(nodes: Any) -> list[str]:
    """Return the ids of nodes, each once."""
    if not isinstance(nodes, (list, tuple)):
        return []
    return list(dict.fromkeys(map(_id_of, nodes[:_MAX_NODES])))


def _id_of(node: Any) -> Any:
    return _get(_get(node, "node") or node, "node_id")


def count_of(values: Any) -> int | None:
    """Return the length of a list."""
    return len(values) if isinstance(values, (list, tuple)) else None


def prompt_of(messages: Any) -> str | None:
    """Return the text of the system messages."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return None
    texts = [
        _get(message, "content") for message in messages if _word(_get(message, "role")) in ("system", "developer")
    ]
    return "\n".join(text for text in texts if isinstance(text, str)) or None


def tool_name(tool: Any) -> str:
    """Return the name under which a model knows a tool."""
    name = _get(_get(tool, "metadata"), "name")
    return name if isinstance(name, str) else type(tool).__name__


def tool_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tool was called with."""
    given = dict(arguments)
    named = given.pop("kwargs", None)
    if not given.get("args"):
        given.pop("args", None)
    return {**given, **named} if isinstance(named, Mapping) else given


def asked(arguments: Mapping[str, Any]) -> str | None:
    """Return what a plain call of a model asks: the last message, or the prompt."""
    messages = arguments.get("messages")
    if isinstance(messages, Sequence) and messages:
        text = _get(messages[-1], "content")
    else:
        text = _first(arguments.get("args") or ()) or _get(arguments.get("kwargs"), "prompt")
    return text if isinstance(text, str) else None


def template_of(template: Any, model: Any) -> str | None:
    """Return the text of a prompt's template, before anything is put into it."""
    try:
        text = template.get_template(llm=model)
    except Exception:  # noqa: BLE001 - a template of the program's own making
        return None
    return text if isinstance(text, str) else None


def answer_of(result: Any, depth: int = 3) -> Any:
    """Return the text of a response, of an agent's output, or of what a workflow stopped with."""
    if result is None or isinstance(result, (str, int, float, bool)):
        return result
    for name in ("response", "result", "content"):
        held = _get(result, name)
        if held is not None and depth and (text := answer_of(held, depth - 1)) is not None:
            return text
    return None


def rewritten(result: Any) -> Any:
    """Return the query, or the queries, that a transform or a question generator made."""
    if isinstance(result, Sequence) and not isinstance(result, str):
        return [_get(question, "sub_question") for question in result]
    # Of HyDE the query stays, and the text that is embedded in its place is new.
    embedded = _get(result, "custom_embedding_strs")
    return embedded if isinstance(embedded, list) and embedded else _question(result)


def call_begun(event: Any, model: Any) -> dict[str, Any]:
    """Return model and temperature of the event that begins a call of `model`."""
    settings = _get(event, "model_dict") or {}
    places = (settings, _get(model, "metadata")) if not any(settings.get(name) for name in _MODELS) else (settings,)
    attributes = {
        "model": _first(held for place in places for name in _MODELS if isinstance(held := _get(place, name), str)),
        "temperature": _first(
            held
            for place in (_get(event, "additional_kwargs"), settings)
            if isinstance(held := _get(place, "temperature"), (int, float))
        ),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def call_ended(event: Any) -> tuple[Any, dict[str, Any]]:
    """Return the answer, and tokens, finish reason and called tools, of the event that ends a model call."""
    response = _get(event, "response")
    if response is None:
        return None, {}
    message = _get(response, "message")
    answer = _get(response, "text") if message is None else _get(message, "content")
    raw, more, said = _get(response, "raw"), _get(response, "additional_kwargs"), _get(message, "additional_kwargs")
    usages = (*(_get(raw, name) for name in ("usage", "usage_metadata")), raw, more, said)
    choices = [held[0] for name in ("choices", "candidates") if isinstance(held := _get(raw, name), list) and held]
    attributes = {
        "tokens_in": _number(usages, _TOKENS_IN),
        "tokens_out": _number(usages, _TOKENS_OUT),
        "finish_reason": _first(
            word
            for place in (*choices, raw, more, said)
            for name in _FINISH_REASONS
            if (word := _word(_get(place, name)))
        ),
        "citations": _first(held for place in (more, said) if isinstance(held := _get(place, "citations"), list)),
        "tool_calls": _tools(said),
    }
    return answer, {name: value for name, value in attributes.items() if value is not None}


def _tools(said: Any) -> list[str] | None:
    """Return the names of the tools that a model wants called."""
    calls = _get(said, "tool_calls")
    if not isinstance(calls, Sequence) or not calls:
        return None
    return [_get(_get(call, "function") or call, "name") or "?" for call in calls]


def _number(places: Iterable[Any], names: Sequence[str]) -> int | None:
    counts = (_get(place, name) for place in places if place is not None for name in names)
    return _first(count for count in counts if isinstance(count, int))


def _word(value: Any) -> str | None:
    """Return a word; that of an enumeration is its value."""
    value = getattr(value, "value", value)
    return value if isinstance(value, str) else None


def _first(values: Iterable[T]) -> T | None:
    return next(iter(values), None)


def _get(thing: Any, name: str) -> Any:
    if isinstance(thing, dict):
        return thing.get(name)
    try:
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - a property that raises is one that is not there
        return None
