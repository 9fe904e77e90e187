"""
What a user writes, for type checkers: `tests/typing/test_types.py` runs them over this file.

A line that must be an error has an ignoring comment, and the checkers are told to complain of needless ones.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from typing_extensions import assert_type

import evalvault_sdk
from evalvault_sdk import (
    Call,
    ContextThreadPoolExecutor,
    FlushReport,
    FolderPayloadStore,
    StageContext,
    StageTracer,
    TraceContext,
    bind,
    documents,
    trace_headers,
)

tracer = StageTracer("run", personal_data=["email", "phone"], payload_store=FolderPayloadStore("/tmp/payloads"))
everything = StageTracer("run", personal_data="all", content="none", sample_rate=0.5, mask=lambda content: content)
StageTracer("run", personal_data=["e-mail"])  # type: ignore[list-item]
StageTracer("run", content="some")  # type: ignore[arg-type]


@tracer.stage("retrieval", capture_args=["query"], on_result=documents)
def retrieve(query: str, top_k: int = 5) -> list[str]:
    return [query] * top_k


@tracer.stage
def rerank(found: list[str]) -> list[str]:
    return found


@tracer.stage("output", attributes=lambda call: {"question": call["question"]}, capture_result=True)
async def answer(question: str) -> str:
    return question


@tracer.stage("output")
def stream(question: str) -> Generator[str, int, bool]:
    sent = yield question
    return sent > 0


@tracer.stage("output")
async def stream_later(question: str) -> AsyncIterator[str]:
    yield question


class Pipeline:
    @tracer.stage("method")
    def method(self, number: int) -> int:
        return number

    @tracer.stage("class")
    @classmethod
    def above(cls, number: int) -> Pipeline:
        return cls()

    @classmethod
    @tracer.stage("class")
    def below(cls, number: int) -> Pipeline:
        return cls()

    @tracer.stage("static")
    @staticmethod
    def static(number: int) -> int:
        return number

    @property
    @tracer.stage("property")
    def size(self) -> int:
        return 1


@evalvault_sdk.stage("prompt")
class Prompt:
    def __call__(self, text: str) -> str:
        return text


assert_type(retrieve("q"), list[str])
assert_type(rerank(["a"]), list[str])
assert_type(stream("q"), Generator[str, int, bool])
assert_type(stream_later("q"), AsyncIterator[str])
assert_type(Pipeline().method(1), int)
assert_type(Pipeline.above(1), Pipeline)
assert_type(Pipeline.below(1), Pipeline)
assert_type(Pipeline.static(1), int)
assert_type(Pipeline().size, int)
assert_type(Prompt()("text"), str)
retrieve(5)  # type: ignore[arg-type]
retrieve("q", topk=5)  # type: ignore[call-arg]
Pipeline().method("1")  # type: ignore[arg-type]


async def use() -> None:
    assert_type(await answer("q"), str)
    assert_type(await tracer.bind(answer)("q"), str)
    await answer(1)  # type: ignore[arg-type]
    async for token in stream_later("q"):
        assert_type(token, str)
    async with tracer.stage("request") as stage:
        assert_type(stage, StageContext)
    async with tracer.trace(session_id="s") as trace:
        assert_type(trace, TraceContext)


def more(call: Call) -> dict[str, Any]:
    return call.arguments


with tracer.trace(**trace_headers(), metadata={"a": 1}) as request, tracer.stage("x", attributes=more) as stage:
    assert_type(request.trace_id, str)
    assert_type(stage.stage_id, str | None)
    stage.set(a=1)
    stage.skip("nothing to do")
    tracer.record_stage("child", parent=stage)

assert_type(bind(retrieve)("q"), list[str])
with ContextThreadPoolExecutor() as pool:
    assert_type(pool.submit(retrieve, "q").result(), list[str])
    pool.submit(retrieve, 5)  # type: ignore[arg-type]
assert_type(evalvault_sdk.configure("run"), StageTracer)
assert_type(evalvault_sdk.flush(), FlushReport)
evalvault_sdk.configure("run", sampel_rate=1.0)  # type: ignore[call-arg]

typed: Callable[[str, int], list[str]] = retrieve
words: Iterator[str] = stream("q")
