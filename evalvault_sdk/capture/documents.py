"""
Read the ids and scores of retrieved documents, whichever library found them.

In:   what a retriever, a vector store, a search engine or a reranker returned.
Out:  the attributes that retrieval metrics are computed from: `doc_ids`, `scores`, `doc_count`.
Caller's thread. Looks at names only, imports no such library, calls nothing, consumes no iterator.
"""

from __future__ import annotations

import math
import operator
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from itertools import chain, islice
from typing import Any, TypeVar

T = TypeVar("T")

#: So many documents are read; `doc_count` says how many there were.
_MAX_DOCUMENTS = 1_000
#: Bytes of a text that its hash is made of.
_MAX_HASHED = 65_536
#: A wrapper in a wrapper, as Elasticsearch's `body.hits.hits`, and no deeper: an object may hold itself.
_MAX_DEPTH = 3

#: What holds the list of documents.
_LISTS = (
    *("matches", "points", "hits", "objects", "body"),  # vector stores and search engines
    *("source_documents", "source_nodes", "documents", "results", "context", "nodes"),  # chains and indexes
)
#: What holds the scores of documents that come in columns: LlamaIndex's VectorStoreQueryResult (Chroma has none).
_COLUMNS = ("similarities", "scores")
#: What holds more about one document.
_PARTS = ("node", "document", "metadata", "payload", "_source", "meta", "properties", "entity")
_IDS = ("id", "_id", "id_", "doc_id", "document_id", "docid", "chunk_id", "node_id", "uuid")
#: What tells the parts of one source apart.
_POSITIONS = ("page", "chunk", "chunk_id", "seq_num")
#: A reranker's first: it made the order. No distance: the nearest document would have the least.
_SCORES = (
    *("rerank_score", "relevance_score", "@search.reranker_score"),
    *("score", "_score", "@search.score", "similarity"),
)
_TEXTS = ("page_content", "text", "content", "document")


def documents(found: Any) -> dict[str, Any]:
    """
    Return `{"doc_ids": [...], "scores": [...]}` of retrieved documents, in their order.

    For `@tracer.stage("retrieval", on_result=documents)` and `stage.set(**documents(found))`. Takes documents of
    LangChain and LlamaIndex, dicts, objects with such attributes, `(document, score)` pairs, lists of them, two
    lists `(documents, scores)`, and the answers of common vector stores, search engines and chains.

    * An id is the document's own, else one in its metadata, else the metadata's `source` (`"a.pdf#page=3"`), else
      the beginning of the SHA-256 of its text. A number is an id, plain text is content. What shows neither id
      nor text becomes its type's name with a question mark: it counts, but nothing else can be said of it.
    * `scores` is left out if no document has one; a document without is None. The number of a pair is taken as it
      is, even from a store that gives a distance there.
    * Of more than 1,000 documents the first are read, and `doc_count` is the number of all.

    What is no such thing, above all an iterator, is left alone: `{}`.
    """
    listed = _listed(found, 0)
    if listed is None:
        if isinstance(found, Iterator) or _described_id(_places(found)) is None:
            return {}
        listed = [found], 1
    first, total = listed
    seen = [_id_and_score(document) for document in first]
    attributes: dict[str, Any] = {"doc_ids": [identity for identity, _ in seen]}
    if any(score is not None for _, score in seen):
        attributes["scores"] = [score for _, score in seen]
    if total > len(first):
        attributes["doc_count"] = total
    return attributes


def _listed(found: Any, depth: int) -> tuple[list[Any], int] | None:
    """Return the first documents of `found` and the number of all, or None if it is no list and holds none."""
    if isinstance(found, Iterator) or depth > _MAX_DEPTH:
        return None
    if _is_list(ids := _get(found, "ids")):
        scores = next((held for name in _COLUMNS if _is_list(held := _get(found, name))), ())
        return _rows(ids, scores)
    for name in _LISTS:
        held = _get(found, name)
        if held is not None and (listed := _listed(held, depth + 1)) is not None:
            return listed
    if not _is_list(found):
        return None
    if _is_two_columns(found):
        return list(zip(*(islice(column, _MAX_DOCUMENTS) for column in found), strict=False)), len(found[0])
    return list(islice(found, _MAX_DOCUMENTS)), len(found)


def _rows(ids: Any, scores: Any) -> tuple[list[Any], int]:
    """Return documents of which each column tells one thing, as Chroma gives them."""
    names, total = _flat(ids)
    numbers, count = _flat(scores)
    if count != total:
        numbers = [None] * len(names)
    return [{"id": name, "score": number} for name, number in zip(names, numbers, strict=False)], total


def _flat(column: Any) -> tuple[list[Any], int]:
    """Return the first values of a column and the number of all; it may have a list of them for every query."""
    values = list(islice(column, _MAX_DOCUMENTS))
    if values and all(map(_is_list, values)):
        return list(islice(chain.from_iterable(values), _MAX_DOCUMENTS)), sum(map(len, values))
    return values, len(column)


def _is_two_columns(found: Any) -> bool:
    """Whether this is `(documents, scores)`, and not a tuple of two documents or of two pairs."""
    if not (isinstance(found, tuple) and len(found) == 2 and all(map(_is_list, found))):
        return False
    first, second = (list(islice(column, _MAX_DOCUMENTS)) for column in found)
    if len(found[0]) != len(found[1]) or any(isinstance(value, float) for value in first):
        return False
    return all(not isinstance(value, str) and _number(value) is not None for value in second)


def _is_list(value: Any) -> bool:
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return False
    if isinstance(value, (Sequence, Set, ValuesView)):
        return True
    return bool(_get(value, "tolist") and _get(value, "shape"))  # an array; that of a single number has no shape


def _id_and_score(document: Any) -> tuple[str, float | None]:
    try:
        score = None
        if isinstance(document, tuple) and len(document) == 2 and not hasattr(document, "_fields"):
            inner, number = document
            if number is None or hasattr(number, "__float__"):
                document, score = inner, _number(number)
        places = _places(document)
        return _id(document, places) or _unknown(document), _first(places, _SCORES, _number) if score is None else score
    except Exception:  # noqa: BLE001 - an odd document costs its own place
        return _unknown(document), None


def _unknown(document: Any) -> str:
    return f"{type(document).__name__}?"  # not its repr, which may hold an address or its content


def _id(document: Any, places: list[Any]) -> str | None:
    if isinstance(document, str):
        return _hash(document)
    if isinstance(document, (float, uuid.UUID)) or hasattr(document, "__index__"):
        return _id_text(document)
    return _described_id(places)


def _described_id(places: list[Any]) -> str | None:
    for place in places:
        for name in _IDS:
            identity = _id_text(_get(place, name))
            # A number called chunk_id counts the chunks of one source: every source has the same ones.
            if identity and not (name == "chunk_id" and identity.isdecimal() and _get(place, "source")):
                return identity
    if source := _first(places, ("source",), _id_text):
        positions = ((name, _first(places, (name,), _id_text)) for name in _POSITIONS)
        where = "&".join(f"{name}={position}" for name, position in positions if position)
        return f"{source}#{where}" if where else source
    return _first(places, _TEXTS, lambda text: _hash(text) if text and isinstance(text, str) else None)


def _places(document: Any) -> list[Any]:
    """Return where to look for what is said of a document: at itself, at its parts, at theirs."""
    parts = _parts(document)
    return [document, *parts, *chain.from_iterable(map(_parts, parts))]


def _parts(thing: Any) -> list[Any]:
    return [part for name in _PARTS if (part := _get(thing, name)) is not None]


def _first(places: list[Any], names: Sequence[str], read: Callable[[Any], T | None]) -> T | None:
    """Return the first thing called one of `names` of which `read` makes something."""
    things = (read(_get(place, name)) for place in places for name in names)
    return next((thing for thing in things if thing is not None), None)


def _get(thing: Any, name: str) -> Any:
    try:
        if type(thing) is dict or isinstance(thing, Mapping):
            return thing.get(name)
        return getattr(thing, name, None)
    except Exception:  # noqa: BLE001 - a property that raises is one that is not there
        return None


def _id_text(value: Any) -> str | None:
    """Return an id as text, or None for what is none."""
    if value is None or isinstance(value, str):
        return str.__str__(value) if value else None
    if _is_bool(value):
        return None
    try:
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else None
        if hasattr(value, "__index__"):
            return str(operator.index(value))
        # A path, a UUID, an ObjectId: what has a text of its own (others show their address) and is no container.
        has_text = getattr(type(value), "__str__", None) is not object.__str__
        return str(value) if has_text and not hasattr(value, "__len__") else None
    except Exception:  # noqa: BLE001 - a user's __str__
        return None


def _number(value: Any) -> float | None:
    """Return a score as a float, or None for what is no finite number."""
    if value is None or _is_bool(value) or _get(value, "shape"):
        return None
    try:
        number = float(value)
    except Exception:  # noqa: BLE001 - a user's __float__
        return None
    return number if math.isfinite(number) else None


def _is_bool(value: Any) -> bool:
    return type(value).__name__ in ("bool", "bool_")  # numpy's has the one or the other name


def _hash(text: str) -> str:
    import hashlib  # loads a large library: not for every program that imports us

    return hashlib.sha256(text[:_MAX_HASHED].encode("utf-8", "replace")[:_MAX_HASHED]).hexdigest()[:16]
