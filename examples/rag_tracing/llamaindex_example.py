"""
A RAG program on LlamaIndex, traced: questions about Python, answered from the standard library's docstrings.

A query engine (rewrite the question, retrieve with BM25, rerank, answer) and a chat that streams. Nothing in it knows
of tracing: `instrument_llama_index(tracer)` in `main` is all that there is to it.

It needs neither network nor keys: the model is a small one of its own, which answers with the sentences that fit best.
Any other of LlamaIndex's takes its place, by provider and name: `RAG_MODEL=ollama:qwen2.5` (with
`llama-index-llms-ollama`), `RAG_MODEL=openai:gpt-4o-mini` (with `llama-index-llms-openai`).

Run it beside a server (`evalvault-sdk serve`)::

    pip install 'evalvault-sdk[llama-index]' bm25s
    python llamaindex_example.py
    evalvault-sdk show llamaindex-example
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
from llama_index.core import ChatPromptTemplate
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse, LLMMetadata
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.indices.query.query_transform.base import BaseQueryTransform
from llama_index.core.llms import LLM, CustomLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from evalvault_sdk import StageTracer, Stats
from evalvault_sdk.integrations.llama_index import instrument_llama_index

MODULES = (
    *("csv", "gzip", "heapq", "json", "pathlib", "random"),
    *("re", "shutil", "statistics", "tempfile", "textwrap", "threading"),
)
SYSTEM_PROMPT = "Answer from the passages only, and cite every passage you use."
PROMPT = ChatPromptTemplate(
    [
        ChatMessage(role="system", content=SYSTEM_PROMPT),
        ChatMessage(role="user", content="{context_str}\n\nQuestion: {query_str}"),
    ]
)
TOP_K = 5
KEEP = 3
_KOREAN_TERMS = {
    "파싱": "parse", "임시": "temporary", "파일": "file", "디렉터리": "directory tree", "복사": "copy",
    "압축": "compress", "중앙값": "median", "평균": "mean", "무작위": "random", "검색": "search",
    "정규식": "regular expression pattern",
}  # fmt: skip
_FILLER = re.compile(r"\b(a|about|an|and|do|does|for|from|how|i|in|is|it|of|the|to|what|which|with)\b")
_WORD = re.compile(r"[a-z][a-z0-9]+")
_PASSAGE = re.compile(r"\[(\w+\.\w+)\] (.*?)(?=\n\n\[|\n\nQuestion: |\nuser: )", flags=re.DOTALL)

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
#: A conversation: the second question is understood from the first.
CONVERSATION = ["How do I compute the median of data?", "And the mean?"]


def docstrings() -> Iterator[TextNode]:
    """Yield the docstrings of some modules, each under the dotted name of what it documents."""
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if inspect.isroutine(value) or inspect.isclass(value) else None
            if text and str(getattr(value, "__module__", "")).startswith(name) and not member.startswith("_"):
                yield TextNode(id_=f"{name}.{member}", text=f"[{name}.{member}] {text}")


def search_terms(question: str) -> list[str]:
    """Return the words of a question that say something, Korean terms in English."""
    known = [word for korean, english in _KOREAN_TERMS.items() if korean in question for word in english.split()]
    return [*known, *_WORD.findall(_FILLER.sub(" ", question.lower()))]


class Glossary(BaseQueryTransform):
    """Rewrites a question as search terms in English."""

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: dict[str, Any]) -> None:
        pass

    def _run(self, query_bundle: QueryBundle, metadata: dict[str, Any]) -> QueryBundle:
        return QueryBundle(" ".join(search_terms(query_bundle.query_str)))


class BM25Retriever(BaseRetriever):
    """The docstrings that fit a query best; none where no word of it occurs."""

    def __init__(self, passages: list[TextNode], top_k: int = TOP_K) -> None:
        super().__init__()
        self.top_k = top_k
        self._passages = passages
        self._index = bm25s.BM25()
        # The dotted name is searched too: it says a lot about its passage.
        texts = [passage.text.replace(".", " ") for passage in passages]
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        tokens = bm25s.tokenize([query_bundle.query_str], stopwords="en", show_progress=False)
        found, scores = self._index.retrieve(tokens, k=self.top_k, show_progress=False)
        pairs = zip(found[0], scores[0], strict=True)
        return [NodeWithScore(node=self._passages[place], score=float(score)) for place, score in pairs if score > 0]


class WordCoverage(BaseNodePostprocessor):
    """Keeps the passages that have most of the query's words."""

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        words = set(search_terms(query_bundle.query_str)) if query_bundle is not None else set()

        def coverage(found: NodeWithScore) -> float:
            return len(words & set(_WORD.findall(found.text.lower()))) / max(1, len(words))

        scored = [NodeWithScore(node=found.node, score=coverage(found)) for found in nodes]
        return sorted(scored, key=lambda found: -(found.score or 0))[:KEEP]


class ExtractiveModel(CustomLLM):
    """A model that quotes: the two sentences of the passages that share most words with the question."""

    model: str = "extractive-1"
    temperature: float = 0.0

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex wants to know of a model."""
        return LLMMetadata(model_name=self.model, is_chat_model=True, context_window=32_000)

    def _answer(self, prompt: str) -> tuple[str, list[str]]:
        """Return the answer, and what it cites."""
        if "Follow Up Input: " in prompt:  # LlamaIndex asks for a question that is understood without the others
            return prompt.split("Follow Up Input: ")[-1].splitlines()[0], []
        question = re.split(r"Question: |user: ", prompt)[-1].split("\nassistant:")[0]
        words = Counter(search_terms(question))
        sentences = []
        for source, passage in re.findall(
            r"\[(\w+\.\w+)\] (.*?)(?=\n\n\[|\n\nQuestion: |\nuser: )", prompt, flags=re.DOTALL
        ):
            for sentence in re.split(r"(?<=[.!?])\s+|\n\n", passage):
                overlap = sum((words & Counter(_WORD.findall(f"{source} {sentence}".lower()))).values())
                if overlap:
                    sentences.append((overlap / (1 + len(sentence) / 400), " ".join(sentence.split()), source))
        chosen = sorted(sentences, key=lambda entry: -entry[0])[:2]
        text = " ".join(f"{sentence} [{source}]" for _, sentence, source in chosen) or "The passages do not say."
        return text, list(dict.fromkeys(source for _, _, source in chosen))

    def _response(self, prompt: str, text: str, citations: list[str], delta: str | None = None) -> CompletionResponse:
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        return CompletionResponse(
            text=text,
            delta=delta,
            raw={"usage": usage, "finish_reason": "stop"},
            additional_kwargs={"citations": citations} if citations else {},
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer at once."""
        return self._response(prompt, *self._answer(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Iterator[CompletionResponse]:
        """Answer word by word."""

        def words() -> Iterator[CompletionResponse]:
            answer, citations = self._answer(prompt)
            text = ""
            for word in re.findall(r"\S+\s*", answer):
                text += word
                yield self._response(prompt, text, citations, word)

        return words()


def model() -> LLM:
    """Return the model that `RAG_MODEL` names, or our own."""
    named = os.environ.get("RAG_MODEL")
    if not named:
        return ExtractiveModel()
    provider, _, name = named.partition(":")
    module = importlib.import_module(f"llama_index.llms.{provider}")
    chosen: Any = next(value for known, value in vars(module).items() if known.lower() == provider.replace("_", ""))
    return chosen(model=name)  # type: ignore[no-any-return]


def main(on_answer: Callable[[str, str], None] = lambda question, text: None) -> Stats:
    """Answer all questions, deliver what was recorded, and return what became of it."""
    # Address and token come from EVALVAULT_API_URL and EVALVAULT_API_TOKEN.
    tracer = StageTracer(run_id=os.environ.get("EVALVAULT_RUN_ID", "llamaindex-example"))
    instrument_llama_index(tracer)

    llm, retriever = model(), BM25Retriever(list(docstrings()))
    engine = TransformQueryEngine(
        RetrieverQueryEngine.from_args(
            retriever, llm=llm, text_qa_template=PROMPT, node_postprocessors=[WordCoverage()]
        ),
        Glossary(),
    )
    for question, relevant in QUESTIONS:
        with tracer.trace(metadata={"relevant_doc_ids": [relevant]}):  # what retrieval should find, for its precision
            on_answer(question, str(engine.query(question)))

    chat = CondensePlusContextChatEngine.from_defaults(
        retriever, llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=3000), system_prompt=SYSTEM_PROMPT
    )
    for question in CONVERSATION:
        with tracer.trace(session_id="session-1"):  # what several requests have in common
            on_answer(question, "".join(chat.stream_chat(question).response_gen))

    return tracer.shutdown(timeout=30)


if __name__ == "__main__":
    stats = main(lambda question, text: print(f"Q: {question}\nA: {text[:160]}\n"))
    print(stats)
    sys.exit(0 if stats.complete else 1)
