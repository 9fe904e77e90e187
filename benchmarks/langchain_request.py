"""
The same RAG request as a chain of LangChain, for the SDKs' handlers: a retriever, a prompt, a model, a parser.

In:   an SDK, the stages' attributes.
Out:  a call of the chain. Model and retriever answer at once: what is left is LangChain's own work, and the handler's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough

from benchmarks.subjects import Subject
from benchmarks.workload import Attributes


class Index(BaseRetriever):
    """Finds the next request's ten documents."""

    found: Iterator[Attributes]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(id=doc_id, page_content=query, metadata={"id": doc_id, "score": score})
            for found in [next(self.found)]
            for doc_id, score in zip(found["doc_ids"], found["scores"], strict=True)
        ]


def langchain_request(subject: Subject, attributes: Iterator[Attributes]) -> Callable[[], object]:
    """Return a call of the chain with the SDK's handler."""
    callbacks = subject.instrument("langchain")
    requests, others = itertools.tee(attributes)
    queries = (one["query"] for one in requests if "query" in one)
    found = (one for one in others if "top_k" in one)
    prompt = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{question}")])
    chain: Any = (
        {"context": Index(found=found), "question": RunnablePassthrough()}
        | prompt
        | FakeListChatModel(responses=["청구 후 3일 안에 (within three days)"])
        | StrOutputParser()
    )
    return lambda: chain.invoke(next(queries), {"callbacks": callbacks})
