"""
A RAG service with FastAPI, traced: questions about Python's standard library, answered at once or as a stream.

Each request is one trace, its stages below `request`: what was asked, what was found, what was answered. A service
that calls this one with `traceparent` in its headers has its own trace go on here. On SIGTERM the server finishes its
requests, then the tracer delivers what they recorded, or keeps it on disk for the next process.

Run it beside a server (`evalvault-sdk serve`)::

    pip install 'evalvault-sdk[demo]'
    EVALVAULT_RUN_ID=rag-service uvicorn fastapi_service_example:app --port 8080
    curl -d '{"question": "How do I copy a directory tree?"}' -H 'Content-Type: application/json' localhost:8080/ask
    evalvault-sdk show rag-service

Where events go is said by the variables `EVALVAULT_API_URL`, `EVALVAULT_API_TOKEN` and so on. `LLM_API_URL` is the
address of a model with OpenAI's API, `http://localhost:11434/v1` for example; with it go `LLM_MODEL` and
`LLM_API_KEY`. Without it, sentences of the passages are the answer.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import bm25s
import requests
from fastapi import FastAPI, HTTPException, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from evalvault_sdk import StageTracer, current_stage, documents
from evalvault_sdk.integrations.asgi import EvalVaultMiddleware

TOP_K = 4
MODULES = ("csv", "fnmatch", "glob", "gzip", "html", "json", "random", "shutil", "statistics", "tempfile", "textwrap")
SYSTEM_PROMPT = "Answer from the passages only, and cite every passage you use, as in [json.loads]."

LLM_API_URL = os.environ.get("LLM_API_URL", "").rstrip("/")
LLM_MODEL = os.environ.get("LLM_MODEL", "gpt-4o-mini") if LLM_API_URL else "extractive-1"

tracer = StageTracer(run_id=os.environ.get("EVALVAULT_RUN_ID", "rag-service"))

# ---------------------------------------------------------------- the text, and its index


@dataclass(frozen=True)
class Passage:
    """One docstring, under the dotted name of what it documents."""

    id: str
    text: str


class Library:
    """The docstrings of some modules, and the BM25 index over them."""

    def __init__(self) -> None:
        self.passages = [passage for name in MODULES for passage in _docstrings(name)]
        self._index = bm25s.BM25()
        texts = [f"{passage.id.replace('.', ' ')}\n{passage.text}" for passage in self.passages]
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def search(self, query: str, top_k: int) -> list[tuple[Passage, float]]:
        """Return the best passages with their scores, best first; none where no word of the query occurs."""
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False)
        found, scores = self._index.retrieve(tokens, k=top_k, show_progress=False)
        pairs = zip(found[0], scores[0], strict=True)
        return [(self.passages[place], float(score)) for place, score in pairs if score > 0]


def _docstrings(name: str) -> Iterator[Passage]:
    module = importlib.import_module(name)
    for attribute, thing in [("", module), *vars(module).items()]:
        own = thing is module or ((inspect.isroutine(thing) or inspect.isclass(thing)) and thing.__module__ == name)
        if own and not attribute.startswith("_") and (text := inspect.getdoc(thing)):
            yield Passage(f"{name}.{attribute}".rstrip("."), text)


# ---------------------------------------------------------------- the stages


@tracer.stage("retrieval", stage_name="bm25", capture_args=["query", "top_k"], on_result=documents)
def retrieve(library: Library, query: str, top_k: int = TOP_K) -> list[tuple[Passage, float]]:
    """Return the passages for a question."""
    return library.search(query, top_k)


# A stream is one stage, from its first word to its last one, or to where the client left.
@tracer.stage("output", attributes={"model": LLM_MODEL}, on_result=lambda words: {"answer": "".join(words)})
def generate(question: str, passages: list[Passage]) -> Generator[str, None, None]:
    """Yield the answer piece by piece."""
    current_stage().set(citations=[passage.id for passage in passages])
    yield from _model(question, passages) if LLM_API_URL else _extract(question, passages)


def _extract(question: str, passages: list[Passage]) -> Iterator[str]:
    """Yield the two sentences that share most words with the question."""
    asked = Counter(re.findall(r"\w+", question.lower()))
    sentences = [
        (sum((asked & Counter(re.findall(r"\w+", sentence.lower()))).values()), f"{sentence} [{passage.id}]")
        for passage in passages
        for sentence in re.split(r"(?<=[.!?])\s+|\n\n", passage.text)
    ]
    best = sorted(sentences, key=lambda pair: -pair[0])[:2]
    words = " ".join(text for _, text in best).split() or ["The", "passages", "do", "not", "say."]
    prompt = " ".join([SYSTEM_PROMPT, question, *(passage.text for passage in passages)])
    current_stage().set(tokens_in=len(prompt.split()), tokens_out=len(words))
    yield words[0]
    yield from (f" {word}" for word in words[1:])


def _model(question: str, passages: list[Passage]) -> Iterator[str]:
    """Yield what the model says, as it says it (OpenAI's API, "Streaming")."""
    context = "\n\n".join(f"[{passage.id}]\n{passage.text}" for passage in passages)
    body = {
        "model": LLM_MODEL,
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"{context}\n\n{question}"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    key = os.environ.get("LLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # Leaving the block, as when the client has gone, closes the connection: the model need not go on.
    with requests.post(
        f"{LLM_API_URL}/chat/completions", json=body, headers=headers, stream=True, timeout=(5, 60)
    ) as response:
        response.raise_for_status()
        for line in response.iter_lines(chunk_size=1):  # a larger chunk would be waited for until it is full
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield from _said(json.loads(line.removeprefix(b"data: ")))


def _said(chunk: Mapping[str, Any]) -> Iterator[str]:
    if usage := chunk.get("usage"):
        current_stage().set(tokens_in=usage.get("prompt_tokens"), tokens_out=usage.get("completion_tokens"))
    for choice in chunk.get("choices", ()):
        if text := choice.get("delta", {}).get("content"):
            yield text


# ---------------------------------------------------------------- the service


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Build the index in the background; at the end deliver what was recorded."""
    app.state.library = None
    Thread(target=lambda: setattr(app.state, "library", Library()), daemon=True).start()
    yield
    # In a thread: requests that are still open may go on meanwhile.
    print(await run_in_threadpool(tracer.shutdown), flush=True)


app = FastAPI(title="Questions about the standard library", lifespan=lifespan)
app.add_middleware(
    EvalVaultMiddleware,
    tracer=tracer,
    request_stage=True,
    skip_paths=("/health", "/ready"),
    session_id=lambda scope: dict(scope["headers"]).get(b"x-session-id", b"").decode("latin-1") or None,
)


class Question(BaseModel):
    """What is asked."""

    question: str = Field(min_length=1, max_length=2_000)


def _find(asked: Question) -> list[Passage]:
    """Record what was asked, and return the passages for it."""
    library = app.state.library
    if library is None:
        raise HTTPException(503, "the index is being built", {"Retry-After": "1"})
    tracer.record_stage("system_prompt", attributes={"prompt_id": "cite-1", "prompt": SYSTEM_PROMPT})
    tracer.record_stage("input", attributes={"query": asked.question})
    return [passage for passage, _ in retrieve(library, asked.question)]


@app.post("/ask")
def ask(asked: Question) -> dict[str, Any]:
    """Answer at once."""
    passages = _find(asked)
    try:
        answer = "".join(generate(asked.question, passages))
    except requests.RequestException as error:
        raise HTTPException(502, "the model does not answer") from error
    return {"answer": answer, "passages": [passage.id for passage in passages]}


@app.post("/ask/stream")
def ask_as_stream(asked: Question) -> StreamingResponse:
    """Answer piece by piece."""
    return StreamingResponse(_closing(generate(asked.question, _find(asked))), media_type="text/plain; charset=utf-8")


async def _closing(stream: Generator[str, None, None]) -> AsyncIterator[str]:
    """Run a stream in threads, and end it with its client. Starlette leaves that to the garbage collector."""
    try:
        async for piece in iterate_in_threadpool(stream):
            yield piece
    finally:
        stream.close()


@app.get("/health")
def health() -> dict[str, str]:
    """Say that the process runs."""
    return {"status": "ok"}


@app.get("/ready")
def ready(response: Response) -> dict[str, Any]:
    """Say whether questions can be answered. That EvalVault cannot be reached is no reason to answer none."""
    is_ready = app.state.library is not None
    response.status_code = 200 if is_ready else 503
    stats = tracer.stats()
    return {"ready": is_ready, "stages": {"recorded": stats.recorded, "delivered": stats.delivered}}
