"""
Read the ids and scores of documents from what a span says of them.

In:   lists of objects, from flattened attributes or from JSON in a text.
Out:  the attributes that metrics of retrieval and reranking are computed from.
Pure. The client's `capture.documents` names documents by the same rules, so that a program which is traced both ways
has one id for one document; a test holds them together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import orjson

from evalvault_sdk.otel.plain import parsed, plain

T = TypeVar("T")

#: So many documents are read, as by the client; `doc_count` says how many there were.
MAX_DOCUMENTS = 1_000

_IDS = ("id", "_id", "id_", "doc_id", "document_id", "docid", "chunk_id", "node_id", "uuid")
#: What tells the parts of one source apart.
_POSITIONS = ("page", "chunk", "chunk_id", "seq_num")
#: A reranker's first: it made the order.
_SCORES = ("rerank_score", "relevance_score", "score", "_score", "similarity")
_TEXTS = ("page_content", "content", "text", "document")
#: What holds more about one document.
_PARTS = ("metadata", "document", "node", "payload", "meta", "properties", "kwargs")
#: What holds the list of documents.
_LISTS = ("documents", "source_documents", "nodes", "results", "matches", "hits", "outputs")
#: Bytes of a text that its hash is made of.
_MAX_HASHED = 65_536
#: A text without blanks of up to so many characters is an id, any other is content.
_MAX_ID = 256


def listed(value: Any) -> list[Any] | None:
    """Return the documents that a list, an object around one, or the JSON of either holds; None if there are none."""
    value = parsed(value)
    for _ in range(2):
        if isinstance(value, dict):
            value = next((held for name in _LISTS if isinstance(held := value.get(name), dict | list)), None)
    return [_readable(document) for document in value] if isinstance(value, list) else None


def _readable(document: Any) -> Any:
    # OpenInference writes the metadata of a document as JSON.
    if isinstance(document, dict) and isinstance(document.get("metadata"), str):
        return {**document, "metadata": parsed(document["metadata"])}
    return document


def completed(documents: list[Any], told_elsewhere: list[Any] | None) -> list[Any]:
    """
    Return `documents` with what a second list of the same documents says besides.

    OpenInference for LangChain gives the content of each document, and its id only within `output.value`.
    """
    if told_elsewhere is None or len(told_elsewhere) != len(documents):
        return documents
    return [
        {**other, **document} if isinstance(document, dict) and isinstance(other, dict) else document
        for document, other in zip(documents, told_elsewhere, strict=True)
    ]


def ids_of(documents: list[Any]) -> list[str]:
    """
    Return an id for each document.

    It is the document's own, else one in its metadata, else the metadata's `source` ("a.pdf#page=3"), else the
    beginning of the SHA-256 of its text, or of its JSON if it has none: the same content has the same id, always.
    """
    return [_id(document) for document in documents]


def scores_of(documents: list[Any]) -> list[float | None] | None:
    """Return the score of each document, None for one without; None if no document has one."""
    scores = [_first(_places(document), _SCORES, _number) for document in documents]
    return scores if any(score is not None for score in scores) else None


def _id(document: Any) -> str:
    if isinstance(document, str):
        is_id = 0 < len(document) <= _MAX_ID and not any(map(str.isspace, document))
        return document if is_id else _hash(document)
    return _id_text(document) or _described_id(_places(document)) or _hash(_as_json(document))


def _described_id(places: list[Mapping[str, Any]]) -> str | None:
    for place in places:
        for name in _IDS:
            identity = _id_text(place.get(name))
            # A number called chunk_id counts the chunks of one source: every source has the same ones.
            if identity and not (name == "chunk_id" and identity.isdecimal() and place.get("source")):
                return identity
    if source := _first(places, ("source",), _id_text):
        positions = ((name, _first(places, (name,), _id_text)) for name in _POSITIONS)
        where = "&".join(f"{name}={position}" for name, position in positions if position)
        return f"{source}#{where}" if where else source
    return _first(places, _TEXTS, lambda text: _hash(text) if text and isinstance(text, str) else None)


def _places(document: Any) -> list[Mapping[str, Any]]:
    """Return where to look for what is said of a document: at itself, at its parts, at theirs."""
    if not isinstance(document, dict):
        return []
    parts = list(_parts(document))
    return [document, *parts, *(inner for part in parts for inner in _parts(part))]


def _parts(thing: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (part for name in _PARTS if isinstance(part := thing.get(name), dict))


def _first(places: list[Mapping[str, Any]], names: tuple[str, ...], read: Callable[[Any], T | None]) -> T | None:
    things = (read(place.get(name)) for place in places for name in names)
    return next((thing for thing in things if thing is not None), None)


def _id_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _as_json(document: Any) -> str:
    return orjson.dumps(plain(document), option=orjson.OPT_SORT_KEYS).decode()


def _hash(text: str) -> str:
    return hashlib.sha256(text[:_MAX_HASHED].encode("utf-8", "replace")[:_MAX_HASHED]).hexdigest()[:16]
