from __future__ import annotations

import collections
import dataclasses
import decimal
import hashlib
import math
import pathlib
import uuid
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalvault_sdk.capture.documents import documents


@dataclasses.dataclass
class Document:
    """As in LangChain."""

    page_content: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    id: Any = None


@dataclasses.dataclass
class TextNode:
    """As in LlamaIndex."""

    id_: str
    text: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def node_id(self) -> str:
        return self.id_


@dataclasses.dataclass
class NodeWithScore:
    """As in LlamaIndex."""

    node: TextNode
    score: float | None = None


@dataclasses.dataclass
class ScoredPoint:
    """As in Qdrant."""

    id: Any
    score: float
    payload: dict[str, Any] | None = None


class Row(NamedTuple):
    id: str
    score: float


class Hostile:
    """Every way to look at it raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


HOSTILE = pytest.param(Hostile(), id="hostile")


class Bag:
    def __len__(self) -> int:
        return 1

    def __str__(self) -> str:
        return "all that is in it"


class Text(str):
    __slots__ = ()


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def id_of(document: Any) -> str:
    (identity,) = documents([document])["doc_ids"]
    assert type(identity) is str
    return identity


def score_of(document: Any) -> Any:
    (score,) = documents([document]).get("scores", ["left out"])
    return score


TWO = {"doc_ids": ["a", "b"], "scores": [0.9, 0.5]}
POINTS = [ScoredPoint("a", 0.9), ScoredPoint("b", 0.5)]
DICTS = [{"id": "a", "score": 0.9}, {"id": "b", "score": 0.5}]
HITS = [{"_id": "a", "_score": 0.9, "_source": {"text": "x"}}, {"_id": "b", "_score": 0.5, "_source": {}}]
AB = [("a", 0.9), ("b", 0.5)]
NODES = [NodeWithScore(TextNode("a"), 0.9), NodeWithScore(TextNode("b"), 0.5)]


@pytest.mark.parametrize(
    "found",
    [
        [(Document(id="a"), 0.9), (Document(id="b"), 0.5)],
        ([Document(id="a"), Document(id="b")], [0.9, 0.5]),
        ([Document(id="a"), Document(id="b")], np.array([0.9, 0.5])),
        ((Document(id="a"), 0.9), (Document(id="b"), 0.5)),
        SimpleNamespace(
            objects=[SimpleNamespace(uuid=name, metadata=SimpleNamespace(score=score)) for name, score in AB]
        ),
        SimpleNamespace(nodes=[TextNode(name, metadata={"score": score}) for name, score in AB], ids=None),
        NODES,
        SimpleNamespace(response="...", source_nodes=NODES, metadata={}),
        SimpleNamespace(nodes=None, similarities=[0.9, 0.5], ids=["a", "b"]),
        POINTS,
        SimpleNamespace(points=POINTS),
        SimpleNamespace(matches=POINTS, namespace=""),
        {"matches": DICTS, "namespace": ""},
        {"documents": DICTS},
        {"results": DICTS},
        {"question": "?", "context": DICTS, "answer": "."},
        {"query": "?", "result": ".", "source_documents": DICTS, "context": "as text"},
        {"took": 1, "hits": {"total": {"value": 2}, "max_score": 0.9, "hits": HITS}},
        SimpleNamespace(meta=None, body={"hits": {"hits": HITS}}),
        DICTS,
        tuple(DICTS),
        collections.deque(DICTS),
        {"x": DICTS[0], "y": DICTS[1]}.values(),
        [Row("a", 0.9), Row("b", 0.5)],
        [{"document": Document(id="a"), "score": 0.9}, {"document": Document(id="b"), "score": 0.5}],
    ],
)
def test_what_libraries_return_becomes_ids_and_scores(found: Any) -> None:
    assert documents(found) == TWO


def test_the_columns_of_chroma_give_ids_and_a_distance_is_no_score() -> None:
    found = {"ids": [["a", "b"]], "distances": [[0.1, 0.2]], "documents": [["x", "y"]], "metadatas": [[None, None]]}
    assert documents(found) == {"doc_ids": ["a", "b"]}
    assert documents({**found, "ids": [["a"], ["b", "c"]]}) == {"doc_ids": ["a", "b", "c"]}
    assert documents({"ids": ["a", "b"], "documents": ["x", "y"]}) == {"doc_ids": ["a", "b"]}
    assert documents([{"id": "a", "distance": 0.1}]) == {"doc_ids": ["a"]}


def test_columns_of_different_length_are_not_taken_together() -> None:
    assert documents({"ids": ["a", "b"], "scores": [0.9]}) == {"doc_ids": ["a", "b"]}
    assert "scores" not in documents(([Document(id="a")], [0.9, 0.5]))


def test_a_list_or_a_tuple_of_two_is_not_mistaken_for_columns() -> None:
    assert documents(((1, 0.9), (2, 0.5))) == {"doc_ids": ["1", "2"], "scores": [0.9, 0.5]}
    assert documents(([Document(id="a")], [Document(id="b")])) == {"doc_ids": ["list?", "list?"]}
    assert documents([[Document(id="a")], [0.5]]) == {"doc_ids": ["list?", "list?"]}


@pytest.mark.parametrize(
    "nothing", [[], (), {"matches": []}, {"ids": [[]]}, {"hits": {"hits": []}}, np.array([1])[:0], set()]
)
def test_finding_nothing_is_a_result(nothing: Any) -> None:
    assert documents(nothing) == {"doc_ids": []}


def test_a_single_document_is_a_list_of_one() -> None:
    assert documents(ScoredPoint("a", 0.9)) == {"doc_ids": ["a"], "scores": [0.9]}
    assert documents(Document("text")) == {"doc_ids": [hash_of("text")]}


@pytest.mark.parametrize(
    "other",
    [None, "text", b"bytes", 7, 0.5, {"answer": "text"}, object(), print, HOSTILE, np.float64(0.5), np.array(3)],
)
def test_what_is_no_list_and_no_document_gives_nothing(other: Any) -> None:
    assert documents(other) == {}


@pytest.mark.parametrize("wrap", [lambda found: found, lambda found: {"documents": found}])
def test_an_iterator_is_not_consumed(wrap: Callable[[Any], Any]) -> None:
    generator = (document for document in DICTS)
    assert documents(wrap(generator)) == {}
    assert len(list(generator)) == 2

    class Cursor(Iterator[Any]):
        id = "a cursor of a database"
        documents = DICTS

        def __next__(self) -> Any:
            raise AssertionError("consumed")

    assert documents(wrap(Cursor())) == {}


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ("문서-1", "문서-1"),
        (7, "7"),
        (7.0, "7"),
        (0, "0"),
        (np.int64(7), "7"),
        (np.str_("a"), "a"),
        (Text("a"), "a"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
    ],
)
def test_an_id_of_any_type_becomes_text(identity: Any, expected: str) -> None:
    assert id_of({"id": identity}) == expected
    assert id_of(Document("text", {"doc_id": identity})) == expected


@pytest.mark.parametrize(
    "identity", [None, "", True, np.True_, 0.5, float("nan"), [], ["a"], {}, object(), Bag(), HOSTILE]
)
def test_what_is_no_id_leaves_the_next_best(identity: Any) -> None:
    assert id_of({"id": identity, "doc_id": "d"}) == "d"
    assert id_of({"id": identity, "text": "text"}) == hash_of("text")


@pytest.mark.parametrize(
    "key", ["id", "_id", "id_", "doc_id", "document_id", "docid", "chunk_id", "node_id", "uuid", "source"]
)
def test_an_id_is_known_by_its_usual_names_as_key_attribute_and_metadata(key: str) -> None:
    assert id_of({key: "a", "text": "t"}) == "a"
    assert id_of(SimpleNamespace(**{key: "a"}, text="t")) == "a"
    assert id_of(Document("t", {key: "a"})) == "a"
    assert id_of(SimpleNamespace(payload={"page_content": "t", "metadata": {key: "a"}})) == "a"


@pytest.mark.parametrize("part", ["node", "document", "metadata", "payload", "_source", "meta", "properties", "entity"])
def test_a_part_of_a_document_may_say_its_id_its_score_or_its_text(part: str) -> None:
    assert documents([{part: {"id": "a", "score": 0.5}}]) == {"doc_ids": ["a"], "scores": [0.5]}
    assert id_of(SimpleNamespace(**{part: SimpleNamespace(text="t")})) == hash_of("t")


def test_the_documents_own_id_comes_before_its_metadatas_and_that_before_the_source() -> None:
    assert id_of(Document("t", {"id": "inner"}, id="own")) == "own"
    assert id_of(Document("t", {"source": "a.pdf", "id": "inner"})) == "inner"
    assert id_of({"source": "a.pdf", "metadata": {"id": "inner"}}) == "inner"
    assert id_of(NodeWithScore(TextNode("node", metadata={"id": "inner"}))) == "node"


def test_a_source_says_which_part_of_it() -> None:
    assert id_of(Document("t", {"source": "a.pdf"})) == "a.pdf"
    assert id_of(Document("t", {"source": "a.pdf", "page": 0})) == "a.pdf#page=0"
    assert id_of(Document("t", {"source": "a.pdf", "page": 3, "chunk": 1})) == "a.pdf#page=3&chunk=1"
    assert id_of(Document("t", {"source": "a.csv", "seq_num": 2})) == "a.csv#seq_num=2"
    assert id_of({"source": "a.pdf", "metadata": {"page": 3}}) == "a.pdf#page=3"


def test_a_number_of_a_chunk_is_no_id_where_there_is_a_source() -> None:
    assert id_of(Document("t", {"source": "a.pdf", "chunk_id": 0})) == "a.pdf#chunk_id=0"
    assert id_of(Document("t", {"source": "a.pdf", "chunk_id": "c-0"})) == "c-0"
    assert id_of(Document("t", {"chunk_id": 12})) == "12"


def test_what_has_no_id_is_known_by_its_text() -> None:
    assert id_of("보험") == id_of(Document("보험")) == id_of({"content": "보험"}) == hash_of("보험")
    assert id_of({"_source": {"text": "보험"}}) == id_of({"document": "보험"}) == hash_of("보험")
    assert id_of("a\ud800b") == hash_of("a?b")
    assert documents(["a", ("b", 0.5)]) == {"doc_ids": [hash_of("a"), hash_of("b")], "scores": [None, 0.5]}


def test_only_the_first_64_kilobytes_of_a_text_are_hashed() -> None:
    assert id_of("x" * 65_536) == id_of("x" * 100_000) == hash_of("x" * 65_536)
    assert id_of("x" * 65_535) != id_of("x" * 65_536)
    assert id_of("한" * 65_536) == id_of("한" * 30_000)


def test_numbers_and_uuids_are_ids() -> None:
    assert documents([3, uuid.UUID(int=1), 5.0])["doc_ids"] == ["3", str(uuid.UUID(int=1)), "5"]
    assert documents(np.array([3, 1])) == {"doc_ids": ["3", "1"]}
    assert documents([(3, 0.5)]) == {"doc_ids": ["3"], "scores": [0.5]}


@pytest.mark.parametrize(
    "key",
    [
        "score",
        "_score",
        "similarity",
        "relevance_score",
        "@search.score",
        "@search.reranker_score",
        "rerank_score",
    ],
)
def test_a_score_is_known_by_its_usual_names_as_key_attribute_and_metadata(key: str) -> None:
    assert score_of({"id": "a", key: 0.5}) == 0.5
    assert score_of(SimpleNamespace(id="a", **{key: 0.5})) == 0.5
    assert score_of(Document("t", {key: 0.5})) == 0.5


def test_of_two_scores_the_one_nearest_to_the_order_wins() -> None:
    assert score_of({"id": "a", "score": 0.1, "rerank_score": 0.9}) == 0.9
    assert score_of({"id": "a", "score": 0.1, "metadata": {"rerank_score": 0.9}}) == 0.1
    assert score_of((Document("t", {"score": 0.1}), 0.9)) == 0.9


@pytest.mark.parametrize(
    "number", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), decimal.Decimal("0.5"), "0.5"]
)
def test_a_score_of_any_type_becomes_a_float(number: Any) -> None:
    score = score_of({"id": "a", "score": number})
    assert (score, type(score)) == (0.5, float)
    assert score_of((Document("t"), number)) == ("left out" if number == "0.5" else 0.5)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize(
    "number", [None, True, np.True_, float("nan"), np.inf, np.array([0.5]), 10**400, "high", [], HOSTILE]
)
def test_what_is_no_finite_number_is_no_score(number: Any) -> None:
    assert documents([{"id": "a", "score": number}]) == {"doc_ids": ["a"]}
    assert documents([{"id": "a", "score": number}, {"id": "b", "score": 0}])["scores"] == [None, 0.0]


def test_a_pair_without_a_score_is_still_a_document() -> None:
    assert documents([(Document(id="a"), None), (Document(id="b"), float("nan"))]) == {"doc_ids": ["a", "b"]}


def test_an_odd_document_costs_its_own_place() -> None:
    class Subject:
        pass

    gone = weakref.proxy(Subject())
    found = [DICTS[0], None, Hostile(), object(), (1, 2, 3), {}, gone, True, Document(), DICTS[1]]
    assert documents(found)["doc_ids"] == [
        *("a", "NoneType?", "Hostile?", "object?", "tuple?", "dict?", "ProxyType?", "bool?", "Document?", "b")
    ]
    assert documents(found)["scores"] == [0.9, *[None] * 8, 0.5]


def test_a_property_that_raises_is_not_there() -> None:
    class Lazy:
        text = "text"

        @property
        def id(self) -> str:
            raise RuntimeError("detached from its session")

    assert id_of(Lazy()) == hash_of("text")


def test_an_object_that_holds_itself_ends() -> None:
    found: dict[str, Any] = {}
    found["results"] = found["metadata"] = found
    assert documents(found) == {}


def test_the_first_thousand_documents_are_read_and_all_are_counted() -> None:
    class Many(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number, document in enumerate(super().__iter__()):
                assert number < 1000, "read too far"
                yield document

    many = Many({"id": number, "score": number} for number in range(1001))
    attributes = documents(many)
    assert attributes["doc_ids"] == [str(number) for number in range(1000)]
    assert len(attributes["scores"]) == 1000
    assert attributes["doc_count"] == 1001
    assert "doc_count" not in documents(many[:1000])


def test_columns_are_bounded_too() -> None:
    numbers = list(range(1001))
    scores = [0.5] * 1001
    bounded = {"doc_ids": [str(number) for number in numbers[:1000]], "scores": scores[:1000], "doc_count": 1001}
    assert documents({"ids": numbers, "scores": scores}) == bounded
    assert documents({"ids": [numbers[:500], numbers[500:]], "scores": [scores[:500], scores[500:]]}) == bounded
    assert documents((numbers, scores)) == bounded


def test_what_was_found_is_not_changed() -> None:
    found = {"hits": {"hits": [dict(hit) for hit in HITS]}}
    documents(found)
    assert found == {"hits": {"hits": HITS}}
    counted: collections.defaultdict[str, Any] = collections.defaultdict(list, id="a")
    documents([counted])
    assert counted == {"id": "a"}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids(),
    lambda children: (
        st.lists(children)
        | st.tuples(children, children)
        | st.dictionaries(st.sampled_from(["id", "ids", "score", "scores", "hits", "documents", "metadata"]), children)
    ),
    max_leaves=20,
)


@given(st.lists(anything))
def test_whatever_a_list_holds_every_document_has_an_id_and_scores_are_aligned(found: list[Any]) -> None:
    attributes = documents(found)
    assert len(attributes["doc_ids"]) == len(found)
    assert len(attributes.get("scores", found)) == len(found)
    assert all(type(identity) is str and identity for identity in attributes["doc_ids"])
    assert all(score is None or math.isfinite(score) for score in attributes.get("scores", ()))


def test_real_documents_of_langchain_are_read() -> None:
    langchain = pytest.importorskip("langchain_core.documents")
    first = langchain.Document(page_content="보험", metadata={"source": "a.pdf", "page": 3})
    second = langchain.Document(page_content="보험", id="b")
    third = langchain.Document(page_content="보험")
    assert documents([first, second, third]) == {"doc_ids": ["a.pdf#page=3", "b", hash_of("보험")]}
    assert documents([(second, np.float32(0.5)), (first, 0.25)])["scores"] == [0.5, 0.25]


def test_real_nodes_and_responses_of_llama_index_are_read() -> None:
    schema = pytest.importorskip("llama_index.core.schema")
    response = pytest.importorskip("llama_index.core.base.response.schema")
    stores = pytest.importorskip("llama_index.core.vector_stores")
    nodes = [schema.TextNode(text="보험", id_="a"), schema.TextNode(text="약관", id_="b")]
    scored = [schema.NodeWithScore(node=nodes[0], score=0.9), schema.NodeWithScore(node=nodes[1], score=0.5)]
    assert documents(nodes) == {"doc_ids": ["a", "b"]}
    assert documents(scored) == documents(response.Response("...", source_nodes=scored)) == TWO
    assert documents(stores.VectorStoreQueryResult(nodes=nodes, similarities=[0.9, 0.5], ids=["a", "b"])) == TWO
