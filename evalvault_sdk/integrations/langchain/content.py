"""
Read what metrics need from what LangChain's runs are given and give back.

In:   inputs and outputs of chains, messages, results of models: of any version, and of classes of the program's own.
Out:  texts, counts and short lists, for the attributes of stages.
Pure. Looks at names only, imports no LangChain, calls nothing, consumes no iterator.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import orjson

from evalvault_sdk.capture.documents import documents

#: What a question is called in the inputs of chains and in the states of graphs, in order.
_QUERIES = ("question", "query", "input", "user_input", "messages")
#: So much of a prompt is kept: messages, and characters of each.
_MAX_MESSAGES = 20
_MAX_CHARACTERS = 4_000
#: A longer text is no search query.
_MAX_QUERY = 2_000
_MAX_CITATIONS = 100
#: What names a source, in the annotations of one provider or another.
_SOURCES = ("id", "doc_id", "document_id", "file_id", "url", "source", "title", "document_title")
_REASONS = ("finish_reason", "stop_reason", "done_reason", "finishReason")
_MODELS = ("model_name", "model", "model_id")
_FIELDS = ("id", "metadata", "page_content")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])?\s*[\"'“]?(.*?)[\"'”]?\s*$")


def look(thing: Any, name: str) -> Any:
    """Return what `thing` has under `name`, as a key or as an attribute; None if nothing."""
    if type(thing) is dict or isinstance(thing, Mapping):
        return thing.get(name)
    return None if thing is None else getattr(thing, name, None)


def documents_of(found: Any) -> dict[str, Any]:
    """Return what `documents` reads from LangChain's documents, which answer slowly when asked for what they lack."""
    if isinstance(found, (list, tuple)) and all(hasattr(document, "page_content") for document in found):
        found = [{name: getattr(document, name, None) for name in _FIELDS} for document in found]
    return documents(found)


def text_of(thing: Any) -> str | None:
    """Return the text of a string, of a message, or of a message's content with its blocks; None if there is none."""
    if isinstance(thing, str):
        return thing or None
    if isinstance(thing, list):
        texts = [block if isinstance(block, str) else look(block, "text") for block in thing]
        return "".join(text for text in texts if isinstance(text, str)) or None
    content = look(thing, "content")
    return None if content is None or content is thing else text_of(content)


def query_of(inputs: Any) -> str | None:
    """Return the question in what a chain or a graph was given: a text, a mapping or state with one, messages."""
    if isinstance(inputs, str):
        return inputs or None
    if isinstance(inputs, (list, tuple)):
        return _last_question(inputs)
    if look(inputs, "content") is not None and not isinstance(inputs, Mapping):
        return text_of(inputs)
    for name in _QUERIES:
        held = look(inputs, name)
        if held is not None and not callable(held) and (query := query_of(held)):
            return query
    if isinstance(inputs, Mapping) and len(inputs) == 1:
        (only,) = inputs.values()
        return only if isinstance(only, str) and only else None
    return None


def _last_question(messages: Sequence[Any]) -> str | None:
    """Return the text of the last message that a person wrote."""
    for message in reversed(messages[-_MAX_MESSAGES:]):
        if isinstance(message, str):
            return message or None
        role, content = _role_and_content(message)
        if role in ("human", "user"):
            return text_of(content)
    return None


def _role_and_content(message: Any) -> tuple[Any, Any]:
    if isinstance(message, (tuple, list)) and len(message) == 2:
        return message[0], message[1]
    return look(message, "type") or look(message, "role"), look(message, "content")


def messages_of(prompt: Any) -> list[dict[str, Any]]:
    """Return the messages of a prompt as `{"role", "content"}`, cut to what can be read; a text is one message."""
    if isinstance(prompt, str):
        return [{"role": "human", "content": prompt[:_MAX_CHARACTERS]}]
    listed = look(prompt, "messages") if not isinstance(prompt, (list, tuple)) else prompt
    if listed is None:
        text = look(prompt, "text")
        return messages_of(text) if isinstance(text, str) else []
    pairs = (_role_and_content(message) for message in islice(listed, _MAX_MESSAGES))
    return [{"role": role, "content": (text_of(content) or "")[:_MAX_CHARACTERS]} for role, content in pairs]


def system_of(messages: list[dict[str, Any]]) -> str | None:
    """Return the texts of the system's messages among them; None if there is none."""
    return "\n".join(message["content"] for message in messages if message["role"] in ("system", "developer")) or None


def queries_in(text: str | None, tool_calls: list[Any]) -> frozenset[str]:
    """Return what a model may have written for a retriever: all it said, a line of it, a value of its JSON."""
    found: set[str] = set()
    if text and len(text) <= _MAX_QUERY:
        stripped = text.strip()
        found = {stripped, *(match[1] for line in stripped.splitlines() if (match := _ITEM.match(line)))}
        if stripped[0:1] in ("{", "["):
            with contextlib.suppress(orjson.JSONDecodeError):
                found.update(_strings(orjson.loads(stripped)))
    for call in tool_calls:
        found.update(_strings(look(call, "args")))
    return frozenset(query for query in found if query)


def _strings(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        if len(value) <= _MAX_QUERY:
            yield value.strip()
    elif depth < 3 and isinstance(value, (dict, list)):
        for inner in islice(value.values() if isinstance(value, dict) else value, _MAX_MESSAGES):
            yield from _strings(inner, depth + 1)


def result_of(response: Any) -> dict[str, Any]:
    """Return the attributes of an `LLMResult`: answer, model, tokens, finish reason, tool calls, citations."""
    attributes: dict[str, Any] = {}
    generations = look(response, "generations")
    told = look(response, "llm_output") or {}
    first = generations[0][0] if generations and generations[0] else None
    message = look(first, "message")
    answered_with = look(message, "response_metadata") or {}
    answer = text_of(message) if message is not None else None
    if answer is None:
        answer = look(first, "text") or None
    if answer is not None:
        attributes["answer"] = answer
    if calls := tool_calls_of(response):
        attributes["tool_calls"] = [look(call, "name") for call in calls]
    if model := _first((answered_with, told), _MODELS):
        attributes["model"] = model
    if reason := _first((look(first, "generation_info"), answered_with), _REASONS):
        attributes["finish_reason"] = reason
    attributes.update(_tokens(look(message, "usage_metadata"), told, answered_with))
    if citations := _citations(message):
        attributes["citations"] = citations
    return attributes


def tool_calls_of(response: Any) -> list[Any]:
    """Return the tool calls of an `LLMResult`."""
    generations = look(response, "generations")
    first = generations[0][0] if generations and generations[0] else None
    calls = look(look(first, "message"), "tool_calls")
    return calls if isinstance(calls, list) else []


def _tokens(usage: Any, *told: Any) -> dict[str, Any]:
    """Return the counts of tokens: of the message, else of what the provider told beside it."""
    if not usage:
        usage = next((held for place in told for name in ("token_usage", "usage") if (held := look(place, name))), None)
    tokens: dict[str, Any] = {}
    for name, called in (
        ("tokens_in", ("input_tokens", "prompt_tokens")),
        ("tokens_out", ("output_tokens", "completion_tokens")),
        ("tokens_total", ("total_tokens",)),
    ):
        number = _first((usage,), called)
        if isinstance(number, int):
            tokens[name] = number
    if isinstance(cached := look(look(usage, "input_token_details"), "cache_read"), int):
        tokens["tokens_cached"] = cached
    if isinstance(reasoning := look(look(usage, "output_token_details"), "reasoning"), int):
        tokens["tokens_reasoning"] = reasoning
    return tokens


def _first(places: Sequence[Any], names: Sequence[str]) -> Any:
    """Return the first value that one of `places` has under one of `names`."""
    for place in places:
        for name in names:
            if (value := look(place, name)) is not None and value != "":
                return value
    return None


def _citations(message: Any) -> list[Any]:
    """Return what a message cites, without repetition: the id or address of a source, in the order of the text."""
    content = look(message, "content")
    more = look(message, "additional_kwargs")
    found: list[Any] = []
    for place in (*(content if isinstance(content, list) else ()), more):
        for name in ("annotations", "citations"):
            held = look(place, name)
            if isinstance(held, list):
                found.extend(islice(held, _MAX_CITATIONS))
    sources = [_source(citation) for citation in found]
    return list(dict.fromkeys(source for source in sources if source))[:_MAX_CITATIONS]


def _source(citation: Any) -> str | None:
    if isinstance(citation, str):
        return citation
    nested = look(citation, "url_citation")  # as OpenAI's Chat Completions have it
    for place in (citation, nested):
        for name in _SOURCES:
            value = look(place, name)
            if isinstance(value, (str, int)) and not isinstance(value, bool):
                return str(value)
    return None
