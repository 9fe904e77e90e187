"""
A RAG chain of LangChain, traced: questions about Python, answered from the standard library's docstrings.

A chain in LCEL: rewrite the question, retrieve with BM25, prompt, answer. Nothing in the chain knows of tracing; there
are two ways to record it, and both are shown in `main`:

* a handler, given to a call: `chain.invoke(question, config={"callbacks": [handler]})`;
* `instrument_langchain(tracer)`, once, for the whole program.

It needs neither network nor keys: the model is a small one of its own, which answers with the sentences
that fit best. Any other that LangChain knows takes its place, with `langchain` and its package (`langchain-openai`):
`RAG_MODEL=openai:gpt-4o-mini`.

Run it beside a server (`evalvault-sdk serve`)::

    pip install 'evalvault-sdk[langchain]' bm25s
    python langchain_example.py
    evalvault-sdk show langchain-example
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import bm25s
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough

from evalvault_sdk import StageTracer, Stats
from evalvault_sdk.integrations.langchain import EvalVaultCallbackHandler, instrument_langchain

MODULES = ["csv", "gzip", "heapq", "json", "pathlib", "re", "shutil", "statistics", "tempfile", "textwrap"]
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer from the passages only, and cite every passage you use.\n\n{passages}"),
        ("human", "{question}"),
    ]
)
_KOREAN_TERMS = {
    "파싱": "parse", "임시": "temporary", "파일": "file", "중앙값": "median", "평균": "mean", "압축": "compress",
    "정규식": "regular expression pattern", "검색": "search", "복사": "copy", "디렉터리": "directory tree",
}  # fmt: skip
_FILLER = frozenset({"a", "do", "for", "from", "how", "in", "is", "of", "the", "to", "what", "with"})
_WORD = re.compile(r"[a-z][a-z0-9]+")

#: Questions, and what should be found for them.
QUESTIONS = [
    ("How do I parse a JSON document from a string?", "json.loads"),
    ("How do I copy a directory tree recursively?", "shutil.copytree"),
    ("How do I compress data with gzip?", "gzip.compress"),
    ("How do I read CSV rows into a dict?", "csv.DictReader"),
    ("How do I find the largest elements of a dataset?", "heapq.nlargest"),
    ("How do I wrap a paragraph of text?", "textwrap.wrap"),
    ("JSON 문자열을 파싱하는 방법은?", "json.loads"),
    ("임시 파일은 어떻게 만드나요?", "tempfile.NamedTemporaryFile"),
    ("숫자의 중앙값을 구하는 함수는?", "statistics.median"),
    ("정규식 패턴으로 검색하려면?", "re.search"),
]


def docstrings() -> Iterator[Document]:
    """Yield the docstrings of some modules, each under the dotted name of what it documents."""
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if inspect.isroutine(value) or inspect.isclass(value) else None
            if text and str(getattr(value, "__module__", "")).startswith(name) and not member.startswith("_"):
                yield Document(page_content=text, metadata={"doc_id": f"{name}.{member}"})


class BM25Retriever(BaseRetriever):
    """The docstrings that fit a query best; none where no word of it occurs."""

    passages: list[Document]
    index: Any
    k: int = 4

    @classmethod
    def over(cls, passages: list[Document]) -> BM25Retriever:
        """Index these passages, with their names, which say a lot about them."""
        index = bm25s.BM25()
        texts = [f"{passage.metadata['doc_id'].replace('.', ' ')}\n{passage.page_content}" for passage in passages]
        index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
        return cls(passages=passages, index=index)

    def _get_relevant_documents(self, query: str, *, run_manager: Any = None) -> list[Document]:
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
        found, scores = self.index.retrieve(tokens, k=self.k, show_progress=False)
        return [
            Document(
                page_content=self.passages[place].page_content,
                metadata={**self.passages[place].metadata, "score": float(score)},
            )
            for place, score in zip(found[0], scores[0], strict=True)
            if score > 0
        ]


class ExtractiveModel(BaseChatModel):
    """A model that quotes: the two sentences of the passages that share most words with the question."""

    model: str = "extractive-1"
    temperature: float = 0.0

    @property
    def _llm_type(self) -> str:
        return "extractive"

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        system, question = str(messages[0].content), str(messages[-1].content)
        words = Counter(search_terms(question).split())
        sentences = []
        for source, passage in re.findall(r"<passage id=\"(.+?)\">(.*?)</passage>", system, flags=re.DOTALL):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\n", passage):
                overlap = sum((words & Counter(_WORD.findall(f"{source} {sentence}".lower()))).values())
                if overlap:
                    sentences.append((overlap / (1 + len(sentence) / 400), " ".join(sentence.split()), source))
        chosen = sorted(sentences, key=lambda entry: -entry[0])[:2]
        text = " ".join(f"{sentence} [{source}]" for _, sentence, source in chosen) or "The passages do not say."
        tokens_in, tokens_out = len(system.split()) + len(question.split()), len(text.split())
        answer = AIMessage(
            content=text,
            additional_kwargs={"citations": list(dict.fromkeys(source for _, _, source in chosen))},
            response_metadata={"finish_reason": "stop"},
            usage_metadata={
                "input_tokens": tokens_in,
                "output_tokens": tokens_out,
                "total_tokens": tokens_in + tokens_out,
            },
        )
        return ChatResult(generations=[ChatGeneration(message=answer)])


def search_terms(question: str) -> str:
    """Return the words of a question that say something, Korean terms in English."""
    known = [english for korean, english in _KOREAN_TERMS.items() if korean in question]
    return " ".join([*known, *(word for word in _WORD.findall(question.lower()) if word not in _FILLER)])


def format_passages(passages: list[Document]) -> str:
    """Return the passages as the prompt has them."""
    return "\n".join(f'<passage id="{doc.metadata["doc_id"]}">{doc.page_content}</passage>' for doc in passages)


def build_chain() -> Runnable[str, str]:
    """Return the chain. What a run is for can be said in its metadata, where LangChain cannot know it."""
    rewrite = RunnableLambda(search_terms).with_config(metadata={"evalvault_stage_type": "query_rewrite"})
    retriever = BM25Retriever.over(list(docstrings()))
    passages = rewrite | retriever | format_passages
    return {"passages": passages, "question": RunnablePassthrough()} | PROMPT | model() | StrOutputParser()


def model() -> BaseChatModel:
    """Return the model that `RAG_MODEL` names, or our own."""
    if name := os.environ.get("RAG_MODEL"):
        from langchain.chat_models import init_chat_model

        return init_chat_model(name)
    return ExtractiveModel()


def main(on_answer: Callable[[str, str], None] = lambda question, text: None) -> Stats:
    """Answer all questions, deliver what was recorded, and return what became of it."""
    # Address and token come from EVALVAULT_API_URL and EVALVAULT_API_TOKEN.
    tracer = StageTracer(run_id=os.environ.get("EVALVAULT_RUN_ID", "langchain-example"))
    chain = build_chain()

    # One way: a handler for a call. Metadata become metadata of the stages: what retrieval should find, for example.
    handler = EvalVaultCallbackHandler(tracer)
    for question, relevant in QUESTIONS[:6]:
        answer = chain.invoke(question, config={"callbacks": [handler], "metadata": {"relevant_doc_ids": [relevant]}})
        on_answer(question, answer)

    # The other way: for the whole program.
    with instrument_langchain(tracer):
        for question, relevant in QUESTIONS[6:]:
            on_answer(question, chain.invoke(question, config={"metadata": {"relevant_doc_ids": [relevant]}}))

    return tracer.shutdown(timeout=30)


if __name__ == "__main__":
    stats = main(lambda question, text: print(f"Q: {question}\nA: {text[:160]}\n"))
    print(stats)
    sys.exit(0 if stats.complete else 1)
