"""
The same RAG request as a query engine of LlamaIndex, for the SDKs' instrumentations: a retriever and a model.

In:   an SDK, the stages' attributes.
Out:  a query. Model and retriever answer at once: what is left is LlamaIndex's own work, and the instrumentation's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from benchmarks.subjects import Subject
from benchmarks.workload import Attributes


class Index(BaseRetriever):
    """Finds the next request's ten documents."""

    def __init__(self, found: Iterator[Attributes]) -> None:
        super().__init__()
        self._found = found

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = next(self._found)
        return [
            NodeWithScore(node=TextNode(id_=doc_id, text=query_bundle.query_str), score=score)
            for doc_id, score in zip(found["doc_ids"], found["scores"], strict=True)
        ]


def llama_index_request(subject: Subject, attributes: Iterator[Attributes]) -> Callable[[], object]:
    """Return a query that the SDK records."""
    Settings.tokenizer = str.split  # its own is downloaded
    subject.instrument("llama_index")
    requests, others = itertools.tee(attributes)
    queries = (one["query"] for one in requests if "query" in one)
    found = (one for one in others if "top_k" in one)
    engine = RetrieverQueryEngine.from_args(Index(found), llm=MockLLM(max_tokens=20))
    return lambda: engine.query(next(queries))
